"""Closed-form importance against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selcrypt_jax import importance

KEY = jax.random.key(0)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


SHAPES = [(3, 3, 4, 5), (3, 4, 5), (2, 3, 3, 4, 5), (4, 5), (1, 1, 4, 5)]


def grouped(leaf: np.ndarray, granularity: str) -> np.ndarray:
    """[groups..., weights in a group] of an HWIO leaf."""
    keep = {"kernel": leaf.shape[-2:], "filter": leaf.shape[-1:], "weight": leaf.shape}[granularity]
    rest = leaf.reshape(-1, *keep) if granularity != "weight" else leaf[None]
    return np.moveaxis(rest, 0, -1)


ORACLES = {
    "descend": lambda groups: np.abs(groups.mean(-1)),
    "ascend": lambda groups: -np.abs(groups.mean(-1)),
    "l2": lambda groups: np.sqrt((groups**2).sum(-1)),
    "mean": lambda groups: -np.abs(np.abs(groups.mean(-1)) - np.abs(groups.mean(-1)).mean()),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["kernel", "filter", "weight"])
@pytest.mark.parametrize("name", ORACLES)
def test_magnitudes(name, granularity, shape):
    leaf = weights(*shape)
    score = getattr(importance, name)({"conv": leaf}, granularity=granularity)["conv"]
    assert score.dtype == jnp.float32
    assert score.ndim == leaf.ndim
    np.broadcast_shapes(score.shape, leaf.shape)
    expected = ORACLES[name](grouped(leaf, granularity))
    np.testing.assert_allclose(score.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["kernel", "filter", "weight"])
@pytest.mark.parametrize("name", ORACLES)
def test_layouts_agree_on_what_a_group_is(name, granularity):
    hwio = weights(3, 3, 4, 5)
    score = getattr(importance, name)
    jax_scores = score({"w": hwio}, granularity=granularity)["w"]
    torch_scores = score({"w": hwio.transpose(3, 2, 0, 1)}, granularity=granularity, layout="OIHW")[
        "w"
    ]
    np.testing.assert_allclose(torch_scores.transpose(2, 3, 1, 0), jax_scores, rtol=1e-5, atol=1e-6)


def test_vectors_and_scalars_have_a_group_an_element():
    scores = importance.l2({"bias": weights(7), "scale": weights()}, select=".")
    assert scores["bias"].shape == (7,)
    assert scores["scale"].shape == ()


def test_default_selection_and_what_is_left_out():
    params = {
        "conv": weights(3, 3, 2, 2),
        "bias": weights(2),
        "step": np.arange(6).reshape(2, 3),
        "name": "resnet",
        "act": jax.nn.relu,
    }
    scores = importance.l2(params)
    assert scores["conv"].shape == (1, 1, 2, 2)
    assert all(scores[name] is False for name in ("bias", "step", "name", "act"))


def test_random_depends_on_key_and_name_alone():
    a, b = weights(3, 3, 4, 5), weights(3, 3, 4, 5)
    first = importance.random({"a": a, "b": b}, key=KEY)
    second = importance.random({"b": a, "c": {"a": b}}, key=KEY)
    other = importance.random({"a": a, "b": b}, key=jax.random.key(1))
    assert first["a"].shape == (1, 1, 4, 5)
    np.testing.assert_array_equal(first["b"], second["b"])
    assert (first["a"] != first["b"]).all()
    assert (first["a"] != other["a"]).all()
    assert ((first["a"] >= 0) & (first["a"] < 1)).all()


def test_low_precision_and_integers_are_measured_in_float32():
    leaf = weights(3, 3, 4, 5)
    half = leaf.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        importance.l2({"w": half})["w"], importance.l2({"w": half.astype(np.float32)})["w"]
    )
    whole = (leaf * 40).astype(np.int8)
    np.testing.assert_array_equal(
        importance.l2({"w": whole}, select="w")["w"],
        importance.l2({"w": whole.astype(np.float32)})["w"],
    )


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("taylor", lambda product: np.abs(product.sum(0, keepdims=True))),
        ("fisher", lambda product: (product**2).sum(0, keepdims=True)),
    ],
)
def test_gradients(name, score, jit):
    params = {"a": weights(4, 6), "b": weights(6, 3)}
    x, y = weights(5, 8, 4), weights(5, 8, 3)
    measure = getattr(importance, name)

    def scores(params, batches):
        return measure(loss_fn, params, batches, granularity="filter")

    actual = (jax.jit(scores) if jit else scores)(params, (x, y))
    for leaf in params:
        expected = np.zeros((1, params[leaf].shape[1]))
        for batch in zip(x, y, strict=True):
            gradient = jax.grad(loss_fn)(params, batch)[leaf]
            expected = expected + score(params[leaf] * np.asarray(gradient)) / len(x)
        np.testing.assert_allclose(actual[leaf], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: importance.l2({"dense": weights(2, 3)}, select="conv"),
            r"'conv' matches no leaf. There are: 'dense'.*change `select`",
        ),
        (lambda: importance.l2({"bias": weights(3)}), "default .* matches no leaf"),
        (lambda: importance.l2({"a": weights(2, 3)}, select="("), "not a regular expression"),
        (
            lambda: importance.l2({"a": weights(2, 3), "f": jnp.mean}, select="."),
            "'f': expected an array of floats or integers, got ",
        ),
        (
            lambda: importance.l2({"m": np.ones((2, 3), bool)}, select="m"),
            "'m': expected an array of floats or integers, got bool",
        ),
        (
            lambda: importance.l2({"q": np.ones((2, 3), np.uint8)}, select="q"),
            "'q': expected floats or signed integers, got uint8.*packed.*importance.random",
        ),
        (
            lambda: importance.l2({"a": weights(2, 3)}, granularity="kernels"),
            "granularity: expected 'kernel', 'filter' or 'weight', got 'kernels'",
        ),
        (
            lambda: importance.l2({"a": weights(2, 3)}, layout="NHWC"),
            "layout: expected 'HWIO' or 'OIHW', got 'NHWC'",
        ),
        (
            lambda: importance.taylor(loss_fn, {"a": weights(2, 3)}, (np.ones((2, 3)), np.ones(3))),
            "batches: expected arrays with the same first axis",
        ),
        (
            lambda: importance.taylor(
                loss_fn, {"a": np.ones((2, 3), np.int8)}, (np.ones(3),), select="a"
            ),
            "expected floats, which have gradients, got integers in 'a'",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
