"""Run a function on all cores, with results in order and bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_HELD = 1 << 27  # bytes

Given = TypeVar("Given")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Given], Result],
    items: Iterable[Given],
    size: Callable[[Given], int],
) -> Iterator[Result]:
    """Parallel ``map`` in threads: later items are computed while the caller uses a result.

    Args:
        function: releases the GIL while it computes, as NumPy does.
        items: drawn in the caller's thread.
        size: bytes of an item. No item is drawn while more than `_HELD` bytes are in flight, so
            large ones are held one at a time.
    """
    cores = os.cpu_count() or 1
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(cores)

    def first() -> Result:
        nonlocal held
        bytes_, job = waiting.popleft()
        held -= bytes_
        return job.result()

    try:
        for item in items:
            waiting.append((size(item), pool.submit(function, item)))
            held += waiting[-1][0]
            del item  # free it as soon as possible
            while waiting and (len(waiting) > cores or held > _HELD):
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
