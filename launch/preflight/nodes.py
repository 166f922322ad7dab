"""`controlbooth launch check`: every node of a job looks at what it needs, and all of them at each other.

It runs as the first step of a job, before the ranks, and costs seconds. The first node listens; the others tell it what
they see, and it tells all of them whether to go on. The speed is measured between the first node and each other one.

Where nothing is wrong but that a node is late or lost, the next attempt may find it: then the status is `again` of
`launch.job.outcome`, and not that of a mistake, which another attempt would meet again.
"""

import importlib.metadata
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlbooth.data.arguments import finite_number, verb_parser, whole_number
from controlbooth.data.errors import UserError
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.launch.job.job import code_version
from controlbooth.launch.job.outcome import EXIT_CODES
from controlbooth.launch.preflight.run import preflight
from controlbooth.launch.ranks.local import gpu_count
from controlbooth.launch.ranks.torchrun import Node
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig, data_set_name, run_folder

REFUSED = 2
AGAIN = EXIT_CODES["again"]
PATIENCE_SECONDS = 120.0
"""For nodes that start later than others, where --patience says nothing else."""
ANSWER_SECONDS = 120.0
"""For each answer of a node that is there."""
CLOCK_SECONDS = 2.0
"""By how much clocks may differ. What was written by which attempt is told by time."""
SHARED_DISK_SECONDS = 15.0
"""Until a file that one node has written is seen by another."""
PROBE_BYTES = 4 * 2**20
PACKAGES = ("torch", "deepspeed", "diffusers", "numpy")


