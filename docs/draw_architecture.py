"""Draws docs/concepts/architecture.svg from the imports of the code: `python docs/draw_architecture.py`.

A box is a folder of modules. An arrow leads from a folder to one that it imports, and those that follow from others are
left out. tests/unit/test_docs.py says when the drawing no longer shows the code.
"""

import sys
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from imports import imported_names

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "concepts" / "architecture.svg"
PACKAGES = {  # from above to below, with what each is for
    "deploy": "retraining by itself",
    "launch": "starts work, on this machine or a cluster",
    "trainer": "config in, weights out",
    "data": "which sample, and what it looks like",
    "models": "networks and their weights",
}
ROWS = (("deploy",), ("launch",), ("trainer",), ("data", "models"))
BOX, BOX_HEIGHT, ROW = 96, 32, 44
GAP, MARGIN, HEAD = 34, 20, 38
LONGEST_PITCH = 190
WIDE, NARROW = 1098, 196

Graph = dict[str, set[str]]
Place = tuple[float, float, float, float]
"""Left, top, width and height of a package, in pixels."""


def folder_of(path: Path) -> str | None:
    """Returns the folder below a package that a file is of: trainer/run; None for files of the package itself."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if len(parts) > 2 else None


def module_file(name: str) -> Path | None:
    """Finds the file of a name that is imported, which may be a module or something in one."""
    parts = name.split(".")[1:]
    while len(parts) > 1:
        path = ROOT.joinpath(*parts).with_suffix(".py")
        if path.exists():
            return path
        parts = parts[:-1]
    return None


def imported(path: Path) -> Iterable[Path]:
    """Finds the files of this project that a file imports, at its top or in its functions."""
    names = sorted(name for name in imported_names(path) if name.startswith("controlbooth."))
    return [file for name in names if (file := module_file(name)) is not None]


def read_imports() -> tuple[Graph, Graph]:
    """Returns which folders import which inside a package, and which packages import which."""
    folders: Graph = {}
    packages: Graph = {package: set() for package in PACKAGES}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            own = folder_of(path)
            if own is not None:
                folders.setdefault(own, set())
            for other in imported(path):
                other_package = other.relative_to(ROOT).parts[0]
                other_folder = folder_of(other)
                if other_package != package:
                    packages[package].add(other_package)
                elif own and other_folder and own != other_folder:
                    folders[own].add(other_folder)
    return folders, packages


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Returns all that a folder imports, directly or through others."""
    found: set[str] = set()
    left = [start]
    while left:
        for other in graph.get(left.pop(), ()):
            if other not in found:
                found.add(other)
                left.append(other)
    return found


def columns_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sorts folders into columns, each of which imports from those after it alone; those of a circle share one."""
    circles = {
        one: frozenset({one} | {o for o in reachable(graph, one) if one in reachable(graph, o)}) for one in graph
    }
    known: dict[frozenset[str], int] = {}

    def floor(circle: frozenset[str]) -> int:
        if circle not in known:
            below = {circles[other] for one in circle for other in graph[one]} - {circle}
            known[circle] = max((floor(one) + 1 for one in below), default=0)
        return known[circle]

    level = {one: floor(circles[one]) for one in graph}
    return [sorted(one for one in graph if level[one] == at) for at in range(max(level.values(), default=-1), -1, -1)]


def arrows(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that do not follow from others."""
    return sorted(
        (one, other)
        for one, others in graph.items()
        for other in others
        if not any(other in reachable(graph, third) for third in others - {other} if one not in reachable(graph, third))
    )


def draw() -> str:
    """Returns the drawing as SVG."""
    folders, packages = read_imports()
    shapes: list[str] = []
    places: dict[str, Place] = {}
    top: float = MARGIN
    for row in ROWS:
        graphs = {package: {k: v for k, v in folders.items() if k.startswith(f"{package}/")} for package in row}
        most = max(len(names) for graph in graphs.values() for names in columns_of(graph) or [[""]])
        height, left = HEAD + MARGIN / 2 + most * ROW, float(MARGIN)
        for package in row:
            width = WIDE if len(row) == 1 else NARROW if package == row[-1] else WIDE - NARROW - GAP
            places[package] = (left, top, width, height)
            shapes += panel(package, places[package]) + inside(graphs[package], places[package])
            left += width + GAP
        top += height + 30
    between = [
        straight(places[one], places[other])
        for one, others in packages.items()
        for other in sorted(others)
        if not any(other in reachable(packages, third) for third in others - {other})
    ]
    size = f'width="{WIDE + 2 * MARGIN}" height="{top - 8:g}" viewBox="0 0 {WIDE + 2 * MARGIN} {top - 8:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img">',
            "<title>The folders of the code, and which imports which</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#475569"/></marker></defs>',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *between,
            *shapes,
            "</svg>\n",
        ]
    )


