"""Work on all cores, with results in order and few of them held at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def ahead(function: Callable[[Given], Result], items: Iterable[Given]) -> Iterator[Result]:
    """``map`` in threads that work on the next items while a result is used.

    Args:
        function: that leaves Python's lock to others while it works, as NumPy does.
        items: drawn in the caller's thread.
    """
    cores = os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(cores)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