@dataclass
class Peer:
    """What the first node knows of another one."""

    rank: int
    host: str
    stream: Any
    versions: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    clock: float = 0.0
    """Seconds by which its clock is ahead."""
    mbit: tuple[float, float] = (0.0, 0.0)
    """To it and from it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "launch check",
        "Checks that this node sees the run's shards, base and folder, and, with the other nodes of a job, "
        "that clocks, versions, shared disk and network are fit. Jobs run it by themselves before they train.",
        "examples:\n  controlbooth launch check run.yaml\n"
        "  controlbooth launch check run.yaml --nodes 2 --node-rank 0 --head n1 --port 29500    # on n1\n"
        "  controlbooth launch check run.yaml --nodes 2 --node-rank 1 --head n1 --port 29500    # on n2\n"
        f"exit statuses:\n  {REFUSED} where something is wrong\n  {AGAIN} where only a node was late or lost",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--nodes", type=whole_number(), default=1)
    parser.add_argument("--node-rank", type=whole_number(0), default=0)
    parser.add_argument("--processes", type=whole_number(), help="ranks on this node (default: one per GPU, or 1)")
    parser.add_argument("--gpus", type=whole_number(0), default=0, help="that this node should have")
    parser.add_argument("--head", default="127.0.0.1", help="address of the node with rank 0")
    parser.add_argument("--port", type=whole_number(1, 65535), default=29500, help="that it listens on")
    parser.add_argument(
        "--least-mbit", type=finite_number(0), default=0.0, help="network speed below which the check fails"
    )
    parser.add_argument(
        "--patience",
        type=finite_number(0),
        default=PATIENCE_SECONDS,
        metavar="SECONDS",
        help="wait so long for nodes that start later (default: %(default)g)",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.node_rank >= options.nodes:
        ranks = f"the ranks of --nodes {options.nodes} go from 0 to {options.nodes - 1}"
        raise UserError(f"--node-rank is {options.node_rank}: {ranks}")
    config = load_config(options.run, options.overrides)
    problems = list(node_problems(config, options.nodes, options.processes, options.gpus))
    if options.node_rank == 0:
        return check_as_head(config, options.nodes, options.port, options.least_mbit, problems, options.patience)
    return check_as_other(config, options.node_rank, options.head, options.port, problems, options.patience)


def node_problems(config: RunConfig, nodes: int, processes: int | None, gpus_expected: int) -> Iterator[str]:
    """Yields what is wrong on this node alone."""
    gpus = gpu_count()
    if gpus < gpus_expected:
        yield (
            f"it shows {gpus} GPUs, and gpus_per_node is {gpus_expected}: run nvidia-smi on it, and exclude the node "
            "if its driver is at fault"
        )
        gpus = gpus_expected  # said once
    node = Node(processes=processes or max(1, gpus), cores=usable_cpus(), gpus=gpus, head_port=0, nodes=nodes)
    yield from preflight(config, node)


def check_as_head(
    config: RunConfig, nodes: int, port: int, least_mbit: float, problems: Sequence[str], patience: float
) -> int:
    """Waits for the others, measures, decides, and prints it. patience: seconds for those that start later.

    -> 0; 2 where something is wrong; 75 where only nodes are missing or the connection to them broke.
    """
    host, versions = socket.gethostname(), node_versions()
    peers: list[Peer] = []
    if nodes > 1:
        with listen(port, nodes) as server:
            peers = list(meet(server, nodes, patience))
    lost = [
        f"node {rank} has not reached {host}, port {port}, within {patience:.0f} s: look at what it says "
        "itself, at whether it resolves that name, and at firewalls between the nodes"
        for rank in sorted(set(range(1, nodes)) - {peer.rank for peer in peers})
    ]
    token = None if problems else write_token(config)
    for peer in sorted(peers, key=lambda peer: peer.rank):
        try:
            examine(peer, token, versions, least_mbit, host)
        except OSError as error:
            lost.append(
                f"node {peer.rank} ({peer.host}): the connection to it broke while it was checked ({error}): look at "
                "its log"
            )
    named = {f"node 0 ({host})": list(problems)} | {f"node {p.rank} ({p.host})": p.problems for p in peers}
    found = once_each(named)
    if token is not None:
        token.unlink(missing_ok=True)
    status = REFUSED if found else AGAIN if lost else 0
    for peer in peers:
        try:
            send(peer.stream, {"status": status})
        except OSError:
            continue  # it ends with `again` by itself
    print(table(host, peers), flush=True)
    if status == 0:
        print(all_well(config, peers), flush=True)
    for problem in [*lost, *found]:
        print(f"controlbooth launch check: {problem}", file=sys.stderr, flush=True)
    return status


def once_each(named: dict[str, list[str]]) -> list[str]:
    """Returns sentences that say what is wrong and where; what several nodes have in common is said once. named: node
    -> what is wrong there."""
    nodes: dict[str, list[str]] = {}
    for node, problems in named.items():
        for problem in problems:
            nodes.setdefault(problem, []).append(node)
    return [
        f"{'all nodes' if len(those) == len(named) > 1 else ', '.join(those)}: {problem}"
        for problem, those in nodes.items()
    ]


def check_as_other(config: RunConfig, rank: int, head: str, port: int, problems: Sequence[str], patience: float) -> int:
    """Answers the first node's questions until it has decided. patience: seconds for nodes that start later.

    -> what that node decides, or where it does not answer, 2 if something is wrong here and otherwise 75.
    """
    us = f"controlbooth launch check: node {rank} ({socket.gethostname()})"
    try:
        with reach(head, port, patience) as connection:
            connection.settimeout(patience + ANSWER_SECONDS)  # it may be waiting for others
            stream = connection.makefile("rwb")
            send(stream, dict(rank=rank, host=socket.gethostname(), versions=node_versions(), problems=list(problems)))
            while True:
                asked = receive(stream)
                if "status" in asked:
                    return asked["status"]
                answer(stream, asked, config)
    except OSError as error:
        print(
            f"{us}: the first node, {head}, does not answer on port {port} ({error}). Look at what that node says, and "
            "whether the network lets these two talk",
            *(f"{us}: {problem}" for problem in problems),
            sep="\n",
            file=sys.stderr,
        )
        return REFUSED if problems else AGAIN


def listen(port: int, nodes: int) -> socket.socket:
    """Opens the socket on which the first node listens. Raises ValueError where another program has the port."""
    try:
        return socket.create_server(("", port), backlog=nodes)
    except OSError as error:
        raise UserError(
            f"the first node ({socket.gethostname()}) cannot listen on port {port} "
            f"({os.strerror(error.errno or 0)}): end the program that has it, or give all nodes another --port"
        ) from error


def meet(server: socket.socket, nodes: int, patience: float) -> Iterator[Peer]:
    """Yields the other nodes, as they connect, until all are there or `patience` seconds are over. One that disconnects
    at once does not count."""
    end = time.monotonic() + patience
    missing = nodes - 1
    while missing:
        server.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        connection.settimeout(ANSWER_SECONDS)
        stream = connection.makefile("rwb")
        try:
            hello = receive(stream)
        except OSError:
            continue
        missing -= 1
        yield Peer(hello["rank"], hello["host"], stream, hello["versions"], hello["problems"])


def reach(head: str, port: int, patience: float) -> socket.socket:
    """Connects to the first node, which may still be starting; tries for `patience` seconds. Raises OSError."""
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((head, port), timeout=10.0)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def examine(peer: Peer, token: Path | None, versions: dict[str, Any], least_mbit: float, host: str) -> None:
    """Fills in what is measured of a peer, and what is wrong with it."""
    peer.clock = clock_of(peer.stream)
    if abs(peer.clock) > CLOCK_SECONDS:
        peer.problems.append(
            f"its clock is {peer.clock:+.1f} s from that of {host}: let both follow one time server (chrony, ntpd)"
        )
    for name, ours in versions.items():
        theirs = peer.versions.get(name)
        if theirs != ours:
            peer.problems.append(
                f"it has {name} {theirs}, and {host} has {ours}: install the same environment on all nodes"
            )
    if token is not None:
        send(peer.stream, {"look": str(token)})
        if not receive(peer.stream)["seen"]:
            peer.problems.append(
                f"it does not see what {host} wrote into {token.parent}: put `output` on a disk that all nodes share"
            )
    peer.mbit = speed_of(peer.stream)
    if min(peer.mbit) < least_mbit:
        peer.problems.append(
            f"the network between {host} and it carries {min(peer.mbit):.0f} Mbit/s, and least_network_mbit is "
            f"{least_mbit:g}: exclude the node, look at its link and its NCCL_SOCKET_IFNAME, or lower the limit"
        )


def answer(stream: Any, asked: dict[str, Any], config: RunConfig) -> None:
    if "clock" in asked:
        send(stream, {"time": time.time()})
    elif "look" in asked:
        send(stream, {"seen": appears(Path(asked["look"]))})
    elif "take" in asked:
        read_exactly(stream, asked["take"])
        send(stream, {"taken": asked["take"]})
    elif "give" in asked:
        stream.write(bytes(asked["give"]))
        stream.flush()


def clock_of(stream: Any) -> float:
    """Measures by how many seconds the peer's clock is ahead, by the quickest of five exchanges."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        before = time.time()
        send(stream, {"clock": True})
        there = receive(stream)["time"]
        after = time.time()
        best = min(best, (after - before, there - (before + after) / 2))
    return best[1]


