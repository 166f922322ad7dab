"""Words of a run and of a cluster in scripts, manifests and commands: each arrives as it was given, or not at all.

The scripts run under bash, with programs in place of the interpreter, srun and scontrol that write down what they get.
"""

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.launch import submit
from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.engines.script import Expanded, Word, checking, shell, training
from controlbooth.launch.job.cluster import Cluster, load_cluster
from controlbooth.launch.job.job import Job
from controlbooth.launch.ranks.local import Start
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig

MARK = "made-by-a-word"
NASTY = (
    f"$(touch {MARK})", f"`touch {MARK}`", f"; touch {MARK};", f"' ; touch {MARK} ; '", f'" ; touch {MARK} ; "',
    f"&& touch {MARK}", f"| touch {MARK}", f"> {MARK}", "$HOME", "${PATH}", "$$", "~", "*", "{a,b}", "!!", "#",
    "-rf", "--", "%a %j", "é ü 图 👩", "\\", "\\\\n", "'", '"', " two  spaces ", "a=b", "[x]?",
)  # fmt: skip
"""Each of them does something in a shell, in a line of sbatch, or in YAML."""
RECORDER = """#!/bin/bash
{ printf '%s\\0' "$@"; printf '\\0'; } >>"$RECORD"
case " $* " in *" controlbooth.launch.job.outcome "*) echo finished ;; esac
"""
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
export SLURM_NODEID=0
exec "$@"
"""
texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/")))
"""Of a name in a folder, before it is made one."""
names = st.lists(texts, min_size=1, max_size=3).map("".join).map(lambda text: f"x{text}"[:40].rstrip())
values = st.lists(st.one_of(texts, st.sampled_from("\n\t")), max_size=4).map("".join)


def job(engine: str, folder: Path, name: str, environment: dict[str, str], subjects: int = 0) -> Job:
    """Everything a user may name holds the name."""
    tree = dict(engine=engine, python=str(folder / name / "python"), environment=environment, nodes=1, restarts=0)
    run = folder / name / "runs" / "first"
    return Job(
        name="first",
        folder=run,
        here=run,
        working_directory=folder / name,
        cluster=Cluster.model_validate(tree),
        submitted=1e9,
        subjects=subjects,
        subjects_per_task=2 if subjects else 0,
    )


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def calls(one: Job, script: str, folder: Path, variables: dict[str, str]) -> list[list[str]]:
    """The words of each program that the script starts, without the program; and no file is made by any of them."""
    program(Path(one.python), RECORDER)
    program(folder / "bin" / "srun", SRUN)
    program(folder / "bin" / "scontrol", "#!/bin/bash\necho node-1\n")
    (one.folder / "job").mkdir(parents=True)
    record, path = folder / "record", f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = dict(PATH=path, RECORD=str(record), HOME=str(folder), LC_ALL="C.UTF-8") | variables
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.rglob(MARK)) and not Path(MARK).exists()
    return [call.split("\0") for call in record.read_text().split("\0\0")[:-1]] if record.exists() else []


def fits(words: list[str], expected: list[Word]) -> bool:
    """Whether a program got these words; those of the script's own variables are whatever the variables hold."""
    pairs = list(zip(words, expected, strict=False))
    return len(words) == len(expected) and all(isinstance(e, Expanded) or w == e for w, e in pairs)


ENGINES = dict(
    local=(background.render, {}),
    slurm=(
        slurm.render,
        dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node-1", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="0"),
    ),
    kubernetes=(
        kubernetes.render_script,
        dict(PET_MASTER_ADDR="a", PET_MASTER_PORT="1", PET_NODE_RANK="0", JOB_COMPLETION_INDEX="0", HOSTNAME="h"),
    ),
)


@pytest.mark.parametrize("subjects", [0, 2], ids=["run", "subjects"])
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(name=names, value=values)
def test_a_script_gives_its_programs_exactly_the_words_of_run_and_cluster(engine, subjects, name, value):
    render, variables = ENGINES[engine]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        one = job(engine, folder, name, {"TITLE": value}, subjects)
        got = calls(one, render(one), folder, variables)
        inside = kubernetes.MOUNTED if engine == "kubernetes" else None
        meeting = ("$HEAD:$PORT", "1") if engine == "slurm" else ("127.0.0.1:0", "1")
        expected = training(one, *meeting, inside)
        started = [call[3:] if call[1] == "controlbooth.launch.ranks.child_process" else call for call in got]
        # the interpreter is the recorder itself, whose first words are what follows it
        trained = [c for c in started if fits(c, expected[1:]) or (engine == "local" and fits(c, expected))]
        assert len(trained) == 1, (got, expected)
        if not subjects and engine != "local":
            checked = checking(one, "$HEAD", "$PORT", "$SLURM_NODEID", inside)[1:]
            assert any(fits(call[: len(checked)], checked) for call in got)
        (judged,) = (call for call in got if "controlbooth.launch.job.outcome" in call)
        assert judged[2] == str(one.folder)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(value=values)
