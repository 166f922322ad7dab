"""What a run file may say, and how it is told what is wrong with it."""

from pathlib import Path

import pytest
import torch
import yaml

from controlbooth.launch.commands.ablate import load_ablations, planned_runs
from controlbooth.trainer.config.loading import build_config, changes, dump, fields_of, load_config
from controlbooth.trainer.config.other_names import FIELDS_OF, OTHER_NAMES
from controlbooth.trainer.config.run import (
    LORA_RATE,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    ValidationConfig,
    base_path,
    gradient_accumulation_steps,
    lanes,
    lora_learning_rate,
    run_folder,
    tracking_uri,
)
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.controlnet.build import report_changes
from controlbooth.trainer.dreambooth.manifest import Subject
from controlbooth.trainer.engine.distributed import World

SHIPPED = sorted((Path(__file__).parents[3] / "launch/configs").glob("*.yaml"))
RUNS = [path for path in SHIPPED if path.stem != "retrain"]  # a policy, which test_policy.py reads
RUN = """
name: first
max_steps: 100
global_batch_size: 64
micro_batch_size: 4
model: {base: miniature}
data: {shards: shards/, condition: edges}
"""


def write(tmp_path: Path, text: str = RUN) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_last_override_wins_over_earlier_ones_over_the_file_over_the_default(tmp_path):
    path = write(tmp_path, RUN + "optimizer: {learning_rate: 2e-5}\nseed: 3\n")
    config = load_config(path, ["seed=4", "seed=5", "checkpoint.keep=7"])
    assert isinstance(config, RunConfig)
    assert (config.seed, config.optimizer.learning_rate, config.checkpoint.keep) == (5, 2e-5, 7)
    assert config.optimizer.warmup_steps == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.resolution=510", r"'data.resolution' is 510: not a multiple of 8, the VAE's factor. Use 504 or 512"),
        ("data.resolution=3", "'data.resolution' is 3: .* Use 8$"),
        ("optimizer.learning_rat=1.0", "unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'"),
        ("learning_rate=1.0", "unknown key 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("model.precision=bf16", "unknown key 'model.precision'; did you mean 'engine.precision'?"),
        ("train_batch_size=4", "unknown key 'train_batch_size'; did you mean 'micro_batch_size'?"),
        ("data.batch=4", "unknown key 'data.batch'; did you mean 'micro_batch_size'?"),
        ("data.prompt_droput=.5", "unknown key 'data.prompt_droput'; did you mean 'data.prompt_dropout'?"),
        ("precison=bf16", "unknown key 'precison'; did you mean 'engine.precision'?"),
        ("zzz=1", "unknown key 'zzz'; known keys: name, output, seed"),
        ("max_steps=many", "'max_steps' is 'many': Input should be a valid integer"),
        ("max_steps=0", "'max_steps' is 0: Input should be greater than 0"),
        ("max_steps=yes", "'max_steps' is True: yes and no are not taken here"),
        ("name=a/b", "'name' is 'a/b': String should match pattern"),
        ("model.family=sd4", "'model.family' is 'sd4': Input should be 'auto', 'sd15', 'sd21'"),
        ("data.prompt_dropout=1.5", "'data.prompt_dropout' is 1.5: Input should be less than or equal to 1"),
        ("data.lanes=100", "data.lanes=100 is not a multiple of global_batch_size=64. Leave data.lanes out, or"),
        ("optimizer.betas=[0.9]", "'optimizer.betas' has 1 values, and needs more"),
        ("optimizer.betas=[1,0.9]", "'optimizer.betas.0' is 1: Input should be less than 1"),
        ("optimizer.betas=[0.9,-1]", "'optimizer.betas.1' is -1: Input should be greater than or equal to 0"),
        ("optimizer.learning_rate=1e400", "'optimizer.learning_rate' is '1e400': Input should be a finite number"),
        ("model.hint_channels=[16,32,64,-96]", "'model.hint_channels.3' is -96: Input should be greater than 0"),
        ("seed=9223372036854775808", "'seed' is 9223372036854775808: Input should be less than 9223372036854775808"),
        ("optimizer.warmup_steps=101", "optimizer.warmup_steps=101 is more than max_steps=100"),
        ("model.unlock_decoder_at=100", "unlock_decoder_at=100 is never reached: the run ends at max_steps=100. Raise"),
        ("model.unlock_decoder_at=-1", "'model.unlock_decoder_at' is -1: Input should be greater than or equal to 0"),
        ("optimizer.decoder_learning_rate=1e-6", "rate=1e-06 is for a decoder that learns, and it stays locked: say"),
        ("model.rank=4", "model.rank=4 is of model.method=lora: set that too, or leave the rank out"),
        ("optimizer.lora_learning_rate=1e-4", "rate=0.0001 is for the low-rank differences of model.method=lora: set"),
        ("engine.offload_parameters=true", "needs engine.zero_stage=3, and it is 2. Set engine.zero_stage=3, or"),
        ("validation.grid=17", "validation.grid=17 pictures cannot be shown of validation.samples=16"),
        ("seed", "override 'seed' is not section.key=value, e.g. optimizer.learning_rate=1e-5"),
        ("seed.x=1", "override 'seed.x=1': seed is a value, not a section"),
        ("name=[", r"override 'name=\[': '\[' is not a YAML value"),
    ],
)
def test_an_error_names_the_key_the_value_and_the_remedy(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, RUN + "seed: 0\n"), [override])


