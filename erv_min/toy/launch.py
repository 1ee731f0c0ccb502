"""Starts the processes of stages and waits for them, as torchrun does: `python -m erv_min.toy.launch JSON`.

Nothing here imports PyTorch, which takes 0.2 GB in each process (0.4 with CUDA): `become` frees it where a process does
nothing any more but wait.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from erv_min.base.errors import STOPPED

# What torchrun tells a process of its group; the last one: the store is not torchrun's own.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
SECONDS: list[tuple[str, float]] = []  # what `run` has taken for which stage


def run(*commands: list[str], processes: int = 1) -> None:
    """Runs `torchrun --nproc_per_node=PROCESSES COMMAND`, or `python COMMAND` if it is one process, for each command,
    side by side, one thread per process, and waits for all.

    (Without torchrun itself, which is a big process more, and would not hand on the status STOPPED.)
    SIGTERM and Ctrl-C are handed on, and a process that fails ends the others. Raises SystemExit: STOPPED after a
    signal and if one of them stopped in order, else naming the command that failed.
    """
    started, jobs, signals = time.time(), [], []

    def hand_on(number: int, _) -> None:
        signals.append(number)
        for process in jobs:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    alone = {name: value for name, value in os.environ.items() if name not in GROUP} | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        print("$", f"torchrun --nproc_per_node={processes}" if processes > 1 else "python", *command, flush=True)
        with socket.socket() as free:  # should another program take it meanwhile, the first process fails, and so all
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in map(str, range(processes)):
            group = dict(zip(GROUP, (rank, rank, str(processes), "127.0.0.1", port, "False")))
            jobs.append(subprocess.Popen([sys.executable, *command], env=alone | group if processes > 1 else alone))
    while not any(status := [process.poll() for process in jobs]) and None in status:
        time.sleep(0.1)
    for process in jobs:
        process.terminate()  # does nothing to one that has ended
    ended = [process.wait() for process in jobs]
    for number, handler in before.items():
        signal.signal(number, handler)
    failed = [job for job, code in zip(jobs, status) if code and code != STOPPED]
    if failed and not signals:
        raise SystemExit(f"'{' '.join(failed[0].args)}' ended with status {failed[0].returncode}: its "
                         "message stands above")
    if signals or any(ended):
        raise SystemExit(STOPPED)
    SECONDS.append(("world" if command[0] == "-m" else Path(command[0]).stem, time.time() - started))


def become(*stages: tuple[list[list[str]], int]) -> None:
    """Replaces this process by one that runs its last stages, (commands, processes) one after the other, and prints
    what each took. Locks of this process are let go: the commands take the folder."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "erv_min.toy.launch", json.dumps([stages, SECONDS])])


if __name__ == "__main__":
    stages, SECONDS = json.loads(sys.argv[1])
    for commands, processes in stages:
        run(*commands, processes=processes)
    print("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in SECONDS)
          + f"; {sum(seconds for _, seconds in SECONDS) / 60:.1f} minutes in all")
