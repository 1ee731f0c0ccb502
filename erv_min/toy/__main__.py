"""`python -m erv_min.toy FOLDER [--seed S] [--test N] ...`: renders the embedded world, trains its base model."""

import argparse
from pathlib import Path

from erv_min.base.processes import barrier, join_processes, run_script
from erv_min.toy.base import train_base
from erv_min.toy.chain import WEIGHTS, one_thread
from erv_min.toy.world import WorldSettings, build_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where clip/, annotations, tokenizers and base/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the base model's weights")
    for name, help in (("test", "held-out clips"), ("tune", "clips to tune settings on, apart from the held-out ones")):
        parser.add_argument(f"--{name}", type=int, default=getattr(WorldSettings, name), help=help)
    parser.add_argument("--clips-only", action="store_true", help="render and annotate, train nothing")
    settings = vars(parser.parse_args())
    if not 0 <= settings["seed"] < 2**44:
        parser.error("--seed must lie between 0 and 2^44 - 1")
    folder, clips_only = settings.pop("folder"), settings.pop("clips_only")
    one_thread("toy")
    if join_processes("cpu").main:
        build_world(folder, WorldSettings(**settings))
    barrier()
    if not clips_only and not (folder / "base" / WEIGHTS).exists():
        train_base(folder, settings["seed"])


if __name__ == "__main__":
    run_script(main)
