"""One contract for every cipher: a new one is a row of `MEMBERS`."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import assert_same, octets

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    Secret,
    decrypt,
    encrypt,
    importance,
    level_key,
    nested_masks,
    ring_keys,
)


class SignCipher:
    """A user's own cipher: it flips signs, and ignores `donate`."""

    def check(self, ring, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params {ring.name!r}: expected floats, got {leaf.dtype}.")

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        result = dict(leaves)
        for ring, key in zip(rings, keys, strict=True):
            leaf = result[ring.name]
            signs = jax.random.rademacher(key, leaf.shape, leaf.dtype)
            result[ring.name] = jnp.where(jax.device_put(ring.mask), leaf * signs, leaf)
        return result


class Member(NamedTuple):
    """A cipher in the contract.

    Attributes:
        make: makes the cipher from parameters and masks.
        error: how much a decrypted weight may differ; 0 for bit for bit.
        bad: a leaf that it refuses, and what its message says.
    """

    make: Callable[[Any, Any], Any]
    error: float
    bad: tuple[np.ndarray, str]


SMALL = np.ones(3, np.float32), "'bad', ring 1: too small to hide in"
INTEGERS = np.arange(300, dtype=np.int32), "'bad': expected floats"
FEW_BITS = np.ones(9, np.int8), "'bad', ring 1: too small to hide in: 9 weights of int8"


def lossless(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda params, masks: LosslessCipher(**options)


WRAPPED = "gaussian, wrapped"
MEMBERS = {
    "weight": Member(lossless(), 0, SMALL),
    "group": Member(lossless(unit="group"), 0, SMALL),
    "stream": Member(lossless(permute=False), 0, SMALL),
    "order only": Member(lossless(fine_bits=0), 0, FEW_BITS),
    "gaussian": Member(GaussianCipher.fit, 1e-5, INTEGERS),
    WRAPPED: Member(partial(GaussianCipher.fit, wrap=True), 1e-5, INTEGERS),
    "a user's own": Member(lambda params, masks: SignCipher(), 0, INTEGERS),
}
every_member = pytest.mark.parametrize("name", MEMBERS)


def compiled(*fast: str) -> Any:
    """Every member; those whose programs are large, or like another's, are slow tests."""
    marks = {name: [] if name in fast else [pytest.mark.slow] for name in MEMBERS}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


RNG = np.random.default_rng(0)
PARAMS = {
    "conv": (RNG.standard_normal((3, 3, 8, 16)) * 0.1).astype(np.float32),
    "dense": (RNG.standard_normal((16, 40)) * 0.1).astype(np.float32),
    "count": np.arange(3, dtype=np.int32),
}
SPECS = {"conv": P(None, None, None, "d"), "dense": P("d"), "count": P()}
CHOSEN = nested_masks(importance.l2({n: PARAMS[n] for n in ("conv", "dense")}), [0.3, 0.6])
MASKS = tuple(mask | {"count": False} for mask in CHOSEN)
KEYS = ring_keys(level_key(Secret(bytes(range(32))), bytes(16), levels=2))


def selected(name: str, level: int = 2) -> np.ndarray:
    return np.broadcast_to(MASKS[level - 1][name], PARAMS[name].shape)


def given() -> dict[str, Any]:
    return {name: jnp.array(leaf, copy=True) for name, leaf in PARAMS.items()}


@cache
def cipher(name: str) -> Any:
    return MEMBERS[name].make(PARAMS, MASKS)


def forth(name: str) -> Callable[[Any, Any], Any]:
    return lambda params, keys: encrypt(params, MASKS, keys, cipher=cipher(name))


def back(name: str) -> Callable[[Any, Any], Any]:
    return lambda params, keys: decrypt(params, MASKS, keys, cipher=cipher(name))


def there_and_back(name: str) -> Callable[[Any, Any], Any]:
    def function(params: Any, keys: Any) -> Any:
        protected = forth(name)(params, keys)
        return protected, back(name)(protected, keys)

    return function


@cache
def protected(name: str) -> dict[str, np.ndarray]:
    """The reference result: the simplest way to run it, which the others are compared with."""
    return jax.tree.map(np.asarray, forth(name)(PARAMS, KEYS))


def assert_near(name: str, actual: Any, expected: Any) -> None:
    error = MEMBERS[name].error
    if not error:
        assert_same(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected))
    for leaf in expected:
        np.testing.assert_allclose(actual[leaf], expected[leaf], atol=error, rtol=0)


@every_member
def test_round_trip(name):
    public = protected(name)
    opened = back(name)(public, KEYS)
    assert_near(name, opened, PARAMS)
    first = decrypt(public, MASKS[:1], KEYS[:1], cipher=cipher(name))
    for leaf in CHOSEN[0]:
        low, high = selected(leaf, 1), selected(leaf)
        assert octets(public[leaf][~high]) == octets(PARAMS[leaf][~high])
        assert (public[leaf] == PARAMS[leaf])[high].mean() < 0.6
        # Level 1 opens its ring and leaves the other as it is.
        assert octets(np.asarray(first[leaf])[~low]) == octets(public[leaf][~low])
        np.testing.assert_array_equal(first[leaf][low], opened[leaf][low])
    assert public["count"] is PARAMS["count"]


@every_member
def test_donated_leaves_give_the_same(name):
    params = given()
    public = encrypt(params, MASKS, KEYS, cipher=cipher(name), donate=True)
    assert_near(name, public, protected(name))
    assert_near(name, decrypt(public, MASKS, KEYS, cipher=cipher(name), donate=True), PARAMS)
    assert not params["count"].is_deleted()


def sines(tree: dict[str, Any]) -> Any:
    return sum(jnp.sin(leaf).sum() for leaf in tree.values() if leaf.dtype != jnp.int32)


def floats_of(tree: Any) -> dict[str, Any]:
    return {name: jnp.asarray(tree[name]) for name in CHOSEN[0]}


def assert_gradient(gradient: Any, start: Any) -> None:
    """The gradient of `sines`: cos for plain weights, 0 for the others."""
    for leaf, found in gradient.items():
        expected = np.where(selected(leaf), 0, np.cos(start[leaf]))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@compiled("weight", "stream", "gaussian", "a user's own")
def test_jit_and_its_gradient(name):
    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def function(floats, count, keys):
        public, opened = there_and_back(name)({**floats, "count": count}, keys)
        return (sines(public) + sines(opened)) / 2, (public, opened)

    (_, (public, opened)), gradient = function(floats_of(PARAMS), PARAMS["count"], KEYS)
    assert_near(name, public, protected(name))
    assert_near(name, opened, PARAMS)
    assert_gradient(gradient, PARAMS)


@every_member
@pytest.mark.parametrize("run", [forth, back])
def test_eager_gradient(name, run):
    start = PARAMS if run is forth else protected(name)
    value, gradient = jax.value_and_grad(
        lambda floats, keys: sines(run(name)({**start, **floats}, keys))
    )(floats_of(start), KEYS)
    np.testing.assert_allclose(value, sines(run(name)(start, KEYS)), rtol=1e-6)
    assert_gradient(gradient, start)


@compiled("weight", "a user's own")
def test_vmap_over_params_and_keys(name):
    keys = jnp.stack(KEYS)
    # What the second of two rows holds must not matter to the first.
    params = {n: jnp.asarray(np.stack([leaf, leaf[::-1]])) for n, leaf in PARAMS.items()}
    public = jax.vmap(forth(name))(params, jnp.stack([keys, keys[::-1]]))
    assert_near(name, {n: leaf[0] for n, leaf in public.items()}, protected(name))


@compiled("weight", "group", "stream", "order only", "a user's own")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_over_eight_devices(name, kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    params = {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in PARAMS.items()}
    public, opened = there_and_back(name)(params, KEYS)
    assert_near(name, public, protected(name))
    assert_near(name, opened, PARAMS)
    for leaf in PARAMS:
        assert public[leaf].sharding.is_equivalent_to(params[leaf].sharding, params[leaf].ndim)
    floats = {leaf: params[leaf] for leaf in CHOSEN[0]}
    with jax.set_mesh(mesh):  # which JAX asks for, whatever is differentiated
        gradient = jax.grad(lambda floats: sines(forth(name)({**params, **floats}, KEYS)))(floats)
    assert_gradient(gradient, PARAMS)


@every_member
def test_wrong_keys_open_nothing(name):
    opened = back(name)(protected(name), KEYS[::-1])
    for leaf in CHOSEN[0]:
        near = np.isclose(opened[leaf], PARAMS[leaf], rtol=0, atol=1e-4)
        assert near[selected(leaf)].mean() < 0.6  # half of all signs are right by chance
        assert octets(np.asarray(opened[leaf])[~selected(leaf)]) == octets(
            PARAMS[leaf][~selected(leaf)]
        )


@every_member
def test_bad_input(name):
    leaf, message = MEMBERS[name].bad
    params, mask = given() | {"bad": leaf}, MASKS[0] | {"bad": True}
    if isinstance(cipher(name), GaussianCipher):
        with pytest.raises(ValueError, match=message):
            GaussianCipher.fit(params, (mask,))
        message = "'bad', ring 1: the Gaussian cipher has no side data"
    with pytest.raises(ValueError, match=message):
        encrypt(params, (mask,), KEYS[:1], cipher=cipher(name), donate=True)
    with pytest.raises(ValueError, match=r"'bad'.*bool, which has no cipher"):
        encrypt({**params, "bad": leaf > 0}, (mask,), KEYS[:1], cipher=cipher(name), donate=True)
    with pytest.raises(ValueError, match="keys: expected 2"):
        decrypt(PARAMS, MASKS, KEYS[:1], cipher=cipher(name))
    # Nothing is used up by a call that fails.
    assert not any(leaf.is_deleted() for n, leaf in params.items() if n != "bad")
