"""Pure: a run and the facts of one node -> the command and the environment that start the node's ranks.

The worker is the same everywhere, `torchrun ... -m controlbooth.trainer.controlnet.train run.yaml`; an engine only
fills in Node. On this machine the only rank of a run is started without torchrun.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Word = TypeVar("Word")
WORKER = "controlbooth.trainer.controlnet.train"
"""The module that each rank of a ControlNet run runs."""
SUBJECTS_WORKER = "controlbooth.trainer.dreambooth.train"
"""The same of a run of subjects."""
GRACE_SECONDS = 300
"""From SIGTERM until torchrun kills its ranks. Its own 30 s are less than a step and a checkpoint of a large model."""

KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in dict(hugetlb=1, trim_threshold=2**34, mmap_threshold=2**25).items()
)
"""Of a process that trains on the CPU: memory of a step's activations is kept for the next step, in huge pages. glibc
otherwise gives it back to the system in every step, and getting it anew took a seventh of the step's time."""

SPIN_COUNT = "2000"
"""How often a thread of a parallel region looks for more work before it sleeps (GOMP_SPINCOUNT). One that sleeps at
once (OMP_WAIT_POLICY=PASSIVE) must be woken thousands of times a step, which took a third of the step's time on two
cores; one that spins for long, as by default, starves other programs: beside a busy one a step took 2 to 15 times as
long, and with this 1.3 times."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What an engine knows of one machine of a run."""

    processes: int
    """Ranks on this node."""
    cores: int
    """Cores that these ranks may use together."""
    gpus: int
    head_port: int
    head_address: str = "127.0.0.1"
    """Of the node with node_rank 0, where all nodes meet."""
    nodes: int = 1
    node_rank: int = 0
    grace_seconds: int = GRACE_SECONDS
    """Must be less than what the engine itself waits before it kills."""


def world_size(node: Node) -> int:
    """Returns the number of ranks of the whole run; every node has the same number."""
    return node.nodes * node.processes


def threads_per_process(node: Node) -> int:
    return max(1, node.cores // node.processes)


def torchrun_command(run_file: str, overrides: Sequence[str], name: str, node: Node, worker: str = WORKER) -> list[str]:
    """Returns the command that starts one node. name: of the run, the same on every node; it names the rendezvous.

    worker: the module that each rank runs.
    """
    meeting = rendezvous(f"{node.head_address}:{node.head_port}", str(int(node.node_rank == 0)))
    # torchrun of this environment, whatever the PATH says
    return [sys.executable, *torchrun_arguments(node, meeting, name, worker, [run_file, *overrides])]


def single_rank_command(run_file: str, overrides: Sequence[str], worker: str = WORKER) -> list[str]:
    """Returns the command that starts the only rank of a run, which meets nobody.

    torchrun's own process would take 0.3 GiB beside it and two seconds before it.
    """
    return [sys.executable, "-u", "-m", worker, run_file, *overrides]  # unbuffered, as torchrun has it


def single_rank_environment() -> dict[str, str]:
    """Returns the variables that torchrun would set for the only rank, whatever the inherited ones say."""
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any: nobody else looks for it
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # of a torchrun that this was started under
    }


def rendezvous(endpoint: str, is_host: str) -> list[str]:
    """Returns the arguments of torchrun that say where nodes meet.

    endpoint: address:port of the first node, where all meet; port 0 is any, for a single node. is_host: "1" on that
    node and "0" on others. Both may be shell expressions, where a script is written and not a command started.
    """
    return [
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=is_host={is_host}",  # otherwise guessed from host names, wrong in containers
    ]


def torchrun_arguments(
    node: Node, meeting: Sequence[Word], name: str, worker: str, arguments: Sequence[Word]
) -> list[str | Word]:
    """Returns what follows the interpreter on the command line. meeting: what `rendezvous` returns, as text or in a
    type of the caller's own, which `arguments` have too."""
    return [
        "-m",
        "torch.distributed.run",
        f"--nnodes={node.nodes}",
        f"--nproc-per-node={node.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={name}",
        *meeting,
        "--max-restarts=0",  # a resume is a new start: its ranks must read the latest checkpoint
        f"--shutdown-timeout={node.grace_seconds}",
        "-m",
        worker,
        *arguments,
    ]


def torchrun_environment(node: Node, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to set on top of `inherited`; what the user has set there stays."""
    chosen = {
        # torchrun would set 1, and without it every rank would take all cores
        "OMP_NUM_THREADS": str(threads_per_process(node)),
        "HF_HUB_OFFLINE": "1",  # models are folders; a name that looks like one of a hub must fail, not download
    }
    if "OMP_WAIT_POLICY" not in inherited:
        chosen["GOMP_SPINCOUNT"] = SPIN_COUNT
    if node.gpus == 0:
        chosen["DS_ACCELERATOR"] = "cpu"  # DeepSpeed otherwise guesses from installed packages
        chosen["GLIBC_TUNABLES"] = KEEP_MEMORY
    return {key: value for key, value in chosen.items() if key not in inherited}
