"""The ciphers' contract: the same bits however they are run, and all of them back."""

import hashlib
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from strategies import FLOATS, INTEGERS, assert_same, bits, cases, octets, payload, two_rings

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    PaperLevels,
    Secret,
    chacha20_impl,
    chacha20_key,
    decrypt,
    encrypt,
    importance,
    level_key,
    nested_masks,
    new_model_id,
    ring_keys,
    unlocking,
)
from selcrypt_jax._ciphers import engine_xla as _lossless_jax

IMPLEMENTATIONS = {
    "threefry": "threefry2x32",
    "rbg": "rbg",
    "chacha20": chacha20_impl,
}


def make_keys(levels: int, impl: Any = "threefry2x32", seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl=impl), levels)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def level_masks(mask: Any, below: Any) -> Any:
    return jax.tree.map(lambda high, low: high & ~low, mask, below)


# --- an independent oracle: the definition in the docstring of _lossless.py, in NumPy -----------

FINE = {"float32": 20, "bfloat16": 4, "float16": 7, "float8_e4m3fn": 0, "float8_e5m2": 0}
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10, "float8_e4m3fn": 3, "float8_e5m2": 2}


class JaxDraws:
    def fold_in(self, key, data):
        return jax.random.fold_in(key, np.uint32(data))

    def bits(self, key, dtype):
        return np.asarray(jax.random.bits(key, (4096,), dtype))


class OpenSSLDraws:
    """ChaCha20 keys as their 32 bytes; see the table in _chacha.py."""

    def _stream(self, key, domain, counter, size):
        nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
        return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))

    def fold_in(self, key, data):
        return self._stream(key, b"fold_in", int(data), 32)

    def bits(self, key, dtype):
        dtype = np.dtype(dtype).newbyteorder("<")
        stream = self._stream(key, b"random_bits", 0, 4096 * dtype.itemsize)
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
        draw = draws.bits(draws.fold_in(draws.fold_in(key, 0), r), "uint32")[: len(units)]
        moved[units] = x[units[np.argsort(draw >> 12, kind="stable")]]

    k = [
        draws.bits(draws.fold_in(draws.fold_in(key, 1), i), flat.dtype)
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


CIPHERS = {
    "default": {},
    "group": {"unit": "group"},
    "stream": {"permute": False},
    "fine": {"fine_bits": 3},
    "group, order only": {"unit": "group", "fine_bits": 0},
}


STREAM_SLOW = ["float16", "float8_e5m2", "int16", "int32", "uint8", "uint16", "uint32"]


@pytest.mark.parametrize(
    ("cipher", "dtype"),
    [({}, dtype) for dtype in FLOATS + INTEGERS]
    + [({"permute": False}, dtype) for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8")]
    + [pytest.param({"permute": False}, dtype, marks=pytest.mark.slow) for dtype in STREAM_SLOW],
)
def test_definition_on_every_dtype(cipher, dtype):
    params = {"w": payload(3, (1153,), dtype)}
    masks = [{"w": mask} for mask in two_rings(4, (1153,))]
    keys = make_keys(2)
    protected = encrypt(params, masks, keys, cipher=LosslessCipher(**cipher))
    assert_same(
        jax.tree.map(np.asarray, protected), oracle(params, masks, keys, JaxDraws(), **cipher)
    )
    assert_same(
        jax.tree.map(np.asarray, decrypt(protected, masks, keys, cipher=LosslessCipher(**cipher))),
        params,
    )


@pytest.mark.parametrize("size", [4095, 4096, 4097, 9000])
def test_definition_at_the_edges_of_blocks(size):
    # Two leaves of different sizes share the tables that the blocks are drawn into.
    params = {"a": weights(size), "b/c": weights(6000)}
    masks = ({"a": True, "b/c": np.arange(6000) < 4100},)
    keys = make_keys(1)
    assert_same(
        jax.tree.map(np.asarray, encrypt(params, masks, keys)),
        oracle(params, masks, keys, JaxDraws()),
    )


@pytest.mark.parametrize("cipher", CIPHERS.values(), ids=CIPHERS)
def test_definition_against_openssl(cipher):
    secrets = [hashlib.sha256(bytes([m])).digest() for m in range(2)]
    params = {"é/w": weights(3, 3, 8, 40), "h": payload(0, (217,), "bfloat16")}
    kernels, halves = two_rings(1, (1, 1, 8, 40)), two_rings(2, (217,))
    masks = [{"é/w": kernels[m], "h": halves[m]} for m in range(2)]
    keys = [chacha20_key(secret) for secret in secrets]
    assert_same(
        jax.tree.map(np.asarray, encrypt(params, masks, keys, cipher=LosslessCipher(**cipher))),
        oracle(params, masks, secrets, OpenSSLDraws(), **cipher),
    )


def test_how_many_blocks_are_drawn_together_changes_nothing(monkeypatch):
    params = {f"w{i}": weights(1153, seed=i) for i in range(5)}
    masks, keys = (dict.fromkeys(params, True),), make_keys(1)
    expected = encrypt(params, masks, keys)
    monkeypatch.setattr(_lossless_jax, "_AT_ONCE", 3)
    assert_same(encrypt(params, masks, keys), expected)
    assert_same(decrypt(expected, masks, keys), jax.tree.map(jnp.asarray, params))


# --- one contract, over ciphers and ways to run them --------------------------------------------


def eager(function, params, keys):
    return function(params, keys)


def jitted(function, params, keys):
    return jax.jit(function)(params, keys)


def closed_over(function, params, keys):
    return jax.jit(lambda params: function(params, keys))(params)


def donated(function, params, keys):
    given = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    result = jax.jit(function, donate_argnums=0)(given, keys)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    return result


def vmapped(function, params, keys):
    """Over the parameters and over the keys; the last of three is the one that is asked for."""
    # Stacked by NumPy: a bfloat16 NaN that goes through jnp.stack may lose its payload.
    batch = jax.tree.map(
        lambda leaf: jnp.asarray(np.stack([np.zeros_like(leaf)] * 2 + [leaf])), params
    )
    result = jax.vmap(function)(batch, jnp.stack([keys[::-1], keys[::-1], keys]))
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[2]), result)


