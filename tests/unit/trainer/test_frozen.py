"""A frozen base in fewer bits, or with blocks that are there only while they work: gradients through it on one rank.
What ranks share is in tests/distributed/test_frozen.py."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from controlbooth.data.errors import UserError
from controlbooth.models.blocks import repeated_blocks
from controlbooth.models.quantized import PACKAGES, QuantizedLinear, check_installed, packed_parts, restoring_bytes
from controlbooth.trainer.config.loading import build_config, changes, dump, without_later_fields
from controlbooth.trainer.config.run import EngineConfig, FrozenConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import PriorConfig, SubjectRunConfig, load_run
from controlbooth.trainer.controlnet.build import make_controlnet
from controlbooth.trainer.controlnet.network_check import network_problems
from controlbooth.trainer.controlnet.trial import trial_loss
from controlbooth.trainer.dreambooth.prior import class_folder
from controlbooth.trainer.engine.distributed import Sharing, World, sharing_of
from controlbooth.trainer.engine.frozen import ALIGNED, Block, Supply, own_tensors, places_of
from controlbooth.trainer.planning.footprint import Footprint, LiveStorages, footprint
from controlbooth.trainer.planning.frozen_memory import frozen_memory
from controlbooth.trainer.planning.rank_memory import rank_memory
from controlbooth.trainer.run.base import open_base
from controlbooth.trainer.run.continuing import HOW, CheckpointError, check_same_run, shaping
from controlbooth.trainer.run.frozen import bytes_held, frozen_blocks, hold_base, quantize_encoders
from controlbooth.trainer.run.same_base import base_facts, check_same_base

ONE_RANK = World(0, 1, 0, torch.device("cpu"))
EMPTY = Footprint(
    micro_batch_size=2, frozen_bytes=0, trained_parameters=800, largest_parameter=100, trained_modules=10,
    profile=((0, 0),), encoder_flops=0, training_flops=0, traffic_bytes=0, operations=0, batch_bytes=0, cached_bytes=0,
)  # fmt: skip
FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def run_of(family="sd15", **frozen):
    model = dict(base="b", frozen=frozen) | ({"hint_channels": [4, 8, 8, 16]} if family in ("sd15", "sdxl") else {})
    return build_config(
        dict(
            name="t", max_steps=10, global_batch_size=2, micro_batch_size=2, model=model,
            data=dict(shards="s", condition="canny", resolution=64),
        )
    )  # fmt: skip


def networks(load_tiny, family, **frozen):
    """A base that is held so, and a ControlNet of its whole weights in which nothing is zero any more."""
    config, base = run_of(family, **frozen), load_tiny(family)
    torch.manual_seed(0)
    controlnet = make_controlnet(config, base)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    quantize_encoders(config, base)
    hold_base(config, base, ONE_RANK)
    return config, base, controlnet


def gradients(config, base, controlnet):
    controlnet.zero_grad()
    trial_loss(config, base, controlnet).backward()
    return {name: p.grad.clone() for name, p in controlnet.named_parameters()}


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["engine", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_streamed_blocks_are_those_through_whole_ones(load_tiny, family, precision, checkpointing):
    whole, streamed = (networks(load_tiny, family, precision=precision, stream=stream) for stream in ("none", "cpu"))
    if checkpointing:
        for network in streamed[1:]:
            getattr(network, "denoiser", network).enable_gradient_checkpointing()
    expected = gradients(*whole)
    assert flat(expected).norm() > 0
    for _ in range(3):  # from the second one on blocks are fetched ahead
        found = gradients(*streamed)
        assert all(torch.equal(found[name], one) for name, one in expected.items())
        with torch.no_grad():
            assert torch.equal(trial_loss(*streamed), trial_loss(*whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_than_two_blocks_are_here_at_once_and_none_after_a_step(load_tiny, family):
    streamed = networks(load_tiny, family, stream="cpu")
    blocks = frozen_blocks(streamed[1].denoiser)
    for _ in range(2):
        gradients(*streamed)
        assert blocks.supply.live == 0 and all(block.storage.nbytes() == 0 for block in blocks.blocks)
    pairs = zip(blocks.order, blocks.order[1:], strict=False)
    assert len(blocks.order) == len(blocks.blocks) == len(repeated_blocks(streamed[1].denoiser))
    assert blocks.supply.most == max(one.size + other.size for one, other in pairs)


def test_all_bytes_of_a_block_are_where_they_were(load_tiny):
    base, whole = load_tiny("sd3"), load_tiny("sd3")
    hold_base(run_of("sd3", stream="cpu"), base, ONE_RANK)
    for block in frozen_blocks(base.denoiser).blocks:
        block.wait()
    state = base.denoiser.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.denoiser.state_dict().items())
    assert all(tensor.data_ptr() % 32 == 0 for one in repeated_blocks(base.denoiser) for tensor in own_tensors(one))


def test_each_of_two_ranks_keeps_half_of_the_bytes_of_each_block(load_tiny):
    whole = Block(repeated_blocks(load_tiny("flux").denoiser)[0], Supply(ONE_RANK.device, None, True))
    halves = [
        Block(repeated_blocks(load_tiny("flux").denoiser)[0], Supply(ONE_RANK.device, Sharing(None, rank, 2), True))
        for rank in (0, 1)
    ]
    assert [half.kept.nbytes for half in halves] == [halves[0].size // 2] * 2
    assert torch.equal(torch.cat([half.kept for half in halves])[: whole.size], whole.kept)


def test_places_are_aligned_and_all_of_them_divide_among_ranks():
    places, end = places_of([1, 300, 256], ranks=3)
    assert places == [0, ALIGNED, 3 * ALIGNED] and end == 6 * ALIGNED


AGREEMENT = {"bf16": 0.9999, "int8": 0.999, "fp8": 0.99, "nf4": 0.9}
"""Least cosines of the gradients of all trained weights. Of these tiny bases of random weights they were .99996, .9998,
.990 and .940 or more, relative errors of .012, .022, .14 and .42: widths of 16 leave little to average over."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", AGREEMENT)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_a_base_in_fewer_bits_point_where_those_through_a_whole_one_do(load_tiny, family, precision):
    whole, fewer = networks(load_tiny, family), networks(load_tiny, family, precision=precision)
    one, other = flat(gradients(*whole)), flat(gradients(*fewer))
    cosine = torch.cosine_similarity(one, other, dim=0)
    print(f"{family} {precision}: cosine {cosine:.6f}, relative error {(one - other).norm() / one.norm():.4f}")
    assert AGREEMENT[precision] < cosine < 1.0


