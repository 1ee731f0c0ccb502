"""`python -m erv_min.toy FOLDER [--seed S] [--test N] ...`: renders the embedded world, trains its base model."""

import argparse
import sys
from pathlib import Path

from erv_min.run.errors import ErvMinError
from erv_min.toy.base import train_base
from erv_min.toy.chain import one_thread
from erv_min.toy.world import WorldSettings, build_world

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where clip/, annotations, tokenizers and base/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the base model's weights")
    for name, help in (("test", "held-out clips"), ("tune", "clips to tune settings on, apart from the held-out ones")):
        parser.add_argument(f"--{name}", type=int, default=getattr(WorldSettings, name), help=help)
    parser.add_argument("--exploitable", action="store_true", help="cues true of two emotions: shows reward hacking")
    parser.add_argument("--clips-only", action="store_true", help="render and annotate, train nothing")
    arguments = parser.parse_args()
    one_thread("toy")
    try:
        build_world(arguments.folder, WorldSettings(seed=arguments.seed, test=arguments.test, tune=arguments.tune,
                                                    exploitable=arguments.exploitable))
        if not arguments.clips_only and not (arguments.folder / "base" / "model.safetensors").exists():
            train_base(arguments.folder, arguments.seed)
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
