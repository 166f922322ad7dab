"""Real trainings of control-LoRAs on the tiny base, on ranks of torchrun, through DeepSpeed."""

import shutil

import forked
import numpy as np
import pytest
import tiny
import yaml
from control_loras import (
    RATES,
    check_another_world_size,
    check_stages_in_bf16,
    check_stages_with_a_plain_process,
    check_two_kills,
)
from safetensors.numpy import load_file
from trainings import finish, logged, run_file, start

from controlbooth.trainer.run.integrity import write_marker


@pytest.fixture(scope="module")
def folder(world_folder, tmp_path_factory):
    """A folder with base/, train/ and held/ whose runs train control-LoRAs; runs go to runs/."""
    own = tmp_path_factory.mktemp("control-lora")
    for name in ("base", "train", "held"):
        shutil.copytree(world_folder / name, own / name)
    tiny.write_model(own, hint_channels=[8, 8, 8, 8], method="lora", rank=4)
    return own


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of an uninterrupted run of 8 steps on 2 ranks, with checkpoints at 4, 6 and 8."""
    finish(start(run_file(folder, "whole", max_steps=8, **RATES), 2))
    return folder / "runs" / "whole"


def test_zero_stages_0_to_3_on_two_ranks_have_the_losses_and_averages_of_one_plain_process(folder):
    _, weights = check_stages_with_a_plain_process(folder)
    base = load_file(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for stage, ours in weights.items():
        assert not ours.keys() & base.keys()
        assert all(np.any(tensor) for name, tensor in ours.items() if name.endswith(".up")), f"ZeRO stage {stage}"


def test_in_bf16_all_stages_train_alike_and_keep_masters_that_are_not_rounded(folder):
    check_stages_in_bf16(folder, "down_blocks.0.resnets.0.conv1.up")


def test_a_run_killed_twice_ends_with_bitwise_the_weights_of_an_uninterrupted_one(folder, whole):
    check_two_kills(folder, whole)
    rates = logged(whole, "lora_learning_rate")
    assert set(rates.values()) == {5e-3} and set(logged(whole, "learning_rate").values()) == {1e-3}


def test_a_run_goes_on_at_another_world_size_with_the_same_losses_within_rounding(folder, whole):
    check_another_world_size(folder, whole)


def test_what_does_not_go_on_from_its_checkpoint_is_refused_and_a_new_run_takes_its_weights(folder, whole, tmp_path):
    for model, message in (
        (dict(method="full", rank=32), "was saved with model.method 'lora', and this run has 'full'. Set it back, or"),
        (dict(rank=8), "was saved with model.rank 4, and this run has 8. Set it back, or"),
    ):
        path = run_file(folder, "whole", max_steps=10, model=model, **(RATES if "method" not in model else {}))
        output, _ = (process := start(path, 1)).communicate(timeout=300)
        assert process.returncode and message in output, output[-2000:]
    before = str(whole / "checkpoints" / "step-00000008" / "controlnet")
    for method, rank in (("lora", 4), ("full", 32)):
        model = dict(controlnet=before, method=method, rank=rank)
        said = finish(start(run_file(folder, f"from-{method}", max_steps=2, model=model), 1))
        assert ("differences from the copy, of rank 4," in said) == (method == "lora")
    weights = tiny.weights(folder / "runs" / "from-full" / "checkpoints" / "step-00000002")
    assert "conv_in.weight" in weights


def test_it_is_measured_and_sampled_by_the_same_commands(folder, whole, tmp_path):
    def call(*arguments):
        done = forked.run(1, ["-m", "controlbooth.launch.cli", *arguments], **forked.BEFORE_IMPORTS)
        assert done.returncode == 0, done.stderr[-3000:]

    call("evaluate", whole, "--samples", "4", "--steps", "2", "-o", tmp_path / "measured")
    assert (tmp_path / "measured" / "evaluation.json").is_file()
    call("sample", "--control", f"edges={whole}", "--data", folder / "held", "--steps", "2",
         "-o", tmp_path / "pictures")  # fmt: skip


def test_a_folder_of_before_goes_on_as_a_full_run_and_not_as_a_control_lora(folder, world_folder):
    finish(start(run_file(world_folder, "before-lora", max_steps=2), 1))
    run = world_folder / "runs" / "before-lora"
    for path in (run / "config.yaml", run / "checkpoints" / "step-00000002" / "config.yaml"):
        tree = yaml.safe_load(path.read_text())
        del tree["model"]["method"], tree["model"]["rank"], tree["optimizer"]["lora_learning_rate"]
        path.write_text(yaml.safe_dump(tree))
    write_marker(run / "checkpoints" / "step-00000002")
    output, _ = (process := start(run_file(world_folder, "before-lora", model=dict(method="lora")), 1)).communicate()
    assert process.returncode and "model.method 'full', and this run has 'lora'" in output, output[-2000:]
    assert "going on from" in finish(start(run_file(world_folder, "before-lora", max_steps=4), 1))
