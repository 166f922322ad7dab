"""The plan's categories against sizes that are counted by hand, and its arithmetic."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from controlbooth.launch.commands.plan import main
from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.denoisers.transformer_copy import fixed_tensors
from controlbooth.models.families import FAMILIES, identify
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import EngineConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.planning import choices
from controlbooth.trainer.planning.accelerators import ACCELERATORS, Layout, accelerator, is_card
from controlbooth.trainer.planning.calibration import (
    SHIPPED,
    config_of_row,
    nearest,
    planned_facts,
    read_rows,
    rows_for,
)
from controlbooth.trainer.planning.footprint import (
    PRODUCTS,
    Footprint,
    LiveStorages,
    footprint,
    scaled,
    shapes_of,
    without_memory,
    worst_moments,
)
from controlbooth.trainer.planning.rank_memory import BUCKET_ELEMENTS, RUNTIME_BYTES, ZERO_BYTES, rank_memory
from controlbooth.trainer.planning.report import (
    assumption_lines,
    curve_lines,
    memory_lines,
    recommendation_lines,
    saving_lines,
)
from controlbooth.trainer.planning.scaling import (
    COUNTERS,
    GLOO_HOP_SECONDS,
    HOP_SECONDS,
    NETWORK,
    Data,
    communication_bytes,
    communication_seconds,
    first_limits,
    scaling_curve,
    step_time,
)
from controlbooth.trainer.planning.speed import GATHER_SECONDS, Speed, fitted_speed, micro_batch_seconds

H100 = ACCELERATORS["h100"]
ONE = Footprint(
    micro_batch_size=2,
    frozen_bytes=1000,
    trained_parameters=800,
    largest_parameter=100,
    trained_modules=10,
    profile=((5000, 0), (3000, 1600), (0, 3200)),
    encoder_flops=10**9,
    training_flops=10**10,
    traffic_bytes=10**8,
    operations=100,
    batch_bytes=64,
    cached_bytes=0,
)
"""A step in fp32 of round numbers."""
SPEED = Speed(device=1.0, launch_seconds=1e-5)


@pytest.fixture(scope="module", autouse=True)
def each_step_once():
    """Follows each step on fake tensors once for all tests of this file: it takes seconds, and is the same again."""
    follow, found = footprint, {}

    def once(config, *arguments, **options):
        asked = config.model_dump_json(), arguments, *options.items()
        if asked not in found:
            found[asked] = follow(config, *arguments, **options)
        return found[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "footprint", once)
        patch.setitem(globals(), "footprint", once)
        yield


@pytest.fixture(scope="module")
def bases(base_folder, tmp_path_factory):
    """A folder with tiny bases by family."""
    folder = tmp_path_factory.mktemp("bases")
    for family in ("sd15", "sdxl", "miniature", "sd3", "flux"):
        (folder / family).symlink_to(base_folder(family))
    return folder


def run(folder, **changes):
    tree = dict(
        name="planned",
        output=str(folder / "runs"),
        max_steps=1000,
        global_batch_size=64,
        micro_batch_size=2,
        model=dict(base=str(folder / "sd15"), hint_channels=[4, 4, 4, 4]),
        data=dict(shards=str(folder / "none"), condition="edges", resolution=32),
        engine=dict(precision="fp32"),
    )
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    return build_config(tree)


def real_base(path):
    from controlbooth.models.pretrained import load_base

    return load_base(path)


def run_on(bases, family, **model):
    """A run on one of the tiny bases, without what only U-Nets know."""
    config = run(bases, model=dict(base=str(bases / family)))
    if FAMILIES[family].is_transformer:
        model = {"hint_channels": type(config.model).model_fields["hint_channels"].default, "text_tokens": 20} | model
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "miniature", "sd3", "flux"])
def test_planned_weights_are_those_of_the_real_modules(bases, family):
    from controlbooth.trainer.controlnet.build import make_controlnet

    config = run_on(bases, family)
    base = real_base(bases / family)
    one = footprint(config, "fp32", 2, "flash")
    controlnet = make_controlnet(config, base)
    modules = [base.denoiser, base.vae, *base.text_encoders]
    held = [*controlnet.buffers(), *(t for m in modules for t in (*m.parameters(), *m.buffers()))]
    held = {t.data_ptr(): t for t in held}.values()  # T5's embedding has two names, and one memory
    assert one.frozen_bytes == sum(t.numel() * t.element_size() for t in held)
    assert one.host_bytes == sum(t.nbytes for t in fixed_tensors(controlnet).values())
    assert (one.host_bytes > 0) == (family == "sd3")  # its table of places, and a block's text side
    assert one.trained_parameters == sum(p.numel() for p in controlnet.parameters())
    assert one.profile[-1][1] == 4 * one.trained_parameters


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "miniature", "flux"])
def test_of_a_control_lora_the_weights_that_it_shares_with_its_base_are_planned_once(bases, family):
    from controlbooth.trainer.controlnet.build import make_controlnet

    config = run_on(bases, family, method="lora", rank=3)
    whole, small = (footprint(one, "fp32", 2, "flash") for one in (run_on(bases, family), config))
    controlnet = make_controlnet(config, real_base(bases / family))
    assert small.frozen_bytes == whole.frozen_bytes
    assert small.trained_parameters == count(controlnet.parameters()) < whole.trained_parameters
    assert small.profile[-1][1] == 4 * small.trained_parameters


@pytest.mark.slow
def test_activations_and_work_grow_with_the_micro_batch_and_gradients_do_not(bases):
    config = run(bases)
    one, four = (footprint(config, "fp32", size, "flash") for size in (1, 4))
    larger = scaled(one, 4)
    assert larger.activation_bytes == pytest.approx(four.activation_bytes, rel=0.02)
    assert larger.training_flops == four.training_flops and larger.encoder_flops == four.encoder_flops
    assert larger.profile[-1][1] == four.profile[-1][1] == 4 * one.trained_parameters


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less_and_computes_more(bases):
    config = run(bases, data=dict(latent_cache="latents"))
    cheap = run(bases, data=dict(latent_cache="latents"), model=dict(gradient_checkpointing=True))
    plain, recomputed = (footprint(one, "fp32", 4, "flash") for one in (config, cheap))
    assert recomputed.activation_bytes < plain.activation_bytes
    assert recomputed.training_flops > 1.1 * plain.training_flops


@pytest.mark.slow
def test_a_latent_cache_leaves_the_encoders_out_of_the_work_and_not_out_of_the_memory(bases):
    online, cached = footprint(run(bases), "fp32", 2, "flash"), None
    cached = footprint(run(bases, data=dict(latent_cache="latents")), "fp32", 2, "flash")
    assert online.encoder_flops > 0 and cached.encoder_flops == 0
    assert cached.training_flops == online.training_flops
    assert (
        online.cached_bytes == 0
    )  # a cache holds mean and deviation, 4 channels of 4 x 4, and 12 tokens of 16 numbers
    assert cached.cached_bytes == 2 * 4 * (2 * 4 * 4 * 4 + 12 * 16)
    assert cached.frozen_bytes == online.frozen_bytes


@pytest.mark.slow
def test_attention_that_keeps_scores_takes_more_memory(bases):
    config = run(bases, data=dict(latent_cache="latents", resolution=64))
    flash, math = (footprint(config, "fp32", 2, kernel) for kernel in ("flash", "math"))
    assert math.activation_bytes > flash.activation_bytes


def test_the_published_shapes_are_planned_without_weights(bases):
    config = run(bases, model=dict(base="nowhere", family="sd15", hint_channels=[16, 32, 96, 256]))
    _, controlnet = shapes_of(config, "bf16")
    assert sum(p.numel() for p in controlnet.parameters()) == 361_279_120
    _, controlnet = shapes_of(config, "bf16", shapes="sdxl")
    assert sum(p.numel() for p in controlnet.parameters()) == 1_251_014_160


TEXT = {"CLIP-L": 123_650_304, "bigG": 694_659_840, "T5": 4_762_310_656}
"""Parameters of text encoders, two of them with projections."""
TRANSFORMERS = [
    ("sd3-medium", 2_028_328_000, 1_062_855_168, ["CLIP-L", "bigG", "T5"], 192),
    ("sd35-medium", 2_243_171_520, 1_261_169_664, ["CLIP-L", "bigG", "T5"], 384),
    ("sd35-large", 8_056_627_520, 2_654_723_200, ["CLIP-L", "bigG", "T5"], 192),
    ("flux-dev", 11_901_408_320, 2_046_461_952, ["CLIP-L", "T5"], 0),
]


@pytest.mark.parametrize(("shapes", "transformer", "controlnet", "encoders", "places"), TRANSFORMERS)
def test_published_transformers_have_the_parameters_that_they_are_known_for(
    bases, shapes, transformer, controlnet, encoders, places
):
    base, trained = shapes_of(run_on(bases, "flux", text_tokens=None), "bf16", shapes)
    named = dict(base.denoiser.config) | {"_class_name": type(base.denoiser).__name__}
    assert base.family is FAMILIES[PUBLISHED[shapes].family] and identify(named) is base.family
    assert count(base.denoiser.parameters()) == transformer
    assert count(base.denoiser.buffers()) == places**2 * PUBLISHED[shapes].denoiser.get("caption_projection_dim", 0)
    assert count(trained.parameters()) + count(trained.buffers()) - count(base.denoiser.buffers()) == controlnet
    assert count(base.vae.parameters()) == 83_819_683 and base.latent_channels == 16
    projection = 768 * 768 if base.family.name == "flux" else 0  # of which FLUX.1 does without
    assert [count(one.parameters()) for one in base.text_encoders] == [
        TEXT[encoders[0]] - projection,
        *(TEXT[name] for name in encoders[1:]),
    ]
    assert base.text_tokens == {"sd3": 256, "flux": 512}[base.family.name]
    assert all(one.model_max_length == 77 for one in base.tokenizers[:-1])
    check_parts_fit_together(base)


def count(tensors):
    return sum(one.numel() for one in tensors)


def check_parts_fit_together(base):
    """As a real base is checked, but for the words of tokenizers, which are none here."""
    config = base.denoiser.config
    clips = [one.config for one in base.text_encoders[:-1]]
    assert base.text_encoders[-1].config.d_model == config["joint_attention_dim"]
    pooled = sum(one.projection_dim if base.family.name == "sd3" else one.hidden_size for one in clips)
    assert pooled == config["pooled_projection_dim"]
    assert base.pixel_multiple == 16 and base.picture_size == (1024, 1024)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_under_gradient_checkpointing_keep_less_and_compute_more(bases, family):
    plain, recomputed = (
        footprint(run_on(bases, family, gradient_checkpointing=cheap), "fp32", 4, "flash") for cheap in (False, True)
    )
    assert recomputed.activation_bytes < 0.7 * plain.activation_bytes
    assert 1.1 * plain.training_flops < recomputed.training_flops < 1.5 * plain.training_flops
    assert recomputed.trained_parameters == plain.trained_parameters


def test_a_latent_cache_has_the_latents_of_conditions_too_where_they_enter_as_such(bases):
    online = run_on(bases, "sd3")
    cached = online.model_copy(update={"data": online.data.model_copy(update={"latent_cache": "latents"})})
    one, other = (footprint(config, "fp32", 2, "flash") for config in (online, cached))
    assert 0 == other.encoder_flops < one.encoder_flops
    assert other.training_flops == one.training_flops
    states, pooled = 12 + 20, 16 + 24  # of CLIP and T5, 48 numbers each; 4 channels of 4 x 4
    assert other.cached_bytes == 2 * 4 * (3 * 4 * 4 * 4 + states * 48 + pooled)


def test_sd3_without_t5_holds_as_much_less(bases):
    whole, without = (footprint(run_on(bases, "sd3", t5=t5), "fp32", 2, "flash") for t5 in (True, False))
    t5 = real_base(bases / "sd3").text_encoders[2]
    assert whole.frozen_bytes - without.frozen_bytes == 4 * count(t5.parameters())
    assert whole.training_flops == without.training_flops


def test_the_number_of_copied_blocks_is_the_runs(bases):
    few, many = (shapes_of(run_on(bases, "flux", copied_blocks=one), "bf16")[1] for one in ((1, 0), (2, 2)))
    assert count(few.parameters()) < count(many.parameters())


def test_what_a_run_on_a_transformer_would_refuse_its_plan_refuses(bases):
    with pytest.raises(ValueError, match="T5, a text encoder of Stable Diffusion 3, overflows in fp16"):
        shapes_of(run_on(bases, "sd3"), "fp16")
    with pytest.raises(ValueError, match="model.trainable_copy=lite is for a U-Net, and the base is FLUX.1-dev"):
        shapes_of(run_on(bases, "flux", trainable_copy="lite"), "bf16")
    with pytest.raises(
        ValueError, match="model.method=lora is for a U-Net or FLUX.1 .*, and the base is Stable Diffusion 3"
    ):
        shapes_of(run_on(bases, "sd3", method="lora"), "bf16")
    odd = run_on(bases, "sd3")
    odd = odd.model_copy(update={"data": odd.data.model_copy(update={"resolution": 40})})
    with pytest.raises(ValueError, match="data.resolution=40 is not a multiple of 16"):
        shapes_of(odd, "bf16")


def test_a_transformer_is_planned_by_rows_of_u_nets_and_its_own_are_told_from_theirs(bases):
    config = run_on(bases, "sd3", copied_blocks=(2,))
    planned = planned_facts(config, "bf16", 2)
    assert planned["family"] == "sd3" and planned_facts(config, "bf16", 2, "sd35-large")["family"] == "sd35-large"
    other, shapes = config_of_row(config, planned | {"family": "sd15"})
    assert shapes == "sd15" and other.model.copied_blocks is None
    same, shapes = config_of_row(config, planned)
    assert shapes is None and same.model.copied_blocks == (2,)
    with pytest.raises(ConfigError, match="a row is of the family flux, of which only the run's own base"):
        config_of_row(config, planned | {"family": "flux"})
    plan = choices.make_plan(config, Layout(H100, 1, 1))
    assert "a base of sd15 (planned: a base of sd3)" in "\n".join(assumption_lines(plan))


def test_a_base_that_is_not_here_and_of_no_family_says_how_to_plan_it(bases):
    config = run(bases, model=dict(base="nowhere", hint_channels=[4, 4, 4, 4]))
    with pytest.raises(ConfigError, match="--shapes sd15 or sd21 or sdxl"):
        shapes_of(config, "bf16")


def test_operations_of_a_convolution_and_a_linear_layer_are_those_of_the_formula():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5, bias=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(net)
        with LiveStorages() as live:
            net(torch.zeros(2, 3, 6, 6)).sum().backward()
    convolution, linear = 2 * 2 * 36 * 8 * 3 * 9, 2 * 2 * 8 * 36 * 5
    # forward; backward by the weights; and by the inputs, which the picture does not need
    assert live.flops == 2 * convolution + 3 * linear


def test_only_what_runs_a_kernel_is_an_operation():
    net = nn.Sequential(nn.Linear(4, 5), nn.SiLU())
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(net)
        inputs = torch.zeros(2, 4)
        with LiveStorages() as live:
            net(inputs).sum().backward()  # a product, SiLU, a sum; 1; and backwards SiLU, a product, the bias's sum
    assert live.operations == 7
    outputs, all_in_fp32 = 2 * 5, 4
    silu, total, one, silu_backward, bias = 2 * outputs, outputs + 1, 2, 3 * outputs, outputs + 5
    assert live.traffic == all_in_fp32 * (silu + total + one + silu_backward + bias)


def test_questions_views_and_allocations_are_no_operations():
    with FakeTensorMode():
        one = torch.zeros(4, 6)
        with LiveStorages() as live:
            _ = one.device, one.size(), one.stride(), one.is_contiguous(), one.numel()
            one.view(24).t().detach().unsqueeze(0).expand(3, 24)
            torch.ops.aten._unsafe_view(one, [24])
            torch.empty(5), torch.empty_like(one), one.new_empty(3)
            one.squeeze_()
            assert (live.operations, live.traffic, live.flops) == (0, 0, 0)
            one.add_(1)
            one.clone()
    assert live.operations == 2 and live.traffic == (2 + 2) * one.nbytes


def test_products_are_counted_as_pytorchs_counter_does_and_attention_besides():
    query, key = (torch.zeros(2, 4, tokens, 8, requires_grad=True) for tokens in (16, 12))
    forward = 2 * 2 * (2 * 4 * 16 * 12 * 8)  # two products of batch, heads, queries, keys and width
    with LiveStorages() as live:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, key)
        assert live.flops == forward
        attended.sum().backward()
    assert live.flops == 3 * forward
    assert flop_registry.keys() < PRODUCTS.keys()


def test_what_is_computed_again_under_checkpointing_is_held_for_one_block_only():
    def peak(checkpointing):
        blocks = [nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(4))) for _ in range(8)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            for block in blocks:
                without_memory(block)
            inputs = torch.zeros(512, 64, requires_grad=True)
            with LiveStorages() as live:
                live.ignore([inputs, *(p for block in blocks for p in block.parameters())])
                hidden = inputs
                for block in blocks:
                    hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointing else block(hidden)
                hidden.sum().backward()
        return max(held for held, _ in live.moments) / inputs.nbytes, live.flops

    (plain, once), (recomputed, again) = peak(False), peak(True)
    assert plain > 8 * 2 * 4  # each layer keeps its input, and what SiLU needs
    assert recomputed < 8 + 2 * 4 + 4  # the blocks' inputs, and one block
    assert again == pytest.approx(once * 4 / 3)


def test_storages_are_followed_from_their_making_to_their_end():
    with FakeTensorMode(), LiveStorages() as live:
        kept = torch.zeros(100)
        view = kept.view(10, 10)
        assert live.live == 400
        torch.zeros(1000).add_(1)
        assert live.live == 400
        del kept
        assert live.live == 400  # the view holds it
        del view
    assert live.live == 0
    assert max(bytes_ for bytes_, _ in live.moments) == 4400


def test_only_moments_that_nothing_exceeds_are_kept():
    assert worst_moments([(1, 0), (5, 0), (3, 2), (2, 2), (4, 1), (0, 3)]) == ((5, 0), (4, 1), (3, 2), (0, 3))


def parts(stage, ranks, precision="fp32", kind="cpu", **engine):
    memory = rank_memory(ONE, EngineConfig(zero_stage=stage, **engine), precision, ranks, kind)
    return memory.device


def test_each_stage_splits_what_it_says_over_the_ranks():
    for stage, weights, optimizer in ((0, 3200, 6400), (1, 3200, 2400), (2, 3200, 2400), (3, 800, 2400)):
        device = parts(stage, 4)
        assert device["trained weights"] == weights and device["optimizer"] == optimizer
        assert device["frozen weights"] == 1000
    assert parts(0, 4)["runtime"] == RUNTIME_BYTES["cpu"]
    assert parts(2, 4)["runtime"] == RUNTIME_BYTES["cpu"] + ZERO_BYTES["cpu"]


def test_masters_exist_beside_half_precision_weights_only():
    assert parts(0, 1)["optimizer"] == 8 * 800
    assert parts(0, 1, "bf16")["optimizer"] == (4 + 8) * 800
    assert parts(2, 4, "bf16")["trained weights"] == 2 * 800


def test_the_peak_is_the_worst_of_three_moments():
    many = rank_memory(ONE, EngineConfig(zero_stage=0), "fp32", 1, "cuda")
    assert many.moment == "reduction"  # weights 3200, Adam 6400, gradients 3200 and their flat copy 3200
    assert many.peak == 1000 + 3200 + 6400 + 3200 + 3200
    heavy = replace(ONE, profile=((50_000, 0), (0, 3200)))
    assert rank_memory(heavy, EngineConfig(zero_stage=0), "fp32", 1, "cuda").moment == "backward"


def test_flat_gradients_are_there_always_and_need_nothing_besides_on_a_card():
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            device = parts(stage, 4, precision)
            assert device["gradients"] == 4 * 800 + (4 if precision == "fp32" else 2) * 100  # and the one being added
            assert device["communication"] == 0 and device["activations"] == 5000
    light = replace(ONE, profile=((10, 0), (0, 3200)))
    on_cpu, on_card = (rank_memory(light, EngineConfig(), "fp32", 2, kind).device for kind in ("cpu", "cuda"))
    assert on_cpu["communication"] == 4 * 800 and on_card["communication"] == 0  # gloo reduces a copy


def of_many_parameters(activations, width=4):
    total = BUCKET_ELEMENTS + 1000
    profile = ((activations, 0), (0, width * total))
    return replace(ONE, trained_parameters=total, largest_parameter=100, profile=profile)


def test_a_cpu_keeps_the_memory_of_activations_beside_a_bucket_and_a_card_does_not():
    heavy = of_many_parameters(10**11)
    cpu, card = (rank_memory(heavy, EngineConfig(zero_stage=2), "fp32", 4, kind) for kind in ("cpu", "cuda"))
    assert cpu.moment == "reduction" and cpu.device["activations"] == heavy.activation_bytes
    assert cpu.device["communication"] == 2 * 4 * BUCKET_ELEMENTS
    assert card.device["activations"] in (heavy.activation_bytes, 0)
    heavy = replace(ONE, profile=((50_000, 0), (0, 3200)))
    alone = rank_memory(heavy, EngineConfig(zero_stage=0), "fp32", 4, "cpu")  # single gradients fit into what is free
    assert alone.device["activations"] + alone.device["gradients"] == 50_000


def test_a_bucket_is_allocated_whole_on_a_card_and_touched_in_part_on_a_cpu():
    one = of_many_parameters(0, width=2)
    assert (
        rank_memory(one, EngineConfig(zero_stage=2), "bf16", 2, "cuda").device["communication"] >= 2 * BUCKET_ELEMENTS
    )
    assert parts(3, 2, kind="cuda")["communication"] >= 4 * BUCKET_ELEMENTS
    assert parts(3, 2, kind="cpu")["communication"] <= 3 * 4 * 800


def test_offload_moves_optimizer_states_to_the_host_and_nothing_is_lost():
    plain = rank_memory(ONE, EngineConfig(zero_stage=2), "bf16", 4, "cuda")
    moved = rank_memory(ONE, EngineConfig(zero_stage=2, offload_optimizer=True), "bf16", 4, "cuda")
    assert plain.device["optimizer"] == moved.host["optimizer"] == 12 * 200
    assert moved.device["optimizer"] == 0 and plain.host["optimizer"] == 0


@settings(max_examples=60, deadline=None)
@given(
    parameters=st.integers(1000, 2 * 10**9),
    activations=st.integers(0, 10**11),
    ranks=st.sampled_from([1, 2, 4, 8, 64]),
    stage=st.integers(0, 3),
    precision=st.sampled_from(["fp32", "bf16"]),
    kind=st.sampled_from(["cpu", "cuda"]),
)
def test_more_of_anything_never_takes_less_memory_and_more_ranks_never_more(
    parameters, activations, ranks, stage, precision, kind
):
    width = 4 if precision == "fp32" else 2

    def peak(total, held, world):
        profile = ((held, 0), (held // 2, width * (total // 2)), (0, width * total))
        one = replace(ONE, trained_parameters=total, largest_parameter=100, profile=profile)
        return rank_memory(one, EngineConfig(zero_stage=stage), precision, world, kind).peak

    here = peak(parameters, activations, ranks)
    assert peak(parameters, activations + 10**6, ranks) >= here
    assert peak(parameters * 2, activations, ranks) >= here
    if ranks > 1 or stage == 0:  # alone there is nothing to gather, nor to add up in fp32
        assert peak(parameters, activations, 2 * ranks) <= here + 4 * 2 * ranks


def test_one_measured_micro_batch_makes_host_and_device_slower_alike():
    for card in (H100, replace(H100, kind="cpu")):
        speed = fitted_speed([(ONE, 1.0)], card, "bf16", SPEED)
        assert micro_batch_seconds(ONE, card, "bf16", speed) == pytest.approx(1.0)
        assert speed.device / SPEED.device == pytest.approx(speed.launch_seconds / SPEED.launch_seconds)


@settings(max_examples=50, deadline=None)
@given(device=st.floats(1.0, 20.0), launch=st.floats(1e-6, 1e-3), sizes=st.sets(st.integers(1, 64), min_size=2))
def test_measured_micro_batches_of_several_sizes_tell_host_from_device(device, launch, sizes):
    true = Speed(device, launch)
    steps = [(scaled(ONE, size), micro_batch_seconds(scaled(ONE, size), H100, "bf16", true)) for size in sizes]
    found = fitted_speed(steps, H100, "bf16", SPEED)
    seconds = [micro_batch_seconds(one, H100, "bf16", found) for one, _ in steps]
    assert seconds == pytest.approx([measured for _, measured in steps], rel=1e-6)


def test_no_device_is_fitted_to_be_faster_than_computed_and_no_host_to_take_less_than_nothing():
    one, eight = scaled(ONE, 1), scaled(ONE, 8)
    flat = fitted_speed([(one, 1.0), (eight, 1.0)], H100, "bf16", SPEED)
    assert flat.device == 1.0 and micro_batch_seconds(one, H100, "bf16", flat) == pytest.approx(1.0, rel=1e-3)
    steep = fitted_speed([(one, 1.0), (eight, 100.0)], H100, "bf16", SPEED)
    assert steep.launch_seconds == 0.0 and steep.device > 1.0


def test_under_zero_3_a_host_gathers_the_weights_of_each_module():
    few = replace(ONE, trained_modules=20)
    for card in (H100, replace(H100, kind="cpu")):
        plain = micro_batch_seconds(few, card, "bf16", SPEED)
        gathering = 20 * GATHER_SECONDS[card.kind]
        assert micro_batch_seconds(few, card, "bf16", SPEED, stage=3) == pytest.approx(plain + gathering)
        assert micro_batch_seconds(few, card, "bf16", SPEED, stage=2) == plain
        step = step_time(few, Layout(card, 1, 1), EngineConfig(zero_stage=3), "bf16", 4, SPEED)
        assert step.compute_seconds == pytest.approx(2 * (plain + gathering))


def test_ranks_count_through_gloo_around_a_ring_and_cpus_reduce_through_it():
    engine = EngineConfig(zero_stage=0)
    alone, many = (step_time(ONE, Layout(H100, nodes, 8), engine, "bf16", 2 * 8 * nodes, SPEED) for nodes in (1, 128))
    assert alone.counting_seconds == pytest.approx(COUNTERS * 2 * 7 * GLOO_HOP_SECONDS)
    assert many.counting_seconds == pytest.approx(COUNTERS * 2 * 1023 * GLOO_HOP_SECONDS)
    assert step_time(ONE, Layout(H100, 1, 1), engine, "bf16", 2, SPEED).counting_seconds == 0.0
    cpu = replace(H100, kind="cpu")
    sent = communication_bytes(ONE, 0, "fp32", 4, 1) / (NETWORK * cpu.node_bandwidth)
    latency = 2 * 2 * 3 * GLOO_HOP_SECONDS
    assert communication_seconds(ONE, Layout(cpu, 1, 4), engine, "fp32", 1) == pytest.approx(sent + latency)


def test_a_ring_sends_twice_what_is_left_when_a_rank_has_its_own():
    assert communication_bytes(ONE, 0, "fp32", 4, 1) == 2 * 0.75 * 800 * 4
    assert communication_bytes(ONE, 0, "bf16", 4, 1) == 2 * 0.75 * 800 * 2
    assert communication_bytes(ONE, 2, "bf16", 4, 3) == 3 * 2 * 0.75 * 800 * 4 + 0.75 * 800 * 2


def test_one_rank_does_not_communicate_and_nodes_share_their_ports():
    engine = EngineConfig(zero_stage=0)
    assert communication_seconds(ONE, Layout(H100, 1, 1), engine, "fp32", 1) == 0.0
    slow = replace(H100, network_bandwidth=1e6)
    sent = communication_bytes(ONE, 0, "fp32", 4, 1)
    seconds = communication_seconds(ONE, Layout(slow, 2, 2), engine, "fp32", 1)
    assert seconds == pytest.approx(sent / (NETWORK * 2e6) + 2 * HOP_SECONDS * 2)


def test_a_step_has_as_many_passes_as_the_global_batch_asks_for():
    layout = Layout(H100, 1, 4)
    step = step_time(ONE, layout, EngineConfig(), "bf16", 64, SPEED)
    assert step.accumulation_steps == 8
    once = step_time(ONE, layout, EngineConfig(), "bf16", 8, SPEED)
    assert step.compute_seconds == pytest.approx(8 * once.compute_seconds)
    slower = step_time(ONE, layout, EngineConfig(), "bf16", 64, Speed(2.0, SPEED.launch_seconds))
    assert slower.device_seconds == pytest.approx(2 * step.device_seconds)
    assert slower.host_seconds == step.host_seconds
    with pytest.raises(ValueError, match="63 samples are not a multiple of 2 \\* 4"):
        step_time(ONE, layout, EngineConfig(), "bf16", 63, SPEED)


@settings(max_examples=30, deadline=None)
@given(
    storage=st.floats(1e3, 1e12),
    decoded=st.floats(1.0, 1e6),
    factor=st.floats(0.5, 20.0),
    whole=st.sampled_from([64, 2048]),
)
def test_more_cards_are_never_more_efficient_and_never_beyond_what_storage_gives(storage, decoded, factor, whole):
    at = {size: scaled(ONE, size) for size in (1, 2, 4)}
    data, speed = Data(1e5, storage, decoded), Speed(factor, factor * 1e-6)
    curve = scaling_curve(at, Layout(H100, 1, 8), EngineConfig(), "bf16", whole, data, speed)
    assert [point.ranks for point in curve] == [2**power for power in range(11)]
    assert all(point.limited_samples_per_second * 1e5 <= storage * 1.001 for point in curve)
    per_card = [point.limited_samples_per_second / point.ranks for point in curve]
    assert all(later <= earlier * 1.001 for earlier, later in zip(per_card, per_card[1:], strict=False))
    _, data = first_limits(curve, storage)
    assert data is None or next(p for p in curve if p.ranks == data).data_bytes_per_second > storage


def limits(whole=1024, largest=8, storage=1e12, decoded=1e9, device=1.0, one=ONE, **card):
    """What limits 1, 2, 4, ... cards of a micro-batch that takes the host 0.1 s and, at device=1, the card nothing."""
    at = {size: scaled(one, size) for size in (1, 2, 4, 8) if size <= largest}
    layout, data = Layout(replace(H100, **card), 1, 8), Data(1e5, storage, decoded)
    curve = scaling_curve(at, layout, EngineConfig(zero_stage=0), "bf16", whole, data, Speed(device, 1e-3))
    return {point.ranks: point.limit for point in curve}


def test_the_curve_says_what_limits_each_number_of_cards():
    small = limits(whole=16, largest=4)
    assert small[1] == small[4] == "the host"
    assert small[8] == small[16] == small[32] == "the global batch"
    assert limits(device=1e5)[1] == "the card"
    assert limits(storage=1e6)[1] == "storage" and limits(decoded=1.0)[1] == "decoding"
    assert limits(storage=1e8)[1] == "the host" and limits(storage=1e8)[32] == "storage"
    big = replace(ONE, trained_parameters=10**7, profile=((5000, 0), (0, 4 * 10**7)))
    assert limits(one=big)[8] == "the host" and limits(one=big, network_bandwidth=1e6)[16] == "the network"
    assert limits(whole=2**20)[1024] == "the host" and limits(whole=2**13)[1024] == "counters (gloo)"


@pytest.mark.slow
def test_days_and_price_are_steps_times_seconds_times_cards(bases):
    plan = choices.make_plan(run(bases), Layout(H100, 2, 4))
    days, price = choices.days_and_price(plan, plan.asked.step)
    seconds = 1000 * plan.asked.step.seconds + plan.checkpoint_bytes / choices.WRITE_BYTES
    assert days == pytest.approx(seconds / 86400)
    assert price == pytest.approx(seconds / 3600 * 8 * H100.price)


@pytest.mark.slow
def test_the_recommended_way_fits_and_is_among_the_fastest_that_do(bases):
    plan = choices.make_plan(run(bases), Layout(H100, 1, 2))
    assert plan.recommended is not None and plan.recommended.fits
    best = max(choice.step.samples_per_second for choice in plan.choices if choice.fits)
    assert plan.recommended.step.samples_per_second >= (1 - choices.ALIKE) * best
    assert {choice.zero_stage for choice in plan.choices} == {0, 1, 2, 3}
    full = choices.make_plan(run(bases), Layout(replace(H100, memory_bytes=1e6), 1, 2))
    assert full.recommended is None


@pytest.mark.slow
def test_the_recommendation_names_the_fastest_that_it_is_measured_by(bases):
    plan = choices.make_plan(run(bases), Layout(H100, 1, 2))
    assert plan.recommended is not None
    fastest = max((one for one in plan.choices if one.fits), key=lambda one: one.step.samples_per_second)
    said = recommendation_lines(replace(plan, recommended=fastest))[-1]
    assert said.strip() == "the fastest that fits; nothing within 1 % of it needs less memory"
    other = replace(plan, recommended=next(one for one in plan.choices if one is not fastest))
    said = recommendation_lines(other)[-1]
    assert f"within 1 % of the fastest, {fastest.name} with micro-batch {fastest.micro_batch_size}: " in said


@pytest.mark.slow
def test_both_tables_show_the_same_activations_of_the_run_as_written(bases):
    plan = choices.make_plan(run(bases), Layout(H100, 1, 2))
    gib = 2**30
    heavy = replace(ONE, profile=((50 * gib, 0), (30 * gib, 3 * gib), (0, 3 * gib)), trained_parameters=2**30)
    asked = choices.one_choice(plan.config, heavy, EngineConfig(zero_stage=0), plan.layout, "fp32", SPEED)
    config = plan.config.model_copy(update={"engine": EngineConfig(zero_stage=0)})
    plan = replace(plan, config=config, one=heavy, variants={}, asked=asked, precision="fp32")
    heads, first = (line.split() for line in memory_lines([plan.asked], plan)[:2])
    shown = first[-len(heads) + 1 :] if "host" not in first else first[: first.index("host")][-len(heads) + 1 :]
    above = dict(zip(heads[1:], shown, strict=True))
    heads, second = (line.split() for line in saving_lines(plan)[:2])
    below = dict(zip(heads, second[-len(heads) :], strict=True))
    assert below["activations"] == above["activations"] and below["peak"] == above["peak"]
    assert float(below["most"]) == 50.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3", "--processes-per-node", "1"], "global_batch_size=64 is not a multiple of 3 ranks"),
        (["--calibration", "runs/short"], "--calibration runs/short does not exist: give the folder of a run"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said_before_anything_is_planned(
    bases, tmp_path, capsys, arguments, message
):
    from controlbooth.trainer.config.loading import dump

    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump(run(bases)))
    with pytest.raises(ConfigError, match=message):
        main([str(run_file), *arguments])
    assert capsys.readouterr() == ("", "")


def test_the_verb_refuses_without_importing_what_plans(tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text("name: x\nmax_steps: 1\nglobal_batch_size: 2\nmicro_batch_size: 2\nmodel:\n  base: miniature\n")
    code = (
        "import sys\nfrom controlbooth.launch.cli import main\n"
        f"status = main(['plan', {str(run_file)!r}, 'data.shards=x', 'data.condition=edges', '--nodes', '3'])\n"
        "sys.exit(0 if status == 2 and 'diffusers' not in sys.modules else 1)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and "global_batch_size=2 is not a multiple of 24 ranks" in ended.stderr


@pytest.mark.slow
def test_a_measured_step_scales_the_planned_one(bases, tmp_path):
    config = run(bases)
    plain = choices.make_plan(config, Layout(H100, 1, 1))
    row = planned_facts(config, "fp32", 2) | {"samples_per_second": 2 / plain.asked.step.seconds * 64 / 2 / 3}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n" + json.dumps(row | {"error": "out of memory", "samples_per_second": None}))
    plan = choices.make_plan(config, Layout(H100, 1, 1), calibration=rows)
    assert plan.measured is not None and plan.measured.differs == ()
    assert plan.asked.step.samples_per_second == pytest.approx(plain.asked.step.samples_per_second / 3, rel=0.05)


def test_the_nearest_measured_step_is_taken_and_says_how_it_differs():
    rows = [
        dict(family="sdxl", resolution=512, micro_batch_size=4, precision="bf16", samples_per_second=1.0),
        dict(family="sd15", resolution=512, micro_batch_size=32, precision="bf16", samples_per_second=2.0),
        dict(family="sd15", resolution=512, micro_batch_size=8, precision="bf16", samples_per_second=3.0),
        dict(family="sd15", resolution=512, micro_batch_size=8, precision="bf16", samples_per_second=9.0, settings="x"),
    ]
    planned = dict(family="sd15", resolution=1024, micro_batch_size=4, precision="bf16")
    found = nearest(rows, planned, H100)
    assert [row["samples_per_second"] for row in found.rows] == [3.0, 2.0]  # the other micro-batch tells the host
    assert found.differs == ("resolution", "micro_batch_size")
    assert found.describe() == (
        "3.0 and 2.0 samples/s of one rank at micro-batch 8 and 32, measured with 512 px (planned: 1024 px), these "
        "micro-batches (planned: micro-batch 4)"
    )
    alone = nearest(rows[2:], planned, H100).describe()
    assert alone.endswith("measured with 512 px (planned: 1024 px), micro-batch 8 (planned: micro-batch 4)")
    scores = nearest([planned | {"attention": "math", "samples_per_second": 1.0}], planned, H100).describe()
    assert "attention math, which keeps its scores (planned: attention auto, which keeps no scores)" in scores


@pytest.fixture(scope="module")
def sd15():
    """A run and its plan on one H200: Stable Diffusion 1.5's shapes, 512 px, encoders in the step. Seconds."""
    config = build_config(
        dict(
            name="sd15",
            max_steps=1000,
            global_batch_size=64,
            micro_batch_size=8,
            model=dict(base="published", family="sd15"),
            data=dict(shards="none", condition="edges", resolution=512),
        )
    )
    return choices.make_plan(config, Layout(ACCELERATORS["h200"], 1, 1))


