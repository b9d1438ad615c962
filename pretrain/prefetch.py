"""Work ahead on a thread: training takes batches that are ready, and knows how long it waited when they were not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

from data_prep.cli import Hung, StopRequested, log

Item = TypeVar("Item")
REPORT_SECONDS = 30.0  # of waiting, after which the log says what for
CLOSE_SECONDS = 5.0


class Prefetch(Generic[Item]):
    """Takes items from an iterator on a daemon thread, up to `depth` ahead. Iterating ends where the iterator ends.

    Args:
        items: runs on the thread alone.
        depth: items that wait ready.
        stall_seconds: a wait of this length ends in an error.
        doing: what the thread is doing at the moment, for messages, such as the file that it reads.
        stop: whether to give up waiting, asked every second.

    `waited`: seconds for which `next` had to wait since it was last set to 0.
    """

    def __init__(
        self,
        items: Iterator[Item],
        depth: int,
        stall_seconds: float,
        doing: Callable[[], str],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.waited = 0.0
        self._stall_seconds, self._doing, self._stop = stall_seconds, doing, stop
        self._ready: Queue[tuple[Item | None, BaseException | None]] = Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """The next item, or what the iterator raised in its place.

        Raises Hung after `stall_seconds` of waiting, StopRequested where it was told to stop while there was no item.
        """
        started = time.monotonic()
        item, error = self._wait(started)
        self.waited += time.monotonic() - started
        if error is not None:
            raise error
        return item  # type: ignore[return-value]  # an item of type Item, as there was no error

    def _wait(self, started: float) -> tuple[Item | None, BaseException | None]:
        reported = started
        while True:
            now = time.monotonic()
            left = self._stall_seconds - (now - started)
            if left <= 0:
                raise Hung(f"no data for {self._stall_seconds:.0f} s (data.stall_seconds): {self._doing()}")
            if now - reported >= REPORT_SECONDS:
                log(f"training has been waiting for data for {now - started:.0f} s: {self._doing()}")
                reported = now
            try:
                return self._ready.get(timeout=min(left, 1.0))
            except Empty:
                if self._stop():
                    raise StopRequested("told to stop while waiting for data") from None

    def _fill(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        """Wait for room; False when nobody wants the item any more."""
        while not self._closed.is_set():
            try:
                self._ready.put((item, error), timeout=1.0)
                return True
            except Full:
                continue
        return False

    def close(self) -> None:
        """End the thread, unless it is stuck in a read: such a one is left behind after some seconds.

        Without it the interpreter might end while the thread is inside torch, which aborts the process.
        """
        self._closed.set()
        with suppress(Empty):
            while True:
                self._ready.get_nowait()  # room for what it may be waiting to put
        self._thread.join(CLOSE_SECONDS)
