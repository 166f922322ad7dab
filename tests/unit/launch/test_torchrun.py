"""From a run and a machine to a command; and that command started, stopped and killed."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from controlbooth.launch.commands import train
from controlbooth.launch.ranks import local
from controlbooth.launch.ranks.torchrun import (
    KEEP_MEMORY,
    SPIN_COUNT,
    Node,
    threads_per_process,
    torchrun_command,
    torchrun_environment,
    world_size,
)
from controlbooth.trainer.config.loading import build_config


def node(**facts) -> Node:
    return Node(**{"processes": 2, "cores": 16, "gpus": 0, "head_port": 29500} | facts)


def test_the_command_of_one_node():
    command = torchrun_command("run.yaml", ["seed=1", "name=b"], "first", node())
    assert shlex.join(command[1:]) == (
        "-m torch.distributed.run --nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=first "
        "--rdzv-endpoint=127.0.0.1:29500 --rdzv-conf=is_host=1 --max-restarts=0 --shutdown-timeout=300 "
        "-m controlbooth.trainer.controlnet.train run.yaml seed=1 name=b"
    )
    assert command[0] == sys.executable


def test_the_nodes_of_a_run_differ_in_who_is_the_host_only():
    first, second = (
        torchrun_command("run.yaml", [], "first", node(nodes=2, node_rank=rank, head_address="n1", grace_seconds=60))
        for rank in (0, 1)
    )
    assert [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]] == [
        ("--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0")
    ]
    assert {"--nnodes=2", "--rdzv-endpoint=n1:29500", "--shutdown-timeout=60"} <= set(first)


@pytest.mark.slow
def test_torchrun_understands_every_argument():
    program = (
        "import sys; from torch.distributed.run import parse_args, config_from_args; a = parse_args(sys.argv[1:])\n"
        "c = config_from_args(a)[0]\n"
        "print(c.min_nodes, c.nproc_per_node, c.rdzv_endpoint, c.rdzv_configs['is_host'], c.shutdown_timeout, "
        "a.training_script, *a.training_script_args)"
    )
    command = torchrun_command("run.yaml", ["seed=1"], "first", node())
    done = subprocess.run([sys.executable, "-c", program, *command[3:]], capture_output=True, text=True)
    assert (
        done.stdout.split() == "1 2 127.0.0.1:29500 1 300 controlbooth.trainer.controlnet.train run.yaml seed=1".split()
    )


def test_ranks_share_the_cores_and_the_world_is_all_nodes():
    assert [threads_per_process(node(processes=ranks)) for ranks in (1, 2, 3, 32)] == [16, 8, 5, 1]
    assert world_size(node(nodes=3, processes=4)) == 12


def test_the_environment_keeps_what_the_user_has_set():
    assert torchrun_environment(node(), {}) == {
        "OMP_NUM_THREADS": "8",
        "GOMP_SPINCOUNT": SPIN_COUNT,
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "GLIBC_TUNABLES": KEEP_MEMORY,
    }
    users = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE", "HF_HUB_OFFLINE": "0"}
    assert torchrun_environment(node(gpus=2), users) == {}


# This machine


def fake_nvidia_smi(tmp_path: Path, monkeypatch, script: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_gpus_are_those_that_the_driver_lists_and_the_user_leaves_visible(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 0: A (UUID: 1)'; echo 'GPU 1: A (UUID: 2)'; echo '  MIG 1g'")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.gpu_count() == 2
    for visible, count in (("", 0), ("1", 1), ("0,1", 2), ("-1", 0), ("0,1,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local.gpu_count() == count


def test_a_machine_without_a_working_driver_has_no_gpu_and_runs_one_rank(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert local.gpu_count() == 0
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert local.gpu_count() == 0
    assert local.this_node().processes == 1 and local.this_node(processes=3).processes == 3
    with pytest.raises(ValueError, match="--processes is 0, but a run has at least one rank"):
        local.this_node(processes=0)


def test_the_port_is_free_or_the_configured_one_or_an_error(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    free = local.head_port()
    monkeypatch.setenv("MASTER_PORT", str(free))
    assert local.head_port() == free
    with socket.socket() as taken:
        taken.bind(("", free))
        taken.listen()
        with pytest.raises(ValueError, match=f"MASTER_PORT={free} cannot be used .*in use.*Unset it to have a free"):
            local.head_port()
    for wrong in ("many", "99999"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(ValueError, match=f"MASTER_PORT.*{wrong}.*Unset it to have a free one"):
            local.head_port()


# `controlbooth train`


@pytest.fixture
def run_file(tmp_path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.tar").write_bytes(bytes(1024))  # an empty tar
    tree = {
        "name": "first",
        "output": str(tmp_path / "runs"),
        "max_steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "model": {"base": "miniature"},
        "data": {"shards": str(shards), "condition": "edges"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_dry_run_shows_the_plan_and_the_command_and_starts_nothing(run_file, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("a dry run started something"))
    monkeypatch.setattr(local, "gpu_count", lambda: 0)
    assert train.main([str(run_file), "max_steps=20", "--processes", "2", "--dry-run", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "batch      8 = 2 a rank x 2 ranks x 2 accumulation steps" in shown
    assert "steps      20, 160 samples" in shown and "nothing is held out or validated" in shown
    assert (
        f"-m controlbooth.trainer.controlnet.train {run_file} max_steps=20 seed=3" in shown
        and "DS_ACCELERATOR=cpu" in shown
    )
    assert not (run_file.parent / "runs").exists()


def test_problems_are_shown_together_and_nothing_starts(run_file, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("started in spite of problems"))
    assert train.main([str(run_file), "--processes", "3", "data.shards=nowhere"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "2 * 3 = 6" in lines[0] and "nowhere" in lines[1]


def test_the_run_gets_the_environment_and_its_status_is_returned(run_file, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "run", lambda start, **_: seen.update(start.environment) or 5)
    assert train.main([str(run_file)]) == 5
    assert seen["RANK"] == "0"


def test_one_rank_is_started_without_torchrun_and_several_with_it(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # as in a shell on a cluster
    alone = local.start_of(node(processes=1), "run.yaml", ["seed=1"], "first")
    assert alone.single_rank and alone.command[1:] == [
        "-u",
        "-m",
        "controlbooth.trainer.controlnet.train",
        "run.yaml",
        "seed=1",
    ]
    assert alone.environment.items() >= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }.items()  # fmt: skip
    assert str(alone).endswith(f" {sys.executable} -u -m controlbooth.trainer.controlnet.train run.yaml seed=1")
    together = local.start_of(node(), "run.yaml", [], "first")
    assert not together.single_rank
    assert "torch.distributed.run" in together.command and "RANK" not in together.environment


def launcher(
    tmp_path: Path, command: list[str], environment: dict[str, str] | None = None, single_rank: bool = False
) -> subprocess.Popen:
    """local.run in a process of its own, as it is when a person starts it."""
    program = (  # a shell leaves Ctrl-C ignored in what it starts in the background, the tests perhaps
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from controlbooth.launch.ranks.local import Start, run; "
        f"sys.exit(run(Start(sys.argv[1:], {{}}, {single_rank})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_files(folder: Path, pattern: str, count: int, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"{count} of {pattern} did not appear"
        time.sleep(0.05)


RANK = """
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK", "0")
def stop(number, frame):
    pathlib.Path(f"checkpoint.{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda number, frame: pathlib.Path(f"interrupted.{rank}").touch())
pathlib.Path(f"ready.{rank}").write_text(str(os.getpid()))
time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_reaches_the_ranks_of_torchrun_as_sigterm_and_leaves_no_traceback(tmp_path, number, status):
    (tmp_path / "rank.py").write_text(RANK)
    command = torchrun_command("run.yaml", [], "first", node(head_port=local.head_port()))
    command = [*command[: command.index("controlbooth.trainer.controlnet.train") - 1], "rank.py"]
    process = launcher(tmp_path, command, {"OMP_NUM_THREADS": "1"})
    wait_for_files(tmp_path, "ready.*", 2)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        left = [(one.pid, one.status(), one.cmdline()) for one in family if one.is_running()]
        pytest.fail(f"still running: {left}; in {tmp_path}: {sorted(one.name for one in tmp_path.iterdir())}")
    assert process.returncode == status
    assert "stopping after this step with a checkpoint" in errors and "Traceback" not in errors
    assert len(list(tmp_path.glob("checkpoint.*"))) == 2 and not list(tmp_path.glob("interrupted.*"))


def test_a_stop_signal_reaches_a_rank_that_is_alone_and_not_what_it_has_started(tmp_path):
    helper = "import signal, subprocess, sys; subprocess.Popen([sys.executable, 'rank.py'], env={'RANK': '1'})\n"
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "alone.py").write_text(helper + RANK + "time.sleep(120)")
    process = launcher(tmp_path, [sys.executable, "alone.py"], {"RANK": "0"}, single_rank=True)
    wait_for_files(tmp_path, "ready.*", 2)
    process.send_signal(signal.SIGTERM)
    wait_for_files(tmp_path, "checkpoint.0", 1)
    assert process.wait(timeout=20) == 143 and not (tmp_path / "checkpoint.1").exists()
    os.kill(int((tmp_path / "ready.1").read_text()), signal.SIGKILL)


