"""Runs of subjects on tiny transformers of flow matching, on ranks of torchrun, and what diffusers makes of them."""

import json
import time
from typing import Any

import bases
import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from studios import difference, finish, kill, run_file, start, states, weights, write_subjects

from controlbooth.launch.commands import dreambooth_measure
from controlbooth.launch.commands.dreambooth_export import main as export_main
from controlbooth.models.files.loading import read_tensors
from controlbooth.models.sampling import sample
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.dreambooth.adapted import attach
from controlbooth.trainer.dreambooth.measuring.measure import fill_stack
from controlbooth.trainer.dreambooth.stack import LORA_FILE
from controlbooth.trainer.run.base import open_base

PIPELINES: dict[str, Any] = {"sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}
NAMES = ("subject-0", "subject-1", "subject-2")
FULL = dict(
    method="full", instance_batch_size=2, steps=3, engine=dict(zero_stage=3), train_text_encoder=True,
    checkpoint_every_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module", params=bases.TRANSFORMER_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A folder with base/ of the family, and a manifest of three subjects named by letters."""
    own = tmp_path_factory.mktemp(family)
    bases.write_base(own / "base", family)
    write_subjects(own)
    rows = yaml.safe_load((own / "subjects.yaml").read_text())[:3]
    rows = [row | dict(identifier=letter, class_noun="d") for row, letter in zip(rows, "abc", strict=True)]
    (own / "subjects.yaml").write_text(yaml.safe_dump(rows))
    (own / "one.yaml").write_text(yaml.safe_dump(rows[:1]))
    return own


def settings(folder, name, **changes):
    model = dict(base=str(folder / "base"), attention="math", text_tokens=bases.T5_TOKENS)
    prior = dict(images=2, sampling_steps=2)
    tree = dict(model=model, steps=6, checkpoint_every_steps=2, subjects_per_batch=3, prior=prior)
    return run_file(folder, name, **tree | changes)


@pytest.fixture(scope="module")
def whole(folder):
    """All three in one stack, with the text encoders of CLIP, undisturbed and looked at on the way."""
    validation = dict(every_steps=3, prompts=["a {identifier} d"], pictures=1, sampling_steps=2, hold_out=1)
    adapter = dict(layers="attention+mlp")
    changes = dict(train_text_encoder=True, adapter=adapter, validation=validation, learning_rate=1e-2)
    path = settings(folder, "whole", **changes)
    finish(start(folder, path))
    return path


def picture(base, prompt="a a d"):
    return sample(base, [prompt], seeds=[5], steps=3, guidance_scale=3.0, picture_size=(64, 64))


def drawn_by_diffusers(pipeline, base):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(5))[None]
    if base.family.packs_latents:
        noise = type(pipeline)._pack_latents(noise, 1, base.latent_channels, 8, 8)
    images = pipeline(
        "a a d", height=64, width=64, num_inference_steps=3, guidance_scale=3.0, latents=noise,
        max_sequence_length=bases.T5_TOKENS, output_type="np",
    ).images  # fmt: skip
    return 255 * torch.from_numpy(images)


def test_subjects_together_end_as_each_does_alone_and_are_looked_at_on_the_way(folder, whole):
    tree = yaml.safe_load(whole.read_text()) | dict(name="alone", subjects_per_batch=1)
    (folder / "alone.yaml").write_text(yaml.safe_dump(tree))
    finish(start(folder, folder / "alone.yaml"))
    for name in NAMES:
        ours, theirs = weights(folder, "whole", name), weights(folder, "alone", name)
        moved = max(np.abs(tensor).max() for key, tensor in theirs.items() if "lora_B" in key)
        assert moved > 1e-2 and difference(ours, theirs) < moved / 50
        own = folder / "runs" / "whole" / "subjects" / name
        assert [one["step"] for one in json.loads((own / "validation.json").read_text())] == [0, 3, 6]
        assert len(list((own / "samples").glob("*.png"))) == 3


def test_a_killed_run_ends_with_bitwise_the_same_weights(folder, whole):
    tree = yaml.safe_load(whole.read_text()) | dict(name="killed")
    (folder / "killed.yaml").write_text(yaml.safe_dump(tree))
    process = start(folder, folder / "killed.yaml")
    state = folder / "runs" / "killed" / "state" / "of-1" / "rank-0.safetensors"
    seen, deadline = set(), time.monotonic() + 400
    while len(seen) < 2:  # it is written at the start, and after the first steps
        assert time.monotonic() < deadline and process.poll() is None
        seen |= {state.stat().st_mtime_ns} if state.exists() else set()
        time.sleep(0.005)
    kill(process)
    finish(start(folder, folder / "killed.yaml"))
    assert all(difference(weights(folder, "killed", name), weights(folder, "whole", name)) == 0.0 for name in NAMES)


def test_subjects_learn_on_a_base_in_int8_whose_blocks_wait_in_host_memory_as_on_one_that_is_there(folder):
    for name, frozen in (("packed", dict(precision="int8")), ("streamed", dict(precision="int8", stream="cpu"))):
        path = settings(folder, name, steps=3, learning_rate=1e-2, train_text_encoder=True)
        tree = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(tree | dict(model=tree["model"] | dict(frozen=frozen))))
        printed = finish(start(folder, path))
        assert "frozen base: int8" in printed and ("blocks in host memory" in printed) == (name == "streamed")
    moved = [np.abs(tensor).max() for key, tensor in weights(folder, "packed", NAMES[0]).items() if "lora_B" in key]
    assert max(moved) > 1e-2
    assert all(difference(weights(folder, "packed", name), weights(folder, "streamed", name)) == 0.0 for name in NAMES)
    (folder / "other.yaml").write_text(path.read_text().replace("int8", "nf4"))
    refused = finish(start(folder, folder / "other.yaml"), 1)  # torchrun's status
    assert "model.frozen.precision was int8 when this run began and is nf4" in refused


