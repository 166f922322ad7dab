import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("unit", "distributed"))]  # stores.py, tiny.py


@pytest.fixture(scope="session")
def stack():
    """PostgreSQL and MLflow's server, started as deploy/compose.yaml says."""
    from stack import Stack, why_not

    if missing := why_not():
        pytest.skip(missing)
    with Stack() as services:
        yield services
