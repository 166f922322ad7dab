"""A real Slurm of several nodes on this machine, for tests: munged, slurmctld and a slurmd for each node, no systemd.

Each node has its own network and host name (Linux namespaces), and its own address on a bridge that lies in a namespace
too, so that nothing touches the machine's own network, and any number of such clusters can be up at once. It needs
root and Debian's slurm-wlm, munge and iproute2; `why_not` says what is missing.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""program -> the Debian package that has it."""
SBIN = "/usr/sbin:/sbin"
GRACE_SECONDS = 40
"""Before a preemption in partition `low`."""


def why_not() -> str | None:
    """Why no cluster can be started here, as a sentence; None where one can."""
    if os.geteuid() != 0:
        return "a Slurm in network namespaces needs root"
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None})
    if missing:
        return f"install the Debian packages {' '.join(missing)} to run a Slurm here"
    probe = f"cb{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


class Slurm:
    """Started and ended by `with`. Partitions: `low`, whose jobs `high` preempts."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.hosts = {"ctl": "10.77.0.1"} | {f"n{number}": f"10.77.0.1{number}" for number in range(1, nodes + 1)}
        self.nodes = [host for host in self.hosts if host != "ctl"]
        self.prefix = f"cb{os.getpid()}"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }

    def __enter__(self) -> "Slurm":
        try:
            self._start_munge()
            self._make_network()
            (self.folder / "slurm.conf").write_text(self._configuration())
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_until(self.idle, 60, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends everything that carries this cluster's configuration, daemons and what they have started."""
        ours = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in _processes_with(ours):
                _kill(pid, number)
            time.sleep(1.0 if number == signal.SIGTERM else 0.0)
        munge = self.folder / "munge.pid"
        if munge.is_file():
            _kill(int(munge.read_text()), signal.SIGTERM)
        for host in [*self.hosts, "sw"]:
            subprocess.run(["ip", "netns", "del", self._namespace(host)], capture_output=True)

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """Runs a command on the host `ctl`, which is the login node too, and returns what it prints."""
        done = subprocess.run(self.on("ctl", command), env=self.environment, capture_output=True, text=True, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command, on a host."""
        # `ip netns exec` would mount /sys anew, and slurmd finds no cgroups there and refuses to start
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(host)}", "unshare", "--uts", "--mount", "bash", "-c"]
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        return [*enter, script, host, str(self.folder / "hosts"), *command]

    def start_controller(self) -> None:
        """Anew, or again with the state that it had."""
        self.run("slurmctld", "-f", str(self.folder / "slurm.conf"))

    def kill_controller(self) -> None:
        _kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGKILL)

    def start_node(self, node: str) -> None:
        subprocess.run(["ip", "-n", self._namespace("sw"), "link", "set", f"v{node}", "up"], check=True)
        command = self.on(node, ["slurmd", "-N", node, "-f", str(self.folder / "slurm.conf")])
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def crash_node(self, node: str) -> None:
        """As by a power cut: everything on it is gone at once, and its link."""
        subprocess.run(["ip", "-n", self._namespace("sw"), "link", "set", f"v{node}", "down"], check=True)
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True)
        for pid in listed.stdout.split():
            _kill(int(pid), signal.SIGKILL)

    def idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=high", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def wait_until(self, true: Callable[[], bool], seconds: float, what: str) -> float:
        """-> the seconds that it took."""
        began = time.monotonic()
        while not true():
            if time.monotonic() - began > seconds:
                logs = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log")]
                raise AssertionError(f"after {seconds:.0f} s it is not so that {what}\n" + "\n".join(logs))
            time.sleep(0.1)
        return time.monotonic() - began

    def _namespace(self, host: str) -> str:
        return self.prefix + host

    def _start_munge(self) -> None:
        """With a key and a socket of its own."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
        files["seed-file"] = "munge.seed"
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        subprocess.run(["munged", "--force", *options], env=self.environment, check=True)

    def _make_network(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in self.hosts.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        switch = self._namespace("sw")
        commands = [["netns", "add", switch], ["-n", switch, "link", "add", "br0", "type", "bridge"]]
        commands += [["-n", switch, "link", "set", "br0", "up"]]
        for host, address in self.hosts.items():
            own = self._namespace(host)
            commands += [
                ["netns", "add", own],
                ["-n", own, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{host}", "netns", switch],
                ["-n", switch, "link", "set", f"v{host}", "master", "br0", "up"],
                ["-n", own, "address", "add", f"{address}/24", "dev", "eth0"],
                ["-n", own, "link", "set", "eth0", "up"],
                ["-n", own, "link", "set", "lo", "up"],
            ]
        for command in commands:
            subprocess.run(["ip", *command], check=True)

    def _configuration(self) -> str:
        folder = self.folder
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        nodes = [f"NodeName={node} NodeAddr={self.hosts[node]} CPUs=4 RealMemory=4000" for node in self.nodes]
        return "\n".join([
            "ClusterName=test",
            f"SlurmctldHost=ctl({self.hosts['ctl']})",
            "SlurmUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",  # what a requeued job waits
            "CredType=cred/munge",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0",
            "ReturnToService=2",
            "SlurmctldTimeout=10",
            "SlurmdTimeout=10",  # a node that is silent for so long is down, and its jobs start elsewhere
            "KillWait=10",
            "MessageTimeout=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd.%n.log",
            "SlurmdParameters=config_overrides",
            "SwitchType=switch/none",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/none",
            *nodes,
            f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
            "",
        ])  # fmt: skip


def _processes_with(variable: bytes) -> list[int]:
    """Ids of processes that have this in their environment, but our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return found


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
