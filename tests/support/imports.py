"""Reads the imports of the code, for the tests of the architecture, its figures and its drawing."""

import ast
from functools import cache
from pathlib import Path


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Returns all nodes of a file's syntax tree, which is read once in a process."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Names that a file imports, at its top or in its functions: modules, and what is taken from them."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: write the import with its whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return frozenset(names)
