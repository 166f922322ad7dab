"""Real trainings of control-LoRAs on the tiny FLUX.1, on ranks of torchrun, through DeepSpeed."""

import shutil
from typing import Any

import bases
import forked
import numpy as np
import pytest
import tiny
import torch
from control_loras import (
    RATES,
    check_another_world_size,
    check_stages_in_bf16,
    check_stages_with_a_plain_process,
    check_two_kills,
    last_weights,
)
from diffusers import FluxControlPipeline
from trainings import finish, logged, run_file, start

from controlbooth.launch.commands import export as export_command
from controlbooth.models.pretrained import load_base, load_control_lora
from controlbooth.models.sampling import Control, sample


@pytest.fixture(scope="module")
def folder(world_folder, tmp_path_factory):
    """A folder with base/, train/ and held/ whose runs train control-LoRAs; runs go to runs/."""
    own = tmp_path_factory.mktemp("flux-control-lora")
    bases.write_base(own / "base", "flux")
    for name in ("train", "held"):
        shutil.copytree(world_folder / name, own / name)
    tiny.write_model(own, method="lora", rank=4, text_tokens=bases.T5_TOKENS)
    return own


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of an uninterrupted run of 8 steps on 2 ranks, with checkpoints at 4, 6 and 8."""
    said = finish(start(run_file(folder, "whole", max_steps=8, **RATES), 2))
    assert "of the base's (differences of rank 4 in the blocks" in said
    return folder / "runs" / "whole"


def test_zero_stages_0_to_3_on_two_ranks_have_the_losses_and_averages_of_one_plain_process(folder):
    average, weights = check_stages_with_a_plain_process(folder)
    assert average and all(name.endswith((".up", ".down")) for name in average)
    for stage, ours in weights.items():
        assert all(np.any(tensor) for name, tensor in ours.items()), f"ZeRO stage {stage}"


def test_in_bf16_all_stages_train_alike_and_keep_masters_that_are_not_rounded(folder):
    check_stages_in_bf16(folder, "transformer_blocks.0.attn.to_q.up")


def test_a_run_killed_twice_ends_with_bitwise_the_weights_of_an_uninterrupted_one(folder, whole):
    check_two_kills(folder, whole)
    assert set(logged(whole, "lora_learning_rate").values()) == {5e-3} and not logged(whole, "learning_rate")


def test_a_run_goes_on_at_another_world_size_with_the_same_losses_within_rounding(folder, whole):
    check_another_world_size(folder, whole)


def test_activations_that_are_recomputed_change_no_bit(folder, whole):
    finish(start(run_file(folder, "again", max_steps=8, model=dict(gradient_checkpointing=True), **RATES), 2))
    again = last_weights(folder / "runs" / "again")
    assert all(np.array_equal(again[name], tensor) for name, tensor in last_weights(whole).items())


def test_on_a_base_in_8_bits_it_is_trained_and_goes_on(folder):
    pytest.importorskip("torchao")
    model = dict(frozen=dict(precision="int8"))
    said = finish(
        start(run_file(folder, "packed", max_steps=4, model=model, engine=dict(precision="bf16"), **RATES), 2)
    )
    assert "frozen base: int8" in said
    path = run_file(folder, "packed", max_steps=6, model=model, engine=dict(precision="bf16"), **RATES)
    assert "at step 4" in finish(start(path, 2))
    losses = logged(folder / "runs" / "packed", "loss")
    assert len(losses) == 6 and all(np.isfinite(loss) for loss in losses.values())


def test_what_does_not_go_on_from_its_checkpoint_is_refused_and_a_new_run_takes_its_weights(folder, whole):
    before = str(whole / "checkpoints" / "step-00000008" / "controlnet")
    refused: Any = (
        ("whole", dict(rank=8), "was saved with model.rank 4, and this run has 8. Set it back, or"),
        ("full", dict(method="full", rank=32, controlnet=before), "has no whole form: go on with model.method=lora"),
        ("blocks", dict(copied_blocks=[2, 2]), "model.copied_blocks=[2, 2] does not go with model.method=lora"),
        ("shards", dict(frozen=dict(shards="world")), "model.frozen.shards=world does not go with model.method=lora"),
    )
    for name, model, message in refused:
        rates = {} if model.get("method") == "full" else RATES
        output, _ = (process := start(run_file(folder, name, max_steps=10, model=model, **rates), 1)).communicate(
            timeout=300
        )
        assert process.returncode and message in output, output[-2000:]
    finish(start(run_file(folder, "further", max_steps=2, model=dict(controlnet=before), **RATES), 1))
    further = tiny.weights(folder / "runs" / "further" / "checkpoints" / "step-00000002")
    assert further.keys() == last_weights(whole).keys()


def test_it_is_measured_and_sampled_by_the_same_commands(folder, whole, tmp_path):
    def call(*arguments):
        done = forked.run(1, ["-m", "controlbooth.launch.cli", *arguments], **forked.BEFORE_IMPORTS)
        assert done.returncode == 0, done.stderr[-3000:]

    call("evaluate", whole, "--samples", "4", "--steps", "2", "-o", tmp_path / "measured")
    assert (tmp_path / "measured" / "evaluation.json").is_file()
    call("sample", "--control", f"edges={whole}:0.8", "--data", folder / "held", "--steps", "2",
         "-o", tmp_path / "pictures")  # fmt: skip
    assert list((tmp_path / "pictures").glob("0*.png"))


def test_a_pipeline_of_diffusers_draws_what_a_run_draws_from_its_export(folder, whole):
    out = folder / "export"
    assert export_command.main([str(whole), str(out)]) == 0
    base = load_base(folder / "base", text_tokens=bases.T5_TOKENS)
    with torch.no_grad():  # a posterior so narrow that a draw from it is its mode, which is what we take of a condition
        base.vae.encoder.conv_out.weight[base.latent_channels :] = 0.0
        base.vae.encoder.conv_out.bias[base.latent_channels :] = -60.0
    pipeline = FluxControlPipeline.from_pretrained(folder / "base", vae=base.vae)
    pipeline.load_lora_weights(out)
    pipeline.set_progress_bar_config(disable=True)
    conditions = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = torch.randn(base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(5))[None]
    expected = pipeline(
        "a cat", control_image=2.0 * conditions - 1.0, height=64, width=64, num_inference_steps=3, guidance_scale=3.0,
        latents=pipeline._pack_latents(first, 1, base.latent_channels, 8, 8), max_sequence_length=bases.T5_TOKENS,
        output_type="np",
    ).images  # fmt: skip
    controlnet = load_control_lora(whole / "checkpoints" / "step-00000008" / "controlnet", base.denoiser, 4)
    ours = sample(base, ["a cat"], [Control(controlnet, conditions)], seeds=[5], steps=3, guidance_scale=3.0)
    assert (ours - 255 * torch.from_numpy(expected)).abs().max() < 0.5 + 1e-3  # equal before they are rounded
    assert not torch.equal(ours, sample(base, ["a cat"], seeds=[5], steps=3, guidance_scale=3.0, picture_size=(64, 64)))
