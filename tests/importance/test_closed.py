"""Closed-form importance; what all of it has in common is in tests/contract."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selcrypt_jax import PSSConfig, importance, pss
from selcrypt_jax._importance.closed import batch_count

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


def learned(loss, params, batches):
    config = PSSConfig("keep", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing was trained
        return pss(loss, params, batches, key=KEY, config=config)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("function", [importance.taylor, importance.fisher, learned])
def test_a_loss_that_fails_on_listed_arrays_says_to_stack_them(function, kind):
    def loss(params, batch):
        return jnp.square(batch.reshape(-1, 5) @ params["w"]).mean()

    params, batches = {"w": weights(5, 3)}, kind([weights(4, 5)] * 3)
    message = "loss_fn: raised AttributeError: .*each of the 3 arrays .* stack them: jax.tree.map"
    with pytest.raises(ValueError, match=message):
        function(loss, params, batches)
    function(loss, params, jax.tree.map(lambda *x: jnp.stack(x), *batches))  # as the message says


def test_other_errors_of_a_loss_are_its_own():
    params = {"w": weights(5, 3)}
    with pytest.raises(KeyError, match="nothing"):
        importance.taylor(lambda _, batch: batch["nothing"], params, {"x": weights(4, 5)})


def test_pairs_of_arrays_are_one_batch():
    """Two images of one shape, or two dicts with other names, are parts of a batch."""
    image = weights(4, 8, 8)
    for batches in ((image, image), [image, image], ({"noisy": image}, {"clean": image})):
        assert batch_count(batches) == 4


def test_few_of_many_sizes_are_shown():
    with pytest.raises(ValueError, match=r"and 96 more\. Stack") as caught:
        batch_count([weights(n % 2 + 1) for n in range(100)])
    assert len(str(caught.value)) < 320