def test_a_pipeline_of_diffusers_loads_an_export_and_draws_our_picture(folder, family, whole, tmp_path):
    out = tmp_path / "subject.safetensors"
    assert export_main([str(folder / "runs" / "whole"), NAMES[0], str(out)]) == 0
    config = load_run(whole)
    base = open_base(config, torch.float32, "cpu")
    plain = picture(base).float()
    lora = read_tensors([folder / "runs" / "whole" / "subjects" / NAMES[0] / LORA_FILE])
    _, adapters = attach(config, base, subjects=0, rank=1)
    branches = 1 if family == "flux" else 2
    fill_stack(adapters, [lora], branches)
    ours = picture(base).float()
    pipeline = PIPELINES[family].from_pretrained(folder / "base")
    before = drawn_by_diffusers(pipeline, base)
    assert (plain - before).abs().max() < 0.51
    pipeline.load_lora_weights(tmp_path, weight_name=out.name)
    after = drawn_by_diffusers(pipeline, base)
    assert (ours - after).abs().max() < 0.51  # equal before they are rounded
    assert (after - before).abs().max() > 2
    kohya = tmp_path / "kohya.safetensors"
    assert export_main([str(folder / "runs" / "whole"), NAMES[0], str(kohya), "--format", "kohya"]) == 0
    assert any(name.startswith("lora_unet_") for name in read_tensors([kohya]))


def test_what_was_trained_is_measured(folder, whole, capsys):
    run = folder / "runs" / "whole"
    assert dreambooth_measure.main([str(run), "--prompts", "2", "--images", "2"]) == 0
    assert "3 subjects, 2 prompts x 2 images" in capsys.readouterr().out
    assert json.loads((run / "measures.json").read_text())["subjects"].keys() == set(NAMES)


def test_all_layers_are_trained_under_zero_3_and_diffusers_reads_the_pipeline(folder, family):
    validation = dict(every_steps=3, prompts=["a {identifier} d"], pictures=1, sampling_steps=2)
    path = settings(folder, "full", learning_rate=1e-3, validation=validation, **FULL)
    finish(start(folder, path, processes=2, subjects="one.yaml"))
    one = settings(folder, "full-one", learning_rate=1e-3, **FULL)
    finish(start(folder, one, processes=1, subjects="one.yaml"))
    assert states(folder, "full")["subject-0"]["state"] == "finished"
    own, other = (folder / "runs" / run / "subjects" / NAMES[0] / "pipeline" for run in ("full", "full-one"))
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after, alone = (load_file(f / part / f"{stem}.safetensors") for f in (folder / "base", own, other))
        moved = [name for name in before if (before[name] != after[name]).any()]
        assert len(moved) > 0.9 * len(before), sorted(set(before) - set(moved))
        # Adam turns the rounding of a gradient that is nearly zero into steps of the rate, 1e-3
        differences = np.concatenate([np.abs(alone[name] - after[name]).ravel() for name in before])
        assert np.quantile(differences, 0.99) < 1e-4 and differences.max() < 6.1e-3
    t5 = "text_encoder_3" if family == "sd3" else "text_encoder_2"
    assert difference(*(load_file(f / t5 / "model.safetensors") for f in (folder / "base", own))) == 0.0
    config = load_run(path)
    base = open_base(config, torch.float32, "cpu", where=own)
    theirs = drawn_by_diffusers(PIPELINES[family].from_pretrained(own), base)
    assert (picture(base).float() - theirs).abs().max() < 0.51


def test_attention_is_chosen_among_the_kernels_that_transformers_have(folder):
    model = dict(base=str(folder / "base"), text_tokens=bases.T5_TOKENS)
    plain = settings(folder, "plain", model=model | dict(attention="plain"))
    assert "attention 'plain' is for U-Nets" in finish(start(folder, plain), status=1)
    chosen = settings(folder, "chosen", model=model | dict(attention="auto"), steps=1, prior=dict(weight=0.0))
    finish(start(folder, chosen, subjects="one.yaml"))
    assert states(folder, "chosen")["subject-0"]["state"] == "finished"


def test_what_is_for_u_nets_is_refused_before_a_folder_is_taken(folder):
    for changes, message in (
        (dict(min_snr_gamma=5.0), "min_snr_gamma=5.0 is for a U-Net"),
        (dict(adapter=dict(layers="attention+convolutions")), "adapter.layers=attention+convolutions is for a U-Net"),
        (dict(precision="fp16"), "fp16"),
    ):
        process = start(folder, settings(folder, "refused", **changes))
        output, _ = process.communicate(timeout=300)
        assert process.returncode and message in output, output[-2000:]
        assert not (folder / "runs" / "refused").exists()