@pytest.mark.slow
def test_the_step_of_sd15_counts_what_was_counted_by_hand(sd15):
    one = sd15.one
    assert one.training_flops / 8e12 == pytest.approx(2.265, rel=0.002)  # forward 1.087, backward 1.179
    vae_attention = 4 * 4096**2 * 512 / 1e12
    assert one.encoder_flops / 8e12 == pytest.approx(1.095 + vae_attention, rel=0.002)
    encoders = 289  # of 2,349 operations
    assert 2000 < one.operations - encoders < 2260
    assert 8e9 < one.traffic_bytes / 8 < 9e9
    again = sd15.variants["gradient checkpointing"]
    assert 1.2 < again.training_flops / one.training_flops < 1.35
    assert again.activation_bytes < 0.4 * one.activation_bytes


@pytest.mark.slow
def test_each_measured_step_of_the_h200_is_predicted_from_the_others(sd15):
    measured = sd15.measured
    assert [row["micro_batch_size"] for row in measured.rows] == [1, 8, 32]
    one = choices.known_footprint(measured)
    for row in measured.rows:
        others = replace(measured, rows=[other for other in measured.rows if other is not row])
        speed = choices.measured_speed(one, others, SPEED)
        at = scaled(one, row["micro_batch_size"])
        step = step_time(at, sd15.layout, EngineConfig(), "bf16", at.micro_batch_size, speed)
        assert step.samples_per_second == pytest.approx(row["samples_per_second"], rel=0.25)


