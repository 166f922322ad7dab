"""Control-LoRAs of FLUX.1: the base with low-rank differences, and conditions as channels beside the picture."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_run
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from inputs import SIZE, batch, disturbed, steps_moving
from safetensors.torch import load_file

from controlbooth.launch.commands.export import main as export_main
from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.denoisers.control_lora import adapters_of, share_weights
from controlbooth.models.denoisers.flux_control_lora import FluxControlLora, build_controlnet
from controlbooth.models.denoisers.registry import (
    check_fits,
    denoise,
    encode_condition,
    parameter_report,
    predict,
)
from controlbooth.models.families import FAMILIES
from controlbooth.models.pretrained import load_control_lora, load_controlnet, save_controlnet
from controlbooth.models.quantized import quantize
from controlbooth.models.recomputing import recompute
from controlbooth.models.sampling import Control, initial_noise, sample
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.loading import build_config

RANK = 3


@pytest.fixture
def base(load_tiny) -> Any:
    return load_tiny("flux")


def begun(base) -> Any:
    torch.manual_seed(0)
    return build_controlnet(base.denoiser, RANK)


def trained(base) -> Any:
    """One with weights as a training might leave them."""
    return disturbed(begun(base))


def inputs_of(base, controlnet) -> Any:
    latents, times, text, conditioning = batch(base)
    return latents, times, text, encode_condition(base, controlnet, conditioning)


def controlled(base, controlnet, scale=1.0):
    return predict(base.denoiser, controlnet, *inputs_of(base, controlnet), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_one_predicts_what_the_base_does_bit_for_bit(base, dtype):
    base.denoiser.to(dtype)
    controlnet = begun(base).to(dtype)
    with torch.no_grad():  # with gradients PyTorch multiplies bf16 on processors in another way
        assert torch.equal(controlled(base, controlnet), denoise(base.denoiser, *batch(base)[:3]))


def test_b_learns_first_and_then_every_parameter_and_the_base_never_moves(base):
    controlnet = begun(base)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    moved = list(steps_moving(controlnet, lambda: controlled(base, controlnet), 2))
    assert moved[0] == {name for name, _ in controlnet.named_parameters() if name.endswith(".up")}
    assert any(name.endswith(".down") for name in moved[1])
    later = trained(base)
    controlled(base, later).square().mean().backward()
    assert all(one.grad is not None and one.grad.any() for one in later.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.denoiser.state_dict().items())


def test_what_is_frozen_is_the_memory_of_the_base_and_in_no_parameter_and_no_file(base):
    controlnet = begun(base)
    own = {tensor.data_ptr() for tensor in base.denoiser.parameters()}
    assert {tensor.data_ptr() for tensor in controlnet.buffers()} == own
    assert controlnet.state_dict().keys() == dict(controlnet.named_parameters()).keys()
    names = {name for name in adapters_of(controlnet)}
    linear = {name for name, one in base.denoiser.named_modules() if isinstance(one, torch.nn.Linear)}
    left = {name for name in linear - names if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    assert all(name.endswith(".linear") for name in left)  # of the norms
    assert {name for name in names if "blocks." not in name} == {"x_embedder"}
    assert controlnet.x_embedder.down.shape == (1, RANK, 2 * base.denoiser.config["in_channels"])
    report = parameter_report(controlnet)
    assert report.hint == controlnet.x_embedder.down.numel() + controlnet.x_embedder.up.numel()
    assert report.zero_convolutions == 0 and report.total == sum(one.numel() for one in controlnet.parameters())


def test_the_base_alone_stays_itself_beside_it_and_is_what_a_scale_of_zero_gives(base):
    alone = denoise(base.denoiser, *batch(base)[:3])
    controlnet = trained(base)
    under, half, none = (controlled(base, controlnet, scale) for scale in (1.0, 0.5, 0.0))
    assert torch.equal(none, alone) and torch.equal(denoise(base.denoiser, *batch(base)[:3]), alone)
    assert min((one - other).abs().max() for one, other in ((under, alone), (half, alone), (half, under))) > 1e-3
    assert torch.equal(controlled(base, controlnet), under)


def test_it_sees_the_condition(base):
    controlnet = trained(base)
    latents, times, text, condition = inputs_of(base, controlnet)
    one, other = (predict(base.denoiser, controlnet, latents, times, text, seen) for seen in (condition, -condition))
    assert (one - other).abs().max() > 1e-3


def test_gradients_under_checkpointing_are_the_same(base):
    gradients = []
    for which in (False, True, 0.5):
        controlnet = trained(base)
        recompute(controlnet, which)
        controlled(base, controlnet).square().mean().backward()
        gradients.append([one.grad for one in controlnet.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_on_a_quantized_base_it_predicts_what_that_base_does_and_a_cast_leaves_the_packed_weights(base, precision):
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[precision])
    base.denoiser.to(torch.bfloat16)
    whole = denoise(base.denoiser, *batch(base)[:3])
    controlnet = begun(base)
    quantize(base.denoiser, precision)
    share_weights(controlnet, base.denoiser)
    controlnet.to(torch.bfloat16)
    rounded = denoise(base.denoiser, *batch(base)[:3])
    with torch.no_grad():
        assert torch.equal(controlled(base, controlnet), rounded) and not torch.equal(rounded, whole)
    assert {one.data_ptr() for one in controlnet.buffers()} >= {one.data_ptr() for one in base.denoiser.buffers()}
    list(steps_moving(controlnet, lambda: controlled(base, controlnet), 2))


def test_a_folder_is_gone_on_from_at_its_rank_and_never_as_a_whole_controlnet(base, load_tiny, tmp_path):
    controlnet = trained(base)
    save_controlnet(controlnet, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["_class_name"] == "FluxControlLora"
    again = load_control_lora(tmp_path / "small", base.denoiser, RANK)
    assert isinstance(again, FluxControlLora) and again.training
    assert torch.equal(controlled(base, again), controlled(base, controlnet))
    assert torch.equal(controlled(base, load_controlnet(tmp_path / "small", base.denoiser)), controlled(base, again))
    with pytest.raises(ValueError, match="small has differences of rank 3, and model.rank is 4: set it so"):
        load_control_lora(tmp_path / "small", base.denoiser, 4)
    with pytest.raises(ValueError, match="is a FluxControlLora, and the base is a SD3Transformer2DModel"):
        load_control_lora(tmp_path / "small", load_tiny("sd3").denoiser, RANK)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | dict(num_layers=2)))
    with pytest.raises(ValueError, match="does not fit FluxControlLora"):
        load_control_lora(tmp_path / "small", base.denoiser, RANK)
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | dict(rank=0)))
    with pytest.raises(ValueError, match="its rank is 0, and a number above 0 belongs there"):
        load_control_lora(tmp_path / "small", base.denoiser, RANK)
    other = FluxControlLora(**{**config, "num_single_layers": 2})
    with pytest.raises(ValueError, match="its num_single_layers is 2, and the base's is 4"):
        check_fits(other, base.denoiser)


def test_what_has_no_meaning_without_residuals_is_refused_by_name(base):
    controlnet, conditioning = trained(base), batch(base)[3]
    options: dict[str, Any] = dict(seeds=[0, 1], steps=1, guidance_scale=3.0)

    def drawn(*controls):
        return sample(base, ["a cat", "red dog"], controls, **options)

    with pytest.raises(ValueError, match="could be added up with others: use one control at a time"):
        drawn(Control(controlnet, conditioning), Control(controlnet, conditioning))
    with pytest.raises(ValueError, match="control schedule 'logspace' could weigh by depth: leave it out"):
        drawn(Control(controlnet, conditioning, schedule="logspace"))
    with pytest.raises(ValueError, match="cannot be left out of one branch of guidance"):
        drawn(Control(controlnet, conditioning, branches="conditional"))


def test_outside_of_its_share_of_the_steps_the_base_draws_alone(base):
    controlnet, conditioning = trained(base), batch(base)[3]
    options: dict[str, Any] = dict(seeds=[0, 1], steps=3, guidance_scale=3.0)
    alone, early, always = (
        sample(base, ["a cat", "red dog"], controls, **options)
        for controls in (
            [Control(controlnet, conditioning, end=0.1)],  # which no whole step fits into
            [Control(controlnet, conditioning, end=0.5)],
            [Control(controlnet, conditioning)],
        )
    )
    assert torch.equal(alone, sample(base, ["a cat", "red dog"], picture_size=(SIZE, SIZE), **options))
    assert not torch.equal(early, always) and not torch.equal(early, alone)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_diffusers_draws_our_pictures_from_an_export(base, base_folder, tmp_path, scale):
    controlnet = trained(base)
    model = dict(base=str(base_folder("flux")), method="lora", rank=RANK)
    run, out = write_run(tmp_path, base, model, lambda folder: save_controlnet(controlnet, folder)), tmp_path / "out"
    assert export_main([str(run), str(out)]) == 0
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert len(weights) == 2 * len(adapters_of(controlnet))
    assert weights["transformer.x_embedder.lora_A.weight"].shape == (RANK, 32)
    assert {one.shape[0] for name, one in weights.items() if "lora_A" in name} == {RANK}
    card = (out / "README.md").read_text()
    assert "FluxControlPipeline" in card and "load_lora_weights" in card
    with torch.no_grad():  # a posterior so narrow that a draw from it is its mode, which is what we take of a condition
        base.vae.encoder.conv_out.weight[base.latent_channels :] = 0.0
        base.vae.encoder.conv_out.bias[base.latent_channels :] = -60.0
    conditioning, seeds = batch(base)[3], [3, 1]
    options: dict[str, Any] = dict(seeds=seeds, steps=3, guidance_scale=3.0)
    ours = sample(base, ["a cat", "red dog"], [Control(controlnet, conditioning, scale)], **options)
    alone = sample(base, ["a cat", "red dog"], picture_size=(SIZE, SIZE), **options)
    assert (ours.int() - alone.int()).abs().max() > 1
    pipeline = FluxControlPipeline.from_pretrained(base_folder("flux"), vae=base.vae, local_files_only=True)
    pipeline.load_lora_weights(out)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(base, seeds, SIZE, SIZE)
    side = SIZE // 8
    pictures = pipeline(
        ["a cat", "red dog"], control_image=2.0 * conditioning - 1.0, height=SIZE, width=SIZE, num_inference_steps=3,
        guidance_scale=3.0, latents=pipeline._pack_latents(noise, 2, base.latent_channels, side, side),
        max_sequence_length=base.text_tokens, joint_attention_kwargs={"scale": scale}, output_type="np",
    ).images  # fmt: skip
    assert (ours - 255 * torch.from_numpy(pictures)).abs().max() < 0.5 + 1e-2  # equal before they are rounded


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        (
            "sd3",
            dict(method="lora"),
            r"method=lora is for a U-Net or FLUX.1 \(pipelines .* none for other transformers\)",
        ),
        ("miniature-dit", dict(method="lora"), "model.method=lora is for a U-Net or FLUX.1"),
        (
            "flux",
            dict(method="lora", copied_blocks=[2, 2]),
            r"model.copied_blocks=\[2, 2\] does not go with model.method",
        ),
        ("flux", dict(method="lora", condition_entry="pixels"), "model.condition_entry=pixels is for SD3"),
        (
            "sd15",
            dict(method="lora", frozen=dict(precision="int8")),
            "precision=int8 is for a whole ControlNet .* FLUX.1",
        ),
    ],
)
def test_what_is_not_for_a_family_is_refused_by_its_field(family, model, message):
    tree = dict(name="x", max_steps=1, global_batch_size=1, micro_batch_size=1, data=dict(shards="s", condition="c"))
    told = misplaced(build_config(tree | dict(model=dict(base="b") | model)), FAMILIES[family])
    assert len(told) == 1 and re.search(message, told[0])


def test_of_flux_dev_it_has_one_to_four_per_cent_of_the_parameters():
    shapes = {name: value for name, value in PUBLISHED["flux-dev"].denoiser.items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(**shapes)
    whole = sum(one.numel() for one in transformer.parameters())
    totals = {rank: parameter_report(build_controlnet(transformer, rank)).total for rank in (32, 128)}
    assert whole == 11_901_408_320 and totals == {32: 130_846_720, 128: 523_386_880}
    documented = (Path(__file__).parents[3] / "docs" / "concepts" / "control-lora.md").read_text()
    assert all(f"{number:,}" in documented for number in (whole, *totals.values()))


def test_without_a_base_it_has_shapes_and_no_memory(base):
    empty: Any = build_controlnet(base.denoiser.to("meta"), RANK)
    assert {one.device.type for one in (*empty.parameters(), *empty.buffers())} == {"meta"}