def sharded(function, params, keys, *, kind, jit=False):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = {"conv": PartitionSpec(None, None, None, "d"), "half": PartitionSpec("d"), "int": None}
    given = {
        name: jax.device_put(leaf, NamedSharding(mesh, spec[name] or PartitionSpec()))
        for name, leaf in params.items()
    }
    assert len(given["conv"].addressable_shards) == 8
    result = (jax.jit(function) if jit else function)(given, keys)
    if not jit or kind == AxisType.Explicit:
        for name, leaf in given.items():
            assert result[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
    return result


RUNS = {
    "eager": eager,
    "jit": jitted,
    "jit, keys closed over": closed_over,
    "donated": donated,
    "vmap": vmapped,
    "sharded": partial(sharded, kind=AxisType.Auto),
    "sharded, jit": partial(sharded, kind=AxisType.Auto, jit=True),
    "sharded, explicit axes": partial(sharded, kind=AxisType.Explicit),
    "sharded, explicit axes, jit": partial(sharded, kind=AxisType.Explicit, jit=True),
}
PARAMS = {
    "conv": payload(0, (3, 3, 8, 16), "float32"),
    "half": payload(1, (16, 40), "bfloat16"),
    "int": payload(2, (3,), "int8"),
}
MASKS = [
    {"conv": conv, "half": half, "int": False}
    for conv, half in zip(two_rings(3, (1, 1, 8, 16)), two_rings(4, (16, 40)), strict=True)
]


def heavy(cipher: str, run: str) -> bool:
    # Each compiles its own programs; one of a kind is enough for the fast suite.
    if cipher == "default":
        return run in ("jit, keys closed over", "sharded, explicit axes")
    return (cipher, run) != ("group", "eager")


@pytest.mark.parametrize(
    ("cipher", "run"),
    [
        pytest.param(cipher, run, marks=[pytest.mark.slow] if heavy(cipher, run) else [])
        for cipher in CIPHERS
        for run in RUNS
    ],
)
def test_the_same_bits_however_it_is_run(cipher, run):
    options = CIPHERS[cipher]
    keys = make_keys(2)
    forth = partial(encrypt, masks=MASKS, cipher=LosslessCipher(**options))
    back = partial(decrypt, masks=MASKS, cipher=LosslessCipher(**options))
    params = jax.tree.map(jnp.asarray, PARAMS)
    protected = RUNS[run](lambda p, k: forth(p, keys=k), params, keys)
    assert_same(
        jax.tree.map(np.asarray, protected), oracle(PARAMS, MASKS, keys, JaxDraws(), **options)
    )
    protected = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), protected)
    assert_same(RUNS[run](lambda p, k: back(p, keys=k), protected, keys), params)


