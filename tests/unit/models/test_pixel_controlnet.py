"""ControlNets of SD3's class that read the pixels of a condition."""

import shutil
from typing import Any

import pytest
import torch
from bases import T5_TOKENS
from inputs import steps_moving

from controlbooth.models.denoisers import flux, sd3
from controlbooth.models.denoisers.pixel_controlnet import PixelSD3ControlNet
from controlbooth.models.denoisers.registry import (
    control_residuals,
    denoise,
    encode_condition,
    parameter_report,
    predict,
)
from controlbooth.models.denoisers.transformer_copy import fixed_tensors
from controlbooth.models.families import FAMILIES, identify
from controlbooth.models.pretrained import load_base, load_controlnet, save_controlnet
from controlbooth.models.recognition import recognise_folder
from controlbooth.models.sampling import Control, sample
from controlbooth.models.text import encode_prompts
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.controlnet.build import new_controlnet
from controlbooth.trainer.export import base_like

SIZE, WIDTHS = 32, (4, 8, 8, 16)


@pytest.fixture(params=["sd3", "miniature-dit"])
def base(request, base_folder):
    return load_base(base_folder(request.param), text_tokens=T5_TOKENS)


def pixel_controlnet(base) -> Any:
    torch.manual_seed(0)
    return sd3.build_controlnet(base.denoiser, (2,), hint_channels=WIDTHS)


def moved(controlnet):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return controlnet


