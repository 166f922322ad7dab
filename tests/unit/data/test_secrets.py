"""Passwords, tokens and signatures: in no message, in no file that others may read, on no console."""

import base64
import stat

import numpy as np
import pytest
import webdataset
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import forget_stores, web_server

from controlbooth.data.files.whole import replaced, write_whole
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.secrets import error_text, is_secret, shown, shown_script, without_secrets
from controlbooth.data.shards import storage
from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.job.cluster import load_cluster
from controlbooth.launch.job.job import Job, job_texts, restore_job, write_job
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError

SECRET = "hunter2-for-nobody"
letters = st.text("abcXYZ019-._~%+/=", min_size=6, max_size=20).map(lambda text: f"q{text}q")


@settings(deadline=None, derandomize=True)
@given(secret=letters, scheme=st.sampled_from(["https", "http", "s3", "gs", "postgresql"]))
def test_no_password_of_an_address_is_left_in_a_text(secret, scheme):
    text = f"cannot read {scheme}://me:{secret}@host:80/a/b.tar (403, url='{scheme}://me:{secret}@host:80/a/b.tar')"
    assert secret not in shown(text) and "host" in shown(text) and shown(text).startswith("cannot read ")


@pytest.mark.parametrize(
    "name",
    ["X-Amz-Signature", "X-Amz-Security-Token", "X-Amz-Credential", "X-Goog-Signature", "Signature", "sig", "token",
     "access_token", "api_key", "apikey", "key", "password", "auth"],
)  # fmt: skip
@settings(deadline=None, derandomize=True)
@given(secret=st.text("abcXYZ019-._~%+", min_size=6, max_size=20).map(lambda text: f"q{text}q"))
def test_no_signature_of_an_address_is_left_in_a_text(name, secret):
    for text in (f"https://host/x.tar?a=1&{name}={secret}&b=2", f"/x.tar?{name}={secret} (Max retries exceeded)"):
        assert secret not in shown(f"HTTPError: {text}, again") and "x.tar" in shown(text)
    assert secret not in error_text(ValueError(f"url={text!r}"))


@pytest.mark.parametrize(
    "text",
    ["https://host:8443/a/b.tar?versionId=3", "s3://bucket/a b", "sqlite:////data/mlflow.db", "plain: a=b, x@y.z",
     "postgresql://trainer@db/mlflow?sslmode=require&sslkey=/k.pem", "http://[::1]:5000/#/experiments/1/runs/2"],
)  # fmt: skip
def test_texts_without_secrets_stay_as_they_are(text):
    assert shown(text) == text and without_secrets(text) == text


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x", True), ("MLFLOW_TRACKING_PASSWORD", "x", True), ("HF_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True), ("PGPASSWORD", "x", True), ("GITHUB_PAT", "x", True), ("SENTRY_DSN", "x", True),
        ("STORE", f"https://me:{SECRET}@host", True), ("NCCL_DEBUG", "WARN", False), ("PATH", "/bin", False),
        ("MONKEYS", "3", False), ("KEYBOARD", "de", False), ("AUTHOR", "me", False), ("COMPASS", "n", False),
    ],
)  # fmt: skip
def test_variables_are_secrets_by_their_names_or_by_an_address_in_them(variable, value, secret):
    assert is_secret(variable, value) == secret


def test_lines_of_shell_are_shown_without_what_they_set():
    line = (
        f"module load cuda; export HF_TOKEN={SECRET}; export B='x y' API_KEY=\"{SECRET} z\"; curl https://a:{SECRET}@h/"
    )
    assert (
        SECRET not in shown_script(line) and "module load cuda" in shown_script(line) and "'x y'" in shown_script(line)
    )


# Runs


def tree(**changes) -> dict:
    run = dict(name="first", max_steps=1, global_batch_size=1, micro_batch_size=1, model=dict(base="miniature"))
    return run | dict(data=dict(shards="shards", condition="edges")) | changes


