import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/; runs go to runs/."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


@pytest.fixture(scope="session")
def studio(world_folder, tmp_path_factory) -> Path:
    """A folder of its own with the tiny base/ and subjects.yaml, six subjects with three pictures each."""
    import studios

    folder = tmp_path_factory.mktemp("studio")  # else its runs would meet those of ControlNets under the same names
    shutil.copytree(world_folder / "base", folder / "base")
    studios.write_subjects(folder)
    return folder
