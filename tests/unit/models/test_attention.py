import pytest
import torch
from torch import nn

from controlbooth.models.attention import (
    AttentionChoice,
    AttentionShape,
    apply_attention,
    attention_shapes,
    choose_attention,
)
from controlbooth.models.denoisers.registry import predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.text import encode_prompts


def forward(base, controlnet=None):
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, base.denoiser.config["in_channels"], 4, 4, generator=draw)
    conditioning = torch.rand(2, 3, 32, 32, generator=draw)
    text = encode_prompts(base, ["a cat", "red dog"], picture_size=(32, 32))
    return predict(base.denoiser, controlnet, latents, torch.tensor([10, 700]), text, conditioning)


@pytest.mark.parametrize("family", ["sd15", "miniature"])
def test_kernels_agree_within_rounding_forward_and_backward(family, load_tiny):
    base = load_tiny(family)
    controlnet = build_controlnet(base.denoiser)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05
    results = {}
    for name in ("flash", "math", "plain"):
        for module in (base.denoiser, controlnet, base.vae):
            apply_attention(module, AttentionChoice(name, "test"))
        controlnet.zero_grad()
        prediction = forward(base, controlnet)
        prediction.square().mean().backward()
        latents = base.encode_latents(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
        results[name] = [prediction, latents, *(parameter.grad.clone() for parameter in controlnet.parameters())]
    for flash, math, plain in zip(*results.values(), strict=True):
        torch.testing.assert_close(flash, math, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plain, math, rtol=1e-3, atol=1e-4)


def test_the_chosen_kernel_is_the_one_that_runs(load_tiny):
    base = load_tiny("sd15")
    latents, states = torch.zeros(1, 4, 4, 4), torch.zeros(1, 12, 16)
    operators = {
        "flash": {"aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"},
        "math": {"aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"},
        "plain": set(),
    }
    for name, expected in operators.items():
        apply_attention(base.denoiser, AttentionChoice(name, "test"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            base.denoiser(latents, 1, states)
        assert {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key} == expected


def test_auto_on_a_cpu_takes_the_faster_and_gives_the_figures():
    choice = choose_attention("auto", "cpu", shapes=[AttentionShape(2, 4, 64, 64, 16)])
    assert choice.name in ("flash", "math", "plain")
    assert "flash" in choice.reason and "math" in choice.reason and " ms" in choice.reason


def test_auto_takes_no_kernel_that_keeps_tens_of_millions_of_scores():
    large = AttentionShape(64, 8, 256, 256, 8)
    assert choose_attention("auto", "cpu", shapes=[large]).name == "flash"


def test_a_shape_can_have_a_kernel_of_its_own(load_tiny):
    base = load_tiny("sd15")
    shapes = attention_shapes(base.denoiser, lambda: forward(base))
    apply_attention(base.denoiser, AttentionChoice("flash", "test"))
    with torch.profiler.profile() as alone:
        forward(base)
    apply_attention(base.denoiser, AttentionChoice("flash", "test", {shapes[0].key: "math"}))
    with torch.profiler.profile() as mixed:
        forward(base)

    def calls(profile, name):
        return sum(event.count for event in profile.key_averages() if event.key == name)

    flash, math = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
    assert calls(alone, math) == 0 and calls(mixed, math) > 0
    assert calls(mixed, flash) == calls(alone, flash) - calls(mixed, math) > 0


def test_other_kernels_are_chosen_only_where_they_are_much_faster():
    shapes = [AttentionShape(2, 4, 64, 64, 16), AttentionShape(2, 4, 4, 4, 16)]
    choice = choose_attention("auto", "cpu", shapes=shapes)
    assert choice.by_shape.keys() <= {shape.key for shape in shapes}
    assert choice.name not in choice.by_shape.values()


@pytest.mark.parametrize("name", ["flash", "math", "plain"])
def test_a_kernel_that_is_asked_for_is_taken(name):
    assert choose_attention(name, "cpu") == AttentionChoice(name, "asked for")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("xformers", "'xformers' cannot run on cpu in float32: xformers has CUDA kernels only. Here can: flash"),
        ("efficient", "'efficient' cannot run on cpu .* for CUDA only. Here can: flash, math, plain; or use 'auto'"),
        ("cudnn", "'cudnn' cannot run on cpu .* for CUDA only"),
        ("quick", "'quick' is not known. Use auto, xformers, flash, cudnn, efficient, math, plain"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_what_can(request_, message):
    with pytest.raises(ValueError, match=message):
        choose_attention(request_, "cpu")


def test_shapes_are_those_of_the_modules_own_calls(load_tiny):
    base = load_tiny("sd15")
    shapes = attention_shapes(base.denoiser, lambda: forward(base))
    level, middle = dict(batch=2, heads=2, query_tokens=16, width=4), dict(batch=2, heads=2, query_tokens=4, width=8)
    assert shapes == (
        AttentionShape(**level, key_tokens=16),
        AttentionShape(**level, key_tokens=12),
        AttentionShape(**middle, key_tokens=12),
        AttentionShape(**middle, key_tokens=4),
    )
    assert not any(module._forward_pre_hooks for module in base.denoiser.modules())
    vae = attention_shapes(base.vae, lambda: base.encode_latents(torch.zeros(1, 3, 32, 32)))
    assert vae == (AttentionShape(1, 1, 16, 16, 8),)


def test_a_module_without_attention_processors_is_refused():
    with pytest.raises(TypeError, match="Linear has no attention processors"):
        apply_attention(nn.Linear(1, 1), AttentionChoice("math", "test"))
