"""Real trainings of ControlNets on tiny bases of flow matching, on ranks of torchrun, through DeepSpeed."""

import json
import shutil
from typing import Any

import bases
import diffusers
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from trainings import finish, finish_after_two_kills, logged, run_file, start

from controlbooth.launch.commands import export as export_command
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.models.sampling import Control, sample

BLOCKS = {"sd3": [2], "flux": [2, 2]}
PIPELINES: dict[str, Any] = {
    "sd3": (diffusers.StableDiffusion3ControlNetPipeline, diffusers.SD3ControlNetModel),
    "flux": (diffusers.FluxControlNetPipeline, diffusers.FluxControlNetModel),
}


@pytest.fixture(scope="module", params=bases.TRANSFORMER_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, world_folder, tmp_path_factory):
    """A folder with base/ of the family, train/ and held/; runs go to runs/."""
    own = tmp_path_factory.mktemp(family)
    bases.write_base(own / "base", family)
    for name in ("train", "held"):
        shutil.copytree(world_folder / name, own / name)
    tiny.write_model(own, copied_blocks=BLOCKS[family], text_tokens=bases.T5_TOKENS)
    return own


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of an uninterrupted run of 8 steps on 2 ranks, with checkpoints at 4, 6 and 8."""
    finish(start(run_file(folder, "whole", max_steps=8), 2))
    return folder / "runs" / "whole"


def last_weights(run):
    return tiny.weights(run / "checkpoints" / "step-00000008")


def test_zero_stages_0_to_3_on_two_ranks_have_the_losses_and_averages_of_one_plain_process(folder):
    plain = tiny.torchrun(1, "plain", folder)["losses"]
    losses = tiny.torchrun(2, "stages", folder, "fp32")
    average = load_file(folder / "plain-average.safetensors")
    assert len(plain) == 6 and plain[0] != plain[1]
    for stage, curve in losses.items():
        np.testing.assert_allclose(curve, plain, rtol=2e-7, err_msg=f"ZeRO stage {stage}")
        ours = tiny.weights(folder / "runs" / f"stage-{stage}-fp32" / "checkpoints" / "step-00000006")
        for name, tensor in average.items():
            np.testing.assert_allclose(ours[name], tensor, atol=2e-5, err_msg=f"ZeRO stage {stage}: {name}")
        unmoved = [name for name in average if not np.any(ours[name] != load_base_tensor(folder, name))]
        assert not unmoved, f"ZeRO stage {stage}"


def load_base_tensor(folder, name):
    """A tensor of the base's, or zeros where the ControlNet begins with these."""
    weights = load_file(folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    return weights.get(name, np.float32(0.0))


def test_a_run_killed_twice_ends_with_bitwise_the_weights_of_an_uninterrupted_one(folder, whole):
    path, killed = run_file(folder, "killed", max_steps=8), folder / "runs" / "killed"
    finish_after_two_kills(path, killed, seed=6)
    assert logged(killed, "loss") == logged(whole, "loss")
    assert all(np.array_equal(last_weights(killed)[name], tensor) for name, tensor in last_weights(whole).items())


def test_a_run_goes_on_at_another_world_size_with_the_same_losses_within_rounding(folder, whole):
    moved = folder / "runs" / "moved"
    shutil.copytree(whole, moved)
    for step in (6, 8):
        shutil.rmtree(moved / "checkpoints" / f"step-{step:08d}")
    assert "at step 4" in finish(start(run_file(folder, "moved", max_steps=8), 1))
    after, before = logged(moved, "loss"), logged(whole, "loss")
    np.testing.assert_allclose([after[s] for s in range(5, 9)], [before[s] for s in range(5, 9)], rtol=2e-6)
    for name, tensor in last_weights(whole).items():
        np.testing.assert_allclose(last_weights(moved)[name], tensor, atol=2e-5, err_msg=name)


def test_an_export_is_loaded_by_the_pipeline_of_diffusers_and_draws_the_pictures_that_we_draw(folder, family, whole):
    out = folder / "export"
    assert export_command.main([str(whole), str(out)]) == 0
    card = (out / "README.md").read_text()
    pipeline_class, network_class = PIPELINES[family]
    assert pipeline_class.__name__ in card and f"max_sequence_length={bases.T5_TOKENS}" in card
    assert json.loads((out / "config.json").read_text()).get("force_zeros_for_pooled_projection", False) is False
    base = load_base(folder / "base", text_tokens=bases.T5_TOKENS)
    with torch.no_grad():  # a posterior so narrow that a draw from it is its mode, which is what we take of a condition
        base.vae.encoder.conv_out.weight[base.latent_channels :] = 0.0
        base.vae.encoder.conv_out.bias[base.latent_channels :] = -60.0
    controlnet = network_class.from_pretrained(out, local_files_only=True)
    pipeline = pipeline_class.from_pretrained(folder / "base", controlnet=controlnet, vae=base.vae)
    pipeline.set_progress_bar_config(disable=True)
    conditions = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = torch.randn(base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(5))[None]
    packed = first if family == "sd3" else pipeline_class._pack_latents(first, 1, base.latent_channels, 8, 8)
    expected = pipeline(
        "a cat", control_image=2.0 * conditions - 1.0, height=64, width=64, num_inference_steps=3, guidance_scale=3.0,
        latents=packed, max_sequence_length=bases.T5_TOKENS, output_type="np",
    ).images  # fmt: skip
    control = Control(load_controlnet(out, base.denoiser), conditions)
    ours = sample(base, ["a cat"], [control], seeds=[5], steps=3, guidance_scale=3.0)
    assert (ours - 255 * torch.from_numpy(expected)).abs().max() < 0.5 + 1e-3  # equal before they are rounded


def test_settings_of_the_other_world_are_refused_before_a_folder_is_taken(folder):
    for changes, message in (
        (dict(optimizer=dict(min_snr_gamma=5.0)), "optimizer.min_snr_gamma=5.0 is for a U-Net"),
        (dict(data=dict(resolution=72)), "data.resolution=72 is not a multiple of 16"),
        (dict(model=dict(copied_blocks=[3, 3, 3])), "model.copied_blocks is"),
    ):
        process = start(run_file(folder, "refused", **changes), 1)
        output, _ = process.communicate(timeout=300)
        assert process.returncode and message in output, output[-2000:]
        assert not (folder / "runs" / "refused").exists()


def test_a_controlnet_that_reads_pixels_is_trained_gone_on_with_and_exported(world_folder, tmp_path):
    bases.write_base(tmp_path / "base", "miniature-dit")
    for name in ("train", "held"):
        shutil.copytree(world_folder / name, tmp_path / name)
    tiny.write_model(tmp_path, hint_channels=[8, 8, 8, 8])
    finish(start(run_file(tmp_path, "whole"), 2))
    whole, parted = tmp_path / "runs" / "whole", tmp_path / "runs" / "parted"
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    assert "going on from" in finish(start(run_file(tmp_path, "parted"), 2))
    weights, again = (tiny.weights(run / "checkpoints" / "step-00000006") for run in (whole, parted))
    assert all(np.array_equal(again[name], tensor) for name, tensor in weights.items())
    assert any(np.any(tensor) for name, tensor in weights.items() if name.startswith("pos_embed_input.conv_out."))
    assert export_command.main([str(whole), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "PixelSD3ControlNet"
    assert "from controlbooth.models.sampling import Control, sample" in (tmp_path / "out" / "README.md").read_text()
