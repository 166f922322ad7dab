"""What deploy/compose.yaml describes, without Docker: Debian's PostgreSQL and MLflow's server, as processes to kill.

The server's command line, its environment and the health checks are read from compose.yaml and the Dockerfile, so that
what is tested here is what is started there. Only places are others: free ports of this machine, and a folder of its
own in place of the volumes.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from stores import free_port

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
UNPRIVILEGED = "postgres"
"""Debian's user for it. PostgreSQL refuses to be started by root."""
START_SECONDS = 180.0


def programs() -> Path | None:
    """The folder of PostgreSQL's newest programs, which Debian does not put on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def why_not() -> str | None:
    """What is missing, for tests that are skipped; None where everything is there."""
    if programs() is None:
        return "needs Debian's PostgreSQL: apt-get install postgresql"
    if not Path(sys.executable).with_name("mlflow").exists():
        return "needs the extra `mlflow`, which has the server"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "needs psycopg, which the extra `dev` has"
    return None


class Stack:
    """The two services in a new folder, below the system's folder for temporary files."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tracking-"))
        self._user = UNPRIVILEGED if os.getuid() == 0 else None
        self._database_port, self.port = free_port(), free_port()
        self._password = secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen] = {}
        self.seconds: dict[str, float] = {}
        """What the first start of each took."""

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        """Of the database. Nobody but the server and the database is told it."""
        return self._password

    def __enter__(self) -> "Stack":
        try:
            self._make_database()
            self.start_database()
            self.start_server()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def described(self) -> str:
        """What runs, and what its first start took."""
        version = subprocess.run([f"{programs()}/postgres", "--version"], capture_output=True, text=True, check=True)
        starts = ", ".join(f"{name} started in {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{version.stdout.strip()} in place of {COMPOSE['postgres']['image']}; {starts}"

    def start_database(self) -> None:
        """Returns when the health check of compose.yaml says that it is there."""
        data, port = self.folder / "database", str(self._database_port)
        command = [str(programs()) + "/postgres", "-D", str(data), "-p", port, "-k", str(data)]
        self._start("postgres", [*command, "-c", "listen_addresses=127.0.0.1"], self._environment(), self._user)
        _, program, *arguments = COMPOSE["postgres"]["healthcheck"]["test"]
        place = {"PGHOST": "127.0.0.1", "PGPORT": port}
        self._wait("postgres", [f"{programs()}/{program}", *arguments], self._environment() | place)

    def start_server(self) -> None:
        """As `start_database`."""
        service = COMPOSE["mlflow"]
        environment = self._environment() | image_environment(service["build"]["target"])
        environment |= {name: self._here(value) for name, value in service["environment"].items()}
        program, *arguments = entrypoint(service["build"]["target"])
        arguments = [self._here(argument) for argument in [*arguments, *service["command"]]]
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        self._start("mlflow", command, environment)
        _, program, *arguments = service["healthcheck"]["test"]
        assert program == "python"
        self._wait("mlflow", [sys.executable, *map(self._here, arguments)], environment)

    def kill(self, name: str) -> None:
        """SIGKILL to all processes of a service at once, as when its machine fails."""
        process = self._processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # so that it has no further child after they are listed
            everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for one in everybody:
                if one.is_running():
                    one.send_signal(signal.SIGKILL)
            psutil.wait_procs(everybody, timeout=30)
        process.wait()

    def _here(self, text: str) -> str:
        """A text of compose.yaml or the Dockerfile with the ports, the places and the password of this machine."""
        text = re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", self._password, text)
        text = text.replace("@postgres/", f"@127.0.0.1:{self._database_port}/")
        text = text.replace("=/artifacts", f"={self.folder / 'artifacts'}").replace("=0.0.0.0", "=127.0.0.1")
        return re.sub(r"(?<=[:=])5000\b", str(self.port), text)

    def _environment(self) -> dict[str, str]:
        """Of a container: nothing of ours but where programs are."""
        return {"PATH": f"{programs()}:{os.environ['PATH']}", "HOME": str(self.folder), "LANG": "C.UTF-8"}

    def _make_database(self) -> None:
        """What the image does at its first start, with the names of compose.yaml."""
        given = {name: self._here(value) for name, value in COMPOSE["postgres"]["environment"].items()}
        if self._user:
            owner = pwd.getpwnam(self._user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        (self.folder / "artifacts").mkdir()
        secret = self.folder / "password"
        secret.write_text(given["POSTGRES_PASSWORD"])
        shutil.chown(secret, self._user or os.getuid())
        command = [f"{programs()}/initdb", "-D", str(self.folder / "database"), "-U", given["POSTGRES_USER"]]
        command += ["--auth=scram-sha-256", "--pwfile", str(secret), "-E", "UTF8"]
        self._run(command, self._environment())
        secret.unlink()
        self.start_database()
        connection = dict(PGHOST="127.0.0.1", PGPORT=str(self._database_port), PGPASSWORD=given["POSTGRES_PASSWORD"])
        create = [f"{programs()}/createdb", "--username", given["POSTGRES_USER"], given["POSTGRES_DB"]]
        self._run(create, self._environment() | connection)
        self.kill("postgres")

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        done = subprocess.run(
            command, env=environment, cwd=self.folder, user=self._user, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")

    def _start(self, name: str, command: list[str], environment: dict[str, str], user: str | None = None) -> None:
        with open(self.folder / f"{name}.log", "a") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                user=user,
                group=user,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, name: str, check: list[str], environment: dict[str, str]) -> None:
        began = time.monotonic()
        while subprocess.run(check, env=environment, cwd=self.folder, capture_output=True).returncode:
            if self._processes[name].poll() is not None or time.monotonic() - began > START_SECONDS:
                log = (self.folder / f"{name}.log").read_text()[-3000:].replace(self._password, "***")
                raise RuntimeError(f"{name} did not start: {log}")
            time.sleep(0.2)
        self.seconds.setdefault(name, time.monotonic() - began)


def stage(name: str) -> list[str]:
    """The instructions of a stage of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    (found,) = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)
    return found.strip().splitlines()


def entrypoint(name: str) -> list[str]:
    (line,) = (line for line in stage(name) if line.startswith("ENTRYPOINT "))
    return yaml.safe_load(line.removeprefix("ENTRYPOINT "))


def image_environment(name: str) -> dict[str, str]:
    lines = (line.removeprefix("ENV ") for line in stage(name) if line.startswith("ENV "))
    return dict(pair.split("=", 1) for line in lines for pair in line.split())
