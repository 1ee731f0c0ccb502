"""How the processes of a job meet and part: torchrun's rendezvous, and an end without hangs and aborts.

`torchrun --nproc_per_node=N script.py` starts them; several machines add torchrun's own options (`--nnodes`,
`--rdzv-backend c10d --rdzv-endpoint HOST:PORT`), and `--max-restarts` starts all of them again after a failure.
"""

import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from erv_min.errors import ErvMinError


def join(backend: str, timeout_minutes: float = 60) -> None:
    """Joins the process group that torchrun describes.

    torchrun's own store outlives a restart (--max-restarts) and with it the addresses of processes that are gone
    (pytorch#135712), so each restart meets under a name of its own. Where several machines count their restarts apart,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each of them makes torchrun give every restart a new store.
    """
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                            timeout=datetime.timedelta(minutes=timeout_minutes))


def leave() -> None:
    """Ends this process, one of several that are through. Alone it does nothing.

    The interpreter is not shut down: a gloo thread that lets go of a tensor meanwhile would ask for the interpreter,
    which aborts the process (pytorch#190489).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _exit(0)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and ends its process: one line for a named error, a traceback for another, status 1.

    Where processes work together, one that fails goes at once: its shutdown would wait for collectives that the others
    never finish. These then fail as well, and wait for torchrun to end them, so that it names the one that began.
    """
    try:
        main()
        leave()
    except (Exception, SystemExit) as error:
        if isinstance(error, ErvMinError):
            error = SystemExit(f"{type(error).__name__}: {error}")
        if not dist.is_initialized():
            raise error
        if isinstance(error, SystemExit):
            if not isinstance(error.code, str):
                _exit(error.code or 0)
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(error)
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            print("another process of this job ended: its error stands above, or is the system's", file=sys.stderr)
            time.sleep(10)
        _exit(1)
