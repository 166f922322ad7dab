"""Nodes of a job that look at each other, as threads that talk over the loopback."""

import contextlib
import io
import socket
import threading
from pathlib import Path

import pytest
import yaml

from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.job.outcome import EXIT_CODES
from controlbooth.launch.preflight import nodes as check


@pytest.fixture
def run(tmp_path) -> Path:
    for name in ("train/a.tar", "held/b.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bytes(1024))  # an empty tar
    tree = dict(
        name="first",
        output=str(tmp_path / "runs"),
        max_steps=10,
        global_batch_size=8,
        micro_batch_size=2,
        model=dict(base="miniature"),
        data=dict(shards=str(tmp_path / "train"), held_out=str(tmp_path / "held"), condition="edges", resolution=64),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def together(run: Path, nodes: int = 2, others: dict[int, list[str]] | None = None, *arguments: str) -> list[int]:
    """The exit status of each node. others: what a node's command line has besides; None where it never starts."""
    port, statuses = free_port(), {}

    def one(rank: int, more: list[str]) -> None:
        place = ["--nodes", str(nodes), "--node-rank", str(rank), "--head", "127.0.0.1", "--port", str(port)]
        statuses[rank] = check.main([str(run), *place, *arguments, *more])

    told = {0: []} | {rank: [] for rank in range(1, nodes)} if others is None else {0: []} | others
    threads = [threading.Thread(target=one, args=(rank, more)) for rank, more in told.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [statuses[rank] for rank in sorted(statuses)]


def test_nodes_that_see_the_same_go_on_and_their_clocks_and_network_are_shown(run, capsys):
    assert together(run, nodes=4) == [0, 0, 0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "node    2" in lines[2] and "Mbit/s to it" in lines[2]
    assert lines[4].startswith("all is well on 4 nodes: data (") and "clocks, versions, the shared disk" in lines[4]
    assert list((run.parent / "runs" / "first").iterdir()) == []  # what it wrote to see whether others see it is gone


def test_one_node_alone_says_what_it_has_looked_at_and_that_all_is_well(run, capsys):
    assert controlbooth(["launch", "check", str(run), "name=o2"]) == 0
    node, verdict = capsys.readouterr().out.splitlines()
    assert node == f"node    0  {socket.gethostname()}: the first node"
    for part in ("all is well on this node: data (", str(run.parent / "train"), "base (miniature)", "runs/o2)"):
        assert part in verdict
    assert controlbooth(["launch", "check", str(run), "data.shards=/nowhere"]) == 2
    assert "all is well" not in capsys.readouterr().out


def test_a_node_that_does_not_see_the_shards_is_named_and_stops_all(run, capsys):
    assert together(run, 2, {1: ["data.shards=/nowhere/train.tar"]}) == [2, 2]
    message = capsys.readouterr().err
    assert (
        f"node 1 ({socket.gethostname()}): data.shards is '/nowhere/train.tar'" in message and "node 0" not in message
    )


def test_what_is_wrong_on_all_nodes_is_said_once(run, capsys):
    assert together(run, 3) == [2, 2, 2]
    assert capsys.readouterr().err.count("global_batch_size=8 is not a multiple") == 1


def test_a_node_that_does_not_come_is_named_and_the_next_attempt_may_meet_it(run, capsys):
    assert together(run, 2, {}, "--patience=0.5") == [EXIT_CODES["again"]]
    assert "node 1 has not reached" in capsys.readouterr().err
    assert together(run, 3, {1: []}, "--patience=0.5", "global_batch_size=12") == [EXIT_CODES["again"]] * 2
    assert "node 2 has not reached" in (message := capsys.readouterr().err) and "node 1" not in message


def test_what_is_wrong_with_the_run_ends_the_job_although_a_node_is_missing(run, capsys):
    assert together(run, 3, {1: []}, "--patience=0.5") == [2, 2]
    message = capsys.readouterr().err
    assert "node 2 has not reached" in message and "global_batch_size=8 is not a multiple" in message


def test_a_node_whose_head_does_not_answer_says_so_and_what_is_wrong_with_itself(run, capsys):
    place = ["--nodes", "2", "--node-rank", "1", "--head", "127.0.0.1", "--port", str(free_port()), "--patience=0.3"]
    assert check.main([str(run), *place]) == EXIT_CODES["again"]
    assert "the first node, 127.0.0.1, does not answer on port" in capsys.readouterr().err
    assert check.main([str(run), *place, "data.shards=/nowhere/train.tar"]) == 2
    assert "data.shards is '/nowhere/train.tar'" in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", '{"rank": 1, "ho', '{"rank": 1, "host": "n2", "versions": {}, "problems": []}\n'])
def test_a_node_that_goes_while_it_is_checked_is_named_and_the_next_attempt_may_meet_it(run, capsys, said):
    port, statuses = free_port(), []
    words = [str(run), "--nodes=2", f"--port={port}", "--patience=1"]
    head = threading.Thread(target=lambda: statuses.append(check.main(words)))
    head.start()
    with check.reach("127.0.0.1", port, 10.0) as connection:
        connection.sendall(said.encode())
    head.join()
    assert statuses == [EXIT_CODES["again"]]
    named = "node 1 (n2): the connection to it broke" if said.endswith("\n") else "node 1 has not reached"
    assert named in capsys.readouterr().err


def test_a_slow_network_other_versions_and_a_wrong_clock_are_named(run, capsys, monkeypatch):
    assert together(run, 2, None, "--least-mbit=1e9") == [2, 2]
    assert "least_network_mbit is 1e+09" in capsys.readouterr().err
    peer = check.Peer(1, "n2", io.BytesIO(), {"torch": "2.12.0"})
    monkeypatch.setattr(check, "clock_of", lambda stream: -7.25)
    monkeypatch.setattr(check, "speed_of", lambda stream: (1000.0, 900.0))
    check.examine(peer, None, {"torch": "2.13.0"}, 0.0, "n1")
    assert peer.problems == [
        "its clock is -7.2 s from that of n1: let both follow one time server (chrony, ntpd)",
        "it has torch 2.12.0, and n1 has 2.13.0: install the same environment on all nodes",
    ]


def test_a_folder_that_is_not_shared_is_seen_by_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SHARED_DISK_SECONDS", 0.2)
    assert not check.appears(tmp_path / "none" / ".check-1")
    (tmp_path / ".check-1").touch()
    assert check.appears(tmp_path / ".check-1")


def test_this_machine_alone_is_checked_by_the_same_command(run, capsys):
    assert controlbooth(["launch", "check", str(run)]) == 0
    with contextlib.suppress(SystemExit):
        assert controlbooth(["launch", "check", str(run), "--gpus=4096"]) == 2
    assert "gpus_per_node is 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes=0"], "argument --nodes: 0 is less than 1"),
        (["--patience=nan"], "argument --patience: nan is not finite"),
        (["--port=70000"], "argument --port: 70000 is more than 65535"),
        (["--nodes=2", "--node-rank=2"], "--node-rank is 2: the ranks of --nodes 2 go from 0 to 1"),
    ],
)
def test_numbers_that_no_job_has_are_refused(run, capsys, words, message):
    assert controlbooth(["launch", "check", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_another_program_has_is_named(run, capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["launch", "check", str(run), "--nodes=2", f"--port={port}"]
        assert controlbooth(words) == 2
    assert f"cannot listen on port {port} (Address already in use): end the program" in capsys.readouterr().err
