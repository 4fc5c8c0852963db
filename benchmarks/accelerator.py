"""Checks and times the package on an accelerator: ``python benchmarks/accelerator.py --out DIR``.

In one process, in under eight minutes, and with only the package installed, it checks that every
cipher gives the bits of the CPU's NumPy engine, for each dtype, with and without jit, and over all
devices. It times `decrypt`, `unlocking`, a step of PSS, random bits, and opening a file, and
measures peak memory. It writes ``DIR/accelerator.json`` and ``DIR/accelerator.md`` after each part,
and lists the parts that failed. ``--quick`` uses small sizes; it also runs on a CPU, where it
compares XLA with NumPy.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import selcrypt_jax as sj
from selcrypt_jax._ciphers import engine_host
from selcrypt_jax.models import VGG19

SECRET, MODEL_ID = bytes(range(32)), bytes(16)
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint32")
Row = dict[str, Any]


def timed(function: Callable[[], Any], repeats: int) -> Row:
    """The first call and the median of the others, in milliseconds; takes at most half a minute."""
    times = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) <= repeats and time.perf_counter() - began < 30):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - start))
    return {"first_ms": round(times[0], 2), "median_ms": round(statistics.median(times[1:]), 3)}


def ciphers(params: Any) -> dict[str, sj.Cipher]:
    """One cipher of each exact form."""
    return {
        "lossless": sj.LosslessCipher(),
        "by group": sj.LosslessCipher("group"),
        "stream": sj.LosslessCipher(permute=False),
        "window": sj.WindowCipher.fit(params),
    }


def bits_of(tree: Any) -> list[bytes]:
    """The bytes of all leaves."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def equal_bits(quick: bool) -> Iterator[Row]:
    """Whether XLA on this device gives the same bits as NumPy on the host."""
    size = 64 if quick else 512
    for dtype in ("float32", "bfloat16") if quick else DTYPES:
        rng = np.random.default_rng(0)
        values = 20 * rng.standard_normal((size, 96, 3))
        leaf = jnp.asarray(values.astype(dtype if dtype != "uint32" else "int32")).astype(dtype)
        masks = sj.nested_masks({"w": rng.random((size, 96, 1))}, [0.2, 0.5])
        for name, cipher in ciphers({"w": leaf}).items():
            for form, good in compared(leaf, masks, cipher):
                yield {"case": f"{dtype}, {name}, {form}", "equal": good}


