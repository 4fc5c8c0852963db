"""Speed of ChaCha20 against JAX's threefry: ``python benchmarks/bench_chacha.py``.

Each row is a request. Both generators serve it, jitted, in turns (so a change in the load of the
machine affects both), and the table shows the medians.
"""

import argparse
import secrets
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from _options import count
from jax import Array, lax

from selcrypt_jax import chacha20_key


def bits(words: int) -> Callable[[Array], Array]:
    """One request for ``words`` uint32."""
    return lambda key: jax.random.bits(key, (words,), jnp.uint32)


def batched(keys: int, words: int, batch_size: int | None = None) -> Callable[[Array], Array]:
    """``words`` uint32 from each of ``keys`` children, by vmap or by lax.map over batches."""
    if batch_size is None:
        return lambda key: jax.vmap(bits(words))(jax.random.split(key, keys))
    return lambda key: lax.map(bits(words), jax.random.split(key, keys), batch_size=batch_size)


def requests(scale: int) -> dict[str, tuple[int, Callable[[Array], Array]]]:
    """The rows of the table: the number of words, and a function of a key that makes them."""
    large, keys = 2**24 // scale, 4096 // scale
    rows = {f"{words} words": (words, bits(words)) for words in (2**10, 2**16, 2**20, large)}
    for name, size in (("vmap", None), ("map, batches of 64", 64), ("map, 1024", 1024)):
        rows[f"{keys} keys × 1024 ({name})"] = (keys * 1024, batched(keys, 1024, size))
    return rows


def medians(functions: list[Callable[[], Array]], repeats: int) -> list[float]:
    """The median seconds of each function; they run in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function().block_until_ready()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=count, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--scale", type=count, default=1, help="divide the large sizes by this")
    args = parser.parse_args()
    keys = [chacha20_key(secrets.token_bytes(32)), jax.random.key(0, impl="threefry2x32")]
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), {len(jax.devices())} device(s)")
    print(f"{'request':<36} {'ChaCha20':>21} {'threefry':>11}  ratio  compile")
    for name, (words, function) in requests(args.scale).items():
        start = time.perf_counter()
        compiled = [jax.jit(function).lower(keys[0]).compile()]
        compile_time = time.perf_counter() - start
        compiled.append(jax.jit(function).lower(keys[1]).compile())
        runs = [lambda run=run, key=key: run(key) for run, key in zip(compiled, keys, strict=True)]
        medians(runs, 1)  # warm up
        ours, theirs = medians(runs, args.repeats)
        print(
            f"{name:<36} {4e-9 * words / ours:6.3f} GB/s {1e9 * ours / words:7.2f} ns/w "
            f"{4e-9 * words / theirs:6.3f} GB/s  {theirs / ours:5.2f}  {compile_time:5.2f} s"
        )


if __name__ == "__main__":
    main()
