"""Section "scaling": how time, work and memory grow with weights, share and devices."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from _measure import Contender, first_calls, in_process, measure
from _rows import Options, Row
from _subjects import LEVELS, PERMUTING, STREAM, Case, Subject
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selcrypt_jax import LosslessCipher, decrypt

FIXED_MS = 3.0
RELATIVE = "% of 8 %'s time"
SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
POWERS, LARGE_POWERS = (20, 22, 24, 26), (28, 30)
DEVICES = (1, 2, 4, 8)
NOTES = {
    "scaling: weights": (
        "A donated decrypt of one dense bfloat16 leaf, with 8 % of its weights drawn at random; "
        "ratios are relative to the smallest leaf."
    ),
    "scaling: share": (
        "A donated decrypt of VGG19 in float32; ratios are relative to a share of 8 %. "
        f"{RELATIVE}: after subtracting a fixed {FIXED_MS:.0f} ms from both."
    ),
    "scaling: devices": (
        "XLA's own analysis of a jitted, donated decrypt of a float32 leaf, sharded over its first "
        "axis, with 8 % drawn at random, on that many (simulated) CPU devices: all figures are per "
        "device. XLA counts the body of a loop once."
    ),
    "scaling: first call": ("Time to trace, compile and run once, in a fresh process, at 8 %."),
}


def decrypting(name: str, subject: Subject) -> Contender:
    """A donated decrypt."""
    return Contender(
        name,
        lambda given: decrypt(*given, donate=True),
        subject.given_up,
        size=lambda: subject.size,
        check=subject.check,
    )


def by_weights(powers: tuple[int, ...]) -> list[Contender]:
    """One contender per number of weights, a power of two."""
    return [
        decrypting(f"2^{power} weights", Subject(Case(f"dense, 2^{power}", 0.08, 1)))
        for power in powers
    ]


def by_share(tree: str, shares: tuple[float, ...]) -> list[Contender]:
    """One contender per share."""
    return [decrypting(f"{share:.0%}", Subject(Case(tree, share, LEVELS))) for share in shares]


def by_form(case: Case) -> list[Contender]:
    """An eager and a jitted contender."""
    subject = Subject(case)
    jitted = subject.jitted()
    return [
        decrypting("eager", subject),
        Contender("jit", lambda given: jitted(given[0], given[2]), subject.given_up),
    ]


def without_fixed(rows: list[Row]) -> list[Row]:
    """Adds the cost of a share in percent of the cost of 8 %, without the fixed part of either."""
    (full,) = (row.median_ms for row in rows if row.contender == "8%")
    return [
        dataclasses.replace(
            row, more={RELATIVE: 100 * (row.median_ms - FIXED_MS) / (full - FIXED_MS)}
        )
        if row.ratio is not None and row.median_ms and full
        else row
        for row in rows
    ]


def analysis(devices: int, cipher: LosslessCipher, rows: int) -> dict[str, float]:
    """XLA's analysis of a sharded decrypt, per device."""
    shape = (rows, 1024)
    mask = np.random.default_rng(0).integers(0, 25, shape, np.uint8) < 2
    keys = Subject(Case("", 0.08, 1)).keys
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))

    def decrypted(leaf: Any, keys: Any) -> Any:
        return decrypt({"kernel": leaf}, ({"kernel": mask},), keys, cipher=cipher)["kernel"]

    leaf = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    function = jax.jit(decrypted, donate_argnums=0, out_shardings=sharding)
    compiled = function.lower(leaf, keys).compile()
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {
        "Mflop": 1e-6 * costs.get("flops", 0.0),
        "accessed, MB": 1e-6 * costs.get("bytes accessed", 0.0),
        "arguments, MB": 1e-6 * memory.argument_size_in_bytes,
        "output, MB": 1e-6 * memory.output_size_in_bytes,
        "temporary, MB": 1e-6 * memory.temp_size_in_bytes,
    }


def by_devices(rows: int) -> list[Row]:
    """Rows of the table; runs in a process with the requested number of devices."""
    forms = {"permuting": PERMUTING, "stream": STREAM}
    return [
        Row(
            "scaling: devices",
            "1 device" if devices == 1 else f"{devices} devices",
            name,
            more=analysis(devices, cipher, rows),
        )
        for name, cipher in forms.items()
        for devices in DEVICES
    ]


def sharded(rows: int) -> list[Row]:
    """`by_devices` on simulated devices."""
    kept = dict(os.environ)
    count = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    os.environ |= {"XLA_FLAGS": f"{kept.get('XLA_FLAGS', '')} {count}", "JAX_PLATFORMS": "cpu"}
    try:
        return in_process(by_devices, rows)
    finally:
        os.environ.clear()
        os.environ.update(kept)


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    powers = (16, 18) if options.quick else POWERS
    powers += LARGE_POWERS if options.large and not options.quick else ()
    weights = measure(
        "scaling: weights",
        "dense leaf, 8%",
        by_weights,
        powers,
        baseline=f"2^{powers[0]} weights",
        options=options,
    )
    tree = "VGG19, a sixteenth" if options.quick else "VGG19"
    shares = (0.01, 0.08, 1.0) if options.quick else SHARES
    shared = measure("scaling: share", tree, by_share, tree, shares, baseline="8%", options=options)
    found = [*weights, *without_fixed(shared), *sharded(1 << (8 if options.quick else 14))]
    trees = ["transformer, tiny"] if options.quick else ["VGG19", "transformer, 200 leaves"]
    for name in trees:
        case = Case(name, 0.08, LEVELS)
        found += first_calls("scaling: first call", name, by_form, [case], options=options)[0]
    return found
