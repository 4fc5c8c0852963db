"""The attack on the order: where the answer is known, and what it must leave alone."""

import jax.numpy as jnp
import numpy as np
import pytest

import selcrypt_jax as sj
from selcrypt_jax.audit._unshuffle import unshuffle

# Moves weights and does nothing else, so that an attack can win to the last bit.
ORDER_ONLY = sj.LosslessCipher(fine_bits=0)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def keys():
    return sj.ring_keys(sj.level_key(sj.Secret(bytes(32)), bytes(16), levels=1))


def bits(leaf):
    array = np.asarray(leaf)
    return array.view(f"uint{8 * array.dtype.itemsize}")


# Weights that are well apart, so that only one order fits.
LADDER = np.random.default_rng(0).permutation(np.linspace(-2, 2, 80, dtype=np.float32))
TRUE = {"w": LADDER.reshape(20, 4), "b": normal(1, (4,)), "act": jnp.tanh}
X = normal(2, (2, 60, 20))
BATCHES = (X, X @ TRUE["w"] + TRUE["b"])


def squared(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)


def mask_of(count, seed=3):
    chosen = np.random.default_rng(seed).permutation(80).reshape(20, 4) < count
    return {"w": chosen, "b": False, "act": False}


def test_an_order_that_the_data_determine_is_found():
    mask = mask_of(40)
    public = sj.encrypt(TRUE, (mask,), keys(), cipher=ORDER_ONLY)
    shipped = float(squared(public, (X[0], BATCHES[1][0])))
    found = unshuffle(public, mask, squared, BATCHES, trials=300)
    np.testing.assert_array_equal(found.params["w"], TRUE["w"])
    assert found.loss < 1e-9 < 1 < shipped
    assert found.trials <= 300


def test_masked_bits_leave_an_error_of_their_size():
    mask = mask_of(40)
    public = sj.encrypt(TRUE, (mask,), keys())
    found = unshuffle(public, mask, squared, BATCHES, trials=2000)
    # A weight is off by an eighth at most, and by less on average.
    assert found.loss < 0.01 * float(squared(public, (X[0], BATCHES[1][0])))
    assert found.loss > 1e-6


def apart(params, batch):
    """How far the leaves are from what they should be."""
    return sum(
        jnp.sum(jnp.square(params[name].astype(jnp.float32) - batch[name])) for name in batch
    )


@pytest.mark.parametrize(
    ("unit", "dtype"),
    [pytest.param("weight", "bfloat16", marks=pytest.mark.slow), ("group", "float32")],
)
def test_units_stay_whole_and_in_their_leaf(unit, dtype):
    params = {
        name: normal(seed, (3, 3, 8, 9)).astype(dtype) for seed, name in enumerate(["one", "two"])
    }
    params["other"] = normal(5, (3,)).astype(dtype)
    chosen = np.random.default_rng(7).permutation(72).reshape(1, 1, 8, 9) < 36
    mask = {"one": chosen, "two": ~chosen, "other": False}
    cipher = sj.LosslessCipher(unit=unit, fine_bits=0)
    public = sj.encrypt(params, (mask,), keys(), cipher=cipher)
    before = {name: np.array(leaf) for name, leaf in public.items()}
    target = {name: jnp.asarray(leaf, jnp.float32)[None] for name, leaf in params.items()}
    found = unshuffle(
        public, mask, apart, target, trials=200, unit=unit
    )  # fmt: skip
    shipped = float(apart(public, {n: leaf[0] for n, leaf in target.items()}))
    assert found.loss < 0.01 * shipped
    assert found.params["other"] is public["other"]
    for name in ("one", "two"):
        np.testing.assert_array_equal(bits(public[name]), bits(before[name]))
        inside = np.broadcast_to(mask[name], before[name].shape)
        after, old = bits(found.params[name]), bits(before[name])
        assert found.params[name].dtype == dtype
        np.testing.assert_array_equal(after[~inside], old[~inside])

        def units(words, name=name):
            rows = words.reshape(9, -1).T[mask[name].ravel()]
            return sorted(map(tuple, rows)) if unit == "group" else sorted(rows.ravel())

        assert units(after) == units(old)
        assert (after != old).any()


def test_integers_have_no_gradient():
    params = {"w": np.arange(40, dtype=np.int8).reshape(8, 5)}
    target = {"w": jnp.asarray(params["w"], jnp.float32)[None]}
    with pytest.raises(ValueError, match=r"mask: expected floats.* got integers in 'w'"):
        unshuffle(params, {"w": True}, apart, target, trials=100)


def test_it_never_ends_worse_than_it_began():
    mask = mask_of(40)
    found = unshuffle(TRUE, mask, squared, BATCHES, trials=60)
    np.testing.assert_array_equal(found.params["w"], TRUE["w"])
    nothing = unshuffle(
        TRUE, mask, lambda params, batch: params["w"].sum() * jnp.nan, BATCHES,
        trials=20,
    )  # fmt: skip
    np.testing.assert_array_equal(nothing.params["w"], TRUE["w"])
    assert nothing.loss == np.inf


def test_trials_are_compiled_once_and_kept_to():
    traces = []

    def loss(params, batch):
        traces.append(0)
        return squared(params, batch)

    mask = mask_of(40)
    first = unshuffle(TRUE, mask, loss, BATCHES, trials=40)
    assert len(traces) <= 2  # the loss, and its gradient
    public = sj.encrypt(TRUE, (mask,), keys())
    again = unshuffle(public, mask_of(40, 9), loss, BATCHES, trials=57)
    assert len(traces) <= 2
    assert first.trials <= 40
    assert 50 <= again.trials <= 57


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "layer"}, "unit: expected one of .*, got 'layer'"),
        ({"trials": 4}, r"trials: expected at least 5 \(one step, and 2 batches"),
        (
            {"mask": {"w": False, "b": False, "act": False}},
            "expected a leaf with two or more weights",
        ),
        ({"mask": mask_of(1)}, "expected a leaf with two or more weights"),
    ],
)
def test_errors(change, message):
    given = {"mask": mask_of(40), "trials": 50} | change
    with pytest.raises(ValueError, match=message):
        unshuffle(TRUE, given.pop("mask"), squared, BATCHES, **given)
