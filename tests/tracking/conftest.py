import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/, and subjects.yaml; runs go to runs/."""
    import studios
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    studios.write_subjects(folder)
    return folder


@pytest.fixture(scope="session")
def client(stack):
    """Of the server, for whoever looks at what has arrived; it may still be busy."""
    from mlflow import MlflowClient

    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"
    return MlflowClient(stack.uri)


TOLD: list[str] = []


@pytest.fixture(scope="session")
def tell():
    """Keeps a line that is printed at the end, whether or not the tests have passed."""
    return TOLD.append


def pytest_terminal_summary(terminalreporter) -> None:
    for line in TOLD:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def stack(tell):
    """PostgreSQL and MLflow's server, started as deploy/compose.yaml says."""
    from stack import Stack, why_not

    if missing := why_not():
        pytest.skip(missing)
    with Stack() as services:
        tell(services.described())
        yield services
