"""Fetching remote shards before their lanes reach them: what to fetch is a function of the step, when is a matter of
threads. Nothing that a step holds depends on it."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.storage import RemoteShard, Shard

FETCH_THREADS = 4
_log = logging.getLogger(__name__)


def upcoming_shards(
    blocks: Sequence[tuple[int, list[int]]], shard_bytes: Sequence[int] | np.ndarray, budget_bytes: int
) -> list[int]:
    """Lists the shards to have, the most urgent first, and ends before the one that would exceed budget_bytes.

    blocks: (when, shards), as `Mixture.upcoming_blocks` gives them.
    """
    chosen: dict[int, None] = {}
    for _, shards in sorted(blocks, key=lambda block: block[0]):
        for shard in shards:
            if shard in chosen:
                continue
            budget_bytes -= int(shard_bytes[shard])
            if budget_bytes < 0:
                return list(chosen)
            chosen[shard] = None
    return list(chosen)


class Prefetcher:
    """Threads that fetch what the plan of the latest step names into the cache."""

    def __init__(self, shards: Sequence[Shard], cache: Cache, plan: Callable[[int], list[int]], step: int):
        """Starts the threads.

        plan: step -> numbers of shards, the most urgent one first; called in one of the threads.
        """
        self.shards, self.cache, self.plan = shards, cache, plan
        self.closing = threading.Event()
        self._step, self._planned = step, step - 1
        self._open: deque[int] = deque()
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        # Daemons: a program that fails before it closes its loader must still end, and the cache bears being cut off.
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True) for i in range(FETCH_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def follow(self, step: int) -> None:
        """Says that work on this step begins. Returns at once."""
        with self._changed:
            self._step = step
            self._changed.notify()

    def close(self) -> None:
        """Ends the threads, each after the chunk that it reads."""
        self.closing.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (number := self._take()) is not None:
            try:
                shard = self.shards[number]
                assert isinstance(shard, RemoteShard)
                self.cache.prefetch(shard, self.closing)
            except (OSError, ValueError) as error:
                # Not the run's error yet: whoever needs the shard tries again, and raises it with the position.
                if not self.closing.is_set():
                    _log.warning("fetching ahead failed: %s", error)
            finally:
                with self._changed:
                    self._busy.discard(number)

    def _take(self) -> int | None:
        with self._changed:
            while not self.closing.is_set():
                if self._planned != self._step:
                    self._planned = self._step
                    self._open = deque(n for n in self.plan(self._step) if n not in self._busy and self._lacks(n))
                    self._changed.notify_all()
                if self._open:
                    number = self._open.popleft()
                    self._busy.add(number)
                    return number
                self._changed.wait()
        return None

    def _lacks(self, number: int) -> bool:
        shard = self.shards[number]
        return isinstance(shard, RemoteShard) and not self.cache.holds(shard)
