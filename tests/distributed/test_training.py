"""Real trainings of a tiny base on ranks of torchrun, through DeepSpeed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import tiny
import webdataset
from diffusers import ControlNetModel
from safetensors.numpy import load_file
from trainings import (
    finish,
    finish_after_two_kills,
    free_port,
    logged,
    path_with_python,
    run_file,
    start,
    wait_for_step,
)

from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.launch.commands import evaluate as evaluate_command
from controlbooth.launch.commands import export as export_command
from controlbooth.launch.commands.data_explain import main as explain_main
from controlbooth.launch.commands.data_order import main as order_main
from controlbooth.trainer.planning.accelerators import accelerator, is_card
from controlbooth.trainer.run.integrity import write_marker


@pytest.fixture(scope="module")
def plain(world_folder):
    return tiny.torchrun(1, "plain", world_folder)["losses"]


def test_zero_stages_0_to_3_on_two_ranks_have_the_losses_and_averages_of_one_plain_process(world_folder, plain):
    losses = tiny.torchrun(2, "stages", world_folder, "fp32")
    average = load_file(world_folder / "plain-average.safetensors")
    assert len(plain) == 6 and plain[0] != plain[1]
    for stage, curve in losses.items():
        np.testing.assert_allclose(curve, plain, rtol=2e-6, err_msg=f"ZeRO stage {stage}")
        ours = tiny.weights(world_folder / "runs" / f"stage-{stage}-fp32" / "checkpoints" / "step-00000006")
        for name, tensor in average.items():
            np.testing.assert_allclose(ours[name], tensor, atol=2e-5, err_msg=f"ZeRO stage {stage}: {name}")


def test_in_bf16_all_stages_learn_alike_and_checkpoints_hold_masters_that_are_not_rounded(world_folder, plain):
    losses = tiny.torchrun(2, "stages", world_folder, "bf16")
    for stage, curve in losses.items():
        np.testing.assert_allclose(curve, plain, rtol=3e-2, err_msg=f"ZeRO stage {stage}")
        ours = tiny.weights(world_folder / "runs" / f"stage-{stage}-bf16" / "checkpoints" / "step-00000006")
        weight = ours["conv_in.weight"]
        rounded = (weight.view(np.uint32) & 0xFFFF) == 0
        assert rounded.mean() < 0.01, f"ZeRO stage {stage}"


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_gradients_are_added_up_in_fp32_of_all_of_a_step_and_nothing_of_an_earlier_one(tmp_path, ranks, precision):
    found = tiny.torchrun(ranks, "flat_gradients", tmp_path, precision, forks=False)
    assert found["skipped"] == [step == 2 for step in range(7)]
    assert max(found["apart"]) < 2e-7, found["apart"]
    assert not found["mlflow"]  # DeepSpeed would, on every rank


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resume_takes_weights_and_averages_over_bit_for_bit_and_the_settings_of_the_run(world_folder, processes):
    outcome = tiny.torchrun(processes, "settings", world_folder)
    assert len(outcome) == 8
    for what, found in outcome.items():
        assert found["betas"] == [0.5, 0.9] and found["weight_decay"] == 0.25, what
        assert found["clip"] in (9.0, None), what
        assert found["same_weights"] and found["same_average"] and found["masters_untouched"], what
        assert found["average_differs"] and found["rounded"] < 0.5, what


@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_holds_the_step_where_it_began_and_is_seen_only_when_it_is_finished(world_folder, processes):
    outcome = tiny.torchrun(processes, "background", world_folder)
    assert len(outcome) == 8
    for what, found in outcome.items():
        assert found["before"] == 0 and found["moved"], what
        assert found["same"] and found["same_average"], what
        assert all("no folder" in error for error in found["errors"]) and len(found["errors"]) == processes, what
        assert found["after_error"] == 0, what


def test_world_sizes_1_2_and_4_see_the_same_keys_drops_timesteps_and_noise_in_each_global_batch(world_folder):
    one, two, four = (tiny.torchrun(n, "batches", world_folder)["batches"] for n in (1, 2, 4))
    assert one == two == four
    keys = [row[1] for batch in one for row in batch]
    assert len(set(keys)) == len(keys) == 48
    drops = [row[2] for batch in one for row in batch]
    assert 0 < sum(drops) < 48
    assert all((row[5] == "") == row[2] for batch in one for row in batch)
    assert len({row[4] for batch in one for row in batch}) == 48  # no two samples share their noise


def test_a_step_without_finite_gradient_on_one_rank_is_skipped_on_all_and_training_goes_on(world_folder):
    for stage, outcome in tiny.torchrun(2, "poisoned", world_folder).items():
        assert outcome["skipped"] == [0, 0, 1, 0, 0, 0], f"ZeRO stage {stage}"
        assert np.isfinite([loss for loss in outcome["losses"]]).all()


@pytest.fixture(scope="module")
def whole(world_folder):
    """The folder of an uninterrupted run of 8 steps on 2 ranks, with checkpoints at 4, 6 and 8."""
    finish(start(run_file(world_folder, "whole", max_steps=8), 2))
    return world_folder / "runs" / "whole"


def test_a_run_killed_twice_ends_with_bitwise_the_weights_of_an_uninterrupted_one(world_folder, whole):
    path = run_file(world_folder, "killed", max_steps=8)
    killed = world_folder / "runs" / "killed"
    finish_after_two_kills(path, killed, seed=5)
    assert logged(killed, "loss") == logged(whole, "loss")
    ours, theirs = (tiny.weights(run / "checkpoints" / "step-00000008") for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_at_another_world_size_from_its_middle_with_the_same_losses_within_rounding(world_folder, whole):
    moved = world_folder / "runs" / "moved"
    shutil.copytree(whole, moved)
    for step in (6, 8):
        shutil.rmtree(moved / "checkpoints" / f"step-{step:08d}")
    output = finish(start(run_file(world_folder, "moved", max_steps=8), 1))
    assert "going on from" in output and "at step 4" in output
    after, before = logged(moved, "loss"), logged(whole, "loss")
    np.testing.assert_allclose([after[s] for s in range(5, 9)], [before[s] for s in range(5, 9)], rtol=2e-6)
    ours, theirs = (tiny.weights(run / "checkpoints" / "step-00000008") for run in (moved, whole))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=2e-5, err_msg=name)


def write_wide_shards(folder):
    """24 pictures that are 1.5 times as wide as high, in three shards."""
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0) as writer:
            for number in range(8 * shard, 8 * shard + 8):
                drawn = render.render(render.scene(9, number), 96)
                image, edges = (cv2.resize(picture, (96, 64)) for picture in (drawn.image, drawn.edges))
                parts = {"png": encode_png(image), "cond.edges.png": encode_png(edges), "txt": b"a wide picture"}
                writer.write({"__key__": f"wide{number:02d}", **parts})


def test_mixed_sources_in_two_shapes_train_and_weights_change_where_the_run_goes_on(world_folder, capsys):
    wide = world_folder / "wide"
    write_wide_shards(wide)
    data = dict(shards=None, max_aspect_ratio=2.0, aspect_step=16)

    def mixed(weights, steps):
        named = [{"shards": str(world_folder / "train")}, {"shards": str(wide)}]
        chosen = [source | {"weight": weight} for source, weight in zip(named, weights, strict=True)]
        return run_file(world_folder, "mixed", data=data | {"sources": chosen}, max_steps=steps)

    run = world_folder / "runs" / "mixed"
    finish(start(mixed([3, 1], 4), 2))
    output = finish(start(mixed([1, 3], 12), 1))
    assert "from step 4 on the sources have the weights [1000000, 3000000], before [3000000, 1000000]" in output
    state = json.loads((run / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["order"]["weights"] == [[0, [3000000, 1000000]], [32, [1000000, 3000000]]]
    assert state["order"]["shapes"] == [[64, 64], [48, 80]]
    assert np.isfinite(list(logged(run, "loss").values())).all()
    wide_steps = []
    for step in range(12):
        order_main(["--run", str(run), "--step", str(step)])
        keys = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
        assert len(keys) == 8 and len({key.startswith("wide") for key in keys}) == 1  # here shape tells the source
        wide_steps.append(keys[0].startswith("wide"))
    assert sum(wide_steps[:4]) == 1 and sum(wide_steps[4:]) == 6
    assert explain_main(["wide05", "--run", str(run)]) == 0
    assert "96 x 64 pixels" in capsys.readouterr().out


def test_a_bf16_run_under_zero_3_goes_on_at_another_world_size(world_folder):
    half = dict(max_steps=6, engine={"precision": "bf16", "zero_stage": 3})
    run = world_folder / "runs" / "half"
    finish(start(run_file(world_folder, "half", **half), 2))
    before = logged(run, "loss")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert "at step 4" in finish(start(run_file(world_folder, "half", **half), 1))
    after = logged(run, "loss")
    assert after.keys() == before.keys()
    np.testing.assert_allclose([after[5], after[6]], [before[5], before[6]], rtol=1e-3)


def test_evaluate_and_export_read_a_run(whole, tmp_path, capsys):
    out = tmp_path / "evaluation"
    assert evaluate_command.main([str(whole), "--samples", "4", "-o", str(out)]) == 0
    assert "with control, no prompt" in capsys.readouterr().out
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    assert figures["real pictures"]["edge_f1"]["mean"] > 0.9 > figures["discs at the true places"]["edge_f1"]["mean"]
    assert (out / "evaluation.png").stat().st_size > 1000
    assert export_command.main([str(whole), str(tmp_path / "out")]) == 0
    ControlNetModel.from_pretrained(tmp_path / "out")


def test_a_run_says_what_its_speed_was_measured_on(whole):
    speed = json.loads((whole / "speed.json").read_text())
    assert speed["device_kind"] == "cpu" and is_card(accelerator("cpu"), speed["device"])


def test_the_deepspeed_launcher_starts_a_run_too(world_folder):
    path = run_file(world_folder, "launched", max_steps=2, checkpoint={"every_steps": 2})
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, "--module", "controlbooth.trainer.controlnet.train", path, "optimizer.learning_rate=2e-3"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path_with_python()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(world_folder / "runs" / "launched", "learning_rate") == {1: 2e-3, 2: 2e-3}
    state = json.loads(
        (world_folder / "runs" / "launched" / "checkpoints" / "step-00000002" / "state.json").read_text()
    )
    assert state["world_size"] == 2


@pytest.mark.parametrize(("processes", "status", "speaker"), [(1, 2, "rank 0: "), (2, 1, "controlbooth train: rank ")])
def test_the_last_thing_a_failed_start_says_is_why(world_folder, processes, status, speaker):
    path = run_file(world_folder, f"refused-{processes}", model={"hint_channels": [4, 8]})  # no check before it tells
    command = [sys.executable, "-m", "controlbooth.launch.cli", "train", str(path), "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert last.startswith(speaker) and "hint_channels (4, 8) halves" in last and "give four widths" in last
    assert processes > 1 or done.stderr.count("hint_channels") == 1  # it is said once


def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on_but_no_other_run_takes_the_folder(world_folder):
    run = world_folder / "runs" / "stopped"
    path = run_file(world_folder, "stopped", max_steps=400, checkpoint={"every_steps": 1000})
    process = start(path, 2)
    wait_for_step(run, 3)
    second = start(path, 1)
    output, _ = second.communicate(timeout=300)
    assert second.returncode != 0 and "is in use by another training" in output
    for rank in psutil.Process(process.pid).children():
        rank.send_signal(signal.SIGTERM)
    finish(process)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and 3 <= status["step"] < 400
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{status['step']:08d}"

    # A restart that is refused says why, and leaves the run as it was.
    kept = (run / "config.yaml").read_bytes()
    refused = start(run_file(world_folder, "stopped", max_steps=400, data={"condition": "segmentation"}), 2)
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode != 0 and "has 'segmentation'. Set it back" in output
    assert (run / "config.yaml").read_bytes() == kept
    assert json.loads((run / "status.json").read_text()) == status

    saved = (checkpoint / "state.json").read_text()
    order = json.loads(saved)["order"] | {"version": 2}  # of a version that dropped prompts by the samples' names
    (checkpoint / "state.json").write_text(json.dumps(json.loads(saved) | {"order": order}))
    write_marker(checkpoint)
    refused = start(run_file(world_folder, "stopped", max_steps=status["step"] + 2), 1)
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode != 0 and "by the names of samples" in output
    assert f"model.controlnet={checkpoint}/controlnet" in output
    (checkpoint / "state.json").write_text(saved)
    write_marker(checkpoint)

    run_file(world_folder, "stopped", max_steps=status["step"] + 2)
    assert f"at step {status['step']}" in finish(start(path, 2))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"

    # A run that is longer than is asked for is refused with its own length.
    run_file(world_folder, "stopped", max_steps=2)
    last = status["step"] + 2
    refused = start(path, 1)
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode != 0 and f"is finished at step {last}. Raise max_steps=2 above {last} to go on" in output
