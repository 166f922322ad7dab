"""All layers of a tiny base trained on subjects, by ranks of torchrun with ZeRO."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file
from studios import finish, kill, run_file, start, states

from controlbooth.launch.commands import dreambooth_measure
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import initial_noise, sample

SETTINGS = dict(
    method="full",
    instance_batch_size=2,
    steps=6,
    learning_rate=1e-3,
    checkpoint_every_steps=2,
    engine=dict(zero_stage=2),
)


@pytest.fixture(scope="module")
def two(studio):
    """A manifest of the first two subjects."""
    (studio / "two.yaml").write_text(yaml.safe_dump(yaml.safe_load((studio / "subjects.yaml").read_text())[:2]))
    return studio


@pytest.fixture(scope="module")
def whole(two):
    """Both subjects on two ranks, undisturbed."""
    finish(start(two, run_file(two, "full", **SETTINGS), processes=2, subjects="two.yaml"))
    return "full"


def pipeline_of(folder, run, number=0):
    return folder / "runs" / run / "subjects" / f"subject-{number}" / "pipeline"


def unet(folder, run, number=0):
    return load_file(pipeline_of(folder, run, number) / "unet" / "diffusion_pytorch_model.safetensors")


def largest(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_every_layer_of_the_unet_moves_and_subjects_begin_with_the_base(two, whole):
    base = load_file(two / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for number in range(2):
        ours = unet(two, whole, number)
        assert all((ours[name] != base[name]).any() for name in base)
    assert largest(unet(two, whole, 0), unet(two, whole, 1)) > 1e-3
    assert all(one["state"] == "finished" and one["step"] == 6 for one in states(two, whole).values())
    assert not list((two / "runs" / whole / "subjects").glob("*/checkpoints"))


def test_one_rank_ends_with_the_weights_of_two(two):
    worker = (str(Path(__file__).parent / "workers" / "smooth.py"), "0.01")
    for name, ranks in (("full-one", 1), ("full-both", 2)):
        path = run_file(two, name, **SETTINGS | dict(learning_rate=1e-2))
        finish(start(two, path, processes=ranks, subjects="two.yaml", worker=worker))
    base = load_file(two / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for number in range(2):
        assert largest(unet(two, "full-both", number), base) > 1e-2
        assert largest(unet(two, "full-one", number), unet(two, "full-both", number)) < 1e-6


def test_a_killed_run_ends_with_bitwise_the_same_weights(two, whole):
    path = run_file(two, "full-killed", **SETTINGS)
    process = start(two, path, processes=2, subjects="two.yaml")
    second = two / "runs" / "full-killed" / "subjects" / "subject-1" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(second.glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    kill(process)
    finish(start(two, path, processes=2, subjects="two.yaml"))
    assert all(largest(unet(two, "full-killed", n), unet(two, whole, n)) == 0.0 for n in range(2))


def test_an_optimizer_of_8_bits_goes_on_from_a_kill_with_the_same_bits_and_another_one_is_refused(two):
    settings = SETTINGS | dict(optimizer="adamw8bit")
    finish(start(two, run_file(two, "bits", **settings), processes=2, subjects="two.yaml"))
    path, run = run_file(two, "bits-killed", **settings), two / "runs" / "bits-killed"
    process = start(two, path, processes=2, subjects="two.yaml")
    deadline = time.monotonic() + 200
    while not list((run / "subjects" / "subject-0" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    kill(process)
    other = run_file(two, "bits-killed", **settings | dict(optimizer="muon"))
    output, _ = start(two, other, processes=2, subjects="two.yaml").communicate(timeout=600)
    assert "was saved with optimizer='adamw8bit', and the run has 'muon'. Set it back" in output
    finish(start(two, run_file(two, "bits-killed", **settings), processes=2, subjects="two.yaml"))
    for number in range(2):
        assert largest(unet(two, "bits", number), unet(two, "bits-killed", number)) == 0.0


def test_a_subject_whose_last_update_is_skipped_ends_with_the_weights_of_the_one_before(two):
    rows = yaml.safe_load((two / "subjects.yaml").read_text())
    (two / "first.yaml").write_text(yaml.safe_dump(rows[:1]))
    changes = dict(prior=dict(weight=0.0), checkpoint_every_steps=2)
    finish(start(two, run_file(two, "full-three", **SETTINGS | changes | dict(steps=3)), subjects="first.yaml"))
    path = run_file(two, "full-skipped", **SETTINGS | changes | dict(steps=4))
    worker = (str(Path(__file__).parent / "workers" / "spoiled.py"), "4")
    finish(start(two, path, subjects="first.yaml", worker=worker))
    assert states(two, "full-skipped")["subject-0"]["step"] == 4
    assert largest(unet(two, "full-skipped"), unet(two, "full-three")) == 0.0


@pytest.mark.parametrize("stage", [2, 3])
def test_a_subject_that_ends_without_numbers_has_failed_and_the_next_is_trained(two, stage):
    rows = yaml.safe_load((two / "two.yaml").read_text())
    spoilers = [dict(learning_rate=1e39), dict(name="loss", identifier="small", learning_rate=1e30)]
    rows = [*(rows[0] | spoiler for spoiler in spoilers), rows[1]]
    (two / "spoiled.yaml").write_text(yaml.safe_dump(rows))
    run = f"full-spoiled-{stage}"
    changes = dict(steps=3, checkpoint_every_steps=1, prior=dict(weight=0.0), engine=dict(zero_stage=stage))
    path = run_file(two, run, **SETTINGS | changes)
    assert "1 subjects finished, 2 failed" in finish(start(two, path, 2, "spoiled.yaml"), status=1)
    told = states(two, run)
    assert "weights are no finite numbers after step 1. Lower" in told["subject-0"]["error"]
    assert "its loss is nan at its last step, 3. Lower" in told["loss"]["error"]
    assert told["subject-1"]["state"] == "finished" and pipeline_of(two, run, 1).is_dir()
    assert not pipeline_of(two, run).exists() and not list((pipeline_of(two, run).parent).glob("checkpoints/step-*"))


def test_the_text_encoder_learns_where_it_is_asked_to(two, whole):
    path = run_file(two, "full-text", **SETTINGS | dict(train_text_encoder=True, prior=dict(weight=0.0)))
    finish(start(two, path, processes=2, subjects="two.yaml"))
    base, ours = (
        load_file(f / "text_encoder" / "model.safetensors") for f in (two / "base", pipeline_of(two, "full-text"))
    )
    assert sum((ours[name] != base[name]).any() for name in base if "position_ids" not in name) > len(base) / 2
    untouched = load_file(pipeline_of(two, whole) / "text_encoder" / "model.safetensors")
    assert largest(untouched, base) == 0.0


def test_the_pipeline_that_is_written_is_one_that_diffusers_reads(two, whole):
    folder = pipeline_of(two, whole)
    ours = load_base(folder, "auto", torch.float32, torch.device("cpu"))
    made = sample(ours, ["a red star"], seeds=[3], steps=4, guidance_scale=2.0)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        "a red star", num_inference_steps=4, guidance_scale=2.0, output_type="np",
        latents=initial_noise(ours, [3], 64, 64),
    ).images  # fmt: skip
    assert np.abs(np.round(theirs * 255) - made.numpy()).max() <= 1


def test_what_was_trained_can_be_measured(two, whole, capsys):
    run = two / "runs" / whole
    assert dreambooth_measure.main([str(run), "--prompts", "2", "--images", "2"]) == 0
    assert "2 subjects, 2 prompts x 2 images" in capsys.readouterr().out
    figures = json.loads((run / "measures.json").read_text())
    assert figures["subjects"].keys() == {"subject-0", "subject-1"}
    drawn = sorted((run / "subjects" / "subject-0" / "pictures").glob("*.png"))
    assert len(drawn) == 2 * 2 + 2
    other = run / "subjects" / "subject-1" / "pictures" / drawn[0].name
    assert drawn[0].read_bytes() != other.read_bytes()


def test_a_subject_leaves_nothing_in_memory_for_the_next(two):
    for stage in (2, 3):
        changes = dict(steps=1, prior=dict(weight=0.0), engine=dict(zero_stage=stage))
        run_file(two, f"in-turn-{stage}", **SETTINGS | changes)
    outcome = tiny.torchrun(2, "subjects_in_turn", two, "in-turn-2", "in-turn-3")
    for name, found in outcome.items():
        assert found["engines"] == [0, 0, 0, 0], name
        assert max(found["held"]) - found["held"][0] < found["weights"] / 20, f"{name}: {found}"


def test_pictures_that_ranks_cannot_share_are_refused(two):
    path = run_file(two, "full-odd", **SETTINGS | dict(instance_batch_size=1))
    output = finish(start(two, path, processes=2, subjects="two.yaml"), status=1)
    assert "instance_batch_size=1 cannot be shared by 2 ranks" in output and "Set it to 2 or a multiple" in output
