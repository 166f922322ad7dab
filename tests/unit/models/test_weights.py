"""Weights that are written can be read by whoever the umask lets read."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.files.weights import save_weights
from controlbooth.models.pretrained import save_controlnet, save_single_file


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_weights_file_has_the_mode_of_any_new_file(umask, tmp_path):
    save_weights({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "a.safetensors")
    assert mode(tmp_path / "a.safetensors") == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(6.0).view(2, 3).T)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_file_of_a_saved_controlnet_has_the_mode_that_the_umask_says(umask, load_tiny, tmp_path):
    controlnet = build_controlnet(load_tiny("sd15").denoiser)
    save_controlnet(controlnet, tmp_path / "folder")
    save_single_file(controlnet, tmp_path / "single.safetensors")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert {mode(path) for path in written} == {0o666 & ~umask}
