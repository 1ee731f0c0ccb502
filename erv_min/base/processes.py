"""The processes of a job: how they meet (torchrun's rendezvous), reduce and gather, and part without hangs and aborts.

`torchrun --nproc_per_node=N script.py` starts them; several machines add torchrun's own options (`--nnodes`,
`--rdzv-backend c10d --rdzv-endpoint HOST:PORT`), and `--max-restarts` starts all of them again after a failure.
"""

import contextlib
import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from erv_min.base import progress
from erv_min.base.errors import ErvMinError, SettingsError


@dataclass(frozen=True)
class Processes:
    """This process among all: rank, number of processes, device. One process needs no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """This process's of a step's `count` prompts (or rows): every size-th. Raises SettingsError on a remainder."""
        if count % self.size:
            raise SettingsError(f"{count} prompts per step do not divide by the {self.size} processes of this job, "
                                "which need equal work: give another --batch-size or number of processes")
        return list(range(self.rank, count, self.size))

    def from_main(self, make: Callable):
        """What make() gives on the main process, on all, which must all call it; its named errors are raised on all."""
        try:
            result = make() if self.main else None
        except (ErvMinError, OSError) as error:
            result = error
        result = all_gather_object(result)[0]
        if isinstance(result, Exception):
            raise result
        return result


def join_processes(device: str = "", deterministic: bool = False) -> Processes:
    """Joins the process group that torchrun describes (nccl on CUDA, gloo on the CPU); alone without torchrun. A
    collective that waits an hour is an error."""
    exact_kernels()
    if deterministic:
        deterministic_kernels()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(f"--device {device}: this machine has no CUDA device; use --device cpu")
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        hour = datetime.timedelta(hours=1)
        store, *_ = next(rendezvous("env://", timeout=hour))
        store.set_timeout(hour)
        # torchrun's store outlives a restart (--max-restarts), and in it the addresses of processes that are gone
        # (pytorch#135712): each restart meets under a name of its own. (Several machines: scripts/README.md.)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=hour)
    barrier()  # nccl connects at the first collective only
    return Processes(rank, size, chosen)


def exact_kernels() -> None:
    """Float32 on CUDA keeps its 24 bits: by default cuDNN's convolutions have 11 (TF32), which moves the towers'
    features by about 1e-3. And no attention of cuDNN, the first choice on an H100: with a mask its gradient can be NaN
    (pytorch#196678), and it keeps a graph of each length."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def deterministic_kernels() -> None:
    """The same bits in every run on CUDA: backward passes (attention's, index_select's) add by atomics otherwise, in no
    fixed order. To be called before the first product, since cuBLAS reads its workspace from the environment."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and it takes as many kernels again
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextlib.contextmanager
def any_kernels():
    """Lifts --deterministic inside, for sampling: no forward kernel adds by atomics, but CUDA's cumsum would be refused
    (torch 2.13 and before), and the cache's index_copy_ would sort in every layer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather_object(value) -> list:
    """Each process's value, in rank order, on every process."""
    parts = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, value)
    return parts


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums of a dictionary of numbers over processes (the keys must be the same everywhere)."""
    first, *others = all_gather_object(values)
    return {key: sum((other[key] for other in others), value) for key, value in first.items()}


def gather_lists(rows: list) -> list:
    """Concatenates each process's list, in rank order, on every process."""
    return [row for part in all_gather_object(rows) for row in part]


# ---- the end of a job ------------------------------------------------------------------------------------------------

PARTED = []  # holds True once this process has left a process group


def part() -> None:
    """Ends the process group: one process may then go on alone for hours (a judge), and none is aborted for waiting."""
    if dist.is_initialized():
        barrier()
        time.sleep(0.05)  # a gloo thread may want Python's lock, which torch 2.6 holds while it waits for that thread
        dist.destroy_process_group()
        PARTED.append(True)


def leave() -> None:
    """Ends this process, one of several that are through, without the interpreter's shutdown, in which a gloo thread
    that lets go of a tensor aborts the process (pytorch#190489). Alone it does nothing."""
    part()
    if PARTED:
        _exit(0)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and ends its process: one line for a named error, a traceback for another, status 1.

    Of several processes one that fails goes at once: a shutdown would wait for collectives that the others never
    finish. These then fail as well, and wait for torchrun to end them, so that it names the one that began.
    """
    try:
        main()
        leave()
    except BaseException as error:
        progress.silence()
        if isinstance(error, BrokenPipeError):  # the reader of the output went away: `| head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error = SystemExit(1)
        elif isinstance(error, ErvMinError):
            error = SystemExit(f"{type(error).__name__}: {error}")
        elif isinstance(error, OSError) and error.filename:  # a folder that cannot be made, a file not written
            error = SystemExit(f"{error.filename}: {error.strerror}")
        elif isinstance(error, KeyboardInterrupt):
            error = SystemExit("stopped by Ctrl-C")
        if not dist.is_initialized():
            raise error
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif isinstance(error.code, str):
            print(error, file=sys.stderr)
        else:
            _exit(error.code or 0)
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            print("another process of this job ended: its error stands above, or is the system's", file=sys.stderr)
            time.sleep(10)
        _exit(1)
