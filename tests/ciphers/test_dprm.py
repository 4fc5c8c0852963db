"""`encrypt` and `decrypt`: levels and keys, JAX's checkers, bad input, donation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from strategies import JAX_CHECKERS, assert_same, bits, octets, payload, two_rings

from selcrypt_jax import (
    LosslessCipher,
    Secret,
    decrypt,
    encrypt,
    importance,
    level_key,
    nested_masks,
    new_model_id,
    ring_keys,
)
from selcrypt_jax._keys.chacha import chacha20_impl


def make_keys(levels: int, impl: Any = chacha20_impl, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl=impl), levels)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- levels and keys ----------------------------------------------------------------------------

TREE = {"a": weights(3, 3, 16, 16), "b": weights(40, 30, seed=1), "c": weights(7)}
TREE_MASKS = nested_masks(importance.l2({"a": TREE["a"], "b": TREE["b"]}), [0.2, 0.5, 0.9])
TREE_MASKS = tuple({**mask, "c": False} for mask in TREE_MASKS)


def test_level_opens_its_rings_and_leaves_the_others():
    keys = make_keys(3)
    protected = encrypt(TREE, TREE_MASKS, keys)
    opened = decrypt(protected, TREE_MASKS[:2], keys[:2])
    for name in ("a", "b"):
        own, every = (np.broadcast_to(mask[name], TREE[name].shape) for mask in TREE_MASKS[1:])
        assert np.array_equal(bits(opened[name])[own], bits(TREE[name])[own])
        higher = every & ~own
        assert np.array_equal(bits(opened[name])[higher], bits(protected[name])[higher])
        assert np.array_equal(bits(opened[name])[~every], bits(TREE[name])[~every])
    assert opened["c"] is TREE["c"]


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


# --- JAX's own checkers -------------------------------------------------------------------------

CHECKERS = JAX_CHECKERS | {
    "set_mesh": lambda: jax.set_mesh(jax.make_mesh((8,), ("d",), (AxisType.Explicit,))),
}
FAST_CHECKERS = ("debug_infs", "transfer_guard", "checking_leaks")


# The NumPy engine, and XLA's, of which most programs are compiled again under each flag.
@pytest.mark.parametrize(
    ("checker", "impl"),
    [(checker, chacha20_impl) for checker in CHECKERS]
    + [
        pytest.param(c, "threefry2x32", marks=[] if c in FAST_CHECKERS else [pytest.mark.slow])
        for c in CHECKERS
    ],
)
@pytest.mark.parametrize("where", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_under_the_checkers_of_jax(checker, impl, where):
    params = {"w": where(payload(1, (217,), "float32")), "b": where(payload(1, (3,), "int8"))}
    masks = [{"w": mask, "b": False} for mask in two_rings(3, (217,))]
    keys = list(make_keys(2, impl))
    expected = encrypt(params, masks, keys)
    with CHECKERS[checker]():
        protected = encrypt(params, masks, keys)
        opened = decrypt(protected, masks, keys)
        assert encrypt(params, (False,), keys[:1])["w"] is params["w"]
    assert octets(protected["w"]) == octets(expected["w"])
    assert octets(opened["w"]) == octets(params["w"])


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
                     ["masks[0]", "'gamma'", "'conv/w'", "from the same tree"]),
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
                  ["keys[1]", "key<chacha20>", "key<rbg>"]),
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
        with pytest.raises(ValueError, match=r"keys\[1\]: expected a different key"):
            encrypt({"w": leaf}, masks, keys)


def test_no_masks_at_all():
    with pytest.raises(ValueError, match="expected one mask per level, got none"):
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


PARAMS = {
    "conv": payload(0, (3, 3, 8, 16), "float32"),
    "half": payload(1, (16, 40), "bfloat16"),
    "int": payload(2, (3,), "int8"),
}
MASKS = [
    {"conv": conv, "half": half, "int": False}
    for conv, half in zip(two_rings(3, (1, 1, 8, 16)), two_rings(4, (16, 40)), strict=True)
]


@pytest.mark.parametrize("impl", ["threefry2x32", chacha20_impl], ids=["threefry", "chacha20"])
def test_donated_leaves_are_used_up(impl):
    keys = make_keys(2, impl)
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


def test_what_is_transformed_is_not_used_up():
    params = {"a": jnp.asarray(weights(20, 20)), "b": jnp.asarray(weights(300))}
    masks, keys = ({"a": True, "b": True},), make_keys(1)

    def loss(leaf: Any, keys: Any) -> Any:
        return encrypt({**params, "a": leaf}, masks, keys, donate=True)["b"].sum()

    jax.grad(loss)(params["a"], keys)
    jax.jit(loss)(params["a"], keys)
    assert not any(leaf.is_deleted() for leaf in params.values())


def test_the_result_is_nobody_elses_memory():
    leaf = np.zeros(16_384, np.float32)
    params = {"w": leaf, "v": jnp.asarray(leaf)}
    protected = encrypt(params, ({"w": True, "v": True},), make_keys(1))
    before = jax.tree.map(octets, protected)
    leaf += 1
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(protected["v"])
    again = decrypt(protected, ({"w": True, "v": False},), make_keys(1))
    assert octets(again["w"]) == bytes(4 * 16_384)
    assert octets(protected["w"]) == before["w"]


def test_donation_under_jit():
    keys = make_keys(2)
    expected = encrypt(PARAMS, MASKS, keys)
    given = {name: jnp.array(leaf, copy=True) for name, leaf in PARAMS.items()}
    function = jax.jit(lambda params, keys: encrypt(params, MASKS, keys), donate_argnums=0)
    protected = function(given, keys)
    assert_same(jax.tree.map(np.asarray, protected), jax.tree.map(np.asarray, expected))
    assert all(leaf.is_deleted() for leaf in given.values())
