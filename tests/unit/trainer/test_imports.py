"""Flags of other trainers: tables fit the fields, commands are read as by a shell, every flag is accounted for."""

import pytest
import yaml

from controlbooth.launch.cli import main
from controlbooth.models.recognition import base_remedy
from controlbooth.trainer.config.loading import fields_of, load_config
from controlbooth.trainer.config.other_names import FIELDS_OF
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.imports.command_lines import read_given, shell_commands
from controlbooth.trainer.imports.runs import UNKNOWN, Asked, import_run
from controlbooth.trainer.imports.tables import DATA_TABLES, KINDS, TRAINERS, counts, table
from controlbooth.trainer.imports.values import JOINT, READERS

CONTROL = "accelerate launch --num_processes=2 train_controlnet.py --pretrained_model_name_or_path=/models/sd15"
SUBJECT = "accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path=/models/sd15"


def imported(command: str, **asked):
    (words,), _ = shell_commands(command, {})
    return import_run(read_given(words, {}), Asked(**{"condition": "canny", **asked}))


@pytest.mark.parametrize("name", TRAINERS)
def test_every_flag_of_a_table_has_a_kind_and_fields_that_exist(name):
    run, subjects = ({key for key, _ in fields_of(model)} for model in (RunConfig, SubjectRunConfig))
    for flag, entry in table(name).items():
        assert entry.kind in KINDS, flag
        assert entry.run is None or entry.run in run, flag
        assert entry.subjects is None or entry.subjects in subjects, flag
        assert entry.read_as in (None, *READERS, *JOINT), flag
        assert entry.why or entry.run or entry.subjects, f"{flag} is explained by nothing"
        assert entry.kind != "taken" or entry.read_as, flag
    assert sum(counts(name).values()) == len(table(name)) > 100


def test_keys_of_descriptions_of_data_are_explained():
    for name in DATA_TABLES.values():
        assert all(entry.kind in KINDS and entry.why for entry in table(name).values())


@pytest.mark.parametrize("name", TRAINERS)
def test_the_names_that_errors_know_point_where_the_tables_do(name):
    for flag, entry in table(name).items():
        fields = {field for field in (entry.run, entry.subjects) if field}
        if entry.kind == "taken" and flag in FIELDS_OF and len(fields) == 1:
            assert fields & set(FIELDS_OF[flag]), f"{flag} becomes {fields}, other_names.py says {FIELDS_OF[flag]}"


def test_a_script_is_read_with_its_variables_comments_and_continued_lines(tmp_path):
    script = tmp_path / "train.sh"
    script.write_bytes(
        b'#!/bin/bash\r\nexport BASE="/models/my sd"  # it\'s here\r\nmkdir -p out && '
        b"accelerate launch --mixed_precision=bf16 train_controlnet.py \\\r\n --pretrained_model_name_or_path=$BASE "
        b'--validation_prompt "a dog" "a cat" \\\n --use_8bit_adam --hub_token ${TOKEN} --learning-rate 1e-4'
    )
    given = read_given(str(script), {})
    assert given.flags["pretrained_model_name_or_path"] == "/models/my sd"
    assert given.flags["validation_prompt"] == ["a dog", "a cat"]
    assert given.flags["use_8bit_adam"] is True and given.flags["mixed_precision"] == "bf16"
    assert given.flags["learning_rate"] == "1e-4" and given.trainer == "diffusers"
    assert any("$TOKEN" in one for one in given.unread)
    assert read_given(str(script), {"BASE": "/other"}).flags["pretrained_model_name_or_path"] == "/other"


def test_batches_epochs_and_prompts_that_are_dropped_become_what_they_meant():
    made = imported(f"{CONTROL} --train_batch_size 4 --gradient_accumulation_steps=3 --num_train_epochs 2", samples=100)
    assert made.fields["global_batch_size"] == 24 and made.fields["micro_batch_size"] == 4
    assert made.fields["max_steps"] == 10  # 5 batches for 100 samples, twice
    assert made.fields["data.prompt_dropout"] == 0.0


