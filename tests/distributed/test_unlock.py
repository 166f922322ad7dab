"""Runs whose decoder begins to learn at their fourth step, on ranks of torchrun."""

import json

import forked
import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file

DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")


def networks(run, step):
    """What a checkpoint gives to others, by the names of an UnlockedNetwork."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    found = {f"controlnet.{name}": tensor for name, tensor in tiny.weights(folder).items()}
    decoder = folder / "controlnet" / "decoder.safetensors"
    if decoder.exists():
        found |= {f"decoder.{name}": tensor for name, tensor in load_file(decoder).items()}
    return found


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def plain(world_folder):
    return tiny.torchrun(1, "unlocking_plain", world_folder)["losses"]


@pytest.fixture(scope="module")
def stages(world_folder):
    return tiny.torchrun(2, "unlocking", world_folder, "fp32")


def test_zero_stages_0_to_3_on_two_ranks_unlock_as_one_plain_process_does(world_folder, plain, stages):
    average = load_file(world_folder / "unlocking-plain-average.safetensors")
    for stage, curve in stages.items():
        np.testing.assert_allclose(curve, plain, rtol=3e-6, err_msg=f"ZeRO stage {stage}")
        ours = networks(world_folder / "runs" / f"unlocking-{stage}-fp32", 6)
        assert ours.keys() == average.keys()
        for name, tensor in average.items():
            np.testing.assert_allclose(ours[name], tensor, atol=2e-5, err_msg=f"ZeRO stage {stage}: {name}")


def test_checkpoints_hold_the_decoder_from_its_step_on_and_what_is_locked_is_the_bases(world_folder, stages):
    base = load_file(world_folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    learns = {f"decoder.{name}" for name in base if name.startswith(DECODER)}
    for stage in stages:
        run = world_folder / "runs" / f"unlocking-{stage}-fp32"
        for step in (2, 3):  # the fourth step is the first one that moves it
            assert not any(name.startswith("decoder.") for name in networks(run, step))
        decoder = {name: tensor for name, tensor in networks(run, 4).items() if name.startswith("decoder.")}
        assert decoder.keys() == learns and all(tensor.dtype == np.float32 for tensor in decoder.values())
        moved = [np.abs(tensor - base[name.removeprefix("decoder.")]).max() for name, tensor in decoder.items()]
        assert 0 < max(moved) < 4.1e-4  # one step of Adam is at most its learning rate, and weight decay
        rates = [line["metrics"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                 if "learning_rate" in line.get("metrics", {})]  # fmt: skip
        assert [rate.get("decoder_learning_rate") for rate in rates] == [None] * 3 + [pytest.approx(4e-4)] * 3
        assert [rate["learning_rate"] for rate in rates] == [1e-3] * 6


def test_in_bf16_all_stages_unlock_alike_and_keep_masters_that_are_not_rounded(world_folder, plain):
    for stage, curve in tiny.torchrun(2, "unlocking", world_folder, "bf16").items():
        np.testing.assert_allclose(curve, plain, rtol=3e-2, err_msg=f"ZeRO stage {stage}")
        run = world_folder / "runs" / f"unlocking-{stage}-bf16"
        for name in ("controlnet.conv_in.weight", "decoder.conv_out.weight"):
            rounded = (networks(run, 6)[name].view(np.uint32) & 0xFFFF) == 0
            assert rounded.mean() < 0.05, f"ZeRO stage {stage}: {name}"


def test_a_resume_before_at_and_after_the_step_ends_bitwise_as_if_there_had_been_none(world_folder):
    resumed = tiny.torchrun(2, "unlocking_resumed", world_folder, "unlocking-whole", "2", "3", "5")
    runs = world_folder / "runs"
    for stage, by_step in resumed.items():
        whole = runs / f"unlocking-whole-{stage}"
        for step, losses in by_step.items():
            again = runs / f"{whole.name}-from-{step}-on-2"
            assert same(networks(again, 6), networks(whole, 6)), f"ZeRO stage {stage} from step {step}"
            assert len(losses) == 6
    elsewhere = tiny.torchrun(1, "unlocking_resumed", world_folder, "unlocking-whole", "2", "5")
    for stage, by_step in elsewhere.items():
        for step, losses in by_step.items():
            what = f"ZeRO stage {stage} from step {step} on one rank"
            np.testing.assert_allclose(losses, resumed[stage]["3"], rtol=3e-6, err_msg=what)
            ours = networks(runs / f"unlocking-whole-{stage}-from-{step}-on-1", 6)
            for name, tensor in networks(runs / f"unlocking-whole-{stage}", 6).items():
                np.testing.assert_allclose(ours[name], tensor, atol=2e-5, err_msg=f"{what}: {name}")


def test_a_run_is_unlocked_from_the_start_measured_and_refused_with_another_step(world_folder, tmp_path):
    tree = tiny.run_tree(world_folder, "from-the-start") | dict(max_steps=2)
    tree["model"] |= dict(unlock_decoder_at=0)
    tree["validation"] |= dict(at_start=True)
    run = world_folder / "runs" / "from-the-start"

    def start(module, *arguments):
        path = world_folder / "from-the-start.yaml"
        path.write_text(yaml.safe_dump(tree))
        return forked.run(1, ["-m", module, *(arguments or (path,))], **forked.BEFORE_IMPORTS)

    first = start("controlbooth.trainer.controlnet.train")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "step 0: the base's decoder learns from here on, 141,284 parameters at 2e-06" in first.stderr
    assert any(name.startswith("decoder.") for name in networks(run, 2))
    measured = start("controlbooth.launch.cli", "evaluate", run, "--samples", "4", "-o", tmp_path / "measured")
    assert measured.returncode == 0, measured.stderr[-3000:]
    tree |= dict(max_steps=4)
    tree["model"] |= dict(unlock_decoder_at=3)
    refused = start("controlbooth.trainer.controlnet.train")
    assert refused.returncode != 0
    assert "has a decoder that learns since step 0, and model.unlock_decoder_at is 3. Set it back" in refused.stderr
