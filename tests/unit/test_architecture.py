"""Imports point downwards only, ranks and collectives have one home, and starting a command is instant."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import imported_names, nodes

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "models", "trainer", "launch", "deploy")
DIRECTIONS = {  # folder -> room -> the rooms of this folder that it may import, with all that those may
    "data": {
        "arguments": ("condition_names",),
        "condition_names": ("errors",),
        "errors": (),
        "secrets": (),
        "files": ("errors",),
        "processes": ("errors",),
        "order": ("errors",),
        "pages": (),
        "pictures": ("arguments", "condition_names", "order", "files"),
        "scenes": ("pictures",),
        "shards": ("pictures", "processes", "secrets"),
        "conditions": ("shards",),
        "loading": ("conditions",),
        "packing": ("loading", "scenes"),
        "inspection": ("loading", "pages"),
        "layouts": ("packing",),
    },
    "models": {
        "architectures": (),
        "attention": (),
        "recomputing": (),
        "blocks": (),
        "quantized": ("blocks",),
        "control_schedules": (),
        "lora": ("quantized",),
        "lora_files": ("base",),
        "files": (),
        "families": ("architectures",),
        "noise": ("families", "files"),
        "base": ("noise",),
        "text": ("base",),
        "identity": ("families",),
        "single_files": ("base", "lora"),
        "recognition": ("single_files",),
        "denoisers": ("text", "lora"),
        "pretrained": ("denoisers", "identity", "recognition"),
        "sampling": ("denoisers", "control_schedules", "identity"),
        "unlocked_decoder": ("pretrained",),
    },
    "trainer": {
        "markdown": (),
        "config": (),
        "engine": ("config",),
        "encoding": ("config",),
        "losses": (),
        "run": ("engine",),
        "tracking": ("run", "markdown"),
        "evaluation": ("tracking",),
        "dreambooth": ("evaluation", "encoding", "losses"),
        "controlnet": ("evaluation", "encoding", "losses"),
        "study": ("dreambooth",),
        "model_card": ("evaluation",),
        "export": ("model_card",),
        "planning": ("controlnet", "dreambooth"),
        "miniature": ("evaluation",),
        "imports": ("config",),
    },
    "launch": {
        "ranks": (),
        "job": ("ranks",),
        "engines": ("job",),
        "preflight": ("engines",),
        "progress": ("job",),
        "serving": (),
        "watch": ("progress", "serving"),
        "mirror": ("watch",),
        "commands": ("preflight", "mirror"),
        "submit": ("commands",),
        "follow": ("submit", "progress"),
        "cli": ("ranks",),
    },
    "deploy": {"retrain": ()},
}
"""The architecture. A room is a folder or a file; each stands below those that name it."""
BELOW = {"data": (), "models": ("data",), "trainer": ("models",), "launch": ("trainer",), "deploy": ("launch",)}
"""Folder -> the folders that it may import, with all that those may."""
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def module_name(path: Path) -> str:
    return ".".join(("controlbooth", *path.relative_to(ROOT).with_suffix("").parts))


MODULES = {module_name(path): path for path in FILES if path.name != "__init__.py"}


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or in its functions."""
    return {name for name in imported_names(path) if name in MODULES and name != module_name(path)}


def reachable(directions: dict[str, tuple[str, ...]], start: str) -> set[str]:
    return {start}.union(*(reachable(directions, below) for below in directions.get(start, ())))


@EVERY_FILE
def test_imports_point_downwards(path):
    folder, room = path.relative_to(ROOT).with_suffix("").parts[:2]
    for name in imported_names(path):
        assert name.split(".")[0] not in FOLDERS, f"write controlbooth.{name}: the bare name loads the file twice"
    if room == "__init__":
        return
    for name in imported_modules(path):
        other, theirs = name.split(".")[1:3]
        if other != folder:
            assert other in reachable(BELOW, folder), f"{folder}/ may not import {name}"
        elif folder in DIRECTIONS:
            allowed = reachable(DIRECTIONS[folder], room)
            assert theirs in allowed, f"{folder}/{room} may not import {name}; of {folder}/ it may: {sorted(allowed)}"