@pytest.mark.slow
def test_activations_grow_as_the_h200_has_measured(sd15):
    eight, many = (scaled(sd15.one, size).activation_bytes / 2**30 for size in (8, 32))
    assert many - eight == pytest.approx(35.28 - 13.91, rel=0.01)


@pytest.mark.slow
def test_what_is_recommended_is_as_fast_as_anything_that_was_measured(sd15):
    best = sd15.recommended
    assert best.micro_batch_size >= 32 and best.step.samples_per_second > 0.95 * 47.9
    said = "\n".join(recommendation_lines(sd15))
    assert "micro-batch 64 is larger than any that was measured, 32: its speed is extrapolated" in said


@pytest.mark.slow
def test_a_gpu_is_planned_by_what_was_measured_and_another_card_is_called_an_assumption(sd15, bases):
    said = "\n".join(assumption_lines(sd15))
    assert "2.9, 20.9 and 47.9 samples/s of one rank at micro-batch 1, 8 and 32 on NVIDIA H200" in said
    assert "warning" not in said
    other = choices.make_plan(run(bases), Layout(H100, 1, 1))
    said = "\n".join(assumption_lines(other))
    assert "on NVIDIA H200" in said and "which is no NVIDIA H100 SXM 80 GB" in said and "an assumption, scaled" in said
    assert other.speed == sd15.speed  # of a card of its own peak and bandwidth, with an equally fast host


