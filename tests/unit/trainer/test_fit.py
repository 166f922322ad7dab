"""The search for the fastest setting that fits: its arithmetic on a step that is made by hand, and its command."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.errors import UserError
from controlbooth.launch.commands.plan import main
from controlbooth.trainer.config.loading import build_config, dump, load_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.planning.accelerators import ACCELERATORS, Layout, card_to_fit
from controlbooth.trainer.planning.fit import Fit, best, find_fit, settings_of, ways
from controlbooth.trainer.planning.fit_report import fit_lines, left_out, runners_up
from controlbooth.trainer.planning.footprint import Footprint, held_as
from controlbooth.trainer.planning.frozen_bytes import HeldBytes
from controlbooth.trainer.planning.speed import Speed

GIB = 2**30
SPEED = Speed(1.0, 6e-6)
BLOCK = 1 * GIB


def held(share):
    block = (round(BLOCK * share), round(BLOCK * share))
    return HeldBytes(round(10 * BLOCK * share) + GIB, (block,) * 8, (block,) * 2, round(GIB / 8 * (share < 1)))


def step(activations=4 * GIB, flops=10**13, **changes):
    """A sample of a base of 11 GiB in bf16, with a ControlNet of 360 million parameters."""
    one = Footprint(
        micro_batch_size=1, frozen_bytes=0, trained_parameters=360_000_000, largest_parameter=10**7,
        trained_modules=200, profile=((activations, 0), (0, 2 * 360_000_000)), encoder_flops=10**12,
        training_flops=flops, traffic_bytes=10**10, operations=4000, batch_bytes=10**6, cached_bytes=0,
        otherwise=(("engine", held(1.0)), ("int8", held(0.5)), ("nf4", held(0.3))),
    )  # fmt: skip
    return held_as(replace(one, **changes), "engine")


def run(**changes):
    tree = dict(
        name="fitted", max_steps=100, global_batch_size=16, micro_batch_size=4, model=dict(base="b"),
        data=dict(shards="s", condition="edges"), engine=dict(precision="bf16"),
    )  # fmt: skip
    return build_config(tree | changes)


def layout(gib, cards=1):
    return Layout(replace(ACCELERATORS["h100"], memory_bytes=gib * GIB), 1, cards)


def searched(config, where):
    """All settings of a step that keeps its activations, and of one that recomputes them."""
    kept, recomputed, *_ = ways(config, where)
    found = settings_of(config, kept, step(), where, "bf16", SPEED)
    lighter = step(activations=GIB // 2, flops=13 * 10**12)
    return found + settings_of(config, recomputed, lighter, where, "bf16", SPEED)


def fit_of(config, where):
    found = searched(config, where)
    least = min(found, key=lambda one: one.choice.needed_bytes)
    return Fit(config, where, "bf16", "b", found, best(found), least, "assumed", False)


@pytest.mark.parametrize(
    ("text", "memory", "title"),
    [
        ("24GiB", 25.4e9, "RTX 4090"),
        ("24 gb", 24e9, "RTX 4090"),
        ("80GiB", 85.5e9, "H100"),
        ("141GB", 141e9, "H200"),
        ("30GiB", 30 * GIB, "RTX 4090"),
        ("l40s", 47.7e9, "L40S"),
    ],
)
def test_a_size_stands_for_what_a_program_sees_of_such_a_card(text, memory, title):
    card = card_to_fit(text)
    assert card.memory_bytes == memory and title in card.title


def test_a_size_may_have_the_speed_of_another_card_and_what_is_neither_is_refused():
    assert card_to_fit("80GiB", "a100-80").name == "a100-80"
    with pytest.raises(UserError, match="--fit 24 is no size such as 24GiB.*accelerator '24' is not known"):
        card_to_fit("24")
    with pytest.raises(UserError, match="is nothing"):
        card_to_fit("0GiB")


@pytest.mark.parametrize("cards", [1, 4])
def test_every_setting_is_a_run_with_the_same_global_batch(cards):
    config = run()
    for setting in searched(config, layout(80, cards)):
        made = build_config(setting.config.model_dump(mode="json"))
        assert made == setting.config and made.global_batch_size == 16
        assert 16 % (made.micro_batch_size * cards) == 0


def test_the_overrides_of_a_setting_make_its_run(tmp_path):
    config = run()
    (tmp_path / "run.yaml").write_text(dump(config))
    for setting in searched(config, layout(80, 4))[::7]:
        assert load_config(tmp_path / "run.yaml", setting.changes) == setting.config


def test_a_run_that_fits_as_it_is_keeps_its_base_and_its_stage():
    chosen = best(searched(run(), layout(200)))
    assert chosen is not None and chosen.kind_changes == ()


def test_a_base_in_fewer_bits_is_taken_only_where_whole_ones_are_slow_or_too_large():
    found = searched(run(), layout(200))
    whole = [one for one in found if one.config.model.frozen.precision == "engine"]
    quantized = [one for one in found if one.config.model.frozen.precision == "int8"]
    near = best([max(whole, key=lambda one: one.samples_per_second), *quantized])
    assert near is not None and near.config.model.frozen.precision == "engine"
    slow = [one for one in whole if one.samples_per_second < 0.5 * max(o.samples_per_second for o in quantized)]
    only = best([*slow, *quantized])
    assert slow and only is not None and only.config.model.frozen.precision == "int8"


@settings(max_examples=15, deadline=None)
@given(gib=st.integers(8, 120), more=st.integers(0, 60))
def test_a_larger_card_is_never_much_slower(gib, more):
    small, large = (best(searched(run(), layout(size))) for size in (gib, gib + more))
    if small is not None:
        assert large is not None
        assert large.samples_per_second >= 0.8 * small.samples_per_second  # NEAR is given up twice at most


def test_streaming_is_never_faster_than_the_bus_and_quantizing_costs_time():
    found = {(one.kind, one.choice.name, one.config.micro_batch_size): one for one in searched(run(), layout(80))}
    for (kind, name, size), setting in found.items():
        optimizer, precision, shards, stream, *rest = kind
        plain = found[(optimizer, "engine", shards, "none", *rest), name, size]
        assert setting.seconds >= plain.seconds - 1e-9
        if stream == "cpu" and precision == "engine":
            assert setting.seconds >= 16 / size * (2 * 8 + 2) * BLOCK / 25e9
        assert bool(setting.estimated) == (setting.kind[1:4] != ("engine", "none", "none") or "offload" in name)


def test_the_report_names_the_command_and_why_less_would_not_do():
    fit = fit_of(run(), layout(16))
    assert fit.chosen is not None and fit.chosen.kind_changes
    lines = fit_lines(fit, "my run.yaml", ["name=x"])
    assert lines[-1] == " ".join(["controlbooth train 'my run.yaml' name=x", *fit.chosen.changes])
    assert all(not one.fits and set(one.kind_changes) < set(fit.chosen.kind_changes) for one in left_out(fit))
    assert left_out(fit) and any(" GiB of 16.0, of which frozen weights " in line for line in lines)
    kinds = [fit.chosen.kind, *(one.kind for one in runners_up(fit))]
    assert len(set(kinds)) == len(kinds) > 1


def test_where_nothing_fits_the_least_that_was_reached_is_told():
    fit = fit_of(run(), layout(3))
    assert fit.chosen is None
    told = "\n".join(fit_lines(fit, "run.yaml"))
    assert (
        f"the least that was reached is {fit.least.choice.needed_bytes / GIB:.1f} GiB" not in told
    )  # the setting first
    assert f"{fit.least.choice.needed_bytes / GIB:.1f} GiB of 3.0, of which" in told
    assert "more cards (--gpus)" in told and "model.method=lora" in told


def test_a_control_lora_and_an_unlocked_decoder_keep_their_base_whole():
    lora = build_config(run().model_dump(mode="json") | {"model": {"base": "b", "method": "lora"}})
    assert all(one.config.model.frozen == lora.model.frozen for one in searched(lora, layout(24)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "--gpus 2 is of --fit"),
        (["--fit", "24GiB", "--nodes", "2"], "--nodes does not go with --fit"),
        (["--fit", "24GiB", "--gpus", "3"], "global_batch_size=16 is not a multiple of 3 ranks"),
    ],
)
def test_what_does_not_go_with_fit_is_refused(tmp_path, arguments, message):
    (tmp_path / "run.yaml").write_text(dump(run()))
    with pytest.raises(ConfigError, match=message):
        main([str(tmp_path / "run.yaml"), *arguments])


@pytest.mark.slow
def test_a_real_base_is_fitted_on_a_card_of_this_machine(base_folder):
    model = dict(base=str(base_folder("sd15")), hint_channels=[4, 4, 4, 4])
    config = run(model=model, data=dict(shards="none", condition="edges", resolution=32))
    fit = find_fit(config, Layout(replace(ACCELERATORS["h100"], memory_bytes=4 * GIB), 1, 1))
    assert fit.chosen is not None and fit.chosen.fits and not fit.is_transformer
    assert json.dumps(fit.chosen.changes)
