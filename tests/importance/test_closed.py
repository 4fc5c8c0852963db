"""Closed-form importance; what all of it has in common is in tests/contract."""

import jax
import numpy as np

from selcrypt_jax import importance

KEY = jax.random.key(0)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_vectors_and_scalars_have_a_group_an_element():
    scores = importance.l2({"bias": weights(7), "scale": weights()}, select=".")
    assert scores["bias"].shape == (7,)
    assert scores["scale"].shape == ()


def test_random_depends_on_key_and_name_alone():
    a, b = weights(3, 3, 4, 5), weights(3, 3, 4, 5)
    first = importance.random({"a": a, "b": b}, key=KEY)
    second = importance.random({"b": a, "c": {"a": b}}, key=KEY)
    other = importance.random({"a": a, "b": b}, key=jax.random.key(1))
    np.testing.assert_array_equal(first["b"], second["b"])
    assert (first["a"] != first["b"]).all()
    assert (first["a"] != other["a"]).all()
    assert ((first["a"] >= 0) & (first["a"] < 1)).all()
