"""Two network namespaces as hosts, on a switch that can cut and slow the cable of each. Needs root and iproute2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ADDRESSES = ("10.88.0.1", "10.88.0.2")
PORT = 29500
"""Every namespace has all ports to itself."""


def why_not() -> str | None:
    """What is missing for hosts to be made, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing := [name for name in ("ip", "tc", "bridge") if shutil.which(name) is None]:
        return f"needs {' and '.join(missing)}: install iproute2"
    probe = f"cb-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Hosts:
    """To be used in `with`: namespaces, cables and the switch are gone afterwards."""

    def __enter__(self) -> "Hosts":
        self.switch = f"cb-switch-{os.getpid()}"
        self.names = [f"cb-host{number}-{os.getpid()}" for number in range(len(ADDRESSES))]
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            _ip("netns", "add", name)
            _ip(
                "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self.switch
            )
            _ip("-n", self.switch, "link", "set", f"port{number}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def cut(self, number: int) -> None:
        """Packets of this host go nowhere, and nobody is told: the cable stays plugged in at both ends."""
        self._in_switch("bridge", "link", "set", "dev", f"port{number}", "state", "0")

    def mend(self, number: int) -> None:
        self._in_switch("bridge", "link", "set", "dev", f"port{number}", "state", "3")

    def slow(self, number: int, rate: str) -> None:
        """What comes to this host and what leaves it pass at this rate, such as 5mbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        self._in_switch("tc", "qdisc", "replace", "dev", f"port{number}", *shape)
        self._on(number, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def hasten(self, number: int) -> None:
        self._in_switch("tc", "qdisc", "del", "dev", f"port{number}", "root")
        self._on(number, "tc", "qdisc", "del", "dev", "eth0", "root")

    def start(self, number: int, run_file: Path, nodes: str = "2", restarts: int = 0, **environment: str):
        """torchrun on this host, one rank; host 0 is where ranks meet. Its output is a pipe."""
        command = ["ip", "netns", "exec", self.names[number]]
        command += ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host{number}"]
        command += [sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nnodes={nodes}", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={run_file.stem}"]
        command += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--max-restarts={restarts}", "--shutdown-timeout=60"]
        command += [f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=3", f"--local-addr={ADDRESSES[number]}"]
        chosen = dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="eth0", PYTHONUNBUFFERED="1")
        chosen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted ranks meet at a stale address
        return subprocess.Popen(
            [*command, "-m", "controlbooth.trainer.controlnet.train", str(run_file)],
            env=os.environ | chosen | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _in_switch(self, *command: str) -> None:
        _ip("netns", "exec", self.switch, *command)

    def _on(self, number: int, *command: str) -> None:
        _ip("netns", "exec", self.names[number], *command)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