@pytest.mark.slow
def test_the_curve_of_a_small_global_batch_is_limited_by_it(sd15):
    assert sd15.curve[0].limit == "the card" and {point.limit for point in sd15.curve[1:]} == {"the global batch"}
    lines = curve_lines(sd15)
    assert lines[0].endswith("limited by") and lines[2].endswith("the global batch")


def test_shipped_rows_are_of_known_cards_and_complete():
    rows = read_rows(SHIPPED)
    assert all(any(is_card(card, row["device"]) for card in ACCELERATORS.values()) for row in rows)
    assert all(row.keys() >= {"peak_memory_gib", "measured_on", "device_kind"} for row in rows)


def finished_run(folder, config, **speed):
    """The folder of a run that has ended, as far as a calibration reads it."""
    from controlbooth.trainer.config.loading import dump

    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    measured = dict(samples_per_second=10.0, step_seconds=6.4, peak_memory_gib=1.0, precision="fp32", attention="math")
    (folder / "speed.json").write_text(json.dumps(measured | {"world_size": 2} | speed))
    return folder


def test_a_run_of_a_cpu_calibrates_no_gpu_and_the_other_way_round(bases, tmp_path):
    config = run(bases)
    cpu = finished_run(tmp_path / "cpu", config, device_kind="cpu", device="AMD EPYC 9B14")
    said = []
    with pytest.raises(ConfigError, match=r"measured on a CPU \(AMD EPYC 9B14\).* NVIDIA H100 .*--accelerator cpu"):
        choices.make_plan(config, Layout(H100, 1, 1), calibration=cpu, say=said.append)
    assert said == []  # before anything was followed
    gpu = finished_run(tmp_path / "gpu", config, device_kind="cuda", device="NVIDIA H200")
    processor = replace(H100, name="cpu", kind="cpu", title="this machine's processor")
    with pytest.raises(ConfigError, match=r"measured on a GPU \(NVIDIA H200\).*--accelerator h200"):
        rows_for(processor, gpu)
    rows = tmp_path / "rows.jsonl"  # as tests/benchmarks/gpu.py names a processor
    rows.write_text(
        json.dumps(planned_facts(config, "fp32", 2) | {"samples_per_second": 1, "device": "cpu, 2 threads"})
    )
    with pytest.raises(ConfigError, match="measured on a CPU"):
        rows_for(H100, rows)
    assert len(rows_for(processor, rows)) == 1