@pytest.mark.parametrize(
    "other",
    [
        *("model.trainable_copy=lite", "model.hint_network=paper", "model.unlock_decoder_at=5", "engine.compile=true"),
        *("model.frozen.shards=node", "model.frozen.stream=cpu", "optimizer.name=muon"),
    ],
)
def test_what_does_not_go_with_low_rank_differences_is_refused(tmp_path, other):
    with pytest.raises(ConfigError, match=f"{other} does not go with model.method=lora: leave one of them out"):
        load_config(write(tmp_path), ["model.method=lora", other])


def test_low_rank_differences_have_a_multiple_of_the_learning_rate_unless_they_are_given_one(tmp_path):
    given = ["model.method=lora", "optimizer.learning_rate=2e-5"]
    assert lora_learning_rate(load_config(write(tmp_path), given)) == pytest.approx(LORA_RATE * 2e-5)
    own = load_config(write(tmp_path), [*given, "optimizer.lora_learning_rate=3e-3"])
    assert lora_learning_rate(own) == 3e-3


FLOATS = [
    (section.__name__, name)
    for section in (SourceConfig, DataConfig, OptimizerConfig, EngineConfig, ValidationConfig, TrackingConfig)
    for name, field in section.model_fields.items()
    if field.annotation in (float, float | None)
]


NONE_AT_ALL = ("optimizer.max_grad_norm", "engine.hang_timeout_seconds")
"""Of which infinity means that there is no clipping, and no watchdog."""


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", [f"{section[:-6].lower()}.{name}" for section, name in FLOATS])
def test_a_number_that_is_not_finite_is_refused_in_every_field_but_where_infinity_means_none(tmp_path, key, value):
    if value == ".inf" and key in NONE_AT_ALL:
        assert "inf" in dump(load_config(write(tmp_path), [f"{key}={value}"]))
        return
    text = RUN.replace("shards: shards/, ", "sources: [{shards: a, weight: 1.0}], ")
    with pytest.raises(ConfigError, match=r"is -?(inf|nan): Input should be"):
        if key == "source.weight":
            load_config(write(tmp_path, text.replace("weight: 1.0", f"weight: {value}")))
        else:
            load_config(write(tmp_path, text), [f"{key}={value}"])


@pytest.mark.parametrize("kind", ["pose", "keypoints", "openpose"])
def test_conditions_that_tell_left_from_right_by_colour_are_not_mirrored(tmp_path, kind):
    changes = [f"data.condition={kind}", "data.random_flip=true"]
    with pytest.raises(ConfigError, match=f"data.condition={kind} tells left .*: set data.random_flip=false"):
        load_config(write(tmp_path), changes)
    load_config(write(tmp_path), [*changes, "data.random_flip=false"])
    for mirrored in ("normals", "edges", "computed:canny_random"):
        load_config(write(tmp_path), [*changes, f"data.condition={mirrored}"])