def test_variables_of_the_cluster_file_have_the_values_that_were_given(value):
    with tempfile.TemporaryDirectory() as made:
        one = job("slurm", Path(made), "x", {"TITLE": value})
        lines = slurm.render(one)
        start = lines.index("export TITLE=")
        text = lines[start : lines.index("\nset -u", start)]
        done = subprocess.run(["bash", "-c", f'{text}\nprintf %s "$TITLE"'], capture_output=True, cwd=made)
        assert done.stdout.decode() == value and not Path(made, MARK).exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words=st.lists(values.filter(lambda text: "\0" not in text), min_size=1, max_size=5))
def test_a_printed_command_starts_what_it_shows(words):
    with tempfile.TemporaryDirectory() as made:
        for text in (
            str(Start(["printf", r"%s\0", *words], {"A": "b c"}, single_rank=True)),
            shell(["printf", r"%s\0", *words]),
        ):
            done = subprocess.run(["bash", "-c", text], capture_output=True, cwd=made)
            assert done.stdout.decode().split("\0")[:-1] == words and not Path(made, MARK).exists()


def sbatch_words(line: str) -> list[str]:
    """As sbatch itself reads a line: quotes, a backslash that escapes anywhere, # begins a comment."""
    words, word, quote, at = [], "", "", 0
    while at < len(line):
        one = line[at]
        if one == "\\":
            at += 1
            word += line[at] if at < len(line) else ""
        elif quote and one == quote:
            quote = ""
        elif not quote and one in "'\"":
            quote = one
        elif not quote and one.isspace():
            words, word = [*words, word], ""
        elif not quote and one == "#":
            break
        else:
            word += one
        at += 1
    return [one for one in [*words, word] if one]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=names)
def test_lines_for_sbatch_hold_one_option_each_and_the_log_lies_in_the_runs_folder(name):
    one = job("slurm", Path("/data"), name, {})
    if list(slurm.folder_problems(one.folder)):
        assert "\\" in name or re.search("hetjob|packjob", name, re.IGNORECASE)
        return
    lines = [line for line in slurm.render(one).splitlines() if line.startswith("#SBATCH")]
    words = [sbatch_words(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(own) == 1 for own in words)
    (log,) = (own[0] for own in words if own[0].startswith("--output="))
    assert log.removeprefix("--output=").replace("%%", "%") == str(one.folder / "job" / "log.txt")
    assert not re.search("%[^%]", log.replace("%%", ""))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=names, value=values)
def test_manifests_are_read_back_as_they_were_meant(name, value):
    one = job("kubernetes", Path("/data"), name, {"TITLE": value})
    run = yaml.safe_dump(dict(name="first", output=str(one.folder)), allow_unicode=True)
    config_map, *_ = yaml.safe_load_all(kubernetes.render(one, {"run.yaml": run}))
    assert config_map["data"] == {"run.yaml": run, "script.sh": kubernetes.render_script(one)}


# What no script could hold


CONTROL = ["a\nb", "a\rb", "a\x1b[2Jb", "a\x7fb", "a\x85b", "a\u2028b", "a\x00b", "a\udc80b"]


def run_tree(**changes) -> dict:
    tree = dict(name="first", max_steps=1, global_batch_size=1, micro_batch_size=1, output="runs")
    return tree | dict(model=dict(base="miniature"), data=dict(shards="shards", condition="edges")) | changes


@pytest.mark.parametrize("text", CONTROL, ids=ascii)
def test_control_characters_in_names_and_paths_are_refused_by_field(text):
    for field, tree in {
        "output": run_tree(output=text),
        "name": run_tree(name=text),
        "data.shards": run_tree(data=dict(shards=text, condition="edges")),
        "data.latent_cache": run_tree(data=dict(shards="s", condition="edges", latent_cache=text)),
        "data.sources.0.shards": run_tree(data=dict(sources=[dict(shards=text)], condition="edges")),
        "model.base": run_tree(model=dict(base=text)),
        "tracking.experiment": run_tree(tracking=dict(experiment=text)),
    }.items():
        with pytest.raises(ConfigError, match=rf"'{field}' is .*control character|'{field}' is .*pattern"):
            build_config(tree)


