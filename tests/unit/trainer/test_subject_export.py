"""`dreambooth export`: one subject or all of them, in the forms that programs read."""

import hashlib

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from controlbooth.launch.commands.dreambooth_export import main

NAMES = ("first", "second")


@pytest.fixture(scope="module")
def run(base_folder, tmp_path_factory):
    """A run of two finished subjects with LoRAs of random numbers on SDXL, and one that is still trained."""
    from controlbooth.models.lora import ATTENTION, attach_adapters, reset_subject, subject_weights
    from controlbooth.models.pretrained import load_base
    from controlbooth.trainer.config.subjects import load_run
    from controlbooth.trainer.dreambooth.manifest import Task, record_texts
    from controlbooth.trainer.dreambooth.stack import LORA_FILE, save_lora
    from controlbooth.trainer.dreambooth.status import write_status
    from controlbooth.trainer.run.attempt import Attempt

    root = tmp_path_factory.mktemp("runs")
    tree = dict(name="pets", output=str(root), model=dict(base=str(base_folder("sdxl"))), resolution=32)
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    plain = attach_adapters(load_base(base_folder("sdxl")).denoiser, ATTENTION, 1, 4)
    adapters = {f"unet.{name}": adapter for name, adapter in plain.items()}
    attempt = Attempt(root / "pets", 1, "id")
    attempt.folder.mkdir(parents=True)
    tasks = []
    for number, name in enumerate((*NAMES, "third")):
        tasks.append(Task(name, (root / "a.png",), "dog", "olis", f"a olis dog {number}", "a dog", 10, 1e-3, 4))
        if name == "third":
            write_status(attempt, root / "pets", name, state="training", step=4)
            continue
        reset_subject(adapters, 0, 4, seed=number)
        for adapter in adapters.values():
            adapter.up.data.normal_()
        save_lora(attempt, subject_weights(adapters, 0, 4), root / "pets" / "subjects" / name / LORA_FILE)
        write_status(attempt, root / "pets", name, state="finished", step=10)
    for name, text in record_texts(load_run(root / "run.yaml"), tasks).items():
        (root / "pets" / name).write_text(text)
    return root / "pets"


def export(*words):
    return main([str(word) for word in words])


def test_all_finished_subjects_are_written_in_every_form_and_told_in_a_table(run, tmp_path, capsys):
    out = tmp_path / "loras"
    assert export(run, "--all", out, "--format", "diffusers,kohya,comfy") == 0
    forms = ("comfy", "diffusers", "kohya")
    names = sorted(f"{name}.{form}.safetensors" for name in NAMES for form in forms)
    assert sorted(file.name for file in out.iterdir()) == names
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["subject", "step", "rank", "form", str(out)]
    assert "not finished: training" in lines[1] and lines[1].startswith("third")
    assert lines[2].split() == ["first", "10", "4", "diffusers", "first.diffusers.safetensors:", "written"]
    assert len(lines) == 2 + 6


def test_a_header_says_what_the_file_is_and_of_which_weights(run, tmp_path):
    out = tmp_path / "rex.safetensors"
    assert export(run, "first", out, "--format", "kohya") == 0
    with safe_open(out, "pt") as file:
        header = file.metadata()
    source = run / "subjects" / "first" / "pytorch_lora_weights.safetensors"
    expected = dict(
        form="kohya", identifier="olis", prompt="a olis dog 0", rank="4", alpha="4", step="10",
        weights_sha256=hashlib.sha256(source.read_bytes()).hexdigest(), ss_network_dim="4", ss_network_alpha="4.0",
        ss_network_module="networks.lora", ss_base_model_version="sdxl_base_v1-0", ss_output_name="first",
        ss_v2="False",
    )  # fmt: skip
    assert expected.items() <= header.items() and header["class"] == "dog" and header["controlbooth_version"]
    tensors = load_file(out)
    assert all(tensor == 4.0 for name, tensor in tensors.items() if name.endswith(".alpha"))
    assert any(name.startswith("lora_unet_input_blocks_") for name in tensors)


def test_a_file_in_diffusers_form_holds_the_runs_own_tensors_bit_for_bit(run, tmp_path):
    assert export(run, "second", tmp_path / "a.safetensors") == 0
    theirs = load_file(run / "subjects" / "second" / "pytorch_lora_weights.safetensors")
    ours = load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_export_writes_only_what_is_missing_or_half_written(run, tmp_path, capsys):
    assert export(run, "--all", tmp_path, "--format", "kohya") == 0
    whole, half = (tmp_path / f"{name}.kohya.safetensors" for name in NAMES)
    before, content = whole.stat().st_mtime_ns, {name: one.clone() for name, one in load_file(half).items()}
    half.write_bytes(half.read_bytes()[:-100])
    capsys.readouterr()
    assert export(run, "--all", tmp_path, "--format", "kohya") == 0
    told = capsys.readouterr().out
    assert "first.kohya.safetensors: there already" in told and "second.kohya.safetensors: written" in told
    assert whole.stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 2
    again = load_file(half)
    assert again.keys() == content.keys() and all(torch.equal(again[name], content[name]) for name in again)


def test_a_file_of_other_weights_is_left_alone_unless_it_is_to_be_written_over(run, tmp_path, capsys):
    assert export(run, "second", tmp_path / "first.diffusers.safetensors") == 0
    other = (tmp_path / "first.diffusers.safetensors").read_bytes()
    assert export(run, "--all", tmp_path) == 1
    assert "of other weights; --force writes over it" in capsys.readouterr().out
    assert (tmp_path / "first.diffusers.safetensors").read_bytes() == other
    assert export(run, "--all", tmp_path, "--force") == 0
    assert (tmp_path / "first.diffusers.safetensors").read_bytes() != other


def test_a_dry_run_tells_what_would_be_written_and_writes_nothing(run, tmp_path, capsys):
    assert export(run, "--all", tmp_path / "new", "--format", "comfy", "--dry-run") == 0
    assert capsys.readouterr().out.count("would be written") == 2
    assert export(run, "first", tmp_path / "one.safetensors", "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_says_why(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no subject 'rex'; it has first, second, third"):
        export(run, "rex", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="third is training, and has nothing to export"):
        export(run, "third", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors is one file, not 2: give one form, or --all FOLDER"):
        export(run, "first", tmp_path / "x.safetensors", "--format", "kohya,comfy")
    with pytest.raises(ValueError, match="none of the 3 subjects .* has a LoRA to export yet"):
        export(run, "--all", tmp_path, "--best")
    for words, message in (
        ((run, "first"), "give NAME and OUT.safetensors for one subject, or --all FOLDER"),
        ((run, "first", "--all", tmp_path), "or --all FOLDER for all that are finished"),
        ((run, "--all", tmp_path, "--format", "ckpt"), "'ckpt' is no form of a LoRA's file: choose from diffusers"),
    ):
        with pytest.raises(SystemExit):
            export(*words)
        assert message in capsys.readouterr().err
