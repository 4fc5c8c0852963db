"""Random state beside parameters: keys keep their type, and none is silently published."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from selcrypt_jax import (
    Protected,
    Secret,
    chacha20_key,
    issue_grant,
    level_key,
    open_model,
    protect,
    protect_file,
    unlock,
    unlock_file,
)

SECRET = Secret.generate()


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def state(seed: int = 0) -> nnx.State:
    return nnx.state(Model(nnx.Rngs(seed)))


def numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(numbers(one), numbers(two))


def test_the_docstrings_example_with_dropout(tmp_path):
    release = protect(state(), secret=SECRET, levels=2)
    release.save(tmp_path / "m")
    key = level_key(SECRET, release.model_id, levels=2)
    assert_same(unlock(release, key), state())
    other = state(1)
    opened = open_model(tmp_path / "m", key, like=other)
    np.testing.assert_array_equal(opened["dense"]["kernel"][...], state()["dense"]["kernel"][...])
    kept = other["dropout"]["rngs"]["key"][...]
    assert opened["dropout"]["rngs"]["key"][...] is kept
    # Nothing of a key is in the file.
    raw = np.asarray(jax.random.key_data(state()["dropout"]["rngs"]["key"][...])).tobytes()
    assert raw not in (tmp_path / "m").read_bytes()
    assert "dropout/rngs/key" not in open_model(tmp_path / "m", key)


def test_orbax_in_memory(tmp_path):
    release = protect(state(), secret=SECRET, levels=2)
    release.save_orbax(tmp_path / "o")
    again = Protected.load_orbax(tmp_path / "o", like=release.params)
    key = level_key(SECRET, release.model_id, levels=2)
    assert_same(unlock(again, key), state())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("rest", ["sealed", "plain"])
def test_a_checkpoint_of_orbax_keeps_the_type_of_keys(impl, shape, rest, tmp_path):
    keys = jax.random.split(jax.random.key(7, impl=impl), shape or 1)
    params = {"w": jnp.ones((64, 64)).at[0].set(2.0), "rng": keys.reshape(shape)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", params)
    done = protect_file(tmp_path / "in", tmp_path / "public", secret=SECRET, levels=1, rest=rest)
    assert done.random_keys == ("rng",)
    grant = issue_grant(tmp_path / "public", level=1, secret=SECRET, signer="unsigned")
    unlock_file(tmp_path / "public", tmp_path / "out", grant)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out", jax.tree.map(jnp.zeros_like, params))
        untyped = checkpointer.restore(tmp_path / "out")
    assert_same(restored, params)
    assert untyped["rng"].dtype == keys.dtype
    assert_same(open_model(tmp_path / "public", grant, like=params), params)


def test_a_state_saved_by_orbax(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", state())
    protect_file(tmp_path / "in", tmp_path / "public", secret=SECRET, levels=2)
    grant = issue_grant(tmp_path / "public", level=2, secret=SECRET, signer="unsigned")
    unlock_file(tmp_path / "public", tmp_path / "out", grant)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "out", state(1)), state())
    assert_same(open_model(tmp_path / "public", grant, like=state(1)), state())


def test_shapes_alone_are_not_enough_for_keys(tmp_path):
    release = protect(state(), secret=SECRET, levels=1)
    release.save(tmp_path / "m")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state())
    key = level_key(SECRET, release.model_id, levels=1)
    with pytest.raises(ValueError, match="'dropout/rngs/key': expected random keys themselves"):
        open_model(tmp_path / "m", key, like=like)


def test_a_key_that_is_selected_is_refused():
    params = {"w": jnp.ones((64, 64)), "rng": jax.random.key(0)}
    with pytest.raises(ValueError, match="rng"):
        protect(params, (True,), secret=SECRET)
    with pytest.raises(ValueError, match="expected masks that select something"):
        protect(params, ({"w": False, "rng": False},), secret=SECRET)


def test_secret_looking_leaves_are_named(tmp_path):
    from safetensors.numpy import save_file

    words = np.asarray(jax.random.key_data(chacha20_key(bytes(range(32)))))
    params = {
        "w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32),
        "dropout_rng": words,
        "attention.key.weight": np.ones((8, 8), np.float32),
        "step": np.uint32([3]),
    }
    save_file(params, tmp_path / "in")
    done = protect_file(tmp_path / "in", tmp_path / "out", secret=SECRET, levels=1)
    assert done.random_keys == ("dropout_rng",)
    with pytest.warns(UserWarning, match=r"'dropout_rng' looks like random keys"):
        protect(params, secret=SECRET, levels=1)
