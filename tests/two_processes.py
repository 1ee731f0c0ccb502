"""Runs scripts one after the other as the processes of one torchrun, and keeps what each process sampled:

    torchrun --nproc_per_node=2 tests/two_processes.py RUNS.json

RUNS.json: a list of [script, command line, OUT]. Leaves OUT/calls-RANK.json, `tiny_runs.record`'s list.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_runs import record, script

from erv_min.base.processes import leave

for name, argv, out in json.loads(Path(sys.argv[1]).read_text()):
    main = script(name).main
    with pytest.MonkeyPatch.context() as patch:
        calls = record(patch, name == "grpo")
        main(argv)
    sampled = [{"sampled": call["sampled"], "noise": call["noise"].tolist()} for call in calls]
    Path(out, f"calls-{os.environ['RANK']}.json").write_text(json.dumps(sampled))
leave()