@settings(max_examples=20)
@given(
    case=cases(), cipher=st.sampled_from([{}, {"permute": False}]), seed=st.integers(0, 2**32 - 1)
)
def test_round_trip_over_random_trees(case, cipher, seed):
    cipher = LosslessCipher(**cipher)
    keys = make_keys(2, seed=seed)
    before = jax.tree.map(octets, case.params)
    protected = encrypt(case.params, case.masks, keys, cipher=cipher)
    assert jax.tree.map(lambda leaf: leaf.shape, protected) == jax.tree.map(
        lambda leaf: leaf.shape, case.params
    )
    assert_same(decrypt(protected, case.masks, keys, cipher=cipher), case.params)
    assert jax.tree.map(octets, case.params) == before


# --- levels and keys ----------------------------------------------------------------------------

TREE = {"a": weights(3, 3, 16, 16), "b": weights(40, 30, seed=1), "c": weights(7)}
TREE_MASKS = nested_masks(importance.l2({"a": TREE["a"], "b": TREE["b"]}), [0.2, 0.5, 0.9])
TREE_MASKS = tuple({**mask, "c": False} for mask in TREE_MASKS)
TREE_RINGS = [TREE_MASKS[0], *map(level_masks, TREE_MASKS[1:], TREE_MASKS[:-1])]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_level_opens_its_rings_and_leaves_the_others(impl):
    keys = make_keys(3, impl)
    protected = encrypt(TREE, TREE_MASKS, keys)
    for level in (0, 2):  # level 3 is every round trip
        opened = decrypt(protected, TREE_MASKS[:level], keys[:level])
        for name in ("a", "b"):
            for number, ring in enumerate(TREE_RINGS, start=1):
                where = np.broadcast_to(ring[name], TREE[name].shape)
                expected = TREE if number <= level else protected
                assert np.array_equal(bits(opened[name])[where], bits(expected[name])[where])
            outside = np.broadcast_to(~TREE_MASKS[-1][name], TREE[name].shape)
            assert np.array_equal(bits(protected[name])[outside], bits(TREE[name])[outside])
        assert opened["c"] is TREE["c"]


@pytest.mark.parametrize("impl", ["rbg", pytest.param("unsafe_rbg", marks=pytest.mark.slow)])
def test_batch_of_keys_gives_each_its_own_bits(impl):
    # XLA's generator would draw for all from the first key.
    keys = jnp.stack([make_keys(1, impl, seed) for seed in range(3)])
    params, masks = {"w": jnp.asarray(weights(217))}, ({"w": True},)
    batch = jax.vmap(lambda key: encrypt(params, masks, key))(keys)
    for row, key in enumerate(keys):
        assert octets(batch["w"][row]) == octets(encrypt(params, masks, key)["w"])


def equal_weights(actual: Any, expected: Any) -> int:
    return int((bits(actual) == bits(expected)).sum())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("wrong", ["other secret", "other model", "lower level", "other leaf"])
def test_wrong_key_is_no_better_than_chance(wrong, dtype):
    size = 8000
    scale = 40 if dtype == "int8" else 1
    leaf = np.round(weights(size) * scale, 6).astype(jnp.dtype(dtype))
    secret, model = Secret(bytes(range(32))), bytes(range(16))
    right = ring_keys(level_key(secret, model, levels=2))
    keys = {
        "other secret": lambda: ring_keys(level_key(Secret(bytes(32)), model, levels=2)),
        "other model": lambda: ring_keys(level_key(secret, new_model_id(), levels=2)),
        # What the holder of level 1 can derive, tried on ring 2.
        "lower level": lambda: [*ring_keys(level_key(secret, model, level=1, levels=2))] * 2,
        "other leaf": lambda: right,
    }[wrong]()
    masks = ({"w": np.arange(size) < 0}, {"w": True})
    protected = encrypt({"w": leaf}, masks, right)
    name = "v" if wrong == "other leaf" else "w"
    opened = decrypt({name: protected["w"]}, [{name: mask["w"]} for mask in masks], keys)
    # Chance, a permutation of the values: Σ count² / n of the weights are in place again.
    fine = {"float32": 20, "int8": 0}[dtype]
    counts = np.unique(bits(leaf) >> fine, return_counts=True)[1].astype(float)
    chance = (counts**2).sum() / size / 2**fine
    assert equal_weights(opened[name], leaf) <= chance + 6 * np.sqrt(chance) + 3
    assert equal_weights(protected["w"], leaf) <= chance + 6 * np.sqrt(chance) + 3


