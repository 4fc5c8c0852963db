"""Times contenders in turns, and measures first calls and peak memory in separate processes."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from _rows import Options, Row

FIRST_CALL = "first call"


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """A function to measure. Creating one must cost nothing: `prepare` makes its data.

    Attributes:
        name: its name in the table.
        run: the timed function; it gets the value that `prepare` returned, and may use it up.
        prepare: makes the input of one run.
        size: bytes of the model or of the output; 0 where GB/s would be meaningless.
        check: gets the result of a run, and raises if it is wrong.
        compiled: whether the first call, which compiles, gets its own row.
        warm_ups: runs before everything is compiled.
        missing: why it cannot run.
    """

    name: str
    run: Callable[[Any], Any] = _nothing
    prepare: Callable[[], Any] = _nothing
    size: Callable[[], int] = lambda: 0
    check: Callable[[Any], None] = _nothing
    compiled: bool = True
    warm_ups: int = 1
    missing: str = ""

    def ready(self) -> Any:
        """The input of one run, fully computed."""
        return jax.block_until_ready(self.prepare())

    def seconds(self) -> float:
        """Seconds of one run."""
        data = self.ready()
        start = time.perf_counter()
        result = jax.block_until_ready(self.run(data))
        end = time.perf_counter()
        del result
        return end - start


Build = Callable[..., Sequence[Contender]]


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process and waits for it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _peak_bytes(contender: Contender) -> int | None:
    """The peak memory of a run above the memory held before; None if this is not Linux."""
    data = contender.ready()
    gc.collect()
    try:
        # Freed memory that is kept for reuse would hide the memory that the run needs.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from here
        before = _status_bytes("VmRSS")
        jax.block_until_ready(contender.run(data))
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def _alone(build: Build, arguments: Sequence[Any], name: str) -> tuple[float, int | None]:
    """Seconds of a first call, and the peak of a later call; nothing else ran in this process."""
    (contender,) = (found for found in build(*arguments) if found.name == name)
    contender.ready()
    jax.clear_caches()  # the same functions may have made its input
    first = contender.seconds()
    for _ in range(contender.warm_ups - 1):
        contender.seconds()
    return first, _peak_bytes(contender)


def first_calls(
    section: str, case: str, build: Build, arguments: Sequence[Any], *, options: Options
) -> tuple[list[Row], Mapping[str, int | None]]:
    """Runs every contender in its own process; with ``--quick`` only the first one.

    Returns:
        Rows of the first calls of contenders that compile; name → peak of a later call in bytes.
    """
    rows, peaks = [], {}
    present = [contender for contender in build(*arguments) if not contender.missing]
    for contender in present[:1] if options.quick else present:
        seconds, peaks[contender.name] = in_process(_alone, build, arguments, contender.name)
        if contender.compiled:
            first = 1e3 * seconds
            name = f"{contender.name}: {FIRST_CALL}"
            rows.append(Row(section, case, name, median_ms=first, minimum_ms=first, runs=1))
    return rows, peaks


def measure(
    section: str,
    case: str,
    build: Build,
    *arguments: Any,
    baseline: str,
    options: Options,
) -> list[Row]:
    """Measures all contenders that ``build(*arguments)`` returns.

    Args:
        section: the section of the rows.
        case: the case of the rows.
        build: a module-level function, so that other processes can call it too.
        arguments: the arguments of `build`; they must be picklable.
        baseline: the contender that ratios are relative to.
        options: how many runs.

    Returns:
        One row per contender, in order; then the rows of the first calls.
    """
    # Before this process allocates anything: together they may exceed the memory.
    firsts, peaks = first_calls(section, case, build, arguments, options=options)
    contenders = build(*arguments)
    times: dict[str, list[float]] = {c.name: [] for c in contenders if not c.missing}
    present = [contender for contender in contenders if contender.name in times]
    for contender in present:
        contender.check(jax.block_until_ready(contender.run(contender.ready())))
        for _ in range(contender.warm_ups - 1):
            contender.seconds()
    for _ in range(options.repeats):
        for contender in present:
            times[contender.name].append(contender.seconds())
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for contender in contenders:
        name = contender.name
        if contender.missing:
            rows.append(Row(section, case, name, note=contender.missing))
            continue
        size, peak = contender.size(), peaks.get(name)
        rows.append(
            Row(
                section,
                case,
                name,
                median_ms=1e3 * medians[name],
                minimum_ms=1e3 * min(times[name]),
                ratio=medians[name] / medians[baseline],
                gb_per_s=1e-9 * size / medians[name] if size else None,
                peak_mb=None if peak is None else 1e-6 * peak,
                runs=options.repeats,
            )
        )
    jax.clear_caches()  # programs hold masks
    return rows + firsts
