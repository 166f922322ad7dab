"""ControlNets of other makers, as diffusers' own classes make and save them: pictures against diffusers' pipelines."""

from typing import Any

import pytest
import torch
from bases import FLUX, SD3, T5_TOKENS, sharp
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)

from controlbooth.models.denoisers import flux
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.models.sampling import Control, sample
from controlbooth.models.unlocked_decoder import load_networks
from controlbooth.trainer.evaluation.sample import open_controls

SIZE = 32
SD3_COPY = {name: SD3[name] for name in SD3 if name != "dual_attention_layers"} | dict(num_layers=2)
STABILITY = SD3_COPY | dict(
    joint_attention_dim=None, caption_projection_dim=2048, pos_embed_max_size=None, pos_embed_type=None,
    use_pos_embed=False, qk_norm=None, force_zeros_for_pooled_projection=False,
)  # fmt: skip
FLUX_COPY = FLUX | dict(num_layers=2, num_single_layers=2)
XLABS = FLUX_COPY | dict(num_layers=3, num_single_layers=0, conditioning_embedding_channels=4, patch_size=2)
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    # name -> class, settings, what the pipeline is told, kind of condition
    "union, depth": (FluxControlNetModel, FLUX_COPY | dict(num_mode=7), dict(control_mode=2), "depth"),
    "union, canny": (FluxControlNetModel, FLUX_COPY | dict(num_mode=10), dict(control_mode=0), "canny_random"),
    "XLabs": (FluxControlNetModel, XLABS, {}, "depth"),
    "XLabs, with single blocks": (FluxControlNetModel, XLABS | dict(num_single_layers=2), {}, "depth"),
    "FLUX.1 untold of guidance": (FluxControlNetModel, FLUX_COPY | dict(guidance_embeds=False), {}, "depth"),
    "Stability's, depth": (SD3ControlNetModel, STABILITY, {}, "depth"),
    "Stability's, canny": (SD3ControlNetModel, STABILITY, {}, "canny"),
    "SD3 with zeros for the pooled text": (SD3ControlNetModel, SD3_COPY, {}, "depth"),
    "SD3 without positions": (
        SD3ControlNetModel, SD3_COPY | dict(pos_embed_type=None, pos_embed_max_size=None), {}, "depth"
    ),
}  # fmt: skip
PIPELINES: dict[Any, Any] = {
    FluxControlNetModel: FluxControlNetPipeline,
    SD3ControlNetModel: StableDiffusion3ControlNetPipeline,
}


def written(folder, kind, settings):
    """A ControlNet of tiny random weights, none of them zero, written by diffusers."""
    torch.manual_seed(1)
    controlnet = kind(**settings)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5)
    controlnet.save_pretrained(folder)
    return folder


def base_for(kind, base_folder):
    base = load_base(base_folder("flux" if kind is FluxControlNetModel else "sd3"), text_tokens=T5_TOKENS)
    sharp(base.vae)
    return base