@pytest.mark.parametrize("precision", AGREEMENT)
def test_a_packed_weight_has_the_bytes_that_are_planned(precision):
    layer = QuantizedLinear(nn.Linear(100, 48), precision)
    assert sum(part.nbytes for part in layer.buffers()) == sum(packed_parts(48, 100, precision))
    live = LiveStorages()
    live.ignore([*layer.buffers(), *layer.parameters()])
    with live:
        weight = layer.weight
    assert weight.shape == (48, 100) and weight.dtype == torch.float32
    most = max(held for held, _ in live.moments)
    assert most == pytest.approx(restoring_bytes(4800, precision, 4), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "frozen", [dict(stream="cpu"), dict(precision="int8", stream="cpu"), dict(precision="nf4", shards="node")], ids=str
)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_plan_has_the_bytes_that_a_base_takes(load_tiny, base_folder, family, frozen):
    config = run_of(family, **frozen)
    own = {"base": str(base_folder(family))} | ({"text_tokens": 20} if family == "flux" else {})
    config = config.model_copy(update={"model": config.model.model_copy(update=own)})
    one = footprint(config, "fp32", 2, "flash")
    _, base, controlnet = networks(load_tiny, family, **frozen)
    for _ in range(2):  # from the second pass on the next block is fetched ahead
        gradients(config, base, controlnet)
    planned = frozen_memory(one, config.model.frozen, 1)
    held_now = [bytes_held(network) for network in (base.denoiser, base.vae, *base.text_encoders)]
    fixed = sum(tensor.nbytes for tensor in controlnet.buffers())
    assert planned.device + planned.host == sum(kept for kept, _ in held_now) + fixed
    assert planned.passing - one.restoring_bytes == max(most for _, most in held_now)


def test_a_split_and_streamed_base_is_planned_by_its_share_and_two_blocks():
    one = replace(
        EMPTY, frozen_bytes=1000, denoiser_blocks=((100, 128), (200, 256), (50, 64)), encoder_blocks=((30, 64),),
        restoring_bytes=7,
    )  # fmt: skip
    split, streamed, both = (
        frozen_memory(one, FrozenConfig(**held), 2)
        for held in (dict(shards="node"), dict(stream="cpu"), dict(shards="world", stream="cpu"))
    )
    assert (split.device, split.passing, split.host) == (1000 - 350 + 224, 128 + 256 + 7, 0)
    assert (streamed.device, streamed.passing, streamed.host) == (1000 - 380, 128 + 256 + 7, 448 + 64)
    assert (both.device, both.passing, both.host) == (1000 - 380, 384 + 192 + 7, 224 + 64)
    assert frozen_memory(one, FrozenConfig(shards="node"), 1).device == 1000  # a rank alone has it whole