def test_every_leaf_ring_and_key_has_a_keystream_of_its_own():
    # Of zeros the stream cipher shows the keystream itself.
    stream = LosslessCipher(permute=False)
    zeros = {"a": jnp.zeros(300, jnp.int32), "b": jnp.zeros(300, jnp.int32)}
    low = np.arange(300) < 150
    masks = ({"a": low, "b": low}, {"a": True, "b": True})
    seen = []
    for seed in range(3):
        result = encrypt(zeros, masks, make_keys(2, seed=seed), cipher=stream)
        seen += [octets(leaf[half]) for leaf in result.values() for half in (low, ~low)]
    same = encrypt(zeros, masks, jax.random.split(jax.random.key(5)), cipher=stream)
    assert octets(same["a"]) != octets(same["b"])
    words = np.concatenate([np.frombuffer(part, np.uint32) for part in seen])
    assert len(set(words.tolist())) > len(words) - 5  # 1800 words: a birthday is improbable


def test_the_same_masks_and_keys_give_the_same_bits():
    keys = make_keys(3)
    again = encrypt(dict(reversed(TREE.items())), TREE_MASKS, list(keys))
    assert_same({name: again[name] for name in TREE}, encrypt(TREE, TREE_MASKS, keys))


def test_level_zero_and_empty_selections():
    assert_same(decrypt(TREE, (), ()), TREE)
    nothing = {"a": False, "b": np.zeros((1, 30), bool), "c": False}
    assert all(new is TREE[name] for name, new in encrypt(TREE, (nothing,), make_keys(1)).items())


def test_leaves_without_weights_pass_through():
    params = {"none": jnp.zeros((0, 3)), "kernels": jnp.zeros((0, 3, 3, 64)), "w": weights(20, 30)}
    masks = nested_masks(importance.l2(params), [1.0])
    for some in (masks, ({"none": True, "kernels": True, "w": True},)):
        protected = encrypt(params, some, make_keys(1))
        assert protected["none"] is params["none"]
        assert_same(decrypt(protected, some, make_keys(1))["w"], jnp.asarray(params["w"]))


def test_two_leaves_may_be_one_array():
    shared = jnp.asarray(weights(500))
    protected = encrypt({"a": shared, "b": shared}, (True,), make_keys(1))
    assert not shared.is_deleted()
    assert equal_weights(protected["a"], protected["b"]) < 3
    assert_same(decrypt(protected, (True,), make_keys(1)), {"a": shared, "b": shared})


def test_a_free_array_stays_free():
    # A leaf that was put nowhere may still join leaves on other devices.
    assert not encrypt({"w": jnp.ones(300)}, (True,), make_keys(1))["w"].committed
    device = jax.devices()[3]
    placed = encrypt({"w": jax.device_put(jnp.ones(300), device)}, (True,), make_keys(1))
    assert placed["w"].devices() == {device}


# --- distribution -------------------------------------------------------------------------------


