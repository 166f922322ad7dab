"""Whatever of a base decides on results is in its identity, and a change of it is told by name and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlbooth.models import identity
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import drawn_by
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import PriorConfig, SubjectRunConfig
from controlbooth.trainer.controlnet.network_check import network_problems
from controlbooth.trainer.dreambooth.network_check import subjects_network_problems
from controlbooth.trainer.dreambooth.prior import class_folder
from controlbooth.trainer.encoding import latent_cache_identities
from controlbooth.trainer.evaluation.sample import Source, check_bases
from controlbooth.trainer.run import same_base
from controlbooth.trainer.run.integrity import write_marker
from controlbooth.trainer.run.same_base import base_facts, check_same_base, describe_base_changes, read_base_facts


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(file: Path) -> None:
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1.0
    save_file(weights, file, metadata={"format": "pt"})


def new_tokenizer(base: Path) -> None:
    """A word of another order in the vocabulary."""
    file = base / "tokenizer" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    file.write_text(json.dumps(tree))


CHANGES = {  # what is told -> how a base is changed
    "prediction_type was epsilon at step 2 and is v_prediction": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"
    ),
    "beta_end was 0.012 at step 2 and is 0.02": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", beta_end=0.02
    ),
    "rescale_betas_zero_snr was false at step 2 and is true": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True
    ),
    "timestep_spacing was leading at step 2 and is trailing": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", timestep_spacing="trailing"
    ),
    "set_alpha_to_one was true at step 2 and is false": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", set_alpha_to_one=False
    ),
    "scheduler class was DDIMScheduler at step 2 and is PNDMScheduler": lambda base: edit(
        base / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler"
    ),
    "vae scaling_factor was 0.4 at step 2 and is 0.18215": lambda base: edit(
        base / "vae" / "config.json", scaling_factor=0.18215
    ),
    "vae shift_factor was null at step 2 and is 0.1": lambda base: edit(base / "vae" / "config.json", shift_factor=0.1),
    "text_encoder hidden_act was quick_gelu at step 2 and is gelu": lambda base: edit(
        base / "text_encoder" / "config.json", hidden_act="gelu"
    ),
    "text_encoder eos_token_id was 1 at step 2 and is 2": lambda base: edit(
        base / "text_encoder" / "config.json", eos_token_id=2
    ),
    "unet act_fn was silu at step 2 and is gelu": lambda base: edit(base / "unet" / "config.json", act_fn="gelu"),
    "tokenizer rules was ": new_tokenizer,
    "tokenizer model_max_length was 12 at step 2 and is 10": lambda base: edit(
        base / "tokenizer" / "tokenizer_config.json", model_max_length=10
    ),
    "tokenizer pad_token was <|endoftext|> at step 2 and is a": lambda base: edit(
        base / "tokenizer" / "tokenizer_config.json", pad_token="a"
    ),
    "force_zeros_for_empty_prompt was false at step 2 and is true": lambda base: edit(
        base / "model_index.json", force_zeros_for_empty_prompt=True
    ),
    "unet weights was ": lambda base: edit_weights(next((base / "unet").glob("*.safetensors"))),
    "vae weights was ": lambda base: edit_weights(next((base / "vae").glob("*.safetensors"))),
    "text_encoder weights was ": lambda base: edit_weights(next((base / "text_encoder").glob("*.safetensors"))),
}


@pytest.fixture
def base_copy(base_folder, tmp_path):
    return shutil.copytree(base_folder("sd15"), tmp_path / "base")


@pytest.mark.slow
@pytest.mark.parametrize("told", CHANGES)
def test_a_change_of_a_base_is_refused_by_name_and_renames_all_that_is_kept(told, base_copy, load_tiny):
    before = load_tiny("sd15")
    saved = json.loads(json.dumps(base_facts(before)))
    CHANGES[told](base_copy)
    now = load_base(base_copy)
    with pytest.raises(ConfigError) as raised:
        check_same_base(saved, now, "at step 2", "Put it back")
    assert f"the base's {told}" in str(raised.value) and str(raised.value).endswith(". Put it back")
    assert drawn_by(now) != drawn_by(before)
    folders = {class_folder(Path("prior"), base, "a dog", PriorConfig(), 32) for base in (before, now)}
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("latents", lambda base: edit_weights(next((base / "vae").glob("*.safetensors")))),
        ("latents", lambda base: edit(base / "vae" / "config.json", scaling_factor=0.2)),
        ("text", lambda base: edit(base / "text_encoder" / "config.json", hidden_act="gelu")),
        ("text", new_tokenizer),
        ("text", lambda base: edit(base / "tokenizer" / "tokenizer_config.json", pad_token="a")),
    ],
)
def test_a_latent_cache_depends_on_what_its_encoders_are_made_of(kind, change, base_copy, load_tiny):
    config = build_config(run_tree(base_copy))
    before = latent_cache_identities(config, load_tiny("sd15"), ((32, 32),))
    assert latent_cache_identities(config, load_base(base_copy), ((32, 32),)) == before
    change(base_copy)
    after = latent_cache_identities(config, load_base(base_copy), ((32, 32),))
    assert {name for name in before if before[name] != after[name]} == {kind}


def test_a_base_that_is_moved_saved_anew_or_described_further_is_the_same(base_copy, tmp_path, load_tiny):
    """Fields that a newer library adds with its defaults change nothing, nor does what names the origin."""
    saved = base_facts(load_tiny("sd15"))
    moved = base_copy.rename(tmp_path / "elsewhere")
    edit(moved / "unet" / "config.json", _name_or_path="there", _diffusers_version="0.99", dropout=0.0)
    edit(moved / "text_encoder" / "config.json", transformers_version="9.9.9", dtype="float16")
    check_same_base(saved, load_base(moved), "at step 2", "")
    older = json.loads(json.dumps(saved))
    del older["base"]["unet"]["act_fn"]  # a field that the library of then did not know
    check_same_base(older, load_base(moved), "at step 2", "")


def test_a_record_of_before_and_other_libraries_are_said_and_go_on(load_tiny, monkeypatch):
    base = load_tiny("sd15")
    check_same_base({"step": 2, "base_digest": base.digest}, base, "at step 2", "")
    (line,) = describe_base_changes({"step": 2}, "at step 2")
    assert "noted nothing of the base but its weights" in line
    saved = base_facts(base)
    assert describe_base_changes(saved, "at step 2") == []
    monkeypatch.setattr(same_base, "libraries", lambda: identity.libraries() | {"torch": "99.0"})
    (line,) = describe_base_changes(saved, "at step 2")
    assert line == (
        f"other libraries than at step 2, so last bits may differ: torch was {torch.__version__} and is 99.0"
    )


def test_a_damaged_record_of_a_run_of_subjects_is_named(tmp_path):
    assert read_base_facts(tmp_path) is None
    for text in ("{", "[]", '{"base": 3}', '{"base": {}}'):
        (tmp_path / "base.json").write_text(text)
        with pytest.raises(ConfigError, match=f"{tmp_path / 'base.json'} is damaged"):
            read_base_facts(tmp_path)


# --- dry runs -------------------------------------------------------------------------------------------------------


def run_tree(base: Path, **model) -> dict:
    return dict(
        name="x",
        output=str(base.parent / "runs"),
        max_steps=4,
        global_batch_size=2,
        micro_batch_size=2,
        model=dict(base=str(base), hint_channels=[4, 4, 8, 8]) | model,
        data=dict(shards="shards", condition="edges", resolution=32),
    )


def test_a_dry_run_refuses_to_go_on_with_a_base_that_has_changed(base_copy, load_tiny):
    config = build_config(run_tree(base_copy))
    saved = base_copy.parent / "runs" / "x" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 2} | base_facts(load_tiny("sd15"))))
    (saved / "config.yaml").write_text(dump(config))
    write_marker(saved)
    assert list(network_problems(config)) == []
    edit(base_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    (problem,) = network_problems(config)
    assert "the base's prediction_type was epsilon at step 2 and is v_prediction. Put it back as it was" in problem
    assert problem.endswith(f"(model.controlnet={saved}/controlnet starts from its weights)")


def test_a_dry_run_names_what_a_base_lacks_and_a_controlnet_that_does_not_fit(base_copy, base_folder, tmp_path):
    from controlbooth.models.denoisers.unet import build_controlnet
    from controlbooth.models.pretrained import save_controlnet

    net = tmp_path / "net"
    save_controlnet(build_controlnet(load_base(base_folder("sdxl")).denoiser, (4, 4, 8, 8)), net)
    (problem,) = network_problems(build_config(run_tree(base_copy, controlnet=str(net))))
    assert problem.startswith(f"model.controlnet is {str(net)!r}: {net} was made for another base: its ")
    (problem,) = network_problems(build_config(run_tree(base_copy, hint_channels=[4, 8])))
    assert "halves the condition picture 1 times" in problem
    file = next((base_copy / "text_encoder").glob("*.safetensors"))
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})
    (problem,) = network_problems(build_config(run_tree(base_copy)))
    assert problem.startswith(f"model.base is {str(base_copy)!r}: {base_copy / 'text_encoder'} does not fit")
    subjects = SubjectRunConfig(name="x", output=tmp_path / "runs", model={"base": str(base_copy)})
    assert list(subjects_network_problems(subjects)) == [problem]


def test_a_dry_run_refuses_prompts_that_are_one_to_the_base(base_copy):
    tree = run_tree(base_copy) | dict(validation=dict(prompts=["a b c d e f g h i j k", "a b c d e f g h i j l"]))
    (problem,) = network_problems(build_config(tree))
    assert "'a b c d e f g h i j k' and 'a b c d e f g h i j l' are one prompt to the base" in problem
    assert "keeps 12 tokens" in problem


def test_a_dry_run_of_subjects_refuses_a_base_that_has_changed(base_copy, load_tiny, tmp_path):
    config = SubjectRunConfig(name="x", output=tmp_path / "runs", model={"base": str(base_copy)})
    assert list(subjects_network_problems(config)) == []
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "base.json").write_text(json.dumps(base_facts(load_tiny("sd15"))))
    assert list(subjects_network_problems(config)) == []
    edit(base_copy / "vae" / "config.json", scaling_factor=0.2)
    (problem,) = subjects_network_problems(config)
    assert "the base's vae scaling_factor was 0.4 when this run began and is 0.2" in problem


# --- what is drawn with a run ---------------------------------------------------------------------------------------


def test_pictures_are_not_drawn_with_a_base_that_has_changed_since_the_run(base_copy, load_tiny, tmp_path):
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 2} | base_facts(load_tiny("sd15"))))
    (saved / "config.yaml").write_text("{}")
    write_marker(saved)
    sources = [Source("edges", tmp_path / "run", 1.0, "uniform", "both")]
    check_bases(sources, load_base(base_copy))
    edit(base_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ConfigError) as raised:
        check_bases(sources, load_base(base_copy))
    assert f"was epsilon at step 2 of {tmp_path / 'run'} and is v_prediction" in str(raised.value)
    assert f"or say --base {base_copy} to draw with what it is now" in str(raised.value)


def test_an_sd3_with_its_t5_and_one_without_are_not_the_same_base():
    whole = {"family": "sd3", "text_encoder": {"weights": "a"}, "text_encoder_3": {"weights": "b"}}
    without = {name: part for name, part in whole.items() if name != "text_encoder_3"}
    assert identity.differences(whole, whole) == []
    assert identity.differences(whole, without) == [("text_encoder_3", "there", "left out")]
    assert "its text_encoder_3" in identity.describe_differences(
        [("family", "a", "b"), *identity.differences(without, whole)], "before"
    )
