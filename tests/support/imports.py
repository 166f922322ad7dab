"""Reads the imports of the code, for the tests of the architecture, its figures and its drawing."""

import ast
from pathlib import Path


def imported_names(path: Path) -> set[str]:
    """Names that a file imports, at its top or in its functions: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: write the import with its whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names