def test_all_errors_of_a_file_are_told_at_once_and_name_the_file(tmp_path):
    path = write(tmp_path, "name: a\nmax_stepps: 1\nmodel: {}\ndata: {shards: s}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in ("did you mean 'max_steps'", "'model.base' is missing", "or give data.condition=VALUE on the command"):
        assert part in message


def test_known_keys_are_listed_once_for_all_that_are_unknown(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, RUN), ["zzz=1", "yyy=2", "data.xxx=3", "data.www=4"])
    message = str(caught.value)
    assert "unknown keys 'zzz', 'yyy'; known keys: name, output, seed" in message
    assert "unknown keys 'data.xxx', 'data.www'; known keys: shards, " in message and message.count("known keys:") == 2


def test_a_file_that_is_not_there_names_those_that_are_shipped(tmp_path):
    shipped = "photos.yaml, quickstart.yaml, sd15-edges.yaml, transformer.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "nothing.yaml")
    assert str(caught.value).endswith(f"nothing.yaml does not exist. Runs to start from, in launch/configs: {shipped}")


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="but a run is a mapping of keys to values"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_yaml_is_refused_with_the_line(tmp_path):
    with pytest.raises(ConfigError, match="(?s)not readable as YAML.*line 2"):
        load_config(write(tmp_path, "name: [\n"))
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(tmp_path)


def test_numbers_may_be_written_with_exponents_and_names_may_look_like_numbers(tmp_path):
    config = load_config(write(tmp_path, RUN.replace("first", "1e5")), ["max_steps=1e3", "optimizer.weight_decay=1e-3"])
    assert (config.name, config.max_steps, config.optimizer.weight_decay) == ("1e5", 1000, 1e-3)


def test_an_empty_section_has_its_defaults_and_can_be_overridden(tmp_path):
    path = write(tmp_path, RUN + "optimizer:\n#  learning_rate: 1e-4\nengine:\n")
    config = load_config(path, ["engine.zero_stage=1"])
    assert (config.optimizer.learning_rate, config.engine.zero_stage) == (1e-5, 1)


def test_the_resolved_tree_reads_back_as_itself(tmp_path):
    overrides = ["optimizer.ema_decay=0.999", "model.hint_channels=[8, 16]", "data.held_out=h"]
    overrides += ["model.unlock_decoder_at=50", "optimizer.decoder_learning_rate=1e-6"]
    config = load_config(write(tmp_path), overrides)
    assert build_config(yaml.safe_load(dump(config))) == config


def test_what_a_resumed_run_has_set_anew_is_told_and_so_is_a_schedule_that_is_stretched_by_it(tmp_path, capsys):
    path = write(tmp_path)
    before = dump(load_config(path, ["optimizer.schedule=cosine"]))
    now = load_config(path, ["optimizer.schedule=cosine", "max_steps=200", "validation.samples=4"])
    assert changes(before, dump(now)) == ["max_steps: 100 -> 200", "validation.samples: 16 -> 4"]
    report_changes(World(0, 1, 0, torch.device("cpu")), now, before, 100)
    told = capsys.readouterr().err
    assert "changed since step 100: max_steps: 100 -> 200; validation.samples: 16 -> 4" in told
    assert "the learning rate of step 100 is 5e-06, and was to be 0" in told
    report_changes(World(0, 1, 0, torch.device("cpu")), now, dump(now), 100)
    assert capsys.readouterr().err == ""


def test_a_key_that_was_renamed_is_taken_under_its_old_name_too(tmp_path):
    path = write(tmp_path, RUN.replace("condition: edges", "condition: edges, columns: old"))
    assert load_config(path) == load_config(write(tmp_path), ["data.latent_cache=old"])
    path = write(tmp_path, RUN.replace("condition: edges", "condition: edges, columns: old"))
    for name in ("data.columns", "data.latent_cache"):
        assert load_config(path, [f"{name}=given"]).data.latent_cache == Path("given")
    assert load_config(path, ["data={shards: s, condition: edges, columns: given}"]).data.latent_cache == Path("given")
    assert "columns" not in dump(load_config(path))