def panel(package: str, place: Place) -> list[str]:
    """Draws the frame of a package, and its title."""
    x, y, width, height = place
    lone = sorted(path.stem for path in (ROOT / package).glob("[a-z]*.py"))
    told = ", ".join(lone) if len(lone) <= 6 else ""
    title = f'<text x="{x + 14:g}" y="{y + 25:g}" font-size="17" font-weight="bold" fill="#0f172a">{package}/</text>'
    said = f'<text x="{x + 20 + 10 * len(package):g}" y="{y + 25:g}" font-size="13" fill="#475569">'
    lines = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="#f1f5f9" stroke="#cbd5e1"/>'
    ]
    if width < WIDE / 2:
        lines += [
            title,
            f'<text x="{x + 14:g}" y="{y + 48:g}" font-size="13" fill="#475569">{PACKAGES[package]}</text>',
        ]
        return lines
    beside = f"{PACKAGES[package]}" + (f"; beside the folders: {told}" if told else "")
    return [*lines, title, f"{said}{escape(beside)}</text>"]


def inside(graph: Graph, place: Place) -> list[str]:
    """Draws the folders of a package, those that import others to the left of them, and the arrows between them."""
    x, y, width, height = place
    columns = columns_of(graph)
    if not columns:
        return []
    pitch = min(LONGEST_PITCH, (width - 2 * MARGIN - BOX) / max(1, len(columns) - 1))
    left: dict[str, float] = {}
    middle: dict[str, float] = {}
    for number, names in reversed([*enumerate(columns)]):  # the rightmost first: others stand beside what they import
        beside = {name: [middle[one] for one in graph[name] if one in middle] for name in names}
        names = sorted(names, key=lambda name: (sum(beside[name]) / max(1, len(beside[name])), name))
        for row, name in enumerate(names):
            left[name] = x + MARGIN + number * pitch
            middle[name] = y + HEAD + (height - HEAD - MARGIN / 2) / 2 + (row - (len(names) - 1) / 2) * ROW
    lines = []
    for one, other in arrows(graph):
        x1, y1, x2, y2 = left[one] + BOX, middle[one], left[other] - 2, middle[other]
        bend = (x2 - x1) * 0.5
        lines.append(
            f'<path d="M{x1:.0f} {y1:.0f} C{x1 + bend:.0f} {y1:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" stroke="#64748b" stroke-width="1.3" marker-end="url(#head)"/>'
        )
    boxes = [
        f'<rect x="{left[name]:.0f}" y="{middle[name] - BOX_HEIGHT / 2:.0f}" width="{BOX}" height="{BOX_HEIGHT}" '
        f'rx="5" fill="#ffffff" stroke="#3f51b5"/><text x="{left[name] + BOX / 2:.0f}" y="{middle[name] + 5:.0f}" '
        f'font-size="13.5" text-anchor="middle" fill="#1e293b">{escape(name.partition("/")[2])}</text>'
        for name in sorted(graph)
    ]
    return [*lines, *boxes]


def straight(one: Place, other: Place) -> str:
    """Draws an arrow from one package to the one below it, or beside it on the left."""
    if one[1] == other[1]:
        y = one[1] + one[3] / 2
        return (
            f'<path d="M{one[0]:.0f} {y:.0f} L{other[0] + other[2] + 3:.0f} {y:.0f}" stroke="#475569" stroke-width="3" '
            'marker-end="url(#head)"/>'
        )
    x = (max(one[0], other[0]) + min(one[0] + one[2], other[0] + other[2])) / 2
    return (
        f'<path d="M{x:.0f} {one[1] + one[3]:.0f} L{x:.0f} {other[1] - 3:.0f}" stroke="#475569" stroke-width="3" '
        'marker-end="url(#head)"/>'
    )


if __name__ == "__main__":
    TARGET.write_text(draw())
    print(TARGET.relative_to(ROOT))
