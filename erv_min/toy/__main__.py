"""`python -m erv_min.toy FOLDER [--seed S]`: renders the embedded world into FOLDER and trains its towers."""

import argparse
import sys
from pathlib import Path

from erv_min.errors import ErvMinError
from erv_min.toy.towers import train_towers
from erv_min.toy.world import WorldSettings, build_world

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where clip/, annotations, tokenizers and towers/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the towers' weights")
    arguments = parser.parse_args()
    try:
        build_world(arguments.folder, WorldSettings(seed=arguments.seed))
        train_towers(arguments.folder, arguments.seed)
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