def test_epochs_without_the_number_of_samples_are_refused():
    with pytest.raises(ConfigError, match="--samples"):
        imported(f"{CONTROL} --num_train_epochs 2")


def test_every_flag_is_accounted_for_and_what_has_no_counterpart_is_told():
    made = imported(
        f"{CONTROL} --max_train_steps 9 --bogus 1 --lr_scheduler polynomial --lr_power 2 --set_grads_to_none"
    )
    told = {account.flag: account for account in made.accounts}
    assert (
        told["bogus"].kind == UNKNOWN and told["lr_scheduler"].kind == "missing" and told["lr_power"].kind == "missing"
    )
    assert told["set_grads_to_none"].kind == "not needed" and told["max_train_steps"].kind == "taken"
    assert "optimizer.schedule" not in made.fields


def test_a_flag_of_a_secret_shows_no_value():
    made = imported(f"{CONTROL} --max_train_steps 9 --hub_token hf_abc")
    assert not any("hf_abc" in str(account) for account in made.accounts)


def test_subjects_without_class_pictures_have_no_prior():
    assert imported(f"{SUBJECT} --max_train_steps 9").fields["prior.weight"] == 0.0
    both = imported(f"{SUBJECT} --max_train_steps 9 --with_prior_preservation --prior_loss_weight 0.5")
    assert both.fields["prior.weight"] == 0.5


def test_programs_that_train_all_layers_make_full_runs():
    full = imported(SUBJECT.replace("_lora", "") + " --max_train_steps 9 --use_8bit_adam")
    assert (full.fields["method"], full.fields["optimizer"]) == ("full", "adamw8bit")
    assert "method" not in imported(f"{SUBJECT} --max_train_steps 9").fields


SETTINGS = {
    "run.toml": '[base]\npretrained_model_name_or_path = "/m/sd15"\nnetwork_module = "networks.lora"\nnetwork_dim = 8\n'
    'unet_lr = 1e-4\nmax_train_steps = 7\nresolution = "512,512"\noptimizer_type = "AdamW8bit"\n',
    "config.json": '{"--pretrained_model_name_or_path": "/m/sd15", "controlnet": true, "max_train_steps": 7, '
    '"model_family": "sd1x", "validation_step_interval": 50, "learning_rate": "1e-4"}',
    "run.sh": f"{CONTROL} --max_train_steps=7 --learning_rate=1e-4",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_that_is_written_is_a_run_with_an_origin_on_each_line(name, tmp_path):
    source, out = tmp_path / name, tmp_path / "out.yaml"
    source.write_text(SETTINGS[name])
    assert main(["import", "config", str(source), "--condition", "canny", "-o", str(out)]) == 0
    text = out.read_text()
    if name == "run.toml":
        run = load_run(out)
        assert (run.steps, run.adapter.rank, run.learning_rate, run.optimizer) == (7, 8, 1e-4, "adamw")
        assert "optimizer_type AdamW8bit: missing" in text
    else:
        run = load_config(out)
        assert (run.max_steps, run.optimizer.learning_rate, run.data.condition) == (7, 1e-4, "canny")
    for line in text.splitlines():
        assert not line or line.startswith("#") or line.endswith(":") or "  # " in line, line
    assert isinstance(yaml.safe_load(text), dict)


def test_a_hub_id_and_a_pickle_are_answered_with_the_command(tmp_path):
    assert base_remedy("stabilityai/sdxl") == ("hf download stabilityai/sdxl --local-dir models/sdxl", "models/sdxl")
    assert base_remedy("/models/sd15") is None and base_remedy("miniature") is None


def test_the_command_for_a_pickle_converts_it(tmp_path):
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    file = tmp_path / "it's.ckpt"
    weight = torch.arange(4.0)
    torch.save({"state_dict": {"a": weight, "b": weight, "step": 3}}, file)
    command, target = base_remedy(str(file)) or ("", "")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    found = load_file(target)
    assert set(found) == {"a", "b"} and torch.equal(found["b"], weight)