@pytest.mark.parametrize("uri", [f"https://me:{SECRET}@host/0.tar", f"https://host/0.tar?X-Amz-Signature={SECRET}"])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("data.shards", lambda uri: dict(data=dict(shards=uri, condition="edges"))),
        ("data.held_out", lambda uri: dict(data=dict(shards="s", held_out=uri, condition="edges"))),
        ("data.sources.0.shards", lambda uri: dict(data=dict(sources=[dict(shards=uri)], condition="edges"))),
        ("model.base", lambda uri: dict(model=dict(base=uri))),
        ("tracking.experiment", lambda uri: dict(tracking=dict(experiment=uri))),
    ],
)
def test_a_secret_in_a_field_is_refused_by_its_name_and_not_shown(field, change, uri):
    with pytest.raises(ConfigError, match=f"'{field}' is 'https://host/0.tar'.*not shown here") as refused:
        build_config(tree(**change(uri)))
    assert SECRET not in str(refused.value)


def test_a_secret_on_the_command_line_is_refused_and_not_printed(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree()))
    for word in (f"data.shards=https://me:{SECRET}@host/0.tar", f"tracking.uri=http://me:{SECRET}@host"):
        assert controlbooth(["train", str(tmp_path / "run.yaml"), word, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert (
        SECRET not in printed.out + printed.err and "NETRC" in printed.err and "MLFLOW_TRACKING_PASSWORD" in printed.err
    )


# Shards


@pytest.fixture
def shard(tmp_path) -> bytes:
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as writer:
        for number in range(3):
            picture = encode_png(np.full((8, 8, 3), number, np.uint8))
            writer.write({"__key__": f"k{number}", "png": picture, "txt": b"a caption"})
    return (tmp_path / "0.tar").read_bytes()


def test_a_password_in_the_uri_of_a_shard_is_refused_with_where_to_put_it(tmp_path, capsys):
    for uri, remedy in ((f"https://me:{SECRET}@host/0.tar", "NETRC"), (f"s3://me:{SECRET}@bucket/0.tar", "AWS_SECRET")):
        assert controlbooth(["data", "index", uri, "--manifest", str(tmp_path / "m.jsonl")]) == 2
        said = capsys.readouterr().err
        assert SECRET not in said and remedy in said
    assert not list(tmp_path.iterdir())


def test_user_and_password_of_a_web_server_are_read_from_the_file_that_netrc_names(tmp_path, monkeypatch, shard):
    asked = []

    def guarded(handler) -> bool:
        asked.append(handler.headers.get("Authorization"))
        if asked[-1] == "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode():
            return False
        handler.send_error(403)
        return True

    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    forget_stores()
    with web_server({"/0.tar": shard}, guarded) as address:
        monkeypatch.delenv("NETRC", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
        with pytest.raises(storage.StorageError, match="Check the URI, the credentials and the rights"):
            storage.stat(f"{address}/0.tar")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert storage.stat(f"{address}/0.tar").size == len(shard)


def test_a_presigned_uri_is_used_and_shown_nowhere_and_its_manifest_is_its_owners(tmp_path, capsys, monkeypatch, shard):
    path = f"/0.tar?Expires=9&Signature={SECRET}"
    forget_stores()
    monkeypatch.chdir(tmp_path)
    with web_server({path: shard}) as address:
        (tmp_path / "m.jsonl").write_text("an old one that all may read")
        assert controlbooth(["data", "index", address + path, "--manifest", "m.jsonl", "--workers", "1"]) == 0
        assert controlbooth(["data", "info", "m.jsonl"]) == 0
        assert controlbooth(["data", "index", f"{address}/1.tar?Signature={SECRET}", "--manifest", "n.jsonl"]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "good until they expire" in said.out
    assert SECRET in (tmp_path / "m.jsonl").read_text() and mode(tmp_path / "m.jsonl") == 0o600
    others = [one for one in tmp_path.rglob("*") if one.is_file() and one.name not in ("m.jsonl", "0.tar")]
    assert others and not [one for one in others if SECRET.encode() in one.read_bytes()]
    forget_stores()
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with pytest.raises(OSError) as lost:  # the server has gone
        storage.stat(address + path)
    assert SECRET not in error_text(lost.value)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_is_private_from_its_first_byte_on(tmp_path):
    write_whole(tmp_path / "open", b"x")
    write_whole(tmp_path / "private", b"x", private=True)
    assert mode(tmp_path / "private") == 0o600 and mode(tmp_path / "open") & 0o044


# Clusters


def cluster(tmp_path, engine="slurm", **changes):
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(dict(engine=engine) | changes))
    return load_cluster(tmp_path / "cluster.yaml", engine)


def job(tmp_path, **changes) -> Job:
    where = tmp_path / "runs" / "first"
    return Job(name="first", folder=where, here=where, working_directory=tmp_path, cluster=cluster(tmp_path, **changes),
               submitted=1e9)  # fmt: skip


@pytest.mark.parametrize("changes", [dict(environment={"A": SECRET}), dict(setup=[f"export A={SECRET}"])])
def test_a_jobs_files_with_an_environment_are_their_owners_also_where_they_are_written_again(tmp_path, changes):
    plain, secret = job(tmp_path), job(tmp_path, **changes)
    files = {"run.yaml": "name: first", "cluster.yaml": "nodes: 1", "script.sh": "true", "manifests.yaml": ""}
    folder = plain.here / "job"
    write_job(plain, files)
    assert {mode(folder / name) & 0o044 for name in files} == {0o044}
    write_job(secret, files)
    modes = {name: mode(folder / name) for name in files}
    assert modes.pop("run.yaml") & 0o044 and set(modes.values()) == {0o600}
    before = job_texts(secret.here)
    write_job(plain, files | {"more": ""})
    restore_job(secret.here, before)
    assert {mode(folder / name) for name in modes} == {0o600} and not (folder / "more").exists()


def test_a_private_file_is_private_from_its_first_byte_on_also_in_the_place_of_one_that_all_may_read(tmp_path):
    path = tmp_path / "script.sh"
    path.write_text("a file that all may read")
    write_whole(path, SECRET.encode(), private=True)
    assert mode(path) == 0o600 and path.read_text() == SECRET and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError), replaced(path) as beside:
        beside.write_text(f"{1 / 0}")
    assert path.read_text() == SECRET and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_a_dry_run_prints_no_value_of_the_environment_that_may_be_a_secret(tmp_path, capsys, engine):
    environment = {"HF_TOKEN": SECRET, "TITLE": SECRET, "NCCL_DEBUG": "WARN", "NCCL_STORE": f"https://a:{SECRET}@b"}
    (tmp_path / "cluster.yaml").write_text(
        yaml.safe_dump(dict(engine=engine, environment=environment, setup=[f"export MY_PASSWORD={SECRET}"]))
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(output=str(tmp_path / "runs"))))
    words = ["launch", engine, str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "cluster.yaml"), "--dry-run"]
    controlbooth(words)
    said = capsys.readouterr()
    assert (
        SECRET not in said.out + said.err and "export NCCL_DEBUG=WARN" in said.out and "export TITLE='***'" in said.out
    )
    assert "values of HF_TOKEN, NCCL_STORE, TITLE are not shown here" in said.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(environment={"HF_TOKEN": SECRET, "NCCL_DEBUG": "WARN"}), "environment.HF_TOKEN"),
        (dict(environment={"STORE": f"https://a:{SECRET}@b"}), "environment.STORE"),
        (dict(setup=["true", f"export HF_TOKEN={SECRET}"]), "setup.1"),
    ],
)
def test_a_secret_in_the_environment_of_pods_is_refused_with_what_kubernetes_has_for_it(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=f"{named} holds a secret.*kubernetes.secrets") as refused:
        cluster(tmp_path, "kubernetes", **changes)
    assert SECRET not in str(refused.value)
    cluster(tmp_path, "slurm", **changes)


def test_a_mistake_in_the_environment_does_not_show_its_values(tmp_path):
    for environment in ({"A B": SECRET}, {"A": f"{SECRET}\0"}, {"A": [SECRET]}):
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(dict(engine="slurm", environment=environment)))
        with pytest.raises(ConfigError, match="environment") as refused:
            load_cluster(tmp_path / "cluster.yaml", "slurm")
        assert SECRET not in str(refused.value), environment
