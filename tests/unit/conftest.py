"""Tiny bases of every family, shared by all unit tests."""

import copy
from pathlib import Path

import pytest
from bases import write_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """Family name -> a folder that tests share: copy it before changing anything in it."""
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = write_base(tmp_path_factory.mktemp("bases") / family, family)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def loaded_bases():
    return {}


@pytest.fixture
def load_tiny(base_folder, loaded_bases):
    """Family name -> a Base that is the test's own."""
    from controlbooth.models.pretrained import load_base

    def load(family: str):
        if family not in loaded_bases:
            loaded_bases[family] = load_base(base_folder(family))
        return copy.deepcopy(loaded_bases[family])

    return load