@EVERY_FILE
def test_docstrings_of_functions_begin_with_a_verb(path):
    """In the third person, as in "Returns": what a function is for is the first thing that its reader asks."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            first = text.split()[0].rstrip(",")
            assert re.fullmatch("[A-Z][a-z]+s", first), f"{path}:{node.lineno} {node.name}: begins with {first!r}"


def test_the_directions_name_every_room_and_nothing_else():
    for folder, rooms in DIRECTIONS.items():
        there = {path.relative_to(ROOT / folder).with_suffix("").parts[0] for path in (ROOT / folder).rglob("*.py")}
        assert there - {"__init__"} == set(rooms)
        assert list(graphlib.TopologicalSorter(rooms).static_order()), "a circle of rooms raises CycleError"


def test_no_modules_import_each_other_in_a_circle():
    """At their tops or in their functions: a late import that hides a circle is one too."""
    graph = {name: imported_modules(path) for name, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_torch_distributed_is_used_in_one_module():
    """Checkpoints may use it as well, for what DeepSpeed and torch offer only there."""
    users = set()
    for path in FILES:
        attributes = {
            f"{node.value.id}.{node.attr}"
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        names = imported_names(path) | attributes
        if any(starts_with(name, package) for name in names for package in ("torch.distributed", "deepspeed.comm")):
            users.add(str(path.relative_to(ROOT)))
    assert users <= {"trainer/engine/distributed.py", "trainer/run/checkpoint.py"}


def test_weights_are_written_in_one_module():
    """Which gives the files the mode that the umask says; safetensors leaves them readable by their owner alone."""
    writers = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in nodes(path)
        if (isinstance(node, ast.Attribute) and node.attr in ("save_file", "serialize_file"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name == "save_file" for alias in node.names))
    }
    assert writers == {"models/files/weights.py"}


def test_a_package_file_is_a_docstring_and_nothing_else():
    """But that of models, which must come before whatever imports diffusers: it keeps start-up lines out."""
    for path in FILES:
        if path.name == "__init__.py" and path.parent.name != "models":
            tree = ast.parse(path.read_text())
            assert len(tree.body) == 1 and ast.get_docstring(tree), path


def test_every_folder_with_modules_is_a_package():
    """One without __init__.py would be missing from a wheel, without a word."""
    assert [path.parent for path in FILES if not (path.parent / "__init__.py").exists()] == []


def test_no_module_has_a_name_that_says_nothing():
    empty = {"utils", "common", "helpers", "helper", "util", "manager", "misc", "base_utils"}
    assert [path for path in FILES if path.stem in empty] == []


HEAVY = ("torch", "diffusers", "transformers", "deepspeed", "mlflow", "numpy")


def modules_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_importing_launch_never_imports_torch():
    """All of its modules, in one process that imports nothing else."""
    modules = [name for name in MODULES if starts_with(name, "controlbooth.launch")]
    program = "import importlib\nfor name in {!r}: importlib.import_module(name)"
    assert modules_after(program.format(modules)).isdisjoint(HEAVY)


def test_help_needs_the_standard_library_only():
    statement = "from controlbooth.launch.cli import main; main(['--help'])"
    assert modules_after(statement).isdisjoint({*HEAVY, "pydantic", "yaml", "psutil"})


def test_help_of_every_verb_and_slips_of_the_finger_are_told_before_torch_is_imported():
    program = f"""
import sys
from controlbooth.launch.cli import TABLE, main
for verb in TABLE:
    for word in ("--help", "--no-such-option"):
        main([*verb.split(), word])
        if heavy := [name for name in {HEAVY[:-1]} if name in sys.modules]:
            sys.exit(f"controlbooth {{verb}} {{word}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_the_config_is_free_of_torch():
    assert modules_after("import controlbooth.trainer.config.run").isdisjoint(HEAVY)


def test_errors_that_people_read_are_of_one_kind():
    """So that the command knows by the type what to show without a traceback."""
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                where = f"{path}, line {node.lineno}: raise UserError or MissingFile of data/errors.py"
                assert node.exc.func.id not in ("ValueError", "FileNotFoundError", "FileExistsError"), where