@pytest.mark.parametrize("text", CONTROL, ids=ascii)
@pytest.mark.parametrize(
    "path", ["python", "slurm.partition", "slurm.account", "slurm.constraint", "kubernetes.image", "kubernetes.queue",
             "kubernetes.namespace", "kubernetes.service_account"],
)  # fmt: skip
def test_control_characters_in_a_cluster_file_are_refused_by_field(tmp_path, path, text):
    section, _, key = path.rpartition(".")
    tree = {section: {key: text}} if section else {key: text}
    (tmp_path / "cluster.yaml").write_text(yaml.dump(tree))
    with pytest.raises(ConfigError, match=rf"'{path}' is|not readable as YAML"):
        load_cluster(tmp_path / "cluster.yaml", "slurm")


@pytest.mark.parametrize(
    ("field", "tree"),
    [
        ("slurm.partition", dict(slurm=dict(partition="gpu --wrap=x"))),
        ("slurm.account", dict(slurm=dict(account="--uid=0"))),
        ("slurm.qos", dict(slurm=dict(qos="high # comment"))),
        ("slurm.constraint", dict(slurm=dict(constraint="'a'"))),
        ("kubernetes.image", dict(kubernetes=dict(image="--image=x y"))),
        ("kubernetes.namespace", dict(kubernetes=dict(namespace="-A"))),
        ("kubernetes.queue", dict(kubernetes=dict(queue="a: b"))),
        ("kubernetes.storage.0.claim", dict(kubernetes=dict(storage=[dict(claim="a b", path="/x")]))),
        ("kubernetes.storage.0.path", dict(kubernetes=dict(storage=[dict(claim="a", path="/x:/y")]))),
        ("kubernetes.secrets.0", dict(kubernetes=dict(secrets=["$(x)"]))),
        ("environment.A B", dict(environment={"A B": "x"})),
        ("environment.1A", dict(environment={"1A": "x"})),
        ("environment.A;touch x;B", dict(environment={"A;touch x;B": "x"})),
    ],
)
def test_names_that_slurm_kubernetes_or_a_shell_would_not_take_are_refused_by_field(tmp_path, field, tree):
    (tmp_path / "cluster.yaml").write_text(yaml.dump(tree))
    with pytest.raises(ConfigError, match=re.escape(f"'{field}")):
        load_cluster(tmp_path / "cluster.yaml", "slurm")


@pytest.mark.parametrize(
    "tree",
    [
        dict(slurm=dict(partition="gpu,long-2", account="a.b", qos="high@x", constraint="[rack1|rack2]&h100*2")),
        dict(environment={"TITLE": "it's 5 $\ntwo lines", "NCCL_DEBUG": 1, "_x9": ""}, setup=["module load a\nb"]),
        dict(kubernetes=dict(image="registry:5000/a/b:1.0@sha256:ab", namespace="team-1", secrets=["store.one"])),
    ],
)
def test_names_that_people_use_are_taken(tmp_path, tree):
    (tmp_path / "cluster.yaml").write_text(yaml.dump(tree))
    load_cluster(tmp_path / "cluster.yaml", "slurm")


def test_prompts_may_have_several_lines_and_paths_spaces_and_letters_of_any_script():
    tree = run_tree(validation=dict(prompts=["a dog\non the beach"]), output="läufe 图/$(x)")
    assert build_config(tree).validation.prompts == ("a dog\non the beach",)
    tree = dict(name="first", model=dict(base="miniature"), instance_prompt="a {identifier}\n{class_noun}")
    assert SubjectRunConfig.model_validate(tree)


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_an_output_of_several_lines_is_refused_by_launch_and_nothing_is_printed_of_it(tmp_path, capsys, engine):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(output="x/y\ntouch made-by-a-line\n#")))
    assert controlbooth(["launch", engine, str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "'output' is 'x/y\\ntouch made-by-a-line\\n#': the control character '\\n'" in said.err and not said.out


def test_a_folder_to_start_in_whose_name_has_several_lines_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(ConfigError, match=r"control character '\\n'"):
        submit.place("first", Path("runs/first"), Cluster(engine="slurm"))


def test_messages_name_commands_that_can_be_copied(tmp_path):
    name = f"x $(touch {MARK})"
    one = job("local", tmp_path, name, {})
    (resume,) = re.findall(r"echo ('controlbooth launch resume.*)", background.render(one))
    assert shlex.split(shlex.split(resume)[0]) == ["controlbooth", "launch", "resume", str(one.folder)]
