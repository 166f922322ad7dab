"""The plan of DreamBooth subjects: what is counted on fake tensors beside what a real step of real weights makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from controlbooth.launch.commands.plan import main
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.run import FrozenConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.planning.accelerators import ACCELERATORS
from controlbooth.trainer.planning.footprint import held_as
from controlbooth.trainer.planning.rank_memory import needed
from controlbooth.trainer.planning.speed import UNMEASURED
from controlbooth.trainer.planning.subjects import (
    StackChoice,
    best_stack,
    followed,
    peak_bytes,
    rows_of,
    stack_choices,
    stack_footprint,
    stack_memory,
    with_subjects,
)


def run(**changes):
    tree = dict(name="s", model=dict(base="miniature"), resolution=64, precision="fp32", identifiers=["kcz"])
    return SubjectRunConfig.model_validate(tree | changes)


@pytest.fixture(scope="module")
def one():
    return stack_footprint(run(), "fp32", 1, "flash")


def choice(one, subjects, seconds, gib, fits=True):
    memory = stack_memory(one, "cuda", FrozenConfig())
    return StackChoice(subjects, False, memory, gib * 2**30, fits, seconds)


@pytest.mark.slow
def test_the_planned_memory_is_what_a_real_step_of_the_built_in_base_makes(one):
    config = run()
    base = load_base("miniature", "auto", torch.float32, "cpu")
    apply_attention(base.denoiser, AttentionChoice("flash", "planned"))
    real = followed(config, base, 3)
    two = stack_footprint(config, "fp32", 2, "flash")
    planned = with_subjects(one, two, 3)
    assert planned.frozen_bytes == real.frozen_bytes and planned.trained_parameters == real.trained_parameters
    assert planned.micro_batch_size == real.micro_batch_size == 3 * rows_of(config)
    assert peak_bytes(planned) == pytest.approx(peak_bytes(real), rel=0.1)
    assert planned.training_flops == pytest.approx(real.training_flops, rel=0.01)


def test_memory_counts_each_adapter_weight_with_its_moments(one):
    memory = stack_memory(one, "cuda", FrozenConfig())
    assert memory.device["trained weights"] + memory.device["optimizer"] == 12 * one.trained_parameters
    assert memory.device["frozen weights"] == one.frozen_bytes
    assert memory.peak == one.frozen_bytes + 12 * one.trained_parameters + peak_bytes(one)


def test_the_fastest_number_that_fits_is_chosen_and_the_smaller_of_equals(one):
    few, many, huge = choice(one, 4, 1.0, 10), choice(one, 8, 1.995, 20), choice(one, 16, 2.0, 90, fits=False)
    assert best_stack([few, many, huge]) == few  # within 1 % as fast
    assert best_stack([choice(one, 1, 1.0, 5), many]) == many
    assert best_stack([huge]) is None


def test_a_base_in_fewer_bits_is_planned_as_it_is_held_and_tried_only_where_nothing_fits_otherwise(one):
    held = {name: held_as(one, name) for name in ("int8", "nf4")}
    assert one.frozen_bytes > held["int8"].frozen_bytes > held["nf4"].frozen_bytes
    frozen = FrozenConfig(precision="int8")
    asked = stack_footprint(run(model=dict(base="miniature", frozen=dict(precision="int8"))), "fp32", 1, "flash")
    assert asked.frozen_bytes == held["int8"].frozen_bytes
    memory = stack_memory(held["int8"], "cuda", frozen)
    assert memory.device["frozen weights"] == held["int8"].frozen_bytes + held["int8"].restoring_bytes
    streamed = stack_memory(held["int8"], "cuda", FrozenConfig(precision="int8", stream="cpu"))
    assert streamed.device["frozen weights"] < memory.device["frozen weights"] and streamed.host["frozen weights"] > 0

    def choices(least):
        size = needed(stack_memory(least, "cuda", frozen), "cuda")
        card = replace(ACCELERATORS["h100"], memory_bytes=size)
        return stack_choices(run(), card, "fp32", UNMEASURED["cuda"], most=1, follow=lambda *_: one)

    assert {choice.frozen.precision for choice in choices(one)} == {"engine"}
    assert best_stack(choices(held["int8"])).frozen == frozen


def test_training_all_layers_is_planned_by_no_stack():
    with pytest.raises(ConfigError, match="a plan of subjects is of method=lora"):
        stack_footprint(run(method="full"), "fp32", 1, "flash")


@pytest.mark.slow
def test_the_command_says_how_many_subjects_fit_and_how_to_train_them(tmp_path, capsys):
    for name in ("rex", "mug"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / name / "0.png")
    rows = [dict(name=name, images=name, class_noun="dog") for name in ("rex", "mug")]
    (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(rows))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run().model_dump(mode="json", exclude_defaults=True)))
    words = [str(tmp_path / "run.yaml"), "--subjects", str(tmp_path / "subjects.yaml"), "--fit", "24GiB"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "2 subjects, LoRA of rank 4" in told and "  chosen\n" in told
    assert (
        f"controlbooth dreambooth run {tmp_path / 'subjects.yaml'} {tmp_path / 'run.yaml'} subjects_per_batch=" in told
    )
    with pytest.raises(ConfigError, match="--nodes does not go with --subjects"):
        main([*words, "--nodes", "2"])
