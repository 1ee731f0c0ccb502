"""Starts the processes of stages and waits for them, as torchrun does: `python -m erv_min.toy.launch JSON`.

Without torchrun itself, which is a big process more, and would not hand on the status STOPPED. Nothing here imports
PyTorch, which takes 0.2 GB in each process (0.4 with CUDA): `become` frees it if a process has nothing to do but wait.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from erv_min.base.errors import STOPPED

Stage = tuple[list[list[str]], int]  # commands that run side by side, and how many processes each of them takes

# What torchrun tells a process of its group; the last one: the store is not torchrun's own.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def run(commands: list[list[str]], processes: int) -> None:
    """Runs `torchrun --nproc_per_node=PROCESSES COMMAND`, or `python COMMAND` if it is one process, for each command,
    side by side, one thread per process, and waits for all.

    SIGTERM, Ctrl-C and a process that fails end the others by SIGTERM. Raises SystemExit: STOPPED after a signal and if
    one of them stopped in order, else naming the command that failed.
    """
    jobs, signals, status = [], [], [None]
    before = {number: signal.signal(number, lambda *_: signals.append(1)) for number in (signal.SIGTERM, signal.SIGINT)}
    alone = {name: value for name, value in os.environ.items() if name not in GROUP} | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        print("$", f"torchrun --nproc_per_node={processes}" if processes > 1 else "python", *command, flush=True)
        with socket.socket() as free:  # should another program take it meanwhile, the first process fails, and so all
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in map(str, range(processes)):
            group = dict(zip(GROUP, (rank, rank, str(processes), "127.0.0.1", port, "False")))
            jobs.append(subprocess.Popen([sys.executable, *command], env=alone | group if processes > 1 else alone))
    while None in status and not any(status) and not signals:
        time.sleep(0.1)
        status = [process.poll() for process in jobs]
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


def become(before: list[Stage], locks: list[int], after: list[Stage]) -> None:
    """Replaces this process by one that runs the stages `before` and `after`. In between it closes the files `locks`,
    which it holds locked until then: the commands of `after` take their folder."""
    for lock in locks:
        os.set_inheritable(lock, True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "erv_min.toy.launch", json.dumps([before, locks, after])])


if __name__ == "__main__":
    before, locks, after = json.loads(sys.argv[1])
    for stage in before:
        run(*stage)
    for lock in locks:
        os.close(lock)
    for stage in after:
        run(*stage)
