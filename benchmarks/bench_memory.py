"""Peak memory of protect, verify and unlock: ``python benchmarks/bench_memory.py``.

Each runs in its own process on a checkpoint of 40 dense tensors, 2 GiB in all. The limit is the
size of the checkpoint plus 1 GB. How far below it a command stays depends on the largest tensor,
because all commands work tensor by tensor. ``--tensors 1 --size 1`` shows the cost of a single
large one.
Files go to a temporary folder, which needs three times the size.
"""

import argparse
import filecmp
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _options import count

# Do not import the package here: every process should load only the code its command needs.

SECRET = bytes(range(32))
SIGNING = bytes(32)
COLUMNS = 4096
BLOCK = 1_000_003  # a prime, so that no two rows are alike
GIB = 1 << 30
BAR = 1_000_000_000


def make(path: Path, size: float, tensors: int) -> None:
    """Writes a checkpoint of random weights, one tensor at a time."""
    rows = math.ceil(size * GIB / tensors / COLUMNS / 4)
    size = rows * COLUMNS * 4
    head = {
        f"layer{i:03}.weight": {
            "dtype": "F32",
            "shape": [rows, COLUMNS],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    head = {"__metadata__": {"format": "pt"}, **head}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the stock library writes it
    block = np.random.default_rng(0).standard_normal(BLOCK).astype("<f4")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number in range(tensors):
            piece = np.roll(block, 7919 * number)
            for start in range(0, rows * COLUMNS, BLOCK):
                file.write(piece[: rows * COLUMNS - start].data)


def nothing() -> None:
    """The memory of Python and NumPy alone."""


def protect(original: Path, public: Path, fractions: list[float]) -> None:
    """Protects with the command's defaults."""
    from selcrypt_jax import Secret, Select, SigningKey, protect_file

    protect_file(
        original,
        public,
        secret=Secret(SECRET),
        levels=fractions,
        selection=Select(granularity="kernel", importance="l2"),
        signing=SigningKey(SIGNING),
    )


def verify(public: Path) -> None:
    """Checks signature and digests, without a grant."""
    from selcrypt_jax import verify_file

    verify_file(public)


def unlock(public: Path, output: Path, levels: int) -> None:
    """Unlocks at the top level."""
    from selcrypt_jax import Grant, Secret, SigningKey, inspect_file, level_key, unlock_file

    model_id = bytes.fromhex(inspect_file(public).model_id)
    key = level_key(Secret(SECRET), model_id, level=levels, levels=levels)
    unlock_file(public, output, Grant(key, SigningKey(SIGNING).public))


def rotate(public: Path, output: Path) -> None:
    """Gives the file new keys."""
    from selcrypt_jax import Secret, SigningKey, rotate_file

    rotate_file(public, output, secret=Secret(SECRET), signing=SigningKey(SIGNING))


def peak_bytes() -> int:
    """The peak memory of this process."""
    try:
        # Preferred over getrusage, which on Linux includes the parent's peak.
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def timed(function: Callable[..., None], args: tuple[Any, ...]) -> tuple[float, int]:
    """Runs in the child: returns seconds, and its peak in bytes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start, peak_bytes()


def main() -> None:
    """Prints the table; exits with status 1 if a command is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2.0, help="GiB")
    parser.add_argument("--tensors", type=count, default=40, help="number of tensors (default: 40)")
    parser.add_argument("--ratio", type=float, default=0.08, help="share to encrypt")
    parser.add_argument("--levels", type=count, default=5, help="number of levels (default: 5)")
    parser.add_argument("--dir", type=Path, help="folder for the files; default: TMPDIR")
    args = parser.parse_args()
    fractions = [args.ratio * (m + 1) / args.levels for m in range(args.levels)]
    with tempfile.TemporaryDirectory(prefix="bench_memory", dir=args.dir) as name:
        folder = Path(name)
        original, public = folder / "original.safetensors", folder / "public.safetensors"
        output = folder / "output.safetensors"
        make(original, args.size, args.tensors)
        size = original.stat().st_size
        print(f"{args.tensors} tensors of float32, {args.ratio:.0%} in {args.levels} levels")
        print(f"original {size / 1e6:,.0f} MB, limit {(size + BAR) / 1e6:,.0f} MB\n")
        print(f"{'process':<10} {'peak':>10} {'to the file':>12} {'time':>9}")
        jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (nothing, ()),
            (protect, (original, public, fractions)),
            (verify, (public,)),
            (unlock, (public, output, args.levels)),
            (rotate, (public, output)),
        ]
        above = False
        for function, arguments in jobs:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                seconds, peak = pool.submit(timed, function, arguments).result()
            above |= peak > size + BAR
            print(
                f"{function.__name__:<10} {peak / 1e6:7,.0f} MB {peak / size:12.2f} "
                f"{seconds:7.1f} s",
                flush=True,
            )
            if function is unlock:
                if not filecmp.cmp(original, output, shallow=False):
                    raise SystemExit("unlock: the output differs from the original.")
                output.unlink()
        grown = public.stat().st_size - size
        print(f"\nprotected file: {grown:+,} bytes ({grown / size:+.3%}); unlocked: identical")
    if above:
        raise SystemExit("above the limit")


if __name__ == "__main__":
    main()
