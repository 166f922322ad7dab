"""Attention kernels on one GPU, and what auto makes of them."""

import pytest
import torch

from controlbooth.models.attention import KERNELS, AttentionShape, _attend, _obstacle, _reason_against, choose_attention

SD15 = [AttentionShape(2, 8, 1024, keys, 40) for keys in (1024, 77)] + [AttentionShape(2, 8, 256, 256, 80)]
SDXL = [AttentionShape(2, 10, 1024, keys, 64) for keys in (1024, 77)]


def gradients(name, shape, device):
    draw = torch.Generator(device).manual_seed(0)
    sizes = [
        (shape.batch, tokens, shape.heads, shape.width) for tokens in (shape.query_tokens, *[shape.key_tokens] * 2)
    ]
    tensors = [torch.randn(size, generator=draw, device=device).bfloat16().requires_grad_() for size in sizes]
    result = _attend(name, *(tensor.transpose(1, 2) for tensor in tensors))
    if name == "xformers":
        result = result.unflatten(0, (shape.batch, shape.heads))
    result.float().square().mean().backward()
    return [result.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("shape", [*SD15, *SDXL], ids=lambda shape: shape.key)
def test_kernels_agree_within_rounding_forward_and_backward(world, shape):
    expected = gradients("math", shape, world.device)
    for name in ("xformers", *KERNELS):
        if why := _obstacle(name, world.device, torch.bfloat16, shape):
            print(f"{name}: {why}")
            continue
        for ours, theirs in zip(gradients(name, shape, world.device), expected, strict=True):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 2e-2, f"{name} differs from math by {error:.4f}"


@pytest.mark.parametrize("shapes", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_auto_takes_a_memory_efficient_kernel_that_repeats_its_gradients(world, shapes):
    choice = choose_attention("auto", world.device, torch.bfloat16, shapes)
    print(f"{choice.name} {dict(choice.by_shape)}: {choice.reason}")
    for shape in shapes:
        name = choice.by_shape.get(shape.key, choice.name)
        assert name != "math"
        assert _reason_against(name, world.device, torch.bfloat16, shape) is None
