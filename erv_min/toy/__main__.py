"""`python -m erv_min.toy FOLDER [--seed S] [--test N] ...`: renders the embedded world, trains its base model."""

import argparse
from pathlib import Path

from erv_min.base.processes import barrier, join_processes, run_script
from erv_min.base.weights import WEIGHTS
from erv_min.toy.base import train_base
from erv_min.toy.chain import one_thread
from erv_min.toy.world import WorldSettings, build_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where clip/, annotations, tokenizers and base/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the base model's weights")
    parser.add_argument("--test", type=int, default=WorldSettings.test, help="held-out clips")
    parser.add_argument("--tune", type=int, default=0, help="clips to tune settings on, apart from the held-out ones")
    parser.add_argument("--clips-only", action="store_true", help="render and annotate, train nothing")
    given = parser.parse_args()
    if not 0 <= given.seed < 2**44:
        parser.error("--seed must lie between 0 and 2^44 - 1")
    one_thread("toy")
    if join_processes("cpu").main:
        build_world(given.folder, WorldSettings(given.seed, test=given.test, tune=given.tune))
    barrier()
    if not given.clips_only and not (given.folder / "base" / WEIGHTS).exists():
        train_base(given.folder, given.seed)


if __name__ == "__main__":
    run_script(main)