def compared(leaf: jax.Array, masks: Any, cipher: sj.Cipher) -> Iterator[tuple[str, bool]]:
    """Each form of a program, and whether it gives the host's bits and inverts them."""
    keys, params = sj.ring_keys(sj.level_key(SECRET, MODEL_ID, levels=2)), {"w": leaf}
    with jax.default_device(jax.devices("cpu")[0]):
        expected = bits_of(sj.encrypt({"w": np.asarray(leaf)}, masks, keys, cipher=cipher))

    def encrypted(params: Any, keys: Any) -> Any:
        return sj.encrypt(params, masks, keys, cipher=cipher)

    devices = np.array(jax.devices())
    rows = NamedSharding(Mesh(devices, ("x",)), PartitionSpec("x"))
    forms: dict[str, Callable[[], Any]] = {
        "eager": lambda: encrypted(params, keys),
        "jit": lambda: jax.jit(encrypted)(params, keys),
    }
    if len(leaf) % len(devices) == 0:
        forms["sharded"] = lambda: jax.jit(encrypted)(jax.device_put(params, rows), keys)
    for form, run in forms.items():
        with patch.object(engine_host, "on_host", lambda leaf: False):
            found = run()
            opened = sj.decrypt(found, masks, keys, cipher=cipher)
        yield form, bits_of(found) == expected and bits_of(opened) == bits_of(params)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The timed functions, by name."""
    repeats = 2 if quick else 10
    keys = sj.ring_keys(sj.level_key(SECRET, MODEL_ID, levels=1))
    model = VGG19(width=0.125 if quick else 1.0, rngs=nnx.Rngs(0))
    model.eval()  # or running statistics change
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jnp.ones((4 if quick else 64, 32, 32, 3))

    for share in (0.01, 0.08, 1.0):
        masks = sj.nested_masks(sj.importance.l2(params, select=r"convs.*kernel$"), [share])

        def decrypt(masks: Any = masks, **options: Any) -> Row:
            protected = sj.encrypt(params, masks, keys, **options)
            return timed(lambda: sj.decrypt(protected, masks, keys, **options), repeats)

        def compiled(masks: Any = masks) -> Row:
            protected = sj.encrypt(params, masks, keys)
            run = jax.jit(lambda params, keys: sj.decrypt(params, masks, keys))
            return timed(lambda: run(protected, keys), repeats)

        yield f"decrypt {share:.0%} of VGG19's kernels", decrypt
        yield f"the same, jitted ({share:.0%})", compiled
        if share == 0.08:

            def forward(masks: Any = masks) -> Row:
                def apply(params: Any, images: jax.Array) -> jax.Array:
                    return nnx.merge(graph, params, rest)(images)

                plain, protected = jax.jit(apply), sj.encrypt(params, masks, keys)
                run = jax.jit(sj.unlocking(apply, masks))
                clear = timed(lambda: plain(params, images), repeats)["median_ms"]
                return timed(lambda: run(protected, keys, images), repeats) | {"clear_ms": clear}

            yield "a forward pass with unlocking", forward

    def window() -> Row:
        cipher = sj.WindowCipher.fit(params)
        protected = sj.encrypt(params, [True], keys, cipher=cipher)
        return timed(lambda: sj.decrypt(protected, [True], keys, cipher=cipher), repeats)

    yield "the window cipher on all of VGG19", window

    def moved(send_first: bool) -> Row:
        """Opens host arrays, sealed and with 8 % in a ring, to plain arrays on the device."""
        masks = sj.nested_masks(sj.importance.l2(params, select=r"convs.*kernel$"), [0.08])
        rings, seal = sj.encrypt(params, masks, keys), sj.WindowCipher.fit(params)
        here = jax.tree.map(np.asarray, sj.encrypt(rings, [True], keys, cipher=seal))

        def opened(given: Any) -> Any:
            return sj.decrypt(sj.decrypt(given, [True], keys, cipher=seal), masks, keys)

        def opened_here() -> Any:
            with jax.default_device(jax.devices("cpu")[0]):
                return opened(here)

        if send_first:
            return timed(lambda: opened(jax.device_put(here)), repeats)
        return timed(lambda: jax.device_put(opened_here(), jax.devices()[0]), repeats)

    yield "VGG19 sent, then opened on the device", lambda: moved(True)
    yield "VGG19 opened on the host, then sent", lambda: moved(False)

    def learn() -> Row:
        def loss(params: Any, batch: Any) -> jax.Array:
            return jnp.mean(nnx.merge(graph, params, rest)(batch) ** 2)

        steps = 2 if quick else 20
        config = sj.PSSConfig(steps=steps)
        start = time.perf_counter()
        scores = sj.pss(loss, params, [images], key=jax.random.key(0), config=config)
        jax.block_until_ready(scores)
        return {"first_ms": round(1e3 * (time.perf_counter() - start), 1), "steps": steps}

    yield "PSS, including compilation", learn
    for impl, make in {
        "ChaCha20": lambda: sj.chacha20_key(SECRET),
        "threefry": lambda: jax.random.key(0, impl="threefry2x32"),
        "rbg": lambda: jax.random.key(0, impl="rbg"),
    }.items():
        for power in (16, 20) if quick else (20, 24, 27):

            def draw(make: Any = make, power: int = power) -> Row:
                bits = jax.jit(lambda key: jax.random.bits(key, (2**power,), "uint32"))
                key = make()
                return timed(lambda: bits(key), repeats)

            yield f"2^{power} random words, {impl}", draw

    def opened() -> Row:
        secret = sj.Secret(SECRET)
        released = sj.protect(params, secret=secret, levels=5)
        key = sj.level_key(SECRET, released.model_id, levels=5)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            released.save(path)
            row = timed(lambda: jax.tree.leaves(sj.open_model(path, key, like=params)), repeats)
            assert bits_of(sj.open_model(path, key, like=params)) == bits_of(params)
        return row

    yield "a sealed file to arrays on the device", opened


def peak_mb() -> float | None:
    """The peak memory of the first device, if it reports that."""
    found = jax.devices()[0].memory_stats() or {}
    peak = found.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 1e6, 1)


def write(folder: Path, result: Row) -> str:
    """The results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accelerator.json").write_text(json.dumps(result, indent=1) + "\n")
    took = f" {result['seconds']} s in all." if "seconds" in result else ""
    lines = ["# On an accelerator", "", f"{result['device']}; {result['versions']}.{took}", ""]
    good = sum(row["equal"] for row in result["bits"])
    lines += [f"Bits identical to the CPU's: {good} of {len(result['bits'])} cases.", ""]
    lines += [f"- different: {row['case']}" for row in result["bits"] if not row["equal"]]
    lines += ["| | first, ms | median, ms | |", "|---|---|---|---|"]
    for row in result["times"]:
        more = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("case", *_COLUMNS))
        cells = (str(row.get(column, "")) for column in _COLUMNS)
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {more} |")
    lines += ["", *(f"- failed: {text}" for text in result["failed"]), ""]
    text = "\n".join(lines)
    (folder / "accelerator.md").write_text(text)
    return text


_COLUMNS = ("first_ms", "median_ms")


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args(arguments)
    devices = jax.devices()
    result: Row = {
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
        "quick": args.quick,
        "bits": [],
        "times": [],
        "failed": [],
    }
    began = time.perf_counter()

    def said(what: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s: {what} …", file=sys.stderr, flush=True)

    write(args.out, result)
    said("comparing bits")
    try:
        for row in equal_bits(args.quick):
            result["bits"].append(row)
    except Exception as error:  # the rest is worth having
        result["failed"].append(f"comparing bits: {type(error).__name__}: {error}"[:300])
    for name, run in cases(args.quick):
        said(name)
        try:
            result["times"].append({"case": name, **run(), "peak_mb": peak_mb()})
        except Exception as error:
            result["failed"].append(f"{name}: {type(error).__name__}: {error}"[:300])
        result["seconds"] = round(time.perf_counter() - began)
        write(args.out, result)
    print(write(args.out, result))


if __name__ == "__main__":
    main()
