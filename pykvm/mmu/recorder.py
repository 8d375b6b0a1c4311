"""`--mmu FILE`: takes snapshots of a running VM at given times and writes them as a page."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm.mmu import page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pykvm.mmu.snapshot import Snapshot

# What `pykvm exec --mmu` hands to the process it becomes.
FILE, TIMES = "PYKVM_MMU", "PYKVM_MMU_AT"
_POLL_SECONDS = 0.02


def parse_times(text: str) -> tuple[float, ...]:
    """Return the one or two numbers in "5" or "5,20", in seconds.

    Errors:
        ValueError  there are others, or they do not rise
    """
    times = tuple(float(part) for part in text.split(","))
    if len(times) > 2 or list(times) != sorted(set(times)) or not 0 <= times[0] <= times[-1] < float("inf"):
        raise ValueError(f"{text}: one number of seconds, or two that rise")
    return times


class Recorder:
    """Snapshots of one VM at `times`, seconds after its first vCPU was there, as a page in a file.

    With two times the page shows what changed between them; `finish` makes the end of the run the last one.
    """

    def __init__(
        self, take: Callable[[], Snapshot | None], path: str, times: Sequence[float] = (), title: str = ""
    ) -> None:
        """`take` returns a snapshot, None as long as there is nothing to see."""
        self._take = take
        self._path = Path(path).absolute()
        self._times = tuple(times)
        self._title = title
        self._stop = threading.Event()
        self._taken: list[Snapshot] = []
        # How many snapshots make the page, when nobody calls finish() first.
        self._wanted = 2
        self._thread = threading.Thread(target=self._record, name="pykvm-mmu", daemon=True)

    def start(self, *, to_the_end: bool) -> None:
        """Begin; to_the_end: the last moment is that of `finish`, unless there are two times."""
        if not to_the_end:
            self._wanted = len(self._times)
        self._thread.start()

    def _record(self) -> None:
        # In somebody else's process signals are for its own threads; and an import of this in its main
        # thread would install a handler for SIGINT.
        import signal  # noqa: PLC0415

        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self._take() is None:
            if self._stop.wait(_POLL_SECONDS):
                return
        start = time.monotonic()
        for at in self._times:
            if self._stop.wait(max(start + at - time.monotonic(), 0)):
                return
            if (taken := self._take()) is not None:
                self._taken.append(taken)
        if len(self._taken) == self._wanted:
            self._write()

    def finish(self) -> None:
        """Take the last snapshot, if it has not been taken, and write the page."""
        self._stop.set()
        self._thread.join()
        if len(self._taken) < 2 and (taken := self._take()) is not None:
            self._taken.append(taken)
            self._write()

    def _write(self) -> None:
        *before, after = self._taken
        text = page.html(after, before[0] if before else None, self._title)
        # Whoever waits for the file finds all of it.
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self._path)
        except OSError as error:
            print(f"pykvm: {self._path}: {error.strerror}", file=sys.stderr)


def from_environment(take: Callable[[], Snapshot | None], environment: Mapping[str, str]) -> Recorder | None:
    """Start what `pykvm exec --mmu` asked for; None when it did not."""
    path = environment.get(FILE)
    if not path:
        return None
    title = Path("/proc/self/exe").readlink().name
    recorder = Recorder(take, path, parse_times(environment.get(TIMES, "")), title)
    recorder.start(to_the_end=False)
    return recorder
