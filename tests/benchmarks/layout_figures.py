"""Prints how large the house is: rooms and arrows of each folder, the longest files and functions, the README.

    .venv/bin/python tests/benchmarks/layout_figures.py [ROOT]         ROOT: another checkout, to compare with

A room is what one sees on opening a folder: a file or a folder with modules. An arrow is an import from one room to
another of the same folder, at the top of a file or in a function; one is in a circle where a way leads back.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from imports import imported_names

FOLDERS = ("data", "models", "trainer", "launch", "deploy")


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules of the five folders."""
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports anywhere."""
    return {name.removeprefix("controlbooth.") for name in imported_names(path)} & modules.keys()


def in_circles(arrows: dict[str, set[str]]) -> int:
    """How many rooms can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(arrows[start])
        while waiting:
            room = waiting.pop()
            if room not in seen:
                seen.add(room)
                waiting += arrows.get(room, ())
        return seen

    return sum(room in reached(room) for room in arrows)


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2]
    modules = modules_of(root)
    print(f"{'folder':9} {'rooms':>5} {'arrows':>6} {'rooms in circles':>16} {'files':>5} {'lines':>6}  longest file")
    for folder in FOLDERS:
        own = {name: path for name, path in modules.items() if name.startswith(f"{folder}.")}
        arrows: dict[str, set[str]] = defaultdict(set)
        for name, path in own.items():
            room = name.split(".")[1]
            arrows[room] |= {other.split(".")[1] for other in imported(path, own)} - {room}
        lengths = {path: len(path.read_text().splitlines()) for path in own.values()}
        longest = max(lengths, key=lambda path: lengths[path])
        print(
            f"{folder:9} {len(arrows):5} {sum(map(len, arrows.values())):6} {in_circles(dict(arrows)):16} {len(own):5} "
            f"{sum(lengths.values()):6}  {longest.relative_to(root)} ({lengths[longest]})"
        )
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(root)}:{node.name}")
        for path in modules.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    print("longest functions: " + ", ".join(f"{name} ({lines})" for lines, name in sorted(functions, reverse=True)[:6]))
    print(f"README.md: {len((root / 'README.md').read_text().splitlines())} lines")


if __name__ == "__main__":
    main()