@pytest.mark.slow
def test_a_calibration_of_another_card_is_warned_of_and_one_of_an_older_version_is_still_read(bases, tmp_path):
    config = run(bases)
    planned = planned_facts(config, "fp32", 2)

    def warning(name, **speed):
        return nearest(rows_for(H100, finished_run(tmp_path / name, config, **speed)), planned, H100).warning()

    assert warning("same", device_kind="cuda", device="NVIDIA H100 80GB HBM3") is None
    other = warning("other", device_kind="cuda", device="NVIDIA A100-SXM4-80GB")
    assert other is not None and "measured on NVIDIA A100-SXM4-80GB, which is no NVIDIA H100 SXM 80 GB" in other
    old = warning("old")
    assert old is not None and "does not say what it ran on" in old
    plan = choices.make_plan(config, Layout(H100, 1, 1), calibration=tmp_path / "other")
    assert f"  warning: {other}" in assumption_lines(plan)


def test_of_rows_of_several_cards_those_of_the_planned_one_count(bases, tmp_path):
    row = planned_facts(run(bases), "fp32", 2) | {"samples_per_second": 1.0}
    rows = tmp_path / "rows.jsonl"
    devices = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "cpu, 2 threads")
    rows.write_text("\n".join(json.dumps(row | {"device": device}) for device in devices))
    assert [one["device"] for one in rows_for(H100, rows)] == ["NVIDIA H100 80GB HBM3"]
    assert len(rows_for(ACCELERATORS["l40s"], rows)) == 2


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_card_is_known_by_what_pytorch_calls_it(device, name):
    assert [card.name for card in ACCELERATORS.values() if is_card(card, device)] == ([name] if name else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not readable"),
        ('{"samples_per_second": 1.0}', "a row without family, micro_batch_size, precision, resolution"),
        ('{"family": "sd15", "error": "out of memory"}', "no row with samples_per_second"),
    ],
)
def test_a_file_that_holds_no_measured_steps_is_refused(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(path)
    with pytest.raises(ConfigError, match="has no speed.json"):
        read_rows(tmp_path)


def test_an_unknown_accelerator_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'a100-40' or 'a100-80'"):
        accelerator("a100")
    with pytest.raises(ValueError, match="did you mean 'l40s'"):
        accelerator("l40")
    with pytest.raises(ValueError, match="Known: h100, h200"):
        accelerator("abacus")
    assert accelerator("H100") is H100


def test_every_card_has_plausible_figures():
    for card in ACCELERATORS.values():
        assert 1e14 < card.half_flops < 1e16 and card.single_flops < card.half_flops
        assert 20e9 < card.memory_bytes < 300e9 and 5e11 < card.memory_bandwidth < 1e13
        assert card.network_bandwidth <= card.node_bandwidth and 0.1 < card.price < 20


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"\x89PNG\xff\xfe", "is not readable: 'utf-8' codec"), (b"- 1\n", "holds list, and no mapping of keys")],
)
def test_a_cluster_file_that_is_none_is_refused_by_name(bases, tmp_path, contents, message):
    from controlbooth.trainer.config.loading import dump

    (tmp_path / "run.yaml").write_text(dump(run(bases)))
    (tmp_path / "cluster.yaml").write_bytes(contents)
    with pytest.raises(ConfigError, match=f"cluster file .*cluster.yaml {message}"):
        main([str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "cluster.yaml")])


@pytest.mark.slow
def test_the_verb_prints_the_plan_and_writes_it(bases, tmp_path, capsys):
    from controlbooth.trainer.config.loading import dump

    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump(run(bases)))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("accelerator: a100-80\nnodes: 2\nprocesses_per_node: 4\n")
    arguments = [str(run_file), "global_batch_size=128", "--cluster", str(cluster)]
    assert main([*arguments, "--json", str(tmp_path / "p.json"), "--simulate", str(tmp_path / "curve.png")]) == 0
    printed = capsys.readouterr().out
    assert "2 x 4 a100-80" in printed and "recommended" in printed and "no NVIDIA A100 SXM 80 GB" in printed
    tree = json.loads((tmp_path / "p.json").read_text())
    assert tree["nodes"] == 2 and tree["asked"]["memory"]["frozen weights"] > 0
    assert tree["curve"][-1]["cards"] == 1024
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
