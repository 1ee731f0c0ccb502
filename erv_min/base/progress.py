"""What a command says while it works: whole lines, on a terminal as in a log file, so that no half of one is left
behind an answer or an error."""

import datetime
import os
import sys
import threading
import time

EVERY = 10.0  # seconds
RUNNING: list["Progress"] = []  # the last of them, the innermost, speaks


class Progress:
    """A line on standard error for every ten seconds that the work inside takes, from the first process of a job:

        with Progress("predictions", len(clips), "clip") as progress:
            for clip in clips:
                ...
                progress.add()

    Shorter work says nothing. `total` 0: it cannot be counted; `first`: what was done before this start. A thread
    speaks, so that a line comes in the midst of a long operation, too.
    """

    def __init__(self, what: str, total: int = 0, unit: str = ""):
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, 0, 0
        self.started = self.last = time.time()  # last: when a line was shown
        self.over, self.thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def start(self) -> "Progress":
        self.started = self.last = time.time()
        RUNNING.append(self)
        if os.environ.get("RANK", "0") == "0":
            self.thread.start()
        return self

    def stop(self, *_) -> None:
        """Nothing is said after this."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        if self in RUNNING:
            RUNNING.remove(self)

    __enter__, __exit__ = start, stop

    def add(self) -> None:
        self.done += 1

    def pace(self) -> str:
        """"2.5 steps/s, 0:00:14 left"; "3.1 s/step, ..." if one takes longer than a second; "" before the first."""
        made, seconds = self.done - self.first, max(time.time() - self.started, 1e-6)
        if not made:
            return ""
        rate = f"{seconds / made:.1f} s/{self.unit}" if seconds > made else f"{made / seconds:.1f} {self.unit}s/s"
        return f"{rate}, {datetime.timedelta(seconds=round(seconds / made * (self.total - self.done)))} left"

    def __str__(self) -> str:
        counted = f"{self.done}/{self.total} {self.unit}s" if self.total else ""
        since = f"{datetime.timedelta(seconds=round(time.time() - self.started))} so far"
        return f"{self.what}: " + ", ".join(filter(None, (counted, since, self.pace())))

    def _watch(self) -> None:
        while not self.over.wait(max(0.0, self.last + EVERY - time.time())):
            if time.time() >= self.last + EVERY:  # no other line was shown in the meantime
                self.last = time.time()
                if RUNNING[-1:] == [self]:
                    print(self, file=sys.stderr, flush=True)


def silence() -> None:
    """Ends all lines to come: what follows is an error."""
    for progress in [*RUNNING]:
        progress.stop()
