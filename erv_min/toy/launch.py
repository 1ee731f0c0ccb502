"""Starts the processes of a stage and waits for them, as torchrun does: `python -m erv_min.toy.launch JSON`.

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

SECONDS: list[tuple[str, float]] = []  # what `run` has taken for which stage


def run(command: list[str], processes: int = 1) -> None:
    """Runs `torchrun --nproc_per_node=PROCESSES COMMAND`, one thread per process, and waits for it.

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
    print("$ torchrun", *([f"--nproc_per_node={processes}"] if processes > 1 else []), *command, flush=True)
    with socket.socket() as free:  # should another program take it meanwhile, the first process fails, and so all
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in map(str, range(processes)):
        jobs.append(subprocess.Popen([sys.executable, *command], env=os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False", "OMP_NUM_THREADS": "1"}))
    while not any(status := [process.poll() for process in jobs]) and None in status:
        time.sleep(0.1)
    for process in jobs:
        process.terminate()  # does nothing to one that has ended
    ended = [process.wait() for process in jobs]
    for number, handler in before.items():
        signal.signal(number, handler)
    failed = [code for code in status if code and code != STOPPED]
    if failed and not signals:
        raise SystemExit(f"'torchrun {' '.join(command)}' ended with status {failed[0]}: its message stands above")
    if signals or any(ended):
        raise SystemExit(STOPPED)
    SECONDS.append(("world" if command[0] == "-m" else Path(command[0]).stem, time.time() - started))


def become(command: list[str], processes: int) -> None:
    """Replaces this process by one that runs `command`, its last stage, and prints what each stage took. Locks of this
    process are let go: the command takes the folder."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "erv_min.toy.launch", json.dumps([command, processes, SECONDS])])


if __name__ == "__main__":
    command, processes, SECONDS = json.loads(sys.argv[1])
    run(command, processes)
    print("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in SECONDS)
          + f"; {sum(seconds for _, seconds in SECONDS) / 60:.1f} minutes in all")