def test_a_rank_has_a_split_base_once_and_gathered_blocks_in_its_passes_alone():
    one = replace(EMPTY, frozen_bytes=1000, denoiser_blocks=((400, 400), (400, 400)), profile=((9000, 0), (0, 3200)))
    memory = rank_memory(one, EngineConfig(), "fp32", 2, "cuda", frozen=FrozenConfig(shards="node"), sharers=2)
    assert memory.moment == "backward" and memory.device["frozen weights"] == 1000 - 400 + 800
    calm = replace(one, profile=((0, 0), (0, 3200)), largest_parameter=0, denoiser_blocks=((4, 4), (4, 4)))
    memory = rank_memory(calm, EngineConfig(), "fp32", 2, "cuda", frozen=FrozenConfig(stream="cpu"))
    assert memory.host["frozen weights"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=dict(frozen=dict(precision="int8"), unlock_decoder_at=5)), "trains its decoder: leave one of them"),
        (dict(model=dict(frozen=dict(stream="cpu")), engine=dict(compile=True)), "engine.compile=true is for a base"),
        (dict(model=dict(frozen=dict(precision="int4"))), "'model.frozen.precision' is 'int4'"),
        (dict(model=dict(frozen=dict(shard="node"))), "did you mean 'model.frozen.shards'?"),
    ],
)
def test_what_a_frozen_base_cannot_be_is_refused_with_what_to_do(changes, message):
    tree = dict(name="t", max_steps=10, global_batch_size=2, micro_batch_size=2)
    tree |= dict(data=dict(shards="s", condition="canny")) | changes
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config(tree | {"model": dict(base="b") | tree["model"]})


@pytest.mark.parametrize(
    ("method", "frozen", "message"),
    [
        (
            "full",
            dict(precision="int8"),
            "model.frozen.precision=int8 is for a base that stays frozen",
        ),
        ("full", dict(stream="cpu"), "model.frozen.stream=cpu is for a base that stays frozen"),
        ("lora", dict(shards="node"), "model.frozen.shards=node is for ControlNets: ranks that share blocks"),
    ],
)
def test_what_the_base_of_subjects_cannot_be_is_refused_with_what_to_do(tmp_path, method, frozen, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dict(name="s", method=method, model=dict(base="b", frozen=frozen))))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(path)


def test_a_run_of_subjects_is_of_the_precision_in_which_its_base_is_held(base_folder):
    """Adapters learn around what is rounded, and class pictures are drawn by it."""
    whole, packed, other = (
        open_base(
            SubjectRunConfig.model_validate(
                dict(
                    name="s", resolution=64, model=dict(base=str(base_folder("sd15")), frozen=dict(precision=precision))
                )
            ),
            torch.float32,
            "meta",
        )
        for precision in ("engine", "int8", "nf4")
    )
    for before, now in ((whole, packed), (packed, whole), (packed, other)):
        with pytest.raises(ConfigError, match=r"the base's model.frozen.precision was \w+ when it began and is \w+"):
            check_same_base(base_facts(before), now, "when it began", "Put it back")
    check_same_base(base_facts(packed), packed, "", "")
    folders = {
        class_folder(Path(), base, "a d", PriorConfig(guidance_scale=1.0), 64) for base in (whole, packed, other)
    }
    assert len(folders) == 3


@pytest.mark.parametrize("precision", sorted(PACKAGES))
def test_a_missing_package_is_named_with_the_line_that_installs_it(precision, monkeypatch):
    monkeypatch.setattr("controlbooth.models.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('pip install "controlbooth[quantized]"')):
        check_installed(precision)
    check_installed("bf16")
    assert any("[quantized]" in line for line in network_problems(run_of(precision=precision)))


def test_a_run_keeps_its_precision_and_may_change_where_its_blocks_are(tmp_path):
    saved, other = run_of(precision="int8"), run_of(precision="int8", shards="node", stream="cpu")
    (tmp_path / "config.yaml").write_text(dump(saved))
    check_same_run({}, {"model": shaping(other)}, tmp_path)
    with pytest.raises(CheckpointError, match="model.frozen.precision 'int8', and this run has 'nf4'"):
        check_same_run({}, {"model": shaping(run_of(precision="nf4"))}, tmp_path)
    changed = changes(dump(saved), dump(other))
    assert changed == ["model.frozen.shards: none -> node", "model.frozen.stream: none -> cpu"]
    assert all(change.startswith(HOW) for change in changed)


def test_a_run_of_a_version_without_the_section_goes_on_as_it_was_and_in_no_other_precision(tmp_path):
    tree = run_of().model_dump(mode="json")
    del tree["model"]["frozen"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    check_same_run({}, {"model": shaping(run_of())}, tmp_path)
    with pytest.raises(CheckpointError, match="model.frozen.precision 'engine', and this run has 'int8'"):
        check_same_run({}, {"model": shaping(run_of(precision="int8"))}, tmp_path)
    assert changes(yaml.safe_dump(tree), dump(run_of())) == []
    assert "frozen" not in without_later_fields(run_of().model_dump(mode="json"))["model"]
    assert "frozen" in without_later_fields(run_of(stream="cpu").model_dump(mode="json"))["model"]


def test_nodes_with_unequal_ranks_are_told_to_split_over_all():
    with pytest.raises(UserError, match="set model.frozen.shards=world"):
        sharing_of(World(0, 5, 0, torch.device("cpu"), ranks_per_node=2), "node")
