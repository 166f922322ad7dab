"""Control-LoRAs: low-rank differences from the base's own encoder, merged, and in files that others read."""

import json
import shutil
from typing import Any

import pytest
import torch
from bases import UNET_FAMILIES
from checkpoints import write_run
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import SIZE, batch, disturbed, steps_moving
from safetensors.torch import load_file, save_file
from torch import nn

from controlbooth.launch.commands.export import main as export_main
from controlbooth.models.denoisers.control_lora import COPIED, ControlLora, adapters_of, is_difference, merged
from controlbooth.models.denoisers.registry import control_residuals, denoise, parameter_report, predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.lora import StackedAdapter, product
from controlbooth.models.noise.schedules import SCHEDULERS
from controlbooth.models.pretrained import load_control_lora, load_controlnet, save_controlnet, save_single_file
from controlbooth.models.sampling import Control, initial_noise, sample
from controlbooth.trainer.run.integrity import COMPLETE

RANK = 3


def begun(base, **options) -> Any:
    torch.manual_seed(0)
    return build_controlnet(base.denoiser, rank=RANK, **options)


def trained(base) -> Any:
    """One with weights as a training might leave them."""
    return disturbed(begun(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_a_new_one_changes_nothing_bit_for_bit(family, dtype, load_tiny):
    base = load_tiny(family)
    base.denoiser.to(dtype)
    controlnet, (latents, times, text, condition) = begun(base).to(dtype), batch(base)
    plain = denoise(base.denoiser, latents, times, text)
    assert torch.equal(predict(base.denoiser, controlnet, latents, times, text, condition), plain)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_its_frozen_weights_are_the_memory_of_the_base_and_in_no_parameter_and_no_file(family, load_tiny):
    base = load_tiny(family)
    controlnet = begun(base)
    own = {tensor.data_ptr() for name, tensor in base.denoiser.named_parameters() if name.split(".")[0] in COPIED}
    assert {tensor.data_ptr() for tensor in controlnet.buffers()} == own
    assert controlnet.state_dict().keys() == dict(controlnet.named_parameters()).keys()
    whole = build_controlnet(base.denoiser)
    assert {name for name, _ in whole.named_parameters() if not name.startswith(COPIED)} == {
        name for name, _ in controlnet.named_parameters() if not is_difference(name)
    }
    matrices = [name for name, one in whole.named_parameters() if name.startswith(COPIED) and one.dim() > 1]
    assert len(matrices) - (family == "miniature") == len(adapters_of(controlnet))  # but for its pooled text's place
    counted, plain = parameter_report(controlnet), parameter_report(whole)
    assert counted.copy < plain.copy / 2 and counted.hint == plain.hint
    assert counted.zero_convolutions == plain.zero_convolutions


@pytest.mark.parametrize("family", ["sd15", "miniature"])
def test_the_connections_learn_first_then_the_hint_and_b_then_a_and_the_base_never_moves(family, load_tiny):
    base = load_tiny(family)
    controlnet, (latents, times, text, condition) = begun(base), batch(base)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    moved = list(steps_moving(controlnet, lambda: predict(base.denoiser, controlnet, latents, times, text, condition)))
    assert {name.split(".")[0] for name in moved[0]} == {"controlnet_down_blocks", "controlnet_mid_block"}
    assert any(name.endswith(".up") for name in moved[1]) and not any(name.endswith(".down") for name in moved[1])
    assert any(name.endswith(".down") for name in moved[2])
    later = trained(base)
    predict(base.denoiser, later, latents, times, text, condition).square().mean().backward()
    assert all(one.grad is not None and one.grad.any() for one in later.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.denoiser.state_dict().items())


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_merged_it_is_an_ordinary_controlnet_that_computes_the_same(family, load_tiny):
    base = load_tiny(family)
    controlnet, inputs = trained(base), batch(base)
    whole = merged(controlnet)
    assert type(whole) is ControlNetModel and "rank" not in whole.config
    own = {tensor.data_ptr() for tensor in base.denoiser.parameters()}
    assert all(one.requires_grad and one.data_ptr() not in own for one in whole.parameters())
    ours, theirs = (control_residuals(one, *inputs).each() for one in (controlnet, whole))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    assert max(one.abs().max() for one in ours) > 0.1


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 1, 3]), st.integers(1, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_a_merged_layer_gives_what_the_adapted_one_gives(rank, inputs, outputs, kernel, stride, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs) if kernel is None else nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    adapter = StackedAdapter(layer, 1, rank)
    nn.init.normal_(adapter.down)
    nn.init.normal_(adapter.up)
    x = torch.randn(2, 5, inputs) if kernel is None else torch.randn(2, inputs, 6, 6)
    expected = adapter(x)
    with torch.no_grad():
        layer.weight += product(adapter.up[0], adapter.down[0], layer.weight)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_hooks_and_kernels_of_the_copy_are_not_the_bases(load_tiny):
    base = load_tiny("sd15")
    controlnet, inputs, called = begun(base), batch(base), []
    for module in controlnet.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    controlnet.enable_gradient_checkpointing()
    denoise(base.denoiser, *inputs[:3])
    assert not called and not base.denoiser.is_gradient_checkpointing
    control_residuals(controlnet, *inputs)
    assert called


def test_gradients_under_checkpointing_are_the_same(load_tiny):
    base = load_tiny("sd15")
    gradients = []
    for cheap in (False, True):
        controlnet, (latents, times, text, condition) = trained(base), batch(base)
        if cheap:
            controlnet.enable_gradient_checkpointing()
        predict(base.denoiser, controlnet, latents, times, text, condition).square().mean().backward()
        gradients.append([one.grad for one in controlnet.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_folder_is_gone_on_from_at_its_rank_and_read_whole_by_all_others(load_tiny, tmp_path):
    base = load_tiny("sd15")
    controlnet = trained(base)
    save_controlnet(controlnet, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["_class_name"] == "ControlLora"
    again = load_control_lora(tmp_path / "small", base.denoiser, RANK)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in controlnet.state_dict().items())
    inputs = batch(base)
    pairs = zip(control_residuals(again, *inputs).each(), control_residuals(controlnet, *inputs).each(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    whole = load_controlnet(tmp_path / "small", base.denoiser)
    assert type(whole) is ControlNetModel
    assert all(torch.equal(whole.state_dict()[name], one) for name, one in merged(controlnet).state_dict().items())
    save_controlnet(whole, tmp_path / "whole")
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.safetensors")) for name in ("small", "whole")]
    assert sizes[0] < sizes[1]
    with pytest.raises(ValueError, match="small has differences of rank 3, and model.rank is 4: set it so"):
        load_control_lora(tmp_path / "small", base.denoiser, 4)
    with pytest.raises(ValueError, match="whole is a whole ControlNet, and model.method=lora trains differences"):
        load_control_lora(tmp_path / "whole", base.denoiser, RANK)
    with pytest.raises(ValueError, match="was made for another base"):
        load_control_lora(tmp_path / "small", load_tiny("miniature").denoiser, RANK)
    with pytest.raises(FileNotFoundError, match="a control-LoRA is trained further from the folder of its checkpoint"):
        load_control_lora(tmp_path / "nowhere", base.denoiser, RANK)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_its_file_is_laid_out_as_stabilitys_are_and_read_back_whole(family, load_tiny, tmp_path):
    base = load_tiny(family)
    controlnet, file = trained(base), tmp_path / "small.safetensors"
    save_single_file(controlnet, file)
    weights = load_file(file)
    assert weights["lora_controlnet"].numel() == 0
    assert weights["input_blocks.1.0.in_layers.2.down"].shape == (RANK, 8, 3, 3)
    assert weights["input_blocks.1.0.in_layers.2.up"].shape == (8, RANK, 1, 1)
    assert weights["time_embed.0.up"].shape == (32, RANK) and weights["time_embed.0.down"].shape == (RANK, 8)
    assert {"zero_convs.0.0.weight", "middle_block_out.0.bias", "input_hint_block.14.weight"} <= weights.keys()
    assert len(weights) == len(controlnet.state_dict()) + 1
    whole, expected = load_controlnet(file, base.denoiser), merged(controlnet).state_dict()
    assert whole.state_dict().keys() == expected.keys()
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in expected.items())
    empty = load_controlnet(file, base.denoiser.to("meta"))
    assert {one.device.type for one in empty.parameters()} == {"meta"}


def test_a_file_of_another_base_is_refused_by_what_does_not_fit(load_tiny, tmp_path):
    base, file = load_tiny("sd15"), tmp_path / "small.safetensors"
    save_single_file(trained(base), file)
    weights = load_file(file)
    save_file(weights | {"input_blocks.9.0.op.up": torch.zeros(1, 1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"holds 1 tensors that .* has not \(input_blocks.9.0.op.up\)"):
        load_controlnet(tmp_path / "more.safetensors", base.denoiser)
    save_file(weights | {"time_embed.0.up": torch.zeros(16, RANK)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"time_embed.0.up and its `down` make no matrix of \(32, 8\)"):
        load_controlnet(tmp_path / "other.safetensors", base.denoiser)


@pytest.fixture
def make_run(tmp_path, load_tiny, base_folder):
    """Family -> a run with a checkpoint of a control-LoRA as the trainer leaves it, without DeepSpeed's files."""

    def make(family):
        base, model = load_tiny(family), dict(base=str(base_folder(family)), method="lora", rank=RANK)
        return write_run(tmp_path, base, model, lambda folder: save_controlnet(trained(base), folder))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_draws_our_pictures_from_an_export_that_is_merged(family, make_run, load_tiny, base_folder, tmp_path):
    base, run, out = load_tiny(family), make_run(family), tmp_path / "out"
    assert export_main([str(run), str(out)]) == 0
    assert "A control-LoRA: it was trained as differences of rank 3" in (out / "README.md").read_text()
    prompts, seeds = ["a cat", "red dog"], [3, 1]
    conditioning = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(seeds=seeds, steps=3, guidance_scale=4.0)
    checkpoint = run / "checkpoints" / "step-00000300" / "controlnet"
    ours = sample(base, prompts, [Control(load_controlnet(checkpoint, base.denoiser), conditioning)], **options)
    as_trained = sample(
        base, prompts, [Control(load_control_lora(checkpoint, base.denoiser, RANK).eval(), conditioning)], **options
    )
    assert (ours.int() - as_trained.int()).abs().max() <= 1
    assert (ours.int() - sample(base, prompts, [], **options).int()).abs().max() > 1
    is_sdxl = family == "sdxl"
    pipeline_class: type = StableDiffusionXLControlNetPipeline if is_sdxl else StableDiffusionControlNetPipeline
    extra = {} if is_sdxl else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline = pipeline_class.from_pretrained(
        base_folder(family), controlnet=ControlNetModel.from_pretrained(out, local_files_only=True),
        local_files_only=True, **extra,
    )  # fmt: skip
    pipeline.scheduler = SCHEDULERS["ddim"].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompts, image=conditioning, num_inference_steps=3, guidance_scale=4.0,
        latents=initial_noise(base, seeds, SIZE, SIZE), output_type="np",
    ).images  # fmt: skip
    assert (ours - 255 * torch.from_numpy(pictures)).abs().max() < 0.5 + 1e-2  # equal before they are rounded


def test_a_single_file_of_a_run_is_its_control_lora(make_run, load_tiny, tmp_path):
    run, out = make_run("sd15"), tmp_path / "out"
    assert export_main([str(run), str(out), "--format", "single-file", "--dtype", "fp16"]) == 0
    weights = load_file(out / "edges.safetensors")
    assert "lora_controlnet" in weights and {one.dtype for one in weights.values() if one.numel()} == {torch.float16}
    assert "key names of Stability's control-LoRAs" in (out / "README.md").read_text()
    assert load_controlnet(out / "edges.safetensors", load_tiny("sd15").denoiser).config["in_channels"] == 4


def test_an_export_is_not_merged_with_another_base(make_run, tmp_path, base_folder):
    run = make_run("sd15")
    state = run / "checkpoints" / "step-00000300" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | dict(base_digest="0" * 64)))
    sizes = run / "checkpoints" / "step-00000300" / COMPLETE
    shutil.copy(sizes, tmp_path / "sizes")
    found = json.loads(sizes.read_text()) | {"state.json": state.stat().st_size}
    sizes.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="The whole ControlNet is made of both: put that base back"):
        export_main([str(run), str(tmp_path / "out")])


def test_without_a_base_it_has_shapes_and_no_memory(load_tiny):
    base = load_tiny("sd15")
    empty: Any = build_controlnet(base.denoiser, rank=RANK, device="meta")
    assert isinstance(empty, ControlLora) and {one.device.type for one in empty.parameters()} == {"meta"}
