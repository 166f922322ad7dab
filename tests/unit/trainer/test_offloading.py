"""Activations in host memory: the same gradients bit for bit, weights and small tensors where they were."""

import copy
import gc
import weakref

import pytest
import torch
from bases import TRANSFORMER_FAMILIES
from inputs import batch, disturbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from controlbooth.models.denoisers.registry import denoiser_of, encode_condition, predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.recomputing import recompute
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import EngineConfig, activation_problems
from controlbooth.trainer.engine.offloading import activations_on_host, keeping_activations

TREE = dict(
    name="t", max_steps=1, global_batch_size=1, micro_batch_size=1,
    model=dict(base="b"), data=dict(shards="s", condition="edges"),
)  # fmt: skip


def gradients_of(network, compute, moved, noted=None, smallest=64):
    """Gradients of a loss. noted: gets the tensors in host memory."""
    network.zero_grad()
    if moved:
        with activations_on_host(network.parameters(), smallest, noted or (lambda host: None)):
            loss = compute()
    else:
        loss = compute()
    loss.backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recomputed", [False, 0.5, True])
def test_a_unets_gradients_are_the_same_bit_for_bit(load_tiny, recomputed):
    base = load_tiny("sd15")
    torch.manual_seed(0)
    controlnet = disturbed(build_controlnet(base.denoiser))
    for network in (base.denoiser, controlnet):
        recompute(network, recomputed)
    hosts: list[torch.Tensor] = []
    both = nn.ModuleList([controlnet, base.denoiser])

    def loss():
        return predict(base.denoiser, controlnet, *batch(base)).square().mean()

    plain = gradients_of(both, loss, moved=False)
    assert all(map(torch.equal, plain, gradients_of(both, loss, moved=True, noted=hosts.append)))
    assert len(hosts) > 10


@pytest.mark.parametrize("family", TRANSFORMER_FAMILIES)
def test_a_transformers_gradients_are_the_same_bit_for_bit(load_tiny, family):
    base = load_tiny(family)
    controlnet = denoiser_of(base.denoiser).file.build_controlnet(base.denoiser, None)
    torch.manual_seed(0)
    disturbed(controlnet, by=0.05)
    both = nn.ModuleList([controlnet, base.denoiser])
    latents, _, text, pixels = batch(base)
    times, condition = torch.tensor([250.0, 800.0]), encode_condition(base, controlnet, pixels)

    def loss():
        return predict(base.denoiser, controlnet, latents, times, text, condition).square().mean()

    hosts: list[torch.Tensor] = []
    plain = gradients_of(both, loss, moved=False)
    assert all(map(torch.equal, plain, gradients_of(both, loss, moved=True, noted=hosts.append)))
    assert len(hosts) > 10


def test_a_storage_is_copied_once_for_all_its_views_and_again_after_it_was_changed():
    x = torch.randn(4, 32, requires_grad=True)
    hosts: list[torch.Tensor] = []
    with activations_on_host([], 64, hosts.append):
        y = x * 1.0
        first, second = y.chunk(2, 1)  # views with strides of the whole
        product = first * second
        assert len(hosts) == 1 and hosts[0].numel() == 4 * 32
        z = (product * product).sum()
        assert len(hosts) == 2
    z.backward()
    expected = x.detach().clone().requires_grad_()
    one, other = (expected * 1.0).chunk(2, 1)
    ((one * other) * (one * other)).sum().backward()
    assert torch.equal(x.grad, expected.grad)

    hosts.clear()
    with activations_on_host([], 64, hosts.append):
        y = torch.ones(64)
        weight = torch.ones(64, requires_grad=True)
        (weight * y).sum()
        y.add_(1.0)
        late = (weight * y).sum()
    assert len(hosts) == 2
    late.backward()
    assert torch.equal(weight.grad, torch.full((64,), 2.0))


def test_weights_and_small_tensors_stay_and_copies_go_with_the_backward_pass():
    layer = nn.Linear(64, 64)
    hosts: list[weakref.ref] = []
    with activations_on_host(layer.parameters(), 1024, lambda host: hosts.append(weakref.ref(host))):
        loss = layer(layer(torch.randn(8, 64))).square().sum()  # inputs of 2,048 bytes: 8 x 64
        layer(torch.randn(1, 64)).sum()  # of 256
    assert len(hosts) == 3 and all(one() is not None for one in hosts)  # the inputs of both, and of the square
    loss.backward()
    gc.collect()
    assert all(one() is None for one in hosts)


def test_what_a_recomputed_block_begins_with_is_moved_and_what_it_computes_again_is_not():
    block = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    hosts: list[torch.Tensor] = []
    with activations_on_host(block.parameters(), 64, hosts.append):
        x = torch.randn(8, 64, requires_grad=True)
        out = checkpoint(block, x * 2, use_reentrant=False)
        assert len(hosts) == 1
    plain = copy.deepcopy(block)
    out.sum().backward()
    plain(x.detach() * 2).sum().backward()
    assert len(hosts) == 1
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(block.parameters(), plain.parameters(), strict=True))


def test_by_default_nothing_is_moved():
    hosts: list[torch.Tensor] = []
    x = torch.randn(2**19, requires_grad=True)
    with keeping_activations(EngineConfig(), nn.Linear(1, 1))():
        loss = x.square().sum()
    with keeping_activations(EngineConfig(activations="cpu"), nn.Linear(1, 1))():
        moved = x.square().sum()
    loss.backward()
    first, x.grad = x.grad, None
    moved.backward()
    assert torch.equal(first, x.grad) and not hosts


def test_settings_under_which_nothing_could_be_moved_are_refused_with_a_remedy():
    for engine, said in (
        (dict(zero_stage=3), "set engine.zero_stage=2, or leave it out"),
        (dict(compile=True), "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=said):
            build_config(TREE | {"engine": engine | {"activations": "cpu"}})
    assert build_config(TREE | {"engine": {"activations": "cpu"}}).engine.activations == "cpu"
    assert [*activation_problems(EngineConfig(activations="cpu"), on_gpu=False)] == [
        "engine.activations=cpu moves what a GPU keeps to the host, and this run is on a CPU: leave it out"
    ]


@pytest.mark.parametrize("value", [0, 1, 2, 1.0, 0.0, "some", "0.5"])
def test_a_share_of_blocks_is_a_number_between_0_and_1(value):
    with pytest.raises(ValueError, match=r"true, false, or a share of the blocks between 0 and 1"):
        build_config(TREE | {"model": dict(base="b", gradient_checkpointing=value)})
    config = build_config(TREE | {"model": dict(base="b", gradient_checkpointing=0.5)})
    assert config.model.gradient_checkpointing == 0.5
