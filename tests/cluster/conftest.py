from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Two nodes under a real Slurm."""
    from two_nodes import Slurm, why_not

    if missing := why_not():
        pytest.skip(missing)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def world(tmp_path_factory, slurm) -> Path:
    """A folder with base/, train/ and held/; runs go to runs/."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder
