"""Bases of flow matching and their ControlNets: tiny random ones, against diffusers' own pipelines and classes."""

import copy
from typing import Any

import pytest
import torch
from bases import SD3, T5_TOKENS, TRANSFORMER_FAMILIES, sharp
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
)
from inputs import steps_moving

from controlbooth.models.denoisers import flux, sd3
from controlbooth.models.denoisers.registry import (
    control_residuals,
    denoise,
    encode_condition,
    parameter_report,
    predict,
)
from controlbooth.models.denoisers.transformer_copy import fixed_tensors, used_but_last, used_evenly
from controlbooth.models.pretrained import load_base, load_controlnet, read_controlnet_folder, save_controlnet
from controlbooth.models.recomputing import blocks_by_grid, recompute
from controlbooth.models.sampling import Control, sample
from controlbooth.models.text import TEXT_ENCODINGS, encode_prompts

SIZE = 32
BLOCKS = {"sd3": (2,), "flux": (2, 2)}
FILES: dict[str, Any] = {"sd3": sd3, "flux": flux}
PIPELINES: dict[str, Any] = {"sd3": StableDiffusion3ControlNetPipeline, "flux": FluxControlNetPipeline}
NETWORKS: dict[str, Any] = {"sd3": SD3ControlNetModel, "flux": FluxControlNetModel}


def new_controlnet(base, blocks=None):
    name = base.family.name
    return FILES[name].build_controlnet(base.denoiser, blocks or BLOCKS[name])


def trained_controlnet(base, seed=1):
    """Returns one that is moved away from zero everywhere."""
    controlnet, draw = new_controlnet(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return controlnet


def batch(base, controlnet=None):
    """Returns noisy latents, times, text and the encoded condition of two samples."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, base.latent_channels, SIZE // 8, SIZE // 8, generator=draw)
    text = encode_prompts(base, ["a cat", "red dog"])
    conditions = torch.rand(2, 3, SIZE, SIZE, generator=draw)
    encoded = None if controlnet is None else encode_condition(base, controlnet, conditions)
    return latents, torch.tensor([250.0, 800.0]), text, encoded


@pytest.fixture(params=TRANSFORMER_FAMILIES)
def base(request, base_folder):
    """As it is read, and no copy of it: where a tensor lies in memory decides on its last bits."""
    return load_base(base_folder(request.param), text_tokens=T5_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_controlnet_changes_nothing_bit_for_bit(base, dtype):
    for module in (base.denoiser, base.vae, *base.text_encoders):
        module.to(dtype)
    controlnet = new_controlnet(base).to(dtype)
    latents, times, text, condition = batch(base, controlnet)
    without = denoise(base.denoiser, latents, times, text)
    assert torch.equal(predict(base.denoiser, controlnet, latents, times, text, condition), without)
    moved = trained_controlnet(base).to(dtype)
    assert not torch.equal(predict(base.denoiser, moved, latents, times, text, condition), without)


def test_all_that_is_copied_is_the_bases_and_the_bases_configuration_stays(base):
    before = dict(base.denoiser.config)
    controlnet = new_controlnet(base)
    theirs = base.denoiser.state_dict()
    zero = FILES[base.family.name].ZERO + FILES[base.family.name].ENTRY
    for name, tensor in controlnet.state_dict().items():
        if name.startswith(zero):
            assert not tensor.any(), name
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert dict(base.denoiser.config) == before
    assert controlnet.config.get("force_zeros_for_pooled_projection", False) is False


def test_the_copied_blocks_compute_what_the_bases_compute(base):
    controlnet = new_controlnet(base)
    latents, times, text, _ = batch(base)
    condition = torch.zeros_like(encode_condition(base, controlnet, torch.zeros(2, 3, SIZE, SIZE)))
    seen: dict[str, Any] = {}
    for owner, network in (("base", base.denoiser), ("copy", controlnet)):
        last = (*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ()))
        places = range(2) if owner == "copy" or base.family.name == "sd3" else (0, 1)
        for place in places:
            name = f"{owner} {place}"
            last[place].register_forward_hook(
                lambda m, a, k, out, name=name: seen.update({name: out}), with_kwargs=True
            )
    with torch.no_grad():
        predict(base.denoiser, controlnet, latents, times, text, condition)
    for place in range(2):
        ours, theirs = seen[f"copy {place}"], seen[f"base {place}"]
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_every_trained_tensor_learns_after_two_steps_and_only_what_was_zero_after_one(base):
    controlnet = new_controlnet(base)
    latents, times, text, condition = batch(base, controlnet)
    zero = FILES[base.family.name].ZERO
    arguments = (base.denoiser, controlnet, latents, times, text, condition)
    first, _, last = steps_moving(controlnet, lambda: predict(*arguments))
    assert first and all(name.startswith(zero) for name in first)
    assert last == {name for name, _ in controlnet.named_parameters()}
    assert all(parameter.grad is None for parameter in base.denoiser.parameters())


def test_what_can_never_learn_is_no_parameter_and_stays_in_the_files(load_tiny, tmp_path):
    base = load_tiny("sd3")
    controlnet = new_controlnet(base)
    trained, all_of_it = {name for name, _ in controlnet.named_parameters()}, set(controlnet.state_dict())
    left = {name for name in all_of_it - trained if "pos_embed" not in name}
    assert left and all("transformer_blocks.1." in name for name in left)
    assert set(fixed_tensors(controlnet)) == all_of_it - trained
    save_controlnet(controlnet, tmp_path)
    theirs = SD3ControlNetModel.from_pretrained(tmp_path, local_files_only=True)
    assert set(theirs.state_dict()) == all_of_it
    again = load_controlnet(tmp_path, base.denoiser)
    assert {name for name, _ in again.named_parameters()} == trained
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in controlnet.state_dict().items())


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    [
        ("sd3", (3,), "of 3 copied joint blocks for a base with 4 some would be added nowhere.*Use 2"),
        ("sd3", (2, 2), "has one kind of block: give one"),
        ("flux", (3, 2), "of 3 copied double blocks for a base with 4.*Use 2 or 4"),
        ("flux", (2, 3), "of 3 copied single blocks"),
        ("flux", (2,), "double and single blocks: give a number of each"),
        ("flux", (0, 2), "of 0 copied double blocks"),
    ],
)
def test_numbers_of_blocks_that_leave_a_residual_unused_are_refused(family, blocks, message, load_tiny):
    with pytest.raises(ValueError, match=message):
        new_controlnet(load_tiny(family), blocks)


def test_the_usable_numbers_of_the_published_bases():
    assert [n for n in range(1, 25) if used_but_last(24, n)] == [*range(1, 13)]
    assert used_but_last(24, 12) and used_but_last(38, 12) and used_but_last(38, 19)
    assert not used_but_last(24, 24) and not used_but_last(38, 38) and not used_but_last(24, 16)
    assert [n for n in range(1, 20) if used_evenly(19, n)] == [1, 2, 3, 4, 5, 7, 10, 19]
    assert used_evenly(38, 4) and used_evenly(38, 10) and used_evenly(38, 5) and not used_evenly(38, 12)


@pytest.mark.parametrize(("family", "blocks"), [("flux", (2, 0)), ("flux", (4, 4)), ("flux", (1, 2)), ("sd3", (1,))])
def test_every_residual_of_a_usable_number_gets_a_gradient(family, blocks, load_tiny):
    base = load_tiny(family)
    controlnet = new_controlnet(base, blocks)
    latents, times, text, condition = batch(base, controlnet)
    predict(base.denoiser, controlnet, latents, times, text, condition).square().mean().backward()
    for name, parameter in controlnet.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(FILES[family].ZERO):
            assert parameter.grad.any(), name


def counts(kind, config, controlnet_blocks, file):
    with torch.device("meta"):
        transformer = kind(**config)
    controlnet = file.build_controlnet(transformer, controlnet_blocks)
    whole = sum(one.numel() for name, one in controlnet.state_dict().items() if name != "pos_embed.pos_embed")
    return sum(one.numel() for one in transformer.parameters()), whole, parameter_report(controlnet).total


SD35 = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pooled_projection_dim=2048)
PUBLISHED = [
    (SD35 | dict(pos_embed_max_size=192), (12,), 2_028_328_000, 1_062_855_168),
    (
        SD35 | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        (12,), 2_243_171_520, 1_261_169_664,
    ),
    (
        SD35 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
                    qk_norm="rms_norm"),
        (12,), 8_056_627_520, 2_654_723_200,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "blocks", "base_count", "control_count"), PUBLISHED)
def test_sd3_has_the_published_numbers_of_parameters(config, blocks, base_count, control_count):
    whole, control, trained = counts(SD3Transformer2DModel, dict(attention_head_dim=64) | config, blocks, sd3)
    assert (whole, control) == (base_count, control_count)
    width = config["caption_projection_dim"]
    norm = 64 if config.get("qk_norm") else 0
    assert control - trained == 10 * width**2 + 7 * width + norm  # the last block's text side never learns


@pytest.mark.parametrize(
    ("blocks", "count"), [((4, 10), 2_952_654_336), ((4, 4), 2_046_461_952), ((4, 0), 1_442_333_696)]
)
def test_flux_has_the_published_numbers_of_parameters(blocks, count):
    whole, control, trained = counts(FluxTransformer2DModel, dict(guidance_embeds=True), blocks, flux)
    assert (whole, control) == (11_901_408_320, count)
    assert (control == trained) == (blocks[1] > 0)


@pytest.mark.parametrize("prompt", ["a cat", "", "a very long red dog, " * 9])
def test_text_is_encoded_as_the_pipelines_do(base, base_folder, prompt):
    pipeline = PIPELINES[base.family.name].from_pretrained(
        base_folder(base.family.name), controlnet=new_controlnet(base)
    )
    options = dict(prompt_2=None, max_sequence_length=T5_TOKENS)
    options |= dict(prompt_3=None, do_classifier_free_guidance=False) if base.family.name == "sd3" else {}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(prompt, **options)
        states, pooled = TEXT_ENCODINGS[base.family.name](base, [prompt])
    # Not bit for bit: where a tensor lies in memory decides on the last bits of a product on some CPUs.
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, encoded[0], **close)
    torch.testing.assert_close(pooled, encoded[2] if base.family.name == "sd3" else encoded[1], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_of_sd3_are_rounded_as_diffusers_rounds_them(base_folder, tmp_path, dtype):
    base = load_base(base_folder("sd3"), dtype=dtype)
    theirs = SD3Transformer2DModel.from_pretrained(base_folder("sd3") / "transformer", torch_dtype=dtype)
    table = theirs.pos_embed.pos_embed
    assert table.dtype == base.denoiser.pos_embed.pos_embed.dtype == dtype
    assert torch.equal(base.denoiser.pos_embed.pos_embed, table)
    exact = SD3Transformer2DModel(**SD3).pos_embed.pos_embed
    assert torch.equal(exact.to(dtype), table) and torch.equal(exact, table) == (dtype == torch.float32)
    controlnet = new_controlnet(base)
    assert controlnet.pos_embed.pos_embed.dtype == torch.float32 and torch.equal(controlnet.pos_embed.pos_embed, table)
    save_controlnet(controlnet, tmp_path)
    again = load_controlnet(tmp_path, base.denoiser, dtype)
    read = SD3ControlNetModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert again.pos_embed.pos_embed.dtype == dtype
    assert torch.equal(again.pos_embed.pos_embed, read.pos_embed.pos_embed) and torch.equal(
        read.pos_embed.pos_embed, table
    )


def test_positions_that_no_file_holds_stay_in_float32_as_in_diffusers(tmp_path):
    settings = {name: SD3[name] for name in SD3 if name != "dual_attention_layers"} | dict(pos_embed_max_size=None)
    SD3ControlNetModel(**settings).save_pretrained(tmp_path)
    theirs = SD3ControlNetModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = read_controlnet_folder(tmp_path, torch.bfloat16)
    assert theirs.pos_embed.pos_embed.dtype == ours.pos_embed.pos_embed.dtype == torch.float32
    assert torch.equal(theirs.pos_embed.pos_embed, ours.pos_embed.pos_embed)


def test_sd3_without_t5_takes_zeros_in_its_place(base_folder):
    base = load_base(base_folder("sd3"), t5=False, text_tokens=T5_TOKENS)
    states, _ = TEXT_ENCODINGS["sd3"](base, ["a cat"])
    whole, _ = TEXT_ENCODINGS["sd3"](load_base(base_folder("sd3"), text_tokens=T5_TOKENS), ["a cat"])
    assert states.shape == whole.shape and not states[:, -T5_TOKENS:].any()
    assert torch.equal(states[:, :-T5_TOKENS], whole[:, :-T5_TOKENS]) and whole[:, -T5_TOKENS:].any()


def test_packing_is_the_pipelines_and_unpacking_its_inverse():
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    packed = flux.pack(latents)
    assert torch.equal(packed, FluxControlNetPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(flux.unpack(packed, 6, 10), latents)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_equal_those_of_diffusers_pipeline(base, base_folder, guidance, tmp_path):
    sharp(base.vae)
    controlnet = trained_controlnet(base)
    save_controlnet(controlnet, tmp_path)
    theirs = NETWORKS[base.family.name].from_pretrained(tmp_path, local_files_only=True)
    pipeline = PIPELINES[base.family.name].from_pretrained(
        base_folder(base.family.name), controlnet=theirs, vae=base.vae
    )
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    conditions = torch.rand(2, 3, SIZE, SIZE, generator=draw)
    prompts, seeds = ["a cat", "red dog"], [5, 6]
    first = torch.stack(
        [torch.randn(base.latent_channels, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    expected = pipeline(
        prompts, control_image=2.0 * conditions - 1.0, height=SIZE, width=SIZE, num_inference_steps=3,
        guidance_scale=guidance, latents=flux.pack(first) if base.family.name == "flux" else first,
        max_sequence_length=T5_TOKENS, controlnet_conditioning_scale=0.8, control_guidance_end=0.7, output_type="np",
    ).images  # fmt: skip
    control = Control(load_controlnet(tmp_path, base.denoiser), conditions, scale=0.8, end=0.7)
    ours = sample(base, prompts, [control], seeds=seeds, steps=3, guidance_scale=guidance)
    # Before rounding: where a tensor lies in memory decides on last bits, and a value may lie on the border of two.
    assert (ours - 255 * torch.from_numpy(expected)).abs().max() < 0.5 + 1e-3
    plain = sample(base, prompts, seeds=seeds, steps=3, guidance_scale=guidance, picture_size=(SIZE, SIZE))
    assert not torch.equal(plain, ours)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(base, sampler):
    options: dict[str, Any] = dict(steps=3, guidance_scale=2.0, picture_size=(SIZE, SIZE), scheduler=sampler)
    both = sample(base, ["a cat", "red dog"], seeds=[1, 2], **options)
    alone = sample(base, ["red dog"], seeds=[2], **options)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1


def test_two_controlnets_add_up_and_schedules_by_height_are_refused(base):
    controlnet = trained_controlnet(base)
    latents, times, text, condition = batch(base, controlnet)
    once = control_residuals(controlnet, latents, times, text, condition).each()
    twice = control_residuals(controlnet, latents, times, text, condition, 2.0).each()
    torch.testing.assert_close([2 * one for one in once], list(twice))
    half = Control(controlnet, torch.rand(1, 3, SIZE, SIZE), scale=0.5)
    whole = Control(controlnet, half.conditioning)
    options: dict[str, Any] = dict(seeds=[1], steps=2, guidance_scale=1.0)
    difference = (
        sample(base, ["a cat"], [half, half], **options).int() - sample(base, ["a cat"], [whole], **options).int()
    )
    assert difference.abs().max() <= 1
    by_height = Control(controlnet, half.conditioning, schedule="resolution")
    with pytest.raises(ValueError, match="'resolution' weighs by the residuals' heights.*Use uniform, 0.825, logspace"):
        sample(base, ["a cat"], [by_height], **options)


def test_a_controlnet_of_another_family_or_size_is_refused(load_tiny, tmp_path):
    other = load_tiny("flux")
    save_controlnet(new_controlnet(other), tmp_path / "flux")
    with pytest.raises(ValueError, match="is a FluxControlNetModel, and the base is a SD3Transformer2DModel"):
        load_controlnet(tmp_path / "flux", load_tiny("sd3").denoiser)
    larger: Any = copy.deepcopy(other.denoiser)
    larger.register_to_config(num_attention_heads=4)
    with pytest.raises(ValueError, match="its num_attention_heads is 2, and the base's is 4"):
        load_controlnet(tmp_path / "flux", larger)


def test_the_first_controlnets_for_sd3_get_what_they_were_trained_with(load_tiny, tmp_path):
    """InstantX trained with zeros for the pooled text, and conditions without the VAE's shift."""
    base = load_tiny("sd3")
    controlnet = trained_controlnet(base)
    conditions = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ours = encode_condition(base, controlnet, conditions)
    controlnet.register_to_config(force_zeros_for_pooled_projection=True)
    theirs = encode_condition(base, controlnet, conditions)
    torch.testing.assert_close(theirs - ours, torch.full_like(ours, 0.06 * 1.5))
    latents, times, text, _ = batch(base)
    condition = theirs.repeat(2, 1, 1, 1)
    first = control_residuals(controlnet, latents, times, text, condition).each()
    text.added_cond_kwargs["pooled_projections"] = torch.zeros_like(text.added_cond_kwargs["pooled_projections"])
    second = control_residuals(controlnet, latents, times, text, condition).each()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_gradient_checkpointing_gives_equal_gradients(base):
    gradients, recomputed = [], []
    for which in (False, 0.5, True):
        controlnet = trained_controlnet(base)
        for network in (controlnet, base.denoiser):
            recompute(network, which)
        recomputed.append(sum(getattr(block, "computes_again", False) for block in blocks_by_grid(base.denoiser)))
        latents, times, text, condition = batch(base, controlnet)
        predict(base.denoiser, controlnet, latents, times, text, condition).square().mean().backward()
        gradients.append([parameter.grad for parameter in controlnet.parameters()])
    assert recomputed[1] == -(-len(blocks_by_grid(base.denoiser)) // 2)
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))


def test_guidance_is_told_to_flux_and_moves_its_prediction(load_tiny):
    base = load_tiny("flux")
    latents, times, text, _ = batch(base)
    assert text.added_cond_kwargs["guidance"].tolist() == [3.5, 3.5]
    told = denoise(base.denoiser, latents, times, text)
    text.added_cond_kwargs["guidance"] = torch.full((2,), 1.0)
    assert not torch.equal(denoise(base.denoiser, latents, times, text), told)


def test_fp16_with_t5_is_refused(base_folder):
    for family in TRANSFORMER_FAMILIES:
        with pytest.raises(ValueError, match="T5, a text encoder of .*, overflows in fp16. Use bf16 or fp32"):
            load_base(base_folder(family), dtype=torch.float16)


def test_the_embedding_that_t5_has_under_two_names_is_one_parameter(base):
    """Two would each take memory once the base is on a GPU: a quarter of a gigabyte of T5-xxl in bf16."""
    t5 = base.text_encoders[-1]
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    assert "encoder.embed_tokens.weight" in t5.state_dict()


def test_a_scheduler_of_the_other_world_is_refused(base_folder, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(base_folder("sd3"), tmp_path / "base")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="the scheduler is a DDIMScheduler, and this base is of flow matching"):
        load_base(folder, device="meta")


def test_sizes_that_cannot_be_packed_are_refused(base):
    with pytest.raises(ValueError, match="makes multiples of 16"):
        sample(base, ["a cat"], seeds=[1], steps=1, guidance_scale=1.0, picture_size=(SIZE, SIZE + 8))
