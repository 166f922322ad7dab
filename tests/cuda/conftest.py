"""Tests that need a GPU; elsewhere they are skipped. All ranks of one: what more ranks do is tested on CPUs."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here; these tests are for machines with one"))


@pytest.fixture(scope="session")
def world():
    from controlbooth.trainer.engine.distributed import join, leave

    yield join()
    leave()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/; runs go to runs/."""
    import tiny

    folder = tmp_path_factory.mktemp("cuda")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder
