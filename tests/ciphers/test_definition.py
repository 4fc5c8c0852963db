"""The lossless cipher against an independent oracle, and its engines against each other."""

import hashlib
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, INTEGERS, assert_same, bits, cases, octets, payload, two_rings

from selcrypt_jax import LosslessCipher, chacha20_key, decrypt, encrypt
from selcrypt_jax._ciphers import engine_host, engine_numpy, engine_xla


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- an independent oracle: the definition in lossless.py, in NumPy -----------------------

FINE = {"float32": 20, "bfloat16": 4, "float16": 7, "float8_e4m3fn": 0, "float8_e5m2": 0}
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10, "float8_e4m3fn": 3, "float8_e5m2": 2}


class JaxDraws:
    def fold_in(self, key, data):
        return jax.random.fold_in(key, np.uint32(data))

    def numbers(self, key, block, dtype):
        """4,096 of a key's random numbers."""
        return np.asarray(jax.random.bits(self.fold_in(key, block), (4096,), dtype))


class OpenSSLDraws:
    """The draws of ChaCha20 keys, given as 32 bytes; see the table in chacha.py."""

    def _stream(self, key, domain, counter, size):
        nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
        return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))

    def fold_in(self, key, data):
        return self._stream(key, b"fold_in", int(data), 32)

    def numbers(self, key, block, dtype):
        dtype = np.dtype(dtype).newbyteorder("<")
        size = 4096 * dtype.itemsize
        stream = self._stream(key, b"random_bits", block * size // 64, size)
        return np.frombuffer(stream, dtype).astype(dtype.newbyteorder("="))


def oracle_ring(name, leaf, ring, key, draws, *, unit="weight", permute=True, fine_bits=None):
    """One ring of one leaf, encrypted."""
    dtype = str(leaf.dtype)
    width = 8 * leaf.dtype.itemsize
    if fine_bits is not None:
        fine = 2**fine_bits - 1
    elif permute:
        fine = 2 ** FINE.get(dtype, 0) - 1
    else:
        fine = 2 ** (width - 1) | (2 ** MANTISSA[dtype] - 1) if dtype in MANTISSA else 2**width - 1

    for word in np.frombuffer(
        hashlib.sha256(b"selcrypt/v1/leaf\0" + name.encode()).digest(), "<u4"
    ):
        key = draws.fold_in(key, word)

    group = np.broadcast_to(np.arange(ring.size).reshape(ring.shape), leaf.shape).ravel()
    positions = np.flatnonzero(np.broadcast_to(ring, leaf.shape))
    if unit == "group":
        positions = positions[np.argsort(group[positions], kind="stable")]
    flat = bits(leaf).ravel().copy()
    x = flat[positions].reshape(ring.sum() if unit == "group" else len(positions), -1)

    moved = x.copy()
    blocks = -(-len(x) // 4096)
    for r in range(blocks if permute else 0):
        units = np.arange(r, len(x), blocks)
        draw = draws.numbers(draws.fold_in(key, 0), r, "uint32")[: len(units)]
        moved[units] = x[units[np.argsort(draw >> 12, kind="stable")]]

    k = [
        draws.numbers(draws.fold_in(key, 1), i, flat.dtype)
        for i in range(-(-len(positions) // 4096))
    ]
    k = np.concatenate(k)[: len(positions)]
    flat[positions] = moved.ravel() ^ (k & flat.dtype.type(fine))
    return flat.view(leaf.dtype).reshape(leaf.shape)


def oracle(params: dict, masks: Any, keys: Any, draws: Any, **cipher: Any) -> dict:
    result = {}
    for name, leaf in params.items():
        leaf = np.asarray(leaf)
        below = np.zeros((1,) * leaf.ndim, bool)
        for mask, key in zip(masks, keys, strict=True):
            mask = np.reshape(mask[name], np.shape(mask[name]) or (1,) * leaf.ndim)
            if (mask & ~below).any():
                leaf = oracle_ring(name, leaf, mask & ~below, key, draws, **cipher)
            below = mask
        result[name] = leaf
    return result


SECRETS = [hashlib.sha256(bytes([m])).digest() for m in range(2)]
KEYS = [chacha20_key(secret) for secret in SECRETS]


def assert_as_defined(params, masks, options=None, *, xla=False):
    """ChaCha20 keys, by the NumPy engine or by XLA; the oracle's bits are those of OpenSSL."""
    options = options or {}
    cipher = LosslessCipher(**options)
    keys, secrets = KEYS[: len(masks)], SECRETS[: len(masks)]
    with patch.object(engine_host, "on_host", lambda leaf: not xla):
        protected = encrypt(params, masks, keys, cipher=cipher)
        opened = decrypt(protected, masks, keys, cipher=cipher)
    expected = oracle(params, masks, secrets, OpenSSLDraws(), **options)
    assert_same(jax.tree.map(np.asarray, protected), expected)
    assert_same(jax.tree.map(np.asarray, opened), jax.tree.map(np.asarray, params))


FORMS = {
    "default": {},
    "group": {"unit": "group"},
    "stream": {"permute": False},
    "fine": {"fine_bits": 3},
    "group, order only": {"unit": "group", "fine_bits": 0},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_every_form_and_dtype(form, dtype):
    if form.get("fine_bits") == 3 and dtype == "float8_e5m2":
        return  # which has two
    params = {"é/w": payload(3, (3, 3, 8, 41), dtype), "h": payload(0, (217,), dtype)}
    kernels, halves = two_rings(1, (1, 1, 8, 41)), two_rings(2, (217,))
    masks = [{"é/w": kernels[m], "h": halves[m]} for m in range(2)]
    assert_as_defined(params, masks, form)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "dtype"),
    [  # one a width and form: its programs know no more of a dtype
        ("default", "float32"),
        ("group", "bfloat16"),
        ("stream", "float8_e4m3fn"),
        pytest.param("default", "float16", marks=SLOW),
        pytest.param("default", "int8", marks=SLOW),
        pytest.param("stream", "float32", marks=SLOW),
        pytest.param("group, order only", "float32", marks=SLOW),
    ],
)
def test_every_width_in_xla(form, dtype):
    params = {"w": payload(3, (3, 3, 8, 41), dtype)}
    masks = [{"w": mask} for mask in two_rings(1, (1, 1, 8, 41))]
    assert_as_defined(params, masks, FORMS[form], xla=True)


# Two leaves of different sizes share the tables that XLA's blocks are drawn into.
@pytest.mark.parametrize(
    ("size", "xla"),
    [(size, False) for size in (4095, 4096, 4097, 8193, 9000, 70_000)]
    + [(4097, True), pytest.param(9000, True, marks=SLOW)],
)
def test_the_edges_of_blocks(size, xla):
    params = {"a": weights(size), "b/c": weights(6000)}
    assert_as_defined(params, ({"a": True, "b/c": np.arange(6000) < 4100},), xla=xla)


@pytest.mark.parametrize("unit", ["weight", "group"])
@pytest.mark.parametrize("inner", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1), (0, 1, 2), ()])
@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=SLOW)], ids=["numpy", "xla"])
def test_masks_of_all_shapes(inner, unit, xla):
    shape = (6, 40, 35)
    params = {"w": payload(5, shape, "float32"), "v": np.ones((30, 30), np.float32)}
    groups = tuple(1 if axis in inner else size for axis, size in enumerate(shape))
    first = np.random.default_rng(0).random(groups) < 0.4
    first.flat[0] = True
    # The second ring's mask has another shape: what is left of the leaf, or in smaller groups.
    rest = ~np.broadcast_to(first, shape)
    every = np.ones((30, 30), bool)
    few = first.size < 36 and unit == "group"  # too few to permute
    none = np.zeros((1, 1, 1), bool)
    masks = (
        {"w": none if few else first, "v": every & few},
        {"w": first | rest, "v": every},
    )
    assert_as_defined(params, masks, {"unit": unit}, xla=xla)


