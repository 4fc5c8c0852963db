"""Derivatives through `encrypt`, `decrypt` and `unlocking`; tests/contract has each cipher's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selcrypt_jax as sj

RNG = np.random.default_rng(0)
PARAMS = {
    "in": RNG.standard_normal((12, 40)).astype(np.float32) / 4,
    "out": RNG.standard_normal((40, 10)).astype(np.float32) / 4,
    "bias": np.zeros((1, 10), np.float32),
}
X = jnp.asarray(RNG.standard_normal((5, 12)), jnp.float32)
SCORES = sj.importance.l2({name: PARAMS[name] for name in ("in", "out")})
MASKS = tuple(mask | {"bias": False} for mask in sj.nested_masks(SCORES, [0.2, 0.5]))
KEYS = sj.ring_keys(sj.level_key(bytes(32), bytes(16), levels=2))
# The form that compiles the fastest; `contract` has them all.
STREAM = sj.LosslessCipher(permute=False)
encrypt, decrypt, unlocking = (
    partial(function, cipher=STREAM) for function in (sj.encrypt, sj.decrypt, sj.unlocking)
)
PUBLIC = encrypt(jax.tree.map(jnp.asarray, PARAMS), MASKS, KEYS)


def loss(params: Any, x: Any) -> Any:
    return jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]).mean()


def of_plain(gradient: Any, level: int = 2) -> Any:
    """The tree with zeros in place of encrypted weights."""
    return jax.tree.map(lambda g, mask: jnp.where(mask, 0, g), gradient, MASKS[level - 1])


def assert_near(actual: Any, expected: Any) -> None:
    for name, leaf in expected.items():
        np.testing.assert_allclose(actual[name], leaf, rtol=1e-4, atol=1e-6)


OPEN = jax.grad(loss)(PARAMS, X)
unlocked_loss = unlocking(loss, MASKS)


@pytest.mark.parametrize("jit", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_unlocking_composes_on_both_sides(jit):
    value, gradient = jit(jax.value_and_grad(unlocked_loss))(PUBLIC, KEYS, X)
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-5)
    assert_near(gradient, of_plain(OPEN))
    value, gradient = jit(unlocking(jax.value_and_grad(loss), MASKS))(PUBLIC, KEYS, X)
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-5)
    assert_near(gradient, OPEN)


def test_a_lower_level_has_the_gradient_of_what_it_runs():
    gradient = jax.grad(unlocking(loss, MASKS[:1]))(PUBLIC, KEYS[:1], X)
    expected = jax.grad(loss)(decrypt(PUBLIC, MASKS[:1], KEYS[:1]), X)
    # What it decrypts gets none; what stays encrypted is a weight like any other to it.
    assert_near(gradient, of_plain(expected, level=1))


def test_what_was_trained_is_still_the_same_release():
    gradient = jax.grad(unlocked_loss)(PUBLIC, KEYS, X)
    trained = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, PUBLIC, gradient)
    opened = decrypt(trained, MASKS, KEYS)
    expected = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, PARAMS, of_plain(OPEN))
    assert_near(opened, expected)
    assert loss(opened, X) < loss(PARAMS, X)


def through(transform: Any) -> Any:
    return transform(lambda params: loss(decrypt(params, MASKS, KEYS), X))


def test_jvp_vjp_and_linearize():
    tangent = jax.tree.map(jnp.ones_like, PUBLIC)
    expected = sum(leaf.sum() for leaf in of_plain(OPEN).values())
    value, found = through(lambda f: jax.jvp(f, (PUBLIC,), (tangent,)))
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    _, linear = through(lambda f: jax.linearize(f, PUBLIC))
    np.testing.assert_allclose(linear(tangent), expected, rtol=1e-4)
    _, pull = through(lambda f: jax.vjp(f, PUBLIC))
    assert_near(pull(jnp.float32(1))[0], of_plain(OPEN))


@pytest.mark.parametrize("inner", [jax.checkpoint, pytest.param(jax.jit, marks=pytest.mark.slow)])
def test_checkpoint_and_jit_inside(inner):
    gradient = jax.grad(inner(unlocked_loss))(PUBLIC, KEYS, X)
    assert_near(gradient, of_plain(OPEN))


def test_a_gradient_for_each_example():
    each = jax.vmap(jax.grad(unlocked_loss), (None, None, 0))(PUBLIC, KEYS, X[:, None])
    expected = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, X[:, None])
    for name, mask in MASKS[-1].items():
        np.testing.assert_allclose(
            each[name], np.where(mask, 0, expected[name]), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("jit", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_hessian_vector_products(jit):
    """The gradient of the plain weights, with the encrypted ones held constant."""
    tangent = jax.tree.map(jnp.ones_like, PUBLIC)

    def product(gradient: Any, params: Any, tangent: Any) -> Any:
        return jax.jvp(gradient, (params,), (tangent,))[1]

    @jit
    def found(params: Any, keys: Any) -> Any:
        return product(jax.grad(lambda p: unlocked_loss(p, keys, X)), params, tangent)

    params = jax.tree.map(jnp.asarray, PARAMS)
    expected = product(jax.grad(partial(loss, x=X)), params, of_plain(tangent))
    assert_near(found(PUBLIC, KEYS), of_plain(expected))


def test_integers_beside_floats():
    params = {"w": PARAMS["in"], "table": np.arange(300, dtype=np.int32)}
    masks = ({"w": MASKS[0]["in"], "table": True},)
    public = encrypt(params, masks, KEYS[:1])

    def total(w: Any) -> Any:
        opened = decrypt({**public, "w": w}, masks, KEYS[:1])
        return opened["w"].sum() + opened["table"].sum().astype(jnp.float32)

    assert_near(
        {"w": jax.grad(total)(public["w"])}, {"w": np.where(masks[0]["w"], 0, np.float32(1))}
    )
    with pytest.raises(TypeError, match="int32"):  # JAX's own
        jax.grad(unlocking(lambda params: params["w"].sum(), masks))(public, KEYS[:1])


@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda p: jax.vjp(f, p)[1](1.0)[0]])
def test_numpy_leaves_are_differentiated_too(transform):
    """NumPy arrays, as `open_model` and safetensors return them."""
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal((16, 32)).astype(np.float32) for n in ("a", "b")}
    masks = sj.nested_masks(sj.importance.l2(params), [0.2, 0.5])
    keys = sj.ring_keys(sj.level_key(bytes(32), bytes(16), levels=2))
    locked = jax.tree.map(np.asarray, sj.encrypt(params, masks, keys))
    found = transform(
        lambda p: sum(jnp.square(x).sum() for x in sj.decrypt(p, masks, keys).values())
    )
    for name, gradient in found(locked).items():
        np.testing.assert_allclose(
            gradient, np.where(masks[-1][name], 0, 2 * params[name]), rtol=1e-6
        )