def speed_of(stream: Any) -> tuple[float, float]:
    """Measures the speed to the peer and from it, in Mbit/s."""
    speeds = []
    for direction in ("take", "give"):
        began = time.perf_counter()
        send(stream, {direction: PROBE_BYTES})
        if direction == "take":
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            receive(stream)
        else:
            read_exactly(stream, PROBE_BYTES)
        speeds.append(PROBE_BYTES * 8e-6 / (time.perf_counter() - began))
    return speeds[0], speeds[1]


def write_token(config: RunConfig) -> Path:
    """Makes a file in the run's folder that the other nodes must see, and returns its path."""
    path = run_folder(config).absolute() / f".check-{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def appears(path: Path) -> bool:
    end = time.monotonic() + SHARED_DISK_SECONDS
    while time.monotonic() < end:
        if path.parent.is_dir() and path.name in os.listdir(path.parent):  # listing asks the server again
            return True
        time.sleep(0.5)
    return False


def node_versions() -> dict[str, Any]:
    """Returns the versions that must be the same on all nodes, by name."""
    code = code_version()
    versions = {"controlbooth": f"{code['version']} {code['commit'] or ''}".strip()}
    return versions | {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES}


def table(host: str, peers: Sequence[Peer]) -> str:
    lines = [f"node    0  {host}: the first node"]
    for peer in sorted(peers, key=lambda peer: peer.rank):
        there, back = peer.mbit
        lines.append(
            f"node {peer.rank:>4}  {peer.host}: clock {peer.clock:+.3f} s, network {there:,.0f} Mbit/s to it and "
            f"{back:,.0f} from it"
        )
    return "\n".join(lines)


def all_well(config: RunConfig, peers: Sequence[Peer]) -> str:
    """Describes what has been looked at, and found fit."""
    seen = (
        f"data ({data_set_name(config)}), base ({config.model.base}), the run's folder ({run_folder(config)}) and its "
        "disk, batch and ranks"
    )
    if not peers:
        return f"all is well on this node: {seen}"
    return (
        f"all is well on {len(peers) + 1} nodes: {seen}; clocks, versions, the shared disk and the network between them"
    )


def send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream: Any) -> dict[str, Any]:
    """Reads one message. Raises ConnectionError where the other side has gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ConnectionError("it closed the connection")
    return json.loads(line)


def read_exactly(stream: Any, size: int) -> None:
    while size:
        data = stream.read(min(size, 2**16))
        if not data:
            raise ConnectionError("it closed the connection")
        size -= len(data)