def test_a_key_under_both_of_its_names_is_refused(tmp_path):
    path = write(tmp_path, RUN.replace("condition: edges", "condition: edges, columns: old, latent_cache: new"))
    with pytest.raises(ConfigError, match="run.yaml has data.columns and data.latent_cache, .* leave data.columns out"):
        load_config(path)


def test_the_configuration_of_an_old_run_folder_is_the_same_as_that_of_its_run_now(tmp_path):
    now = load_config(write(tmp_path), ["data.latent_cache=latents"])
    for old, new in (("columns: latents", now), ("columns: null", load_config(tmp_path / "run.yaml"))):
        text = dump(now).replace("latent_cache: latents", old)
        assert old in text and changes(text, dump(new)) == []
        (tmp_path / "config.yaml").write_text(text)
        assert load_config(tmp_path / "config.yaml") == new
    assert changes(text, dump(now)) == ["data.latent_cache: None -> latents"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_is_complete_and_is_told_how_to_be_started(path):
    header = path.read_text().partition("\nname:")[0]
    if path.stem == "dreambooth":
        load_run(path)
        assert f"controlbooth dreambooth run SUBJECTS.yaml launch/configs/{path.name}" in header
    elif path.stem in ("ablations", "copied-blocks"):
        grid = load_ablations(path)
        for _, _, changes in planned_runs(grid, path.parent / grid.run):
            load_config(path.parent / grid.run, changes)
        assert f"controlbooth ablate launch/configs/{path.name}" in header
    else:
        load_config(path)
        assert f"controlbooth train launch/configs/{path.name}" in header


def test_a_config_is_frozen(tmp_path):
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_is_explained_or_says_what_it_is_by_its_name():
    plain = {"warmup_steps", "betas", "weight_decay", "epsilon", "every_steps", "sampling_steps", "guidance_scale"}
    plain |= {"max_steps", "global_batch_size", "micro_batch_size", "experiment", "output"}
    for section in (RunConfig, *(field.annotation for field in RunConfig.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            nested = hasattr(field.annotation, "model_fields")
            assert field.description or nested or name in plain, f"{section}.{name} wants a docstring"


def test_accumulation_keeps_the_global_batch_and_its_error_names_every_number(tmp_path):
    config = load_config(write(tmp_path))
    assert [gradient_accumulation_steps(config, ranks) for ranks in (1, 2, 8, 16)] == [16, 8, 2, 1]
    with pytest.raises(ConfigError, match=r"global_batch_size=64 .* 4 \* 3 = 12.* \(possible: 1, 2, 4, 8, 16\)"):
        gradient_accumulation_steps(config, world_size=3)
    with pytest.raises(ConfigError, match="possible: none with this micro_batch_size"):
        gradient_accumulation_steps(load_config(write(tmp_path), ["micro_batch_size=5"]), world_size=1)


def test_what_follows_from_the_fields(tmp_path):
    config = load_config(write(tmp_path), [f"output={tmp_path}"])
    assert lanes(config) == 64 and lanes(load_config(write(tmp_path), ["data.lanes=128"])) == 128
    assert run_folder(config) == tmp_path / "first"
    assert tracking_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(load_config(write(tmp_path), ["tracking.uri=http://host:5000"])) == "http://host:5000"
    assert base_path(config).parts[-2:] == ("models", "miniature")
    assert base_path(load_config(write(tmp_path), ["model.base=/models/sd"])) == Path("/models/sd")


def test_what_other_trainers_call_a_field_leads_to_one_that_a_file_has():
    known = {key for model in (RunConfig, SubjectRunConfig, Subject) for key, _ in fields_of(model)}
    assert known >= OTHER_NAMES.keys()
    clashes = [(name, key) for name, keys in FIELDS_OF.items() for key in keys if name in known and key == name]
    assert clashes == []