def batch(base, controlnet):
    """Returns noisy latents, times, text and the encoded condition of two samples."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, base.latent_channels, SIZE // 8, SIZE // 8, generator=draw)
    conditions = torch.rand(2, 3, SIZE, SIZE, generator=draw)
    encoded = encode_condition(base, controlnet, conditions)
    assert encoded is conditions
    return latents, torch.tensor([250.0, 800.0]), encode_prompts(base, ["a cat", "red dog"]), encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_one_changes_nothing_bit_for_bit(base, dtype):
    for module in (base.denoiser, base.vae, *base.text_encoders):
        module.to(dtype)
    controlnet = pixel_controlnet(base).to(dtype)
    latents, times, text, condition = batch(base, controlnet)
    without = denoise(base.denoiser, latents, times, text)
    assert torch.equal(predict(base.denoiser, controlnet, latents, times, text, condition), without)
    again = moved(controlnet)
    assert not torch.equal(predict(base.denoiser, again, latents, times, text, condition), without)


def test_all_but_the_hint_network_is_the_ordinary_copy_and_tokens_lie_as_the_latents_do(base):
    controlnet, plain = pixel_controlnet(base), sd3.build_controlnet(base.denoiser, (2,))
    ours = {name: one for name, one in controlnet.state_dict().items() if not name.startswith(sd3.ENTRY)}
    theirs = {name: one for name, one in plain.state_dict().items() if not name.startswith(sd3.ENTRY)}
    assert ours.keys() == theirs.keys() and all(torch.equal(one, theirs[name]) for name, one in ours.items())
    moved(controlnet)
    condition = torch.zeros(1, 3, SIZE, 2 * SIZE)
    tokens = controlnet.pos_embed_input(condition)
    rows = SIZE // base.pixel_multiple
    assert tokens.shape == (1, rows * 2 * rows, controlnet.inner_dim)
    condition[..., -1, -1] = 1.0
    changed = (controlnet.pos_embed_input(condition) != tokens).any(dim=2)[0].view(rows, 2 * rows)
    assert changed[-1, -1] and not changed[0].any() and not changed[:, :rows].any()


def test_a_sparse_condition_reaches_the_last_layer_at_the_size_it_had(base):
    hint = pixel_controlnet(base).pos_embed_input
    lines = (torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    seen = {}
    hint.conv_out.register_forward_hook(lambda module, inputs, output: seen.update(variance=inputs[0].square().mean()))
    hint(lines)
    assert 0.03 < seen["variance"] < 3.0


def test_every_tensor_learns_after_two_steps_and_only_what_was_zero_after_one(base):
    controlnet = pixel_controlnet(base)
    latents, times, text, condition = batch(base, controlnet)
    arguments = (base.denoiser, controlnet, latents, times, text, condition)
    first, _, last = steps_moving(controlnet, lambda: predict(*arguments))
    assert first and all(name.startswith(sd3.ZERO) for name in first)
    assert last == {name for name, _ in controlnet.named_parameters()}


def test_it_is_saved_and_read_again_and_continues_as_the_same(base, tmp_path):
    controlnet = moved(pixel_controlnet(base))
    save_controlnet(controlnet, tmp_path)
    again = load_controlnet(tmp_path, base.denoiser)
    assert isinstance(again, PixelSD3ControlNet) and tuple(again.config["hint_channels"]) == WIDTHS
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in controlnet.state_dict().items())
    assert set(dict(again.named_parameters())) == set(dict(controlnet.named_parameters()))
    assert set(fixed_tensors(again)) == set(fixed_tensors(controlnet))
    assert parameter_report(again).hint == sum(one.numel() for one in again.pos_embed_input.parameters())
    arguments = batch(base, again)
    ours, theirs = (control_residuals(one, *arguments).each() for one in (again, controlnet))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    checkpointed = load_controlnet(tmp_path, base.denoiser)
    checkpointed.enable_gradient_checkpointing()
    assert all(map(torch.equal, control_residuals(checkpointed, *arguments).each(), ours))
    assert identify(base_like(again)) == base.family


def test_pictures_follow_its_condition_and_the_hint_network_runs_once_for_all_steps(base):
    controlnet, runs = moved(pixel_controlnet(base)), []
    controlnet.pos_embed_input.conv_in.register_forward_hook(lambda *_: runs.append(1))
    options: dict[str, Any] = dict(seeds=[1], steps=3, guidance_scale=2.0)
    dark = sample(base, ["a cat"], [Control(controlnet, torch.zeros(1, 3, SIZE, SIZE))], **options)
    assert len(runs) == 1
    bright = sample(base, ["a cat"], [Control(controlnet, torch.ones(1, 3, SIZE, SIZE))], **options)
    assert not torch.equal(dark, bright)


def test_a_condition_of_another_size_and_widths_that_miss_the_latents_are_refused(base):
    controlnet = pixel_controlnet(base)
    latents, times, text, condition = batch(base, controlnet)
    with pytest.raises(ValueError, match="the condition is 32x16 pixels, but latents of 4x4 need 32x32"):
        control_residuals(controlnet, latents, times, text, condition[..., :16])
    with pytest.raises(ValueError, match="halves the condition picture 2 times.*give four widths"):
        sd3.build_controlnet(base.denoiser, (2,), hint_channels=(4, 8, 8))


def run(**model):
    data = {"shards": "a", "condition": "canny", "held_out": "h"}
    sizes = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return build_config({"name": "n", "model": {"base": "b", **model}, "data": data, **sizes})


def test_a_run_chooses_it_for_sd3_and_is_told_where_it_has_no_place(base, load_tiny):
    sd, dev, unet = FAMILIES["sd3"], FAMILIES["flux"], FAMILIES["sd15"]
    pixels = run(condition_entry="pixels", hint_channels=[4, 8, 8, 16], copied_blocks=[2]).model
    made = new_controlnet(base.denoiser, pixels)
    unsaid = type(new_controlnet(base.denoiser, run().model)).__name__
    assert unsaid == ("SD3ControlNetModel" if base.family.name == "sd3" else "PixelSD3ControlNet")
    assert isinstance(made, PixelSD3ControlNet) and tuple(made.config["hint_channels"]) == (4, 8, 8, 16)
    latents = run(condition_entry="latents").model
    assert type(new_controlnet(base.denoiser, latents)).__name__ == "SD3ControlNetModel"
    assert misplaced(run(condition_entry="pixels", hint_channels=[4, 8, 8, 16]), sd) == []
    assert misplaced(run(condition_entry="latents"), sd) == misplaced(run(condition_entry="latents"), dev) == []
    (told,) = misplaced(run(hint_channels=[4, 8, 8, 16]), sd)
    assert told.startswith("model.hint_channels=[4, 8, 8, 16] is for a U-Net") and "leave it out" in told
    (told,) = misplaced(run(condition_entry="pixels"), dev)
    assert told.startswith("model.condition_entry=pixels is for SD3, and conditions of FLUX.1-dev come in as latents")
    (told,) = misplaced(run(condition_entry="pixels"), unet)
    assert told.startswith("model.condition_entry=pixels is for a base of flow matching") and "leave it out" in told
    with pytest.raises(ValueError, match="condition_entry=pixels is for Stable Diffusion 3"):
        flux.build_controlnet(load_tiny("flux").denoiser, hint_channels=(4, 8, 8, 16))


def test_the_miniature_with_a_transformer_is_told_from_sd3_and_reads_one_text_encoder(base_folder, tmp_path, load_tiny):
    folder = shutil.copytree(base_folder("miniature-dit"), tmp_path / "base")
    assert recognise_folder(folder).name == "miniature-dit" and recognise_folder(base_folder("sd3")).name == "sd3"
    base = load_tiny("miniature-dit")
    text = encode_prompts(base, ["a cat", ""])
    ids = base.tokenizers[0](["a cat", ""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        read = base.text_encoders[0](ids)
    assert torch.equal(text.encoder_hidden_states, read.last_hidden_state)
    assert torch.equal(text.added_cond_kwargs["pooled_projections"], read.pooler_output)
    assert text.added_cond_kwargs.keys() == {"pooled_projections"} and base.text_tokens == 0
    assert base.process.shift(torch.Size((4, 4))) == 1.0 and base.pixel_multiple == 8
    (told,) = misplaced(run(text_tokens=20), base.family)
    assert told.startswith("model.text_tokens=20 is for a base with T5 (SD3, FLUX.1), and the base is the miniature")
    (told,) = misplaced(run(t5=False), base.family)
    assert told.startswith("model.t5=False is for a base with T5 as its third text encoder")
    assert misplaced(run(condition_entry="latents"), base.family) == []
    (folder / "text_encoder_2").mkdir()
    assert recognise_folder(folder).name == "sd3"


def test_guidance_draws_the_miniature_with_a_transformer_away_from_the_empty_prompt(load_tiny):
    base = load_tiny("miniature-dit")
    options: dict[str, Any] = dict(seeds=[1], steps=2, picture_size=(SIZE, SIZE))
    plain, guided = (sample(base, ["a cat"], guidance_scale=scale, **options) for scale in (1.0, 4.0))
    assert plain.shape == (1, SIZE, SIZE, 3) and not torch.equal(plain, guided)
