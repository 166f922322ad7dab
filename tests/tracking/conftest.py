import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("unit", "distributed"))]  # stores.py, tiny.py


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
