"""Imports point downwards only, ranks and collectives have one home, and starting a command is instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {  # folder -> what it may import besides itself
    "data": (),
    "models": (),
    "trainer": ("controlbooth.data", "controlbooth.models"),
    "launch": (
        "controlbooth.data.arguments",
        "controlbooth.data.condition_sizes",
        "controlbooth.data.long_captions",
        "controlbooth.data.readable",
        "controlbooth.data.parent",
        "controlbooth.data.secrets",
        "controlbooth.models.recognition",
        "controlbooth.models.weight_files",
        "controlbooth.data.locks",
        "controlbooth.data.records",
        "controlbooth.trainer.config",
        "controlbooth.trainer.continuing",
        "controlbooth.trainer.evaluate.verdict",
        "controlbooth.trainer.file_kinds",
        "controlbooth.trainer.mlflow_address",
        "controlbooth.trainer.network_check",
        "controlbooth.trainer.starting",
        "controlbooth.trainer.subjects",
        "controlbooth.trainer.words",
    ),
    "deploy": (
        "controlbooth.data.arguments",
        "controlbooth.data.parent",
        "controlbooth.data.locks",
        "controlbooth.data.records",
        "controlbooth.launch",
        "controlbooth.models",
        "controlbooth.trainer",
    ),
}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(path: Path) -> set[str]:
    """Names that a file imports, at its top or in its functions: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: write the import with its whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@EVERY_FILE
def test_imports_point_downwards(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = (f"controlbooth.{folder}", *MAY_IMPORT[folder])
    for name in imports(path):
        assert name.split(".")[0] not in MAY_IMPORT, f"write controlbooth.{name}: the bare name loads the file twice"
        # `from controlbooth.trainer import config` names controlbooth.trainer too, which is an empty package
        if starts_with(name, "controlbooth") and not any(starts_with(package, name) for package in allowed):
            assert any(starts_with(name, package) for package in allowed), (
                f"{folder}/ may not import {name}; it may import {', '.join(allowed)}"
            )


def test_torch_distributed_is_used_in_one_module():
    """Checkpoints may use it as well, for what DeepSpeed and torch offer only there."""
    users = set()
    for path in FILES:
        attributes = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        names = imports(path) | attributes
        if any(starts_with(name, package) for name in names for package in ("torch.distributed", "deepspeed.comm")):
            users.add(str(path.relative_to(ROOT)))
    assert users <= {"trainer/distributed.py", "trainer/checkpoint.py"}


def test_weights_are_written_in_one_module():
    """Which gives the files the mode that the umask says; safetensors leaves them readable by their owner alone."""
    writers = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("save_file", "serialize_file"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name == "save_file" for alias in node.names))
    }
    assert writers == {"models/weights.py"}


def test_a_package_file_is_a_docstring_and_nothing_else():
    for path in FILES:
        if path.name == "__init__.py":
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


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py")))
def test_launch_never_imports_torch(module):
    assert modules_after(f"import controlbooth.launch.{module}").isdisjoint(HEAVY)


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
    assert modules_after("import controlbooth.trainer.config").isdisjoint(HEAVY)
