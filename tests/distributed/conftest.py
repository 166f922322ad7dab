import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # worker.py, a program, and these tests share tiny.py


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/; runs go to runs/."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


@pytest.fixture(scope="session")
def studio(world_folder) -> Path:
    """A manifest of six subjects with three pictures each, beside the tiny base."""
    import studios

    studios.write_subjects(world_folder)
    return world_folder