@settings(max_examples=20)
@given(case=cases(), form=st.sampled_from([{}, {"permute": False}]))
def test_round_trip_over_random_trees(case, form):
    cipher = LosslessCipher(**form)
    before = jax.tree.map(octets, case.params)
    protected = encrypt(case.params, case.masks, KEYS, cipher=cipher)
    assert_same(decrypt(protected, case.masks, KEYS, cipher=cipher), case.params)
    assert jax.tree.map(octets, case.params) == before


@pytest.mark.slow
@settings(max_examples=30)
@given(case=cases())
def test_xla_gives_the_bits_of_numpy(case):
    with patch.object(engine_host, "on_host", lambda leaf: False):
        in_xla = encrypt(case.params, case.masks, KEYS)
    assert_same(in_xla, encrypt(case.params, case.masks, KEYS))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_other_implementations(impl):
    params, masks = {"w": weights(1153)}, [{"w": mask} for mask in two_rings(4, (1153,))]
    keys = jax.random.split(jax.random.key(0, impl=impl))
    protected = encrypt(params, masks, keys)
    assert_same(jax.tree.map(np.asarray, protected), oracle(params, masks, keys, JaxDraws()))
    assert_same(jax.tree.map(np.asarray, decrypt(protected, masks, keys)), params)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_batch_of_keys_gives_each_its_own_bits(impl):
    # XLA's generator would draw for all from the first key.
    keys = jnp.stack([jax.random.split(jax.random.key(n, impl=impl), 1) for n in range(3)])
    params, masks = {"w": jnp.asarray(weights(217))}, ({"w": True},)
    batch = jax.vmap(lambda key: encrypt(params, masks, key))(keys)
    for row, key in enumerate(keys):
        assert octets(batch["w"][row]) == octets(encrypt(params, masks, key)["w"])


