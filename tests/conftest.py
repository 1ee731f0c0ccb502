"""Shared by all tests: where the golden vectors lie, and one thread a process (the machine has two cores)."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """train.Run takes SIGTERM for itself; what a test leaves behind must not make pytest deaf to it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
