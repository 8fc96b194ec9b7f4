import pytest

from .pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Runs jobs on up to four processes; see `pool.py`."""
    workers = Pool()
    yield workers
    workers.close()
