"""A function in threads, its results in order: to read, run, extract, measure and outline."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = min(4, os.cpu_count() or 1)


def in_threads(
    call: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], threads: int = THREADS
) -> Iterator[Any]:
    """The result of the call with each job's arguments, in order.

    Up to `threads` calls run while the next job is made; only a few jobs are in memory. Where the
    consumer stops early, calls that have not begun are dropped.
    """
    running: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(call, *job))
                while len(running) > threads + 1 or (running and running[0].done()):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
