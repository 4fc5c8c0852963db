"""The NumPy engine: bit for bit the JAX one, and without JAX."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from strategies import bits, cases, is_array, octets, payload, two_rings

from selcrypt_jax import LosslessCipher, Secret, encrypt, level_key, ring_keys
from selcrypt_jax._dtypes import DTYPES, SAFETENSORS
from selcrypt_jax._groups import group_positions
from selcrypt_jax._lossless_numpy import rewrite_ring
from selcrypt_jax._masks import split_rings
from selcrypt_jax._tree import named_leaves

KEY = level_key(Secret(bytes(range(32))), bytes(16), level=2, levels=2)


def run(params, masks, *, cipher, inverse=False, given=None):
    """What the NumPy engine makes of a tree: name → array."""
    tree = named_leaves(params)
    result = {
        name: np.array(leaf) if given is None else given[name]
        for name, leaf in tree.leaves.items()
        if is_array(leaf)
    }
    for ring in split_rings(tree, masks):
        leaf = result[ring.name] = np.ascontiguousarray(result[ring.name])
        rewrite_ring(
            bits(leaf).reshape(-1),
            group_positions(leaf.shape, ring.mask),
            KEY.lower(ring.level).cipher_key(),
            ring.name,
            cipher=cipher,
            fine=cipher.fine_mask(leaf.dtype),
            inverse=inverse,
        )
    return result


def assert_engines_agree(params, masks, cipher):
    expected = named_leaves(encrypt(params, masks, ring_keys(KEY), cipher=cipher)).leaves
    actual = run(params, masks, cipher=cipher)
    for name, leaf in actual.items():
        assert octets(leaf) == octets(expected[name]), name
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


def test_dtypes_are_as_their_library_says():
    for name, dtype in DTYPES.items():
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
        "import sys, selcrypt_jax._lossless_numpy, selcrypt_jax; selcrypt_jax.LosslessCipher();"
        "assert 'jax' not in sys.modules and 'jaxlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