def test_a_second_signal_kills_ranks_that_do_not_stop(tmp_path):
    (tmp_path / "rank.py").write_text(RANK.replace("sys.exit(0)", "time.sleep(120)"))
    agent = "import subprocess, sys; subprocess.run([sys.executable, 'rank.py'], start_new_session=True)"
    process = launcher(tmp_path, [sys.executable, "-c", agent])
    wait_for_files(tmp_path, "ready.0", 1)
    process.send_signal(signal.SIGTERM)
    wait_for_files(tmp_path, "checkpoint.0", 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    rank = int((tmp_path / "ready.0").read_text())
    end = time.monotonic() + 20
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the rank is still running"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way to ask for it")
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_with_a_checkpoint_when_the_command_that_started_them_is_killed(tmp_path, ranks):
    (tmp_path / "rank.py").write_text(RANK)
    command = torchrun_command("run.yaml", [], "first", node(head_port=local.head_port()))
    command = [*command[: command.index("controlbooth.trainer.controlnet.train") - 1], "rank.py"]
    command = command if ranks > 1 else [sys.executable, "rank.py"]
    process = launcher(tmp_path, command, {"OMP_NUM_THREADS": "1"}, single_rank=ranks == 1)
    wait_for_files(tmp_path, "ready.*", ranks)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    wait_for_files(tmp_path, "checkpoint.*", ranks)
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way to ask for it")
@pytest.mark.parametrize("launched", [True, False], ids=["by-the-launcher", "by-hand"])
def test_ranks_end_with_a_checkpoint_when_their_agent_is_killed_and_the_launcher_waits_for_them(tmp_path, launched):
    wish = "from controlbooth.data.processes.parent import end_with_agent\nend_with_agent()\n"
    (tmp_path / "rank.py").write_text(RANK.replace("sys.exit(0)", "time.sleep(1); sys.exit(0)").replace(
        "pathlib.Path(f\"ready", f"{wish}pathlib.Path(f\"ready"))  # fmt: skip
    command = torchrun_command("run.yaml", [], "first", node(head_port=local.head_port()))
    command = [*command[: command.index("controlbooth.trainer.controlnet.train") - 1], "rank.py"]
    if launched:
        process = launcher(tmp_path, command, {"OMP_NUM_THREADS": "1"})
    else:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_files(tmp_path, "ready.*", 2)
    ranks = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("ready.*")]
    (psutil.Process(process.pid).children()[0] if launched else process).kill()
    if launched:
        assert process.wait(60) == 137 and not any(map(is_at_work, ranks))
        named = sorted(str(rank.pid) for rank in ranks)
        said = re.search(
            r"torchrun was ended by SIGKILL; its ranks \(processes (.*)\) are stopping", process.stderr.read()
        )
        assert said and sorted(said[1].split(", ")) == named
    wait_for_files(tmp_path, "checkpoint.*", 2)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def is_at_work(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_ranks_that_do_not_stop_after_their_agent_are_killed_by_the_next_signal(tmp_path):
    (tmp_path / "rank.py").write_text(RANK.replace("sys.exit(0)", "time.sleep(120)"))
    agent = "import subprocess, sys; subprocess.run([sys.executable, 'rank.py'], start_new_session=True)"
    process = launcher(tmp_path, [sys.executable, "-c", agent])
    wait_for_files(tmp_path, "ready.0", 1)
    rank = psutil.Process(int((tmp_path / "ready.0").read_text()))
    psutil.Process(process.pid).children()[0].kill()
    wait_for_files(tmp_path, "checkpoint.0", 1)
    assert process.poll() is None and is_at_work(rank)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert not is_at_work(rank)


def test_a_command_in_another_one_is_told_of_ctrl_c_once_and_waited_for(tmp_path):
    slow = "time.sleep(1); pathlib.Path('saved').touch(); sys.exit(0)"
    (tmp_path / "rank.py").write_text(RANK.replace('pathlib.Path(f"interrupted.{rank}").touch()', "interrupt()"))
    (tmp_path / "rank.py").write_text(f"def interrupt():\n    {slow}\n{(tmp_path / 'rank.py').read_text()}")
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from controlbooth.launch.ranks import child_process as children; "
        "children.call([sys.executable, 'rank.py'], os.environ)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_files(tmp_path, "ready.*", 1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1] and (tmp_path / "saved").exists()
    assert not (tmp_path / "checkpoint.0").exists()


def test_a_signal_after_the_last_step_stops_nothing_and_the_run_is_as_finished_as_it_was(tmp_path):
    (tmp_path / "rank.py").write_text("import pathlib, time\npathlib.Path('ready').touch()\ntime.sleep(3)")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from controlbooth.launch.ranks.local import Start, run; "
        "sys.exit(run(Start([sys.executable, 'rank.py'], {}, True), is_over=lambda: True))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_files(tmp_path, "ready", 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == "controlbooth: it is finished, and its ranks are ending; once more ends them now\n"


def test_a_run_is_finished_by_what_this_start_of_it_has_written(tmp_path):
    assert not train.is_finished(tmp_path, 5.0)
    for state, since, finished in (("finished", 5.0, True), ("finished", 7.0, False), ("stopped", 5.0, False)):
        (tmp_path / "status.json").write_text(json.dumps(dict(state=state, step=3, time=6.0)))
        assert train.is_finished(tmp_path, since) == finished


def test_ranks_that_were_stopped_from_outside_are_not_said_to_have_been_killed(tmp_path):
    assert train.stopped_well(tmp_path, 5.0) is None
    for state, since, stopped in (("stopped", 5.0, True), ("stopped", 7.0, False), ("running", 5.0, False)):
        (tmp_path / "status.json").write_text(json.dumps(dict(state=state, step=3, time=6.0)))
        told = train.stopped_well(tmp_path, since)
        assert (told is not None) == stopped and (not stopped or "with step 3 saved" in told)


@pytest.mark.parametrize(("program", "status"), [("raise SystemExit(3)", 3), ("", 0), ("import os; os.abort()", 134)])
def test_the_status_of_a_run_that_ends_by_itself_is_passed_on(tmp_path, program, status):
    process = launcher(tmp_path, [sys.executable, "-c", program])
    process.communicate(timeout=60)
    assert process.returncode == status


@pytest.mark.parametrize(("program", "said"), [("os.kill(os.getpid(), 11)", "SIGSEGV"), ("sys.exit(3)", None)])
def test_a_rank_alone_that_a_signal_ends_is_not_passed_over_in_silence(run_file, monkeypatch, capfd, program, said):
    start = local.Start([sys.executable, "-c", f"import os, sys; {program}"], {}, single_rank=True)
    monkeypatch.setattr(train, "start_of", lambda *_: start)
    assert train.main([str(run_file)]) == (139 if said else 3)
    errors = capfd.readouterr().err
    assert f"rank 0 ended without a word: something has killed it ({said})" in errors if said else not errors


def test_whatever_is_started_says_which_signal_ended_its_only_rank(tmp_path):
    process = launcher(tmp_path, [sys.executable, "-c", "import os; os.abort()"], single_rank=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 134 and "controlbooth: rank 0 was ended by SIGABRT" in errors


def test_a_rank_that_was_killed_for_memory_is_recognised_and_what_to_lower_is_named():
    run = build_config(
        dict(
            name="run",
            max_steps=1,
            global_batch_size=8,
            micro_batch_size=4,
            model=dict(base="miniature"),
            data=dict(shards="train", condition="edges"),
        )
    )
    lost = {0: "RankLost: rank 0 on here has lost another rank (Connection closed by peer)"}
    hint = train.why_silent(run, lost, 2, kills=1)
    assert hint and hint.startswith("rank 1 ended without a word, and the kernel has killed 1 process for memory")
    assert "micro_batch_size=4" in hint and "--processes" in hint
    assert "SIGKILL" in (train.why_silent(run, lost, 2, kills=0) or "")
    assert train.why_silent(run, {0: "ConfigError: a wrong field"}, 2, kills=1) is None  # torchrun ended the other one
    assert train.why_silent(run, lost | {1: lost[0]}, 2, kills=1) is None
    assert train.out_of_memory_kills() >= 0
