import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from controlbooth.launch.commands.export import main
from controlbooth.models.pretrained import load_base, load_controlnet, save_controlnet
from controlbooth.models.sampling import Control, sample
from controlbooth.trainer import export as exports
from controlbooth.trainer.config.loading import build_config, dump, load_config
from controlbooth.trainer.config.run import ModelConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import new_controlnet
from controlbooth.trainer.run.checkpoint import complete_checkpoints, folder_of
from controlbooth.trainer.run.integrity import COMPLETE, folder_digest

STEPS = {100: 0.5, 200: 0.8, 300: 0.7}  # step -> edge F1


def write_checkpoint(run: Path, step: int, base, metrics: dict, complete: bool = True) -> Path:
    """As the trainer leaves one, without DeepSpeed's files."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    torch.manual_seed(step)
    controlnet = new_controlnet(base.denoiser, ModelConfig(base=str(base.path)))
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    save_controlnet(controlnet, folder / "controlnet")
    digest = folder_digest(folder / "controlnet")
    state = dict(step=step, digest=digest, dataset_fingerprint="f1", base_digest=base.digest, metrics=metrics)
    (folder / "state.json").write_text(json.dumps(state))
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if complete:
        (folder / COMPLETE).write_text(json.dumps(sizes))
    return folder


@pytest.fixture
def make_run(tmp_path, load_tiny, base_folder):
    """Family name -> the folder of a run with three checkpoints, an incomplete fourth, and a sample grid."""

    def make(family: str = "sd15") -> Path:
        run = tmp_path / "runs" / "edges"
        run.mkdir(parents=True)
        tree = dict(
            name="edges",
            max_steps=400,
            global_batch_size=8,
            micro_batch_size=4,
            model=dict(base=str(base_folder(family))),
            data=dict(shards="shards/*.tar", condition="edges", resolution=32),
            validation=dict(sampling_steps=2),
            tracking=dict(uri="http://secret-host:5000"),
        )
        (run / "config.yaml").write_text(dump(build_config(tree)))
        base = load_tiny(family)
        for step, score in STEPS.items():
            write_checkpoint(run, step, base, dict(edge_f1=score, fixed_noise_loss=0.123456))
            shutil.copy(run / "config.yaml", folder_of(run, step))
        write_checkpoint(run, 400, base, {}, complete=False)
        (run / "samples").mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run / "samples" / "step-00000300.png")
        return run

    return make


def step_of(out: Path) -> int:
    """Which checkpoint was exported, by its weights."""
    weights = load_file(out / "diffusion_pytorch_model.safetensors")
    run = out.parent / "runs" / "edges"
    for checkpoint in complete_checkpoints(run):
        expected = load_file(checkpoint / "controlnet" / "diffusion_pytorch_model.safetensors")
        if torch.equal(expected["conv_in.weight"], weights["conv_in.weight"]):
            return int(checkpoint.name.removeprefix("step-"))
    raise AssertionError("no checkpoint has these weights")


@pytest.mark.parametrize(("options", "step"), [([], 300), (["--step", "100"], 100), (["--best"], 200)])
def test_the_latest_whole_checkpoint_is_exported_or_the_one_that_is_asked_for(options, step, make_run, tmp_path):
    assert main([str(make_run()), str(tmp_path / "out"), *options]) == 0
    assert step_of(tmp_path / "out") == step
    assert (tmp_path / "out" / "samples.png").exists() == (step == 300)  # the one that was drawn at this step


@pytest.mark.parametrize("family", ["sd15", "sdxl", "miniature", "miniature-dit"])
def test_the_usage_snippet_of_the_card_runs(family, make_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    main([str(make_run(family)), str(out)])
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(out / "condition.png")
    monkeypatch.chdir(out)
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open(out / "picture.png").size == (32, 32)


SCHEDULERS = {  # as published bases have them; the first is Stable Diffusion 1.5's own, without clip_sample
    "pndm": dict(_class_name="PNDMScheduler", skip_prk_steps=True),
    "euler, v, zero terminal SNR": dict(
        _class_name="EulerDiscreteScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "ddim that clips": dict(thresholding=True, set_alpha_to_one=False, steps_offset=1, timestep_spacing="linspace"),
    "stochastic": dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler_of_base", SCHEDULERS)
def test_the_usage_snippet_draws_what_the_run_draws_whatever_the_scheduler_file_says(
    scheduler_of_base, make_run, tmp_path, monkeypatch
):
    run, out = make_run(), tmp_path / "out"
    config = load_config(run / "config.yaml")
    base_folder = tmp_path / "base"  # as Stable Diffusion 1.5's own file is: of another class, without clip_sample
    shutil.copytree(config.model.base, base_folder)
    scheduler = base_folder / "scheduler" / "scheduler_config.json"
    options = json.loads(scheduler.read_text())
    del options["clip_sample"]
    scheduler.write_text(json.dumps(options | SCHEDULERS[scheduler_of_base]))
    if scheduler_of_base == "stochastic":  # and a base that has half-precision variants alone
        for file in base_folder.rglob("*.safetensors"):
            half = {name: tensor.half() for name, tensor in load_file(file).items()}
            save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
            file.unlink()
    for file in (run / "config.yaml", *run.glob("checkpoints/*/config.yaml")):
        file.write_text(dump(load_config(file, [f"model.base={base_folder}", "validation.sampling_steps=8"])))
    main([str(run), str(out)])
    condition = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(condition).save(out / "condition.png")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    exec(compile(code, "README.md", "exec"), {})

    base = load_base(base_folder, "sd15", torch.float32, "cpu")
    control = Control(
        load_controlnet(out, base.denoiser).eval(), torch.from_numpy(condition).permute(2, 0, 1)[None] / 255
    )
    ours = sample(
        base, ["a prompt like the captions of the training set"], [control], seeds=[0], steps=8,
        guidance_scale=base.family.usual_guidance,
    )[0].numpy()  # fmt: skip
    theirs = np.asarray(Image.open(out / "picture.png"))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_the_card_tells_what_the_model_is(make_run, tmp_path):
    main([str(make_run()), str(tmp_path / "out"), "--dtype", "fp16"])
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "diffusers" and header["base_model"] == "sd15"
    assert header["tags"] == ["controlnet", "stable-diffusion", "edges", "controlbooth"]
    for expected in (
        "A ControlNet for Stable Diffusion 1.x (`sd15`) that follows **edges** pictures",
        "for 300 steps of 8 samples",
        "| edge f1 | 0.7 |",
        "| fixed noise loss | 0.1235 |",
        "`controlbooth evaluate` before the export puts figures with intervals here",
        "| samples seen | `2,400` |",
        "| fingerprint of the data set | `f1` |",
        "| weights | `fp16` |",
        "![Samples of the validation set](samples.png)",
        "learning_rate: 1.0e-05",
    ):
        assert expected in text, expected
    assert "secret" not in text  # where a run was tracked is not part of the model
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "samples.png"
    }  # fmt: skip


def test_the_card_shows_the_evaluation_of_these_weights_beside_chance_and_the_real_pictures(make_run, tmp_path):
    run = make_run()

    def interval(mean: float) -> dict:
        return dict(mean=mean, low=mean - 0.05, high=mean + 0.05)

    figures = {
        "without control": {"edge_f1": interval(0.25) | dict(chance=interval(0.24), share=interval(0.01))},
        "with control": {
            "edge_f1": interval(0.9) | dict(chance=interval(0.2), share=interval(0.93)),
            "says_class": {"mean": 0.5},
        },
        "real pictures": {"edge_f1": interval(0.95) | dict(chance=interval(0.2), share=interval(1.0))},
    }
    sampler = dict(scheduler="ddim", steps=20, guidance=2.0)
    digest = json.loads((folder_of(run, 300) / "state.json").read_text())["digest"]
    evaluation = dict(digest=digest, figures=figures, samples=64, resolution=32, sampler=sampler)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    main([str(run), str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "Of 64 held-out conditions at 32 pixels (ddim, 20 steps, guidance 2)",
        "| figure | without control | with control | real pictures | chance, with control | share of what is poss",
        "| edge f1 | 0.250 (0.200 to 0.300) | 0.900 (0.850 to 0.950) | 0.950 (0.900 to 1.000) | 0.200 (0.150 to 0.250) "
        "| 0.930 (0.880 to 0.980) |",
        "| class |  | 0.500 |  |  |  |",
    ):
        assert expected in text, expected

    main([str(run), str(tmp_path / "other"), "--step", "200"])  # of these weights nothing was measured
    assert "share of what is possible" not in (tmp_path / "other" / "README.md").read_text()


def test_weights_are_written_in_the_dtype_that_is_asked_for(make_run, tmp_path):
    run = make_run()
    main([str(run), str(tmp_path / "out"), "--dtype", "fp16"])
    weights = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    original = load_file(run / "checkpoints" / "step-00000300" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(tensor, original[key].half()) for key, tensor in weights.items())
    ControlNetModel.from_pretrained(tmp_path / "out", torch_dtype=torch.float16, local_files_only=True)


def test_a_single_file_has_the_original_names_and_reads_back(make_run, load_tiny, tmp_path):
    run = make_run()
    main([str(run), str(tmp_path / "out"), "--format", "single-file"])
    weights = load_file(tmp_path / "out" / "edges.safetensors")
    assert all(key.startswith("control_model.") for key in weights)
    again = load_controlnet(tmp_path / "out" / "edges.safetensors", load_tiny("sd15").denoiser)
    original = load_file(run / "checkpoints" / "step-00000300" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, original[key]) for key, tensor in again.state_dict().items())
    assert "Put it where your image UI keeps its ControlNets" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_fails_leaves_nothing_behind(make_run, tmp_path):
    run = make_run("miniature")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="as its base, which has no original layout"):
        main([str(run), str(out), "--format", "single-file"])
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ValueError, match="as its base, which has no original layout"):
        main([str(run), str(out), "--format", "single-file", "--force"])
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_a_folder_that_holds_something_is_replaced_only_when_told_so(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    main([str(run), str(out)])  # an empty folder is as good as none
    with pytest.raises(FileExistsError, match="out is not empty. Give another folder, or --force"):
        main([str(run), str(out), "--step", "100"])
    assert step_of(out) == 300
    (out / "old").touch()
    main([str(run), str(out), "--step", "100", "--force"])
    assert step_of(out) == 100 and not (out / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_a_folder_around_the_run_is_never_replaced(make_run, tmp_path):
    run = make_run()
    with pytest.raises(ValueError, match="holds the run .* and would be replaced"):
        main([str(run), str(tmp_path / "runs"), "--force"])
    assert complete_checkpoints(run)


def test_what_cannot_be_exported_is_said(make_run, tmp_path):
    run, out = make_run(), str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 400. There are: 100, 200, 300"):
        main([str(run), out, "--step", "400"])
    with pytest.raises(FileNotFoundError, match="config.yaml does not exist, so .* is no folder of a run"):
        main([str(tmp_path), out])
    for checkpoint in complete_checkpoints(run):
        state = json.loads((checkpoint / "state.json").read_text()) | {"metrics": {}}
        (checkpoint / "state.json").write_text(json.dumps(state))
        (checkpoint / COMPLETE).write_text(json.dumps({"state.json": (checkpoint / "state.json").stat().st_size}))
    with pytest.raises(
        FileNotFoundError, match="no checkpoint of .*steps 100, 200, 300.* has a figure that tells control"
    ):
        main([str(run), out, "--best"])
    for checkpoint in complete_checkpoints(run):
        (checkpoint / COMPLETE).unlink()
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        main([str(run), out])
    (run / "config.yaml").write_text("name: pets\nmodel: {base: miniature}\nsubjects_per_batch: 8\n")
    with pytest.raises(ConfigError, match="is a DreamBooth run, not a run: use "):
        main([str(run), out])
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file. Give a folder that does not exist yet"):
        exports.export(run, run, tmp_path / "file", "diffusers", "fp32")


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "controlbooth export runs/edges exported/edges --best" in capsys.readouterr().out


def test_weights_of_which_a_byte_has_changed_are_not_exported(make_run, tmp_path, capsys):
    run = make_run()
    weights = run / "checkpoints" / "step-00000300" / "controlnet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="step-00000300 is damaged, in controlnet"):
        main([str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert main([str(run), str(tmp_path / "out"), "--step", "200"]) == 0