def eighths(values: np.ndarray) -> dict:
    """The signed histogram in eighths of an octave."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    eighth = np.floor((np.abs(mantissa) - 0.5) * 16)
    columns = np.stack([np.signbit(values), exponent, eighth])
    found, counts = np.unique(columns, axis=1, return_counts=True)
    return dict(zip(map(tuple, found.T), counts.tolist(), strict=True))


def ks(a: np.ndarray, b: np.ndarray) -> float:
    return scipy.stats.ks_2samp(a.ravel(), b.ravel(), method="asymp").pvalue


def assert_distribution_kept(leaf: np.ndarray, mask: np.ndarray, unit: str) -> None:
    cipher = LosslessCipher(unit=unit)
    protected = np.asarray(encrypt({"w": leaf}, ({"w": mask},), make_keys(1), cipher=cipher)["w"])
    selected = np.broadcast_to(mask, leaf.shape)
    assert ks(protected, leaf) >= 0.9
    assert ks(protected[selected], leaf[selected]) >= 0.9
    assert eighths(protected[selected]) == eighths(leaf[selected])
    assert equal_weights(protected[selected], leaf[selected]) <= 3


CONV = np.random.default_rng(0).standard_t(3, (3, 3, 64, 64)).astype(np.float32) * 0.03


@pytest.mark.parametrize("unit", ["weight", "group"])
@pytest.mark.parametrize("fraction", [0.02, 0.08, 0.3])
def test_distribution_is_kept(fraction, unit):
    (mask,) = nested_masks(importance.l2({"w": CONV}), [fraction])
    assert_distribution_kept(CONV, mask["w"], unit)


def test_the_distribution_test_can_fail():
    masks = nested_masks(importance.l2({"w": CONV}), [0.3])
    cipher = GaussianCipher.fit({"w": CONV}, masks)
    protected = np.asarray(encrypt({"w": CONV}, masks, make_keys(1), cipher=cipher)["w"])
    assert ks(protected, CONV) < 1e-3


@pytest.mark.data
@pytest.mark.skipif("SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set")
@pytest.mark.parametrize("layer", [5, 8, 11])
@pytest.mark.parametrize("levels", [PaperLevels(0.02), PaperLevels(0.08), PaperLevels(0.3)])
def test_distribution_is_kept_on_the_papers_network(levels, layer):
    folder = Path(os.environ["SELCRYPT_DATA"]) / "dncnn_color_paper"
    network = safetensors.numpy.load_file(folder / "dncnn_color_sigma50.safetensors")
    learned = safetensors.numpy.load_file(folder / "dncnn_color_sigma50_importance.safetensors")
    leaf = network[f"dncnn.{layer}.weight"]
    masks = nested_masks({"w": learned[f"layer_{layer}"].reshape(64, 64, 1, 1)}, levels)
    assert_distribution_kept(leaf, masks[-1]["w"], "weight")


# --- JAX's own checkers -------------------------------------------------------------------------

CHECKERS = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
    "enable_x64": lambda: jax.enable_x64(True),
    "set_mesh": lambda: jax.set_mesh(jax.make_mesh((8,), ("d",), (AxisType.Explicit,))),
}


@pytest.mark.parametrize("where", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("checker", CHECKERS)
def test_under_the_checkers_of_jax(checker, where):
    params = {"w": where(payload(1, (217,), "float32")), "b": where(payload(1, (3,), "int8"))}
    masks = [{"w": mask, "b": False} for mask in two_rings(3, (217,))]
    keys = list(make_keys(2))
    expected = encrypt(params, masks, keys)
    with CHECKERS[checker]():
        protected = encrypt(params, masks, keys)
        opened = decrypt(protected, masks, keys)
        assert encrypt(params, (False,), keys[:1])["w"] is params["w"]
    assert octets(protected["w"]) == octets(expected["w"])
    assert octets(opened["w"]) == octets(params["w"])


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
@pytest.mark.parametrize("permute", [True, False])
def test_wide_leaves(dtype, permute):
    params = {"w": payload(0, (200,), dtype)}
    cipher = LosslessCipher(permute=permute)
    keys = make_keys(1)
    with pytest.raises(ValueError, match=rf"'w'.*{dtype}.*jax_enable_x64"):
        encrypt(params, (True,), keys)
    with jax.enable_x64(True):
        protected = encrypt(params, (True,), keys, cipher=cipher)
        opened = decrypt(protected, (True,), keys, cipher=cipher)
    assert protected["w"].dtype == dtype
    assert equal_weights(protected["w"], params["w"]) < 10
    assert octets(opened["w"]) == octets(params["w"])
    kept = {"w": weights(200), "count": np.array(2**53 + 1)}
    assert encrypt(kept, ({"w": True, "count": False},), keys)["count"] is kept["count"]


def test_a_second_call_compiles_nothing(caplog):
    keys = make_keys(3)

    def compilations(seed):
        params = {**TREE, "new shape": weights(123, seed=seed)}
        masks = [{**mask, "new shape": m == 2} for m, mask in enumerate(TREE_MASKS)]
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            decrypt(encrypt(params, masks, keys), masks, keys)
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert compilations(0)
    assert compilations(1) == []


def test_leaves_of_a_shape_are_compiled_once(caplog):
    params = {f"w{i}": weights(41, 8, seed=i) for i in range(60)}
    masks = (nested_masks(importance.l2(params), [0.5])[0],)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        encrypt(params, masks, make_keys(1))
    assert 0 < len([m for m in caplog.messages if m.startswith("Compiling")]) < 20


# --- bad input ----------------------------------------------------------------------------------

CONV_LEAF = {"conv": {"w": weights(3, 3, 8, 16)}, "bias": weights(16), "name": "net"}
KERNELS = np.ones((1, 1, 8, 16), bool)


def with_mask(mask: Any, bias: Any = False) -> tuple[Any, ...]:
    return ({"conv": {"w": mask}, "bias": bias, "name": False},)


BAD_MASKS = {
    "wrong size": (with_mask(np.ones((1, 1, 8, 15), bool)), ValueError,
                   ["masks[0]", "'conv/w'", "(3, 3, 8, 16)", "(1, 1, 8, 15)", "layout"]),
    "wrong axes": (with_mask(np.ones((8, 16), bool)), ValueError, ["'conv/w'", "(8, 16)"]),
    "no such path": (({**with_mask(KERNELS)[0], "gamma": False},), ValueError,
                     ["masks[0]", "'gamma'", "'conv/w'", "another tree"]),
    "path missing": (({"conv": {"w": KERNELS}, "name": False},), ValueError,
                     ["masks[0]", "'bias'", "got none", "plain False"]),
    "not nested": (with_mask(KERNELS) + with_mask(KERNELS & (np.arange(16) != 5)), ValueError,
                   ["'conv/w'", "masks[1]", "(0, 0, 0, 5)", "masks[0]", "nested_masks"]),
    "floats": (with_mask(KERNELS.astype(np.float32)), TypeError, ["'conv/w'", "float32"]),
    "a number": (with_mask(1), TypeError, ["masks[0]", "'conv/w'", "int"]),
    "selects a string": (({"conv": False, "bias": False, "name": True},), ValueError,
                         ["'name'", "str", "False"]),
    "one mask": (with_mask(KERNELS)[0], TypeError, ["masks", "dict", "(mask,)"]),
    "too small": (with_mask(KERNELS, bias=np.arange(16) < 3), ValueError,
                  ["'bias'", "ring 1", "3 weights", "63 bits", "128", "Select more groups"]),
}  # fmt: skip


@pytest.mark.parametrize("function", [encrypt, decrypt])
@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks(case, function):
    masks, error, parts = BAD_MASKS[case]
    before = octets(CONV_LEAF["conv"]["w"])
    with pytest.raises(error) as caught:
        function(CONV_LEAF, masks, make_keys(len(masks) if isinstance(masks, tuple) else 1))
    assert [part for part in parts if part not in str(caught.value)] == []
    assert octets(CONV_LEAF["conv"]["w"]) == before


def test_traced_masks_are_refused():
    keys = make_keys(1)
    with pytest.raises(TypeError, match=r"masks\[0\]: 'conv/w': .*concrete.*outside jit"):
        jax.jit(lambda mask: encrypt(CONV_LEAF, with_mask(mask), keys)["bias"])(KERNELS)


OLD = np.array([0, 7], np.uint32)  # what jax.random.PRNGKey(7) is
BAD_KEYS = {
    "too few": (make_keys(1), ValueError, ["expected 2", "got 1", "keys[:m]"]),
    "too many": (make_keys(3), ValueError, ["expected 2", "got 3"]),
    "a single key": (jax.random.key(0), ValueError, ["expected 2", "a single key"]),
    "an integer": (12345, ValueError, ["expected 2", "int"]),
    "integers": ([12345, 67890], TypeError, ["keys[0]", "typed key", "int", "ring_keys"]),
    "bytes": ([make_keys(1)[0], b"12345"], TypeError, ["keys[1]", "typed key", "bytes"]),
    "old style": (OLD, TypeError, ["keys[0]", "typed key", "uint32", "wrap_key_data"]),
    "old styles": ([OLD, OLD], TypeError, ["keys[0]", "an array of uint32"]),
    "keys of keys": (jax.random.split(jax.random.key(0), (2, 4)), ValueError, ["keys[0]", "(4,)"]),
    "two kinds": ([make_keys(1)[0], make_keys(1, "rbg")[0]], ValueError,
                  ["keys[1]", "key<fry>", "key<rbg>"]),
}  # fmt: skip


@pytest.mark.parametrize("function", [encrypt, decrypt])
@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys(case, function):
    keys, error, parts = BAD_KEYS[case]
    with pytest.raises(error) as caught:
        function(CONV_LEAF, with_mask(KERNELS & (np.arange(16) < 8)) + with_mask(KERNELS), keys)
    message = str(caught.value)
    assert [part for part in ["keys", *parts] if part not in message] == []
    assert "12345" not in message  # it may be a secret


@pytest.mark.parametrize(
    ("leaf", "parts"),
    [
        (np.ones(300, bool), ["bool", "no cipher", "False"]),
        (np.ones(300, np.complex64), ["complex64", "no cipher"]),
        (jax.random.split(jax.random.key(0), 300), ["key<fry>", "no cipher"]),
        (jnp.ones(300, jnp.int4), ["int4", "8 bits", "ring 1"]),
        (jnp.ones(300, jnp.float4_e2m1fn), ["float4_e2m1fn", "8 bits"]),
    ],
    ids=["bool", "complex64", "key", "int4", "float4"],
)
def test_dtypes_without_a_cipher(leaf, parts):
    with pytest.raises(ValueError, match="'w'") as caught:
        encrypt({"ok": weights(300), "w": leaf}, (True,), make_keys(1))
    assert [part for part in parts if part not in str(caught.value)] == []
    protected = encrypt({"ok": weights(300), "w": leaf}, ({"ok": True, "w": False},), make_keys(1))
    assert protected["w"] is leaf


@pytest.mark.parametrize(
    ("dtype", "cipher", "enough"),
    [
        ("int8", {}, 35),  # 35! = 1.03e40 > 2**128 = 3.4e38 > 34! = 2.95e38
        ("float32", {}, 6),  # 6·20 + log2 720 = 129.5; 5·20 + log2 120 = 106.9
        ("float32", {"permute": False}, 6),  # 24 bits each
        ("float8_e5m2", {"permute": False}, 43),  # 3 bits each
        ("uint16", {"fine_bits": 4}, 19),  # 19·4 + log2 19! = 132.8; 18·4 + log2 18! = 124.5
    ],
)
def test_the_smallest_ring(dtype, cipher, enough):
    leaf = payload(0, (64,), dtype)
    cipher = LosslessCipher(**cipher)
    with pytest.raises(ValueError, match="'w', ring 1: too small to hide in"):
        encrypt({"w": leaf}, ({"w": np.arange(64) < enough - 1},), make_keys(1), cipher=cipher)
    protected = encrypt({"w": leaf}, ({"w": np.arange(64) < enough},), make_keys(1), cipher=cipher)
    assert octets(protected["w"]) != octets(leaf)


def test_bad_options():
    with pytest.raises(ValueError, match=r"unit.*'weight' or 'group'.*'kernel'"):
        LosslessCipher(unit="kernel")
    with pytest.raises(ValueError, match=r"fine_bits.*-1"):
        LosslessCipher(fine_bits=-1)
    with pytest.raises(ValueError, match=r"'w', ring 1.*at most 7 for bfloat16, got 8"):
        encrypt(
            {"w": jnp.ones(300, jnp.bfloat16)},
            (True,),
            make_keys(1),
            cipher=LosslessCipher(fine_bits=8),
        )


def test_abstract_leaves():
    # Checks and key derivation must not depend on values.
    shapes = {f"w{i}": jax.ShapeDtypeStruct((64,), jnp.float32) for i in range(50)}
    result = jax.eval_shape(lambda p, k: encrypt(p, (True,), k), shapes, make_keys(1))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), result) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes
    )


def test_a_mask_in_another_form_is_the_same_mask():
    leaf = weights(3, 3, 12, 10)
    mask = np.asarray(nested_masks(importance.l2({"w": leaf}), [0.3])[0]["w"])
    protected = encrypt({"w": leaf}, ({"w": mask},), make_keys(1))
    wide = np.broadcast_to(mask, leaf.shape)
    assert_same(decrypt(protected, ({"w": wide},), make_keys(1)), {"w": leaf})


@pytest.mark.parametrize(
    ("cipher", "mask"),
    [
        (LosslessCipher(unit="group"), True),
        (LosslessCipher(permute=False, fine_bits=20), True),
        (LosslessCipher(permute=False, fine_bits=1), True),
    ],
)
def test_a_cipher_that_leaves_all_coarse_bits_in_place(cipher, mask):
    with pytest.raises(ValueError, match=r"'w'.*changes more than fine bits.*within an eighth"):
        encrypt({"w": weights(3, 3, 16, 16)}, ({"w": mask},), make_keys(1), cipher=cipher)


def test_one_key_for_two_levels():
    leaf = weights(30, 30)
    masks = nested_masks(importance.l2({"w": leaf}), [0.5, 1.0])
    key = jax.random.key(0)
    for keys in ((key, key), jnp.stack([key, key])):
        with pytest.raises(ValueError, match=r"keys\[1\]: expected a key of its own"):
            encrypt({"w": leaf}, masks, keys)


def test_no_masks_at_all():
    with pytest.raises(ValueError, match="expected one mask a level, got none"):
        encrypt({"w": weights(3, 3)}, (), ())


def test_an_array_for_a_subtree_is_told_apart():
    params = [weights(30, 30), weights(30, 30)]
    (mask,) = nested_masks(importance.l2(params), [0.5])
    with pytest.raises(ValueError, match=r"whole subtree.*single level pass \(mask,\)"):
        encrypt(params, mask, make_keys(2))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((20, 20), ">f4"), "'w': expected native byte order, got >f4"),
        (jax.ShapeDtypeStruct((20, 20), "float32"), "'w': expected a JAX or NumPy array"),
    ],
)
def test_arrays_that_are_none(leaf, message):
    with pytest.raises(ValueError, match=message):
        encrypt({"w": leaf}, (True,), make_keys(1))


def test_a_cipher_is_an_object():
    with pytest.raises(TypeError, match="cipher: expected an object with check and run"):
        encrypt({"w": weights(20, 20)}, (True,), make_keys(1), cipher=LosslessCipher)


# --- donation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["threefry", "chacha20"])
def test_donated_leaves_are_used_up(impl):
    keys = make_keys(2, IMPLEMENTATIONS[impl])
    expected = encrypt(PARAMS, MASKS, keys)
    given = {name: jnp.array(leaf, copy=True) for name, leaf in PARAMS.items()}
    protected = encrypt(given, MASKS, keys, donate=True)
    assert_same(jax.tree.map(np.asarray, protected), jax.tree.map(np.asarray, expected))
    assert {name: leaf.is_deleted() for name, leaf in given.items()} == {
        "conv": True,
        "half": True,
        "int": False,
    }
    opened = decrypt(protected, MASKS, keys, donate=True)
    assert_same(jax.tree.map(np.asarray, opened), PARAMS)
    assert protected["conv"].is_deleted()


def test_what_is_not_ours_is_not_used_up():
    keys = make_keys(1, chacha20_impl)
    twice = jnp.asarray(weights(40, 40))
    mine = weights(3, 3, 30, 30, seed=1)
    before = mine.copy()
    params = {"a": twice, "b": {"c": twice}, "d": mine}
    protected = encrypt(params, ({"a": True, "b": False, "d": True},), keys, donate=True)
    assert protected["b"]["c"] is twice
    assert not twice.is_deleted()
    np.testing.assert_array_equal(mine, before)
    assert (np.asarray(protected["d"]) != before).any()


def test_nothing_is_used_up_by_a_call_that_fails():
    params = {"a": jnp.asarray(weights(40, 40)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="too small to hide in"):
        encrypt(params, ({"a": True, "b": True},), make_keys(1), donate=True)
    assert not params["a"].is_deleted()


# --- inside of a program ------------------------------------------------------------------------


def chain(params, x, *, scale):
    for name in sorted(params):
        x = jnp.tanh(scale * (x @ params[name]))
    return x


@pytest.mark.parametrize("permute", [True, False])
def test_a_program_unlocks_for_itself(permute):
    cipher = LosslessCipher(permute=permute)
    params = {f"layer{i}": jnp.asarray(weights(48, 48, seed=i)) for i in range(3)}
    masks = nested_masks(importance.l2(params), [0.3, 0.6])
    keys = make_keys(2, chacha20_impl)
    protected = encrypt(params, masks, keys, cipher=cipher)
    x = jnp.asarray(weights(4, 48))
    forward = jax.jit(unlocking(chain, masks, cipher=cipher))
    expected = jax.jit(chain)(params, x, scale=0.1)
    np.testing.assert_array_equal(forward(protected, keys, x, scale=0.1), expected)
    lower = jax.jit(unlocking(chain, masks[:1], cipher=cipher))(protected, keys[:1], x, scale=0.1)
    assert not (lower == expected).all()


ROOM = """
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
        [sys.executable, "-c", ROOM],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | flags,
    )
    assert float(run.stdout) < 0.5
