"""What must hold of trainings of control-LoRAs on any base: runs of 8 steps, with checkpoints at 4, 6 and 8."""

import shutil

import numpy as np
import tiny
from safetensors.numpy import load_file
from trainings import finish, finish_after_two_kills, logged, run_file, start

RATES = dict(optimizer=dict(lora_learning_rate=5e-3))


def last_weights(run):
    return tiny.weights(run / "checkpoints" / "step-00000008")


def check_stages_with_a_plain_process(folder):
    """ZeRO 0 to 3 on two ranks have the losses and averages of one plain process; -> the averages, and each stage's
    weights."""
    plain = tiny.torchrun(1, "plain", folder)["losses"]
    average = load_file(folder / "plain-average.safetensors")
    weights = {}
    for stage, curve in tiny.torchrun(2, "stages", folder, "fp32").items():
        np.testing.assert_allclose(curve, plain, rtol=3e-6, err_msg=f"ZeRO stage {stage}")
        ours = tiny.weights(folder / "runs" / f"stage-{stage}-fp32" / "checkpoints" / "step-00000006")
        assert ours.keys() == average.keys()
        for name, tensor in average.items():
            np.testing.assert_allclose(ours[name], tensor, atol=1e-4, err_msg=f"ZeRO stage {stage}: {name}")
        weights[stage] = ours
    return average, weights


def check_stages_in_bf16(folder, name):
    """All stages train alike in bf16, and keep masters that are not rounded. name: of a difference, which tells it."""
    curves = tiny.torchrun(2, "stages", folder, "bf16")
    for stage, curve in curves.items():
        np.testing.assert_allclose(curve, curves["0"], rtol=3e-2, err_msg=f"ZeRO stage {stage}")
        ours = tiny.weights(folder / "runs" / f"stage-{stage}-bf16" / "checkpoints" / "step-00000006")
        rounded = (ours[name].view(np.uint32) & 0xFFFF) == 0
        assert rounded.mean() < 0.05, f"ZeRO stage {stage}"


def check_two_kills(folder, whole):
    """A run that is killed twice ends with bitwise the losses and weights of an uninterrupted one."""
    path, killed = run_file(folder, "killed", max_steps=8, **RATES), folder / "runs" / "killed"
    finish_after_two_kills(path, killed, seed=6)
    assert logged(killed, "loss") == logged(whole, "loss")
    assert all(np.array_equal(last_weights(killed)[name], tensor) for name, tensor in last_weights(whole).items())


def check_another_world_size(folder, whole):
    """A run of two ranks goes on with one, with the same losses within rounding."""
    moved = folder / "runs" / "moved"
    shutil.copytree(whole, moved)
    for step in (6, 8):
        shutil.rmtree(moved / "checkpoints" / f"step-{step:08d}")
    assert "at step 4" in finish(start(run_file(folder, "moved", max_steps=8, **RATES), 1))
    after, before = logged(moved, "loss"), logged(whole, "loss")
    np.testing.assert_allclose([after[s] for s in range(5, 9)], [before[s] for s in range(5, 9)], rtol=3e-6)
