"""Shared by all tests: where the golden vectors lie, and one thread per process (the machine has two cores)."""

import os
import signal
from pathlib import Path

import pytest

from erv_min.base import progress

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """train.folder.Run takes SIGTERM and SIGINT for itself, and tells how far it is; what a test leaves behind must
    not make pytest deaf to them, nor be told on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    progress.silence()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny world, policy and verifier, for runs of whole scripts (tiny_runs.py)."""
    import tiny_runs

    return tiny_runs.make(tmp_path_factory.mktemp("tiny"))
