"""Which blocks compute their activations again, and that this changes no gradient."""

import copy

import pytest
import torch
from inputs import batch, disturbed
from torch import nn

from controlbooth.models.denoisers.registry import predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.recomputing import blocks_by_grid, recompute


def kept(base, controlnet) -> tuple[int, list[torch.Tensor]]:
    """The bytes that a forward pass keeps for the backward pass besides weights, and the gradients."""
    weights = {p.untyped_storage().data_ptr() for net in (base.denoiser, controlnet) for p in net.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    controlnet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predict(base.denoiser, controlnet, *batch(base)).square().mean()
    loss.backward()
    return sum(seen.values()), [p.grad.clone() for p in controlnet.parameters()]


@pytest.mark.parametrize("copied", [False, True])
def test_a_share_of_the_blocks_keeps_less_than_none_and_more_than_all_with_equal_gradients(load_tiny, copied):
    found = []
    for which in (False, 0.3, 0.7, True):
        base = load_tiny("sd15")
        torch.manual_seed(0)
        controlnet = disturbed(build_controlnet(base.denoiser))
        for network in (base.denoiser, controlnet):
            recompute(network, which)
        found.append(kept(base, copy.deepcopy(controlnet) if copied else controlnet))
    sizes = [size for size, _ in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, sizes
    for _, gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0][1]))


def test_blocks_on_the_largest_grids_of_a_unet_come_first(load_tiny):
    unet = load_tiny("sd15").denoiser
    names = {module: name for name, module in unet.named_modules()}
    order = [names[block] for block in blocks_by_grid(unet)]
    last = len(unet.up_blocks) - 1
    assert order[0].startswith("down_blocks.0.") and order[-1].startswith("mid_block.")
    levels = [
        int(n.split(".")[1]) if n.startswith("down") else last - int(n.split(".")[1]) for n in order if n[0] != "m"
    ]
    assert levels == sorted(levels) and f"up_blocks.{last}.resnets.0" in order[: order.index("down_blocks.1.resnets.0")]


def test_every_block_that_diffusers_recomputes_can_be_chosen(load_tiny):
    base = load_tiny("sd15")
    called: list[nn.Module] = []

    def note(block, *inputs):
        called.append(block)
        return block(*inputs)

    controlnet = build_controlnet(base.denoiser)
    for network in (base.denoiser, controlnet):
        network.enable_gradient_checkpointing(note)
    predict(base.denoiser, controlnet, *batch(base))
    known = {*blocks_by_grid(base.denoiser), *blocks_by_grid(controlnet)}
    assert called and set(called) <= known
