import copy

import pytest
import torch
from torch import nn

from controlbooth.models.lora import (
    ATTENTION,
    CONVOLUTIONS,
    StackedAdamW,
    StackedAdapter,
    adapted_names,
    attach_adapters,
    detached_adapters,
    load_subject,
    reset_subject,
    subject_weights,
)
from controlbooth.trainer.miniature.unet import UNET


def tiny_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    changes = dict(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), cross_attention_dim=32, norm_num_groups=4,
        attention_head_dim=2, addition_embed_type=None, class_embed_type=None,
    )  # fmt: skip
    config = {key: value for key, value in (UNET | changes).items() if not key.startswith("addition")}
    # In double precision, as Adam makes much of the rounding of gradients that are nearly zero.
    return UNet2DConditionModel(**config).eval().double()


def call(unet, x, text):
    return unet(x, torch.full((len(x),), 500), text).sample


def inputs(subjects, rows=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(subjects * rows, 4, 8, 8, generator=generator).double()
    return x, torch.randn(subjects * rows, 5, 32, generator=generator).double()


def begin(unet, layers, subjects, rank=4, ranks=None):
    adapters = attach_adapters(unet, layers, subjects, rank)
    for slot in range(subjects):
        reset_subject(adapters, slot, (ranks or [rank] * subjects)[slot], seed=100 + slot)
    return adapters


def train(unet, adapters, x, text, steps=5, rate=1e-2):
    """steps of a made-up loss, the sum over subjects of their own means."""
    subjects = len(next(iter(adapters.values())).down)
    optimizer = StackedAdamW(adapters)
    norms = []
    for step in range(steps):
        for parameter in optimizer.parameters:
            parameter.grad = None
        call(unet, x, text).square().flatten(1).mean(1).view(subjects, -1).mean(1).sum().backward()
        rates, clips = torch.full((subjects,), rate), torch.full((subjects,), 0.01)
        norms.append(optimizer.step(rates, [step] * subjects, clips)[0])
    return norms


@pytest.mark.parametrize("layers", [ATTENTION, ATTENTION + CONVOLUTIONS])
def test_a_network_is_unchanged_bit_for_bit_before_the_first_update(layers):
    unet = tiny_unet()
    x, text = inputs(3)
    before = call(unet, x, text)
    adapters = begin(unet, layers, 3)
    assert torch.equal(call(unet, x, text), before)
    assert not any(p.requires_grad for name, p in unet.named_parameters() if not name.endswith((".down", ".up")))
    with detached_adapters(unet, adapters):
        assert not any(isinstance(module, StackedAdapter) for module in unet.modules())
    assert sum(isinstance(module, StackedAdapter) for module in unet.modules()) == len(adapters)


@pytest.mark.parametrize("layers", [ATTENTION, ATTENTION + CONVOLUTIONS])
def test_subjects_in_one_batch_learn_as_each_does_alone(layers):
    together = tiny_unet()
    x, text = inputs(3)
    stacked = begin(together, layers, 3)
    norms = train(together, stacked, x, text)
    for slot in range(3):
        alone = tiny_unet()
        single = attach_adapters(alone, layers, 1, 4)
        reset_subject(single, 0, 4, seed=100 + slot)
        own = train(alone, single, x[2 * slot : 2 * slot + 2], text[2 * slot : 2 * slot + 2])
        torch.testing.assert_close([norm[slot] for norm in norms], [norm[0] for norm in own], rtol=1e-4, atol=1e-7)
        ours, theirs = subject_weights(stacked, slot, 4), subject_weights(single, 0, 4)
        assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5
        assert any(theirs[name].abs().max() > 0.01 for name in theirs if "lora_B" in name)


def test_no_gradient_crosses_subjects():
    x, text = inputs(3)
    other = x.clone()
    other[2:4] += 1.0  # the rows of subject 1
    weights = []
    for pictures in (x, other):
        unet = tiny_unet()
        adapters = begin(unet, ATTENTION, 3)
        train(unet, adapters, pictures, text)
        weights.append([subject_weights(adapters, slot, 4) for slot in range(3)])
    for slot in (0, 2):
        assert all(torch.equal(weights[0][slot][name], weights[1][slot][name]) for name in weights[0][slot])
    assert not all(torch.equal(weights[0][1][name], weights[1][1][name]) for name in weights[0][1])


@pytest.mark.parametrize("layers", [ATTENTION, ATTENTION + CONVOLUTIONS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_subject_whose_weights_are_no_numbers_changes_no_bit_of_the_others(layers, value):
    x, text = inputs(3)
    weights = []
    for spoiled in (False, True):
        unet = tiny_unet().float()
        adapters = begin(unet, layers, 3)
        if spoiled:
            for adapter in adapters.values():
                adapter.up[1], adapter.down[1] = value, value
        with torch.enable_grad():
            train(unet, adapters, x.float(), text.float())
        weights.append([subject_weights(adapters, slot, 4) for slot in range(3)])
    for slot in (0, 2):
        assert all(torch.equal(weights[0][slot][name], weights[1][slot][name]) for name in weights[0][slot])


def test_a_smaller_rank_in_a_larger_stack_learns_as_it_does_in_its_own():
    x, text = inputs(2)
    unet = tiny_unet()
    adapters = begin(unet, ATTENTION, 2, rank=4, ranks=[4, 2])
    train(unet, adapters, x, text)
    small = tiny_unet()
    own = attach_adapters(small, ATTENTION, 1, 2)
    reset_subject(own, 0, 2, seed=101)
    train(small, own, x[2:], text[2:])
    ours, theirs = subject_weights(adapters, 1, 2), subject_weights(own, 0, 2)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5
    assert all(not adapter.down[1, 2:].any() and not adapter.up[1, :, 2:].any() for adapter in adapters.values())


def test_an_adapter_is_a_lora_of_the_layer_it_stands_for():
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(6, 5), torch.randn(4, 3, 6)), (nn.Conv2d(6, 5, 3, 2, 1), torch.randn(4, 6, 7, 7))):
        adapter = StackedAdapter(copy.deepcopy(layer), 2, 3)
        nn.init.normal_(adapter.down)
        nn.init.normal_(adapter.up)
        for slot in range(2):
            merged = copy.deepcopy(layer)
            delta = torch.einsum("or,r...->o...", adapter.up[slot].flatten(1), adapter.down[slot])
            merged.weight.data += delta
            rows = slice(2 * slot, 2 * slot + 2)
            torch.testing.assert_close(adapter(x)[rows], merged(x[rows]), rtol=1e-4, atol=1e-5)


def test_the_update_is_that_of_torch():
    unet = tiny_unet()
    adapters = begin(unet, ATTENTION, 2)
    x, text = inputs(2)
    mirror = [
        nn.Parameter(p.detach().clone()) for name in sorted(adapters) for p in (adapters[name].down, adapters[name].up)
    ]
    reference = torch.optim.AdamW(mirror, lr=1e-3, weight_decay=0.1)
    optimizer = StackedAdamW(adapters, weight_decay=0.1)
    for step in range(4):
        for parameter in optimizer.parameters:
            parameter.grad = None
        call(unet, x, text).square().mean().backward()
        for ours, theirs in zip(optimizer.parameters, mirror, strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.step(torch.full((2,), 1e-3), [step] * 2, torch.full((2,), 1e9))
        reference.step()
        for ours, theirs in zip(optimizer.parameters, mirror, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_subject_without_a_finite_gradient_and_an_empty_slot_stay_as_they_are():
    unet = tiny_unet()
    adapters = begin(unet, ATTENTION, 3)
    x, text = inputs(3)
    optimizer = StackedAdamW(adapters)
    before = [subject_weights(adapters, slot, 4) for slot in range(3)]
    poisoned = x.clone()
    poisoned[0] = float("nan")
    call(unet, poisoned, text).square().flatten(1).mean(1).sum().backward()
    norms, moved = optimizer.step(torch.tensor([1e-2, 1e-2, 0.0]), [0, 0, 0], torch.ones(3))
    assert moved.tolist() == [False, True, False] and norms[1:].isfinite().all()
    for slot, same in ((0, True), (1, False), (2, True)):
        after = subject_weights(adapters, slot, 4)
        assert all(torch.equal(after[name], before[slot][name]) for name in after) == same
    assert all(moment[0].abs().max() == 0 for moment in optimizer.first)


def test_a_subject_is_taken_out_and_put_back():
    unet = tiny_unet()
    adapters = begin(unet, ATTENTION, 2)
    x, text = inputs(2)
    train(unet, adapters, x, text)
    weights = subject_weights(adapters, 0, 4)
    reset_subject(adapters, 1, 4, seed=7)
    load_subject(adapters, 1, weights)
    assert all(torch.equal(subject_weights(adapters, 1, 4)[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="other layers: 1 names differ, such as mid"):
        load_subject(adapters, 1, weights | {"mid": x})
    first = next(iter(weights))
    with pytest.raises(ValueError, match="does not fit"):
        load_subject(adapters, 1, weights | {first: torch.zeros(9, 3)})
    up = next(name for name in weights if name.endswith("lora_B.weight"))
    with pytest.raises(ValueError, match="a LoRA of shape .1, 4. does not fit"):  # which would fit all rows
        load_subject(adapters, 1, weights | {up: weights[up][:1]})
    for wrong in (weights[up].to(torch.int32), torch.full_like(weights[up], float("nan"))):
        with pytest.raises(ValueError, match="no finite numbers with a fraction"):
            load_subject(adapters, 1, weights | {up: wrong})


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="UNet2DConditionModel has no layer named to_nothing"):
        adapted_names(tiny_unet(), ["to_nothing"])
