from dataclasses import replace

import pytest
import torch
from inputs import batch

from controlbooth.models.denoisers.registry import control_residuals, parameter_report, predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.denoisers.variants import VariantControlNet
from controlbooth.models.pretrained import load_controlnet, save_controlnet, save_single_file
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError

PAPER = dict(hint_network="paper", hint_channels=(16, 32, 64, 128))
VARIANTS = [dict(trainable_copy="lite"), PAPER, PAPER | dict(trainable_copy="lite")]


def moved(controlnet, base, steps=3):
    """Trained for a few steps; returns the losses."""
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        latents, timesteps, text, conditioning = batch(base)
        loss = predict(base.denoiser, controlnet, latents, timesteps, text, conditioning).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", VARIANTS, ids=("lite", "paper hint", "both"))
def test_a_variant_has_the_residuals_of_a_controlnet_starts_without_effect_and_learns(load_tiny, options):
    tiny_base = load_tiny("sd15")
    controlnet = build_controlnet(tiny_base.denoiser, **options)
    arguments = batch(tiny_base)
    ours = control_residuals(controlnet, *arguments)
    theirs = control_residuals(build_controlnet(tiny_base.denoiser), *arguments)
    assert [one.shape for one in ours.each()] == [one.shape for one in theirs.each()]
    assert not any(one.any() for one in ours.each())
    losses = moved(controlnet, tiny_base)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", VARIANTS, ids=("lite", "paper hint", "both"))
def test_a_variant_is_read_again_from_its_folder(load_tiny, options, tmp_path):
    tiny_base = load_tiny("sd15")
    controlnet = build_controlnet(tiny_base.denoiser, **options)
    moved(controlnet, tiny_base)
    save_controlnet(controlnet, tmp_path)
    again = load_controlnet(tmp_path, tiny_base.denoiser)
    assert isinstance(again, VariantControlNet)
    arguments = batch(tiny_base)
    assert torch.equal(
        control_residuals(again, *arguments).each()[-1], control_residuals(controlnet, *arguments).each()[-1]
    )
    with pytest.raises(ValueError, match="no names in the original layout"):
        save_single_file(again, tmp_path / "one.safetensors")


def test_lite_is_small_and_does_not_read_the_prompt(load_tiny):
    tiny_base = load_tiny("sd15")
    lite = build_controlnet(tiny_base.denoiser, trainable_copy="lite", connections="gaussian")
    assert parameter_report(lite).copy < parameter_report(build_controlnet(tiny_base.denoiser)).copy / 3
    latents, timesteps, text, conditioning = batch(tiny_base)
    other = replace(text, encoder_hidden_states=text.encoder_hidden_states + 1.0)
    one = control_residuals(lite, latents, timesteps, text, conditioning)
    two = control_residuals(lite, latents, timesteps, other, conditioning)
    assert one.each()[-1].any() and torch.equal(one.each()[-1], two.each()[-1])


def test_gaussian_connections_disturb_the_base_from_the_first_step(load_tiny):
    tiny_base = load_tiny("sd15")
    arguments = batch(tiny_base)
    latents, timesteps, text, conditioning = arguments
    gaussian = build_controlnet(tiny_base.denoiser, connections="gaussian")
    plain = predict(tiny_base.denoiser, None, latents, timesteps, text, None)
    with torch.no_grad():
        disturbed = predict(tiny_base.denoiser, gaussian, latents, timesteps, text, conditioning)
    assert (disturbed - plain).square().mean() > 0.01 * plain.square().mean()


def test_only_mid_control_learns_through_the_middle_block_alone(load_tiny):
    tiny_base = load_tiny("sd15")
    controlnet = build_controlnet(tiny_base.denoiser, only_mid_control=True)
    start = {name: value.clone() for name, value in controlnet.state_dict().items()}
    moved(controlnet, tiny_base)
    residuals = control_residuals(controlnet, *batch(tiny_base))
    assert residuals.each()[-1].any() and not any(one.any() for one in residuals.each()[:-1])
    changed = {name for name, value in controlnet.state_dict().items() if not torch.equal(value, start[name])}
    assert "controlnet_mid_block.weight" in changed and any(name.startswith("down_blocks.") for name in changed)
    with pytest.raises(ValueError, match="still zero"):
        build_controlnet(tiny_base.denoiser, connections="gaussian", only_mid_control=True)


def test_how_a_controlnet_starts_is_not_asked_of_one_that_has_started():
    tree = dict(name="x", max_steps=1, global_batch_size=1, micro_batch_size=1)
    tree |= dict(data=dict(shards="s", condition="edges"), model=dict(base="b", controlnet="c", trainable_copy="lite"))
    with pytest.raises(ConfigError, match="model.trainable_copy=lite is how a new ControlNet starts"):
        build_config(tree)