@pytest.mark.parametrize("unit", ["weight", "group"])
@pytest.mark.parametrize("piece", [1, 1000, 40_000])
def test_how_much_is_permuted_at_a_time_changes_nothing(monkeypatch, piece, unit):
    monkeypatch.setattr(engine_numpy, "_PIECE", piece)
    params = {"a": weights(4500, 2), "b": weights(3, 3, 30, 40)}
    mask = np.random.default_rng(0).random((1, 1, 30, 40)) < 0.95
    assert_as_defined(params, ({"a": np.ones((4500, 1), bool), "b": mask},), {"unit": unit})


def test_how_many_blocks_are_drawn_together_changes_nothing(monkeypatch):
    params = {f"w{i}": weights(1153, seed=i) for i in range(5)}
    masks, keys = (dict.fromkeys(params, True),), jax.random.split(jax.random.key(0), 1)
    expected = encrypt(params, masks, keys)
    monkeypatch.setattr(engine_xla, "_AT_ONCE", 3)
    assert_same(encrypt(params, masks, keys), expected)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
@pytest.mark.parametrize("permute", [True, False])
def test_wide_leaves(dtype, permute):
    params = {"w": payload(0, (200,), dtype)}
    with pytest.raises(ValueError, match=rf"'w'.*{dtype}.*jax_enable_x64"):
        encrypt(params, (True,), KEYS[:1])
    cipher = LosslessCipher(permute=permute)
    with jax.enable_x64(True):
        protected = encrypt(params, (True,), KEYS[:1], cipher=cipher)
        opened = decrypt(protected, (True,), KEYS[:1], cipher=cipher)
        if (dtype, permute) == ("float64", True):
            with patch.object(engine_host, "on_host", lambda leaf: False):
                assert_same(encrypt(params, (True,), KEYS[:1], cipher=cipher), protected)
    assert protected["w"].dtype == dtype
    assert (bits(protected["w"]) == bits(params["w"])).sum() < 10
    assert octets(opened["w"]) == octets(params["w"])
    kept = {"w": weights(200), "count": np.array(2**53 + 1)}
    assert encrypt(kept, ({"w": True, "count": False},), KEYS[:1])["count"] is kept["count"]


def test_a_mask_in_another_form_is_the_same_mask():
    leaf, mask = weights(3, 3, 12, 10), np.random.default_rng(0).random((1, 1, 12, 10)) < 0.3
    protected = encrypt({"w": leaf}, ({"w": mask},), KEYS[:1])
    wide = np.broadcast_to(mask, leaf.shape)
    assert_same(decrypt(protected, ({"w": wide},), KEYS[:1]), {"w": jnp.asarray(leaf)})


def test_needs_no_jax():
    code = (
        "import sys, selcrypt_jax._ciphers.engine_numpy, selcrypt_jax; "
        "selcrypt_jax.LosslessCipher();"
        "assert 'jax' not in sys.modules and 'jaxlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