@pytest.mark.parametrize("name", KINDS)
def test_pictures_with_a_controlnet_of_another_maker_equal_those_of_diffusers_pipeline(name, base_folder, tmp_path):
    kind, settings, told, condition = KINDS[name]
    base = base_for(kind, base_folder)
    written(tmp_path, kind, settings)
    theirs = kind.from_pretrained(tmp_path, local_files_only=True)
    pipeline = PIPELINES[kind].from_pretrained(base_folder(base.family.name), controlnet=theirs, vae=base.vae)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    conditions = torch.rand(2, 3, SIZE, SIZE, generator=draw)
    prompts, seeds = ["a cat", "red dog"], [5, 6]
    first = torch.stack(
        [torch.randn(base.latent_channels, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    # Tensors go into the VAE as they are; of lines, the model card of Stability's makes what its authors' code makes.
    given = 127.5 * conditions + 0.5 if name == "Stability's, canny" else 2.0 * conditions - 1.0
    expected = pipeline(
        prompts, control_image=given, height=SIZE, width=SIZE, num_inference_steps=3, guidance_scale=4.0,
        latents=flux.pack(first) if kind is FluxControlNetModel else first, max_sequence_length=T5_TOKENS,
        controlnet_conditioning_scale=0.8, control_guidance_end=0.7, output_type="np", **told,
    ).images  # fmt: skip
    _, networks = open_controls({condition: tmp_path}, base)
    options: dict[str, Any] = dict(seeds=seeds, steps=3, guidance_scale=4.0)
    ours = sample(base, prompts, [Control(networks[condition], conditions, scale=0.8, end=0.7)], **options)
    # Before rounding: where a tensor lies in memory decides on last bits, and a value may lie on the border of two.
    assert (ours - 255 * torch.from_numpy(expected)).abs().max() < 0.5 + 1e-2
    plain = sample(base, prompts, picture_size=(SIZE, SIZE), **options)
    other = sample(base, prompts, [Control(networks[condition], 1.0 - conditions, scale=0.8, end=0.7)], **options)
    assert (plain.int() - ours.int()).abs().max() > 2 and (other.int() - ours.int()).abs().max() > 0


def test_a_unions_kinds_differ_and_one_that_it_does_not_know_is_refused(base_folder, tmp_path):
    written(tmp_path, FluxControlNetModel, FLUX_COPY | dict(num_mode=4))
    base = base_for(FluxControlNetModel, base_folder)
    conditions = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    pictures = {}
    for kind in ("canny", "computed:canny", "blur"):
        _, controlnet = load_networks(tmp_path, base, kind=kind)
        pictures[kind] = sample(
            base, ["a cat"], [Control(controlnet, conditions)], seeds=[1], steps=2, guidance_scale=1
        )
    assert torch.equal(pictures["canny"], pictures["computed:canny"])
    assert not torch.equal(pictures["canny"], pictures["blur"])
    for kind in ("edges", "pose"):  # the second is one of others' unions, which have more kinds
        with pytest.raises(
            ValueError, match=f"a union, and '{kind}' is none of .*: canny, tile, depth, blur. Name the"
        ):
            load_networks(tmp_path, base, kind=kind)
    _, untold = load_networks(tmp_path, base)
    with pytest.raises(ValueError, match="a union wants to know the kind of its conditions"):
        sample(base, ["a cat"], [Control(untold, conditions)], seeds=[1], steps=1, guidance_scale=1)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            FluxControlNetModel,
            FLUX_COPY | dict(num_mode=7),
            "is a union of several kinds of control: it can be sampled",
        ),
        (FluxControlNetModel, XLABS, "is of XLabs' kind, which reads pixels: it can be sampled with and measured"),
        (SD3ControlNetModel, STABILITY, "is one of Stability's for SD3.5-large, without text: it can be sampled"),
        (SD3ControlNetModel, SD3_COPY | dict(extra_conditioning_channels=1), "takes 1 more channels .* for inpainting"),
        (FluxControlNetModel, XLABS | dict(patch_size=1), "gives 4 numbers a token, patch_size 1 .* in_channels is 16"),
    ],
)
def test_training_does_not_go_on_from_a_controlnet_of_such_a_kind(kind, settings, message, base_folder, tmp_path):
    written(tmp_path, kind, settings)
    base = base_for(kind, base_folder)
    with pytest.raises(ValueError, match=message):
        load_controlnet(tmp_path, base.denoiser)


def test_controlnets_that_add_to_other_blocks_are_not_added_up(base_folder, tmp_path):
    base = base_for(FluxControlNetModel, base_folder)
    folders = {
        "depth": written(tmp_path / "depth", FluxControlNetModel, FLUX_COPY | dict(num_mode=7)),
        "blur": written(tmp_path / "blur", FluxControlNetModel, XLABS),
    }
    _, networks = open_controls(folders, base)
    controls = [Control(one, torch.rand(1, 3, SIZE, SIZE)) for one in networks.values()]
    with pytest.raises(
        ValueError, match=r"cannot be added up: they have \[2, 2\] and \[3, 0\]. Use them one at a time"
    ):
        sample(base, ["a cat"], controls, seeds=[1], steps=1, guidance_scale=1.0)


def test_a_controlnet_without_positions_has_its_bases_in_its_own_precision(base_folder, tmp_path):
    written(tmp_path, SD3ControlNetModel, STABILITY)
    base = base_for(SD3ControlNetModel, base_folder)
    _, controlnet = load_networks(tmp_path, base, torch.bfloat16)
    assert controlnet.pos_embed.proj.weight.dtype == torch.bfloat16
    assert controlnet.pos_embed.proj is not base.denoiser.pos_embed.proj
    for name, tensor in base.denoiser.pos_embed.state_dict().items():
        assert torch.equal(controlnet.pos_embed.state_dict()[name], tensor.bfloat16())
