"""Shared by all tests: where the golden vectors lie, and one thread a process (the machine has two cores)."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"
