"""Counts what is compiled: speed is tested by counts, not by clocks."""

import logging
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    WindowCipher,
    decrypt,
    encrypt,
    importance,
    nested_masks,
    unlocking,
)
from selcrypt_jax._keys.chacha import chacha20_impl


def tree(leaves, size=40):
    keys = jax.random.split(jax.random.key(0), leaves)
    return {f"w{i:03}": jax.random.normal(key, (size, size)) for i, key in enumerate(keys)}


def make_keys(levels, impl=chacha20_impl):
    return jax.random.split(jax.random.key(0, impl=impl), levels)


def compiled_names(caplog, function):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return [m.split()[1] for m in caplog.messages if m.startswith("Compiling")]


def test_on_a_cpu_nothing_is_compiled(caplog):
    params, keys = tree(3, size=37), make_keys(2)
    masks = nested_masks(importance.l2(params), [0.3, 0.6])
    assert compiled_names(caplog, lambda: decrypt(params, masks, keys)) == []


def test_leaves_of_a_shape_share_programs(caplog):
    # A size that no other test has, so that nothing is in the cache.
    params, keys = tree(30, size=43), make_keys(2, "threefry2x32")
    masks = nested_masks(importance.l2(params), [0.2, 0.4])
    names = compiled_names(caplog, lambda: encrypt(params, masks, keys))
    assert len([name for name in names if "rewrite" in name]) == 1
    assert len(names) < 20
    again = {name: leaf + 1 for name, leaf in params.items()}
    assert compiled_names(caplog, lambda: encrypt(again, masks, keys)) == []


def text_of(leaves, levels, cipher=None):
    params = tree(leaves)
    shares = [0.5 * (level + 1) / levels for level in range(levels)]
    masks, keys = nested_masks(importance.l2(params), shares), make_keys(levels)
    function = jax.jit(lambda params, keys: decrypt(params, masks, keys, cipher=cipher))
    return function.lower(params, keys).as_text()


def test_a_jitted_program_has_one_sort_and_does_not_grow_with_levels():
    assert text_of(2, 2).count("stablehlo.sort") == text_of(6, 5).count("stablehlo.sort") == 1
    # Rings of one size in a leaf are one loop.
    few, many = text_of(2, 2), text_of(2, 6)
    for operation in ("gather", "scatter"):
        assert few.count(f"stablehlo.{operation}") == many.count(f"stablehlo.{operation}") > 0
    assert "stablehlo.sort" not in text_of(2, 2, LosslessCipher(permute=False))


def chain(params, x, *, scale):
    for name in sorted(params):
        x = jnp.tanh(scale * (x @ params[name]))
    return x


@pytest.mark.parametrize("permute", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_program_unlocks_for_itself(permute):
    cipher = LosslessCipher(permute=permute)
    params = {f"layer{i}": jax.random.normal(jax.random.key(i), (48, 48)) for i in range(3)}
    masks = nested_masks(importance.l2(params), [0.3, 0.6])
    keys = make_keys(2)
    protected = encrypt(params, masks, keys, cipher=cipher)
    x = jax.random.normal(jax.random.key(3), (4, 48))
    forward = jax.jit(unlocking(chain, masks, cipher=cipher))
    expected = jax.jit(chain)(params, x, scale=0.1)
    np.testing.assert_array_equal(forward(protected, keys, x, scale=0.1), expected)
    lower = jax.jit(unlocking(chain, masks[:1], cipher=cipher))(protected, keys[:1], x, scale=0.1)
    assert not (lower == expected).all()


MEMORY = """
import jax, jax.numpy as jnp
from selcrypt_jax import LosslessCipher, importance, nested_masks, unlocking, level_key, ring_keys

def chain(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return x

params = {f"layer{i:02}": jax.random.normal(jax.random.key(i), (256, 256)) for i in range(12)}
masks = nested_masks(importance.l2(params), [0.05])
keys = ring_keys(level_key(bytes(32), bytes(16), levels=1))
forward = jax.jit(unlocking(chain, masks, cipher=LosslessCipher(permute=False)))
program = forward.lower(params, keys, jnp.ones((4, 256))).compile()
size = sum(leaf.nbytes for leaf in params.values())
print(program.memory_analysis().temp_size_in_bytes / size)
"""


@pytest.mark.slow
def test_a_program_need_not_hold_all_of_the_plaintext():
    # One device, and the scheduler that saves memory, as accelerators have it.
    flags = {"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | flags,
    )
    assert float(run.stdout) < 0.5


def ciphers(params, masks):
    return {
        "lossless": LosslessCipher(),
        "group": LosslessCipher("group"),
        "stream": LosslessCipher(permute=False),
        "window": WindowCipher.fit(params),
        "gaussian": GaussianCipher.fit(params, masks),
    }


@pytest.mark.parametrize("name", ["lossless", "group", "stream", "window", "gaussian"])
def test_programs_are_lowered_for_every_platform(name):
    """Also for accelerators that are not here: no program calls back to this machine."""
    params = tree(2)
    masks = nested_masks(importance.l2(params), [0.3])
    keys, cipher = make_keys(1), ciphers(params, masks)[name]
    forward = unlocking(lambda params, x: x @ params["w000"], masks, cipher=cipher)
    for function, *more in (
        (lambda params, keys: encrypt(params, masks, keys, cipher=cipher),),
        (lambda params, keys: decrypt(params, masks, keys, cipher=cipher),),
        (forward, jnp.ones((3, 40))),
    ):
        platforms = ("cpu", "cuda", "rocm", "tpu")
        made = jax.export.export(jax.jit(function), platforms=platforms)(params, keys, *more)
        assert made.platforms == platforms
