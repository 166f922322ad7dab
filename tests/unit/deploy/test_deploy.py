"""What deploy/ holds for engines that are not here: read as strictly as that can be done without them.

No image was built of the Dockerfile; tests/tracking starts the services of the compose file without images. The
manifests are in test_rendering.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
COMPOSE = (ROOT / "deploy" / "compose.yaml").read_text()
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD", "ARG", "LABEL"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, rest) of each, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def dockerfile_faults(text: str) -> list[str]:
    faults, stages, user = [], {}, {}
    stage = ""
    for name, rest in instructions(text):
        if name not in INSTRUCTIONS:
            faults.append(f"there is no instruction {name}")
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            stages[stage] = image
            if not re.search(r":[\w.-]*\d", image):
                faults.append(f"{image} has no version")
        if name == "USER":
            user[stage] = rest
        if name == "COPY":
            source = re.match(r"--from=(\S+)", rest)
            if source and source[1] not in stages:
                faults.append(f"there is no stage {source[1]}")
            for path in [] if source else rest.split()[:-1]:
                if not (ROOT / path).exists():
                    faults.append(f"{path} is not in the repository")
        if name in ("RUN",) and "pip install" in rest and "-c /constraints.txt" not in rest:
            faults.append("pip installs without the tested versions")
        if name in ("RUN",) and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            faults.append("apt's lists stay in the image")
    run = [one for one in stages if one not in ("wheel", "kubectl")]
    faults += [f"stage {one or 'last'} runs as {user.get(one, 'root')}" for one in run if user.get(one) != "1000"]
    return faults


def compose_faults(text: str) -> list[str]:
    tree = yaml.safe_load(text)
    faults = [f"unknown key {key}" for key in tree.keys() - {"services", "volumes"}]
    for name, service in tree["services"].items():
        known = {"image", "build", "restart", "environment", "volumes", "healthcheck", "depends_on", "command", "ports"}
        faults += [f"{name}: unknown key {key}" for key in service.keys() - known]
        if ("image" in service) == ("build" in service):
            faults.append(f"{name}: an image or a build")
        for volume in service.get("volumes", ()):
            if volume.split(":")[0] not in tree["volumes"]:
                faults.append(f"{name}: volume {volume} is not declared")
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy" and "healthcheck" not in tree["services"].get(other, {}):
                faults.append(f"{name}: {other} has no health check to wait for")
        for key, value in service.get("environment", {}).items():
            if re.search("password", key, re.I) and not re.fullmatch(r"\$\{\w+:\?.+\}", value):
                faults.append(f"{name}: {key} is written in the file")
        for port in service.get("ports", ()):
            if not str(port).startswith("127.0.0.1:"):
                faults.append(f"{name}: port {port} is open to everybody")
        if "build" in service and f"AS {service['build']['target']}\n" not in DOCKERFILE:
            faults.append(f"{name}: the Dockerfile has no stage {service['build']['target']}")
    return faults


def test_the_dockerfile_has_no_fault_that_can_be_read():
    assert dockerfile_faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 1000\nWORKDIR", "WORKDIR", "stage last runs as root"),
        ("COPY models models", "COPY weights weights", "weights is not in the repository"),
        ("--from=wheel", "--from=whell", "there is no stage whell"),
        (":13.0.1-base-ubuntu24.04", ":latest", "nvidia/cuda:latest has no version"),
        ("RUN pip install --no-cache-dir -c /constraints.txt \"$", 'RUN pip install "$', "without the tested versions"),
        (" && rm -rf /var/lib/apt/lists/* \\\n", "", "apt's lists stay in the image"),
        ("WORKDIR /source", "WORKDIRR /source", "there is no instruction WORKDIRR"),
    ],
)  # fmt: skip
def test_a_broken_dockerfile_is_refused(old, new, fault):
    assert old in DOCKERFILE
    assert any(fault in one for one in dockerfile_faults(DOCKERFILE.replace(old, new)))


def test_the_compose_file_has_no_fault_that_can_be_read():
    assert compose_faults(COMPOSE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("${POSTGRES_PASSWORD:?set it in deploy/.env}\n", "secret\n", "POSTGRES_PASSWORD is written in the file"),
        ("127.0.0.1:5000:5000", "5000:5000", "open to everybody"),
        ("target: mlflow", "target: mlflaw", "no stage mlflaw"),
        ("  artifacts: {}", "", "volume artifacts:/artifacts is not declared"),
        ("healthcheck:\n      test: [CMD, pg_isready", "healthchek:\n      test: [CMD, pg_isready", "unknown key"),
    ],
)
def test_a_broken_compose_file_is_refused(old, new, fault):
    assert old in COMPOSE
    assert any(fault in one for one in compose_faults(COMPOSE.replace(old, new, 1)))


def test_the_server_takes_every_option_that_it_is_given():
    import mlflow.cli  # seconds, which only the process of this test has to take

    server = mlflow.cli.server
    known = {option for parameter in server.params for option in parameter.opts}
    compose = yaml.safe_load(COMPOSE)["services"]["mlflow"]["command"]
    (kubernetes, _) = yaml.safe_load_all((ROOT / "deploy/kubernetes/mlflow.yaml").read_text())
    given = [*compose, *kubernetes["spec"]["template"]["spec"]["containers"][0]["args"]]
    given += [word for name, rest in instructions(DOCKERFILE) if name == "ENTRYPOINT" for word in yaml.safe_load(rest)]
    options = {word.partition("=")[0] for word in given if word.startswith("--")}
    assert options and options <= known


def test_what_a_tick_in_a_pod_names_by_relative_paths_outlives_the_pod():
    pod = yaml.safe_load((ROOT / "deploy/kubernetes/retrain.yaml").read_text())
    pod = pod["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    claimed = {one["name"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
    kept = [Path(one["mountPath"]) for one in container["volumeMounts"] if one["name"] in claimed]
    assert any(Path(container["workingDir"]).is_relative_to(one) for one in kept)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_puts_the_cluster_objects_together():
    done = subprocess.run(["kubectl", "kustomize", str(ROOT / "deploy/kubernetes")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert {one["kind"] for one in documents} >= {
        "CronJob",
        "Deployment",
        "LocalQueue",
        "PersistentVolumeClaim",
        "Role",
    }
    images = {
        container["image"]
        for one in documents
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    assert images == {"registry.example/controlbooth-mlflow:0.1.0"}
