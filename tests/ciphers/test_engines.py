"""The NumPy engine: bit for bit the JAX one, and without JAX."""

import subprocess
import sys
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from strategies import bits, cases, is_array, octets, payload, two_rings

from selcrypt_jax import (
    LosslessCipher,
    Secret,
    chacha20_impl,
    decrypt,
    encrypt,
    level_key,
    ring_keys,
)
from selcrypt_jax._ciphers import engine_host as _lossless_host
from selcrypt_jax._ciphers import engine_xla as _lossless_jax
from selcrypt_jax._ciphers.engine_numpy import rewrite_leaf
from selcrypt_jax._tree.dtypes import DTYPES, SAFETENSORS
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax._tree.rings import split_rings

KEY = level_key(Secret(bytes(range(32))), bytes(16), level=2, levels=2)


def run(params, masks, *, cipher, inverse=False, given=None):
    """What the NumPy engine makes of a tree: name → array."""
    tree = named_leaves(params)
    result = {
        name: np.array(leaf) if given is None else given[name]
        for name, leaf in tree.leaves.items()
        if is_array(leaf)
    }
    rings = split_rings(tree, masks)
    for name in {ring.name for ring in rings}:
        leaf = result[name] = np.ascontiguousarray(result[name])
        own = [(r.mask, KEY.lower(r.level).cipher_key()) for r in rings if r.name == name]
        rewrite_leaf(
            bits(leaf).reshape(-1),
            leaf.shape,
            own,
            name,
            cipher=cipher,
            fine=cipher.fine_mask(leaf.dtype),
            inverse=inverse,
        )
    return result


def assert_engines_agree(params, masks, cipher):
    actual = run(params, masks, cipher=cipher)
    # Tables made by NumPy, as on a CPU, and tables made by XLA, as elsewhere.
    for on_host in (True, False):
        with patch.object(_lossless_jax, "on_host", lambda *_, made=on_host: made):
            protected = encrypt(params, masks, ring_keys(KEY), cipher=cipher)
            opened = decrypt(protected, masks, ring_keys(KEY), cipher=cipher)
        for name, leaf in actual.items():
            assert octets(leaf) == octets(named_leaves(protected).leaves[name]), name
        for name, leaf in named_leaves(params).leaves.items():
            assert octets(named_leaves(opened).leaves[name]) == octets(leaf), name
    back = run(params, masks, cipher=cipher, inverse=True, given=actual)
    for name, leaf in named_leaves(params).leaves.items():
        assert octets(back[name]) == octets(leaf), name


@pytest.mark.slow
@settings(max_examples=50)
@given(case=cases())
def test_same_bits_for_any_tree(case):
    assert_engines_agree(case.params, case.masks, LosslessCipher())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int16"])
@pytest.mark.parametrize(
    "cipher",
    [LosslessCipher(), LosslessCipher(unit="group"), LosslessCipher(permute=False)],
    ids=["weight", "group", "stream"],
)
def test_same_bits_for_every_form(dtype, cipher):
    params = {"w": jnp.asarray(payload(3, (3, 3, 40, 41), dtype))}
    masks = tuple({"w": mask} for mask in two_rings(4, (1, 1, 40, 41)))
    assert_engines_agree(params, masks, cipher)


@pytest.mark.parametrize(
    "weights", [4096, 4097, 8193, pytest.param(70_000, marks=pytest.mark.slow)]
)
def test_same_bits_around_the_ends_of_blocks(weights):
    params = {"w": jnp.asarray(payload(weights, (weights,), "float32"))}
    assert_engines_agree(params, (False, True), LosslessCipher())


def test_xla_makes_the_tables_under_jit_and_for_other_keys():
    leaves = {"w": jnp.ones(3)}
    keys = jax.random.split(jax.random.key(0, impl=chacha20_impl), 2)
    assert _lossless_host.on_host(leaves, keys)
    assert not _lossless_host.on_host(leaves, jax.random.split(jax.random.key(0), 2))
    assert not jax.jit(lambda w: [_lossless_host.on_host({"w": w}, keys)])(jnp.ones(3))[0]
    assert not jax.jit(lambda k: [_lossless_host.on_host(leaves, k)])(keys)[0]


INNER = [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1), (0, 1, 2), ()]


@pytest.mark.parametrize(
    ("unit", "inner"),
    [("weight", (1,))]
    + [
        pytest.param(unit, inner, marks=pytest.mark.slow)
        for unit in ("weight", "group")
        for inner in INNER
        if (unit, inner) != ("weight", (1,))
    ],
)
def test_masks_of_all_shapes(inner, unit):
    shape = (6, 40, 35)
    params = {"w": jnp.asarray(payload(5, shape, "float32")), "v": jnp.ones((30, 30))}
    groups = tuple(1 if axis in inner else size for axis, size in enumerate(shape))
    first = np.random.default_rng(0).random(groups) < 0.4
    first.flat[0] = True
    # The second ring's mask has another shape: what is left of the leaf, or in smaller groups.
    rest = ~np.broadcast_to(first, shape)
    every = np.ones((30, 30), bool)
    few = first.size < 36 and unit == "group"  # too few to permute
    masks = ({"w": not few and first, "v": few and every}, {"w": first | rest, "v": every})
    assert_engines_agree(params, masks, LosslessCipher(unit=unit))


def test_dtypes_are_as_their_library_says():
    for name, dtype in DTYPES.items():
        if not hasattr(np, name) and not hasattr(ml_dtypes, name):
            continue  # of a later version
        if dtype.kind == "float":
            info = ml_dtypes.finfo(name)
            signed = float(info.min) < 0
            actual = info.bits, info.nmant, signed
            assert actual == (dtype.bits, dtype.mantissa, dtype.signed), name
        elif dtype.kind == "integer":
            info = jnp.iinfo(name)
            assert (info.bits, info.min < 0) == (dtype.bits, dtype.signed), name
    assert {dtype.name for dtype in SAFETENSORS.values()} <= set(DTYPES)


def test_numbers_of_jax_are_known():
    for name in dir(jnp):
        scalar = getattr(jnp, name)
        if isinstance(getattr(scalar, "dtype", None), np.dtype) and jnp.issubdtype(
            scalar, jnp.number
        ):
            dtype = jax.dtypes.canonicalize_dtype(scalar.dtype)
            assert dtype.name in DTYPES or jnp.issubdtype(dtype, jnp.complexfloating), name


def test_needs_no_jax():
    code = (
        "import sys, selcrypt_jax._ciphers.engine_numpy, selcrypt_jax; "
        "selcrypt_jax.LosslessCipher();"
        "assert 'jax' not in sys.modules and 'jaxlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
