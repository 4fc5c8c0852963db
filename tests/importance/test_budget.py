"""Importance learned at budgets, on a network whose important weights are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from important_weights import BATCHES, IMPORTANT, known_network, loss_fn

import selcrypt_jax as sj
from selcrypt_jax._importance.budget import AtBudgets, _least, _ordered
from selcrypt_jax._importance.frozen import Frozen

KEY = jax.random.key(0)
GROUPS = {"a": 48, "b": 32}


@pytest.mark.parametrize(
    ("scope", "shares", "counts"),
    [
        ("model", (1 / 80, 3 / 80, 0.1), [1, 3, 8]),
        ("leaf", (0.05, 0.1), [2 + 1, 4 + 3]),
        # No group of the second leaf.
        pytest.param("leaf", (0.025,), [1], marks=pytest.mark.slow),
    ],
)
def test_the_smallest_budgets_hold_the_weights_that_matter(scope, shares, counts):
    config, opened = sj.PSSBudgets(shares, scope, steps=60), []

    def progress(state, metrics):
        opened.extend(np.asarray(metrics.open).tolist())

    params = known_network()
    scores = sj.pss(loss_fn, params, BATCHES, key=KEY, config=config, progress=progress)
    assert scores["act"] is False
    assert scores["name"] is False
    each = 60 // len(counts)
    assert opened == [count for count in counts for _ in range(each)]
    masks = sj.nested_masks(scores, shares, scope=scope)
    important = {(name, place) for name, places in IMPORTANT.items() for place in places}
    for mask, count in zip(masks, counts, strict=True):
        found = {
            (name, tuple(map(int, place)))
            for name in IMPORTANT
            if mask[name] is not False
            for place in np.argwhere(mask[name])
        }
        assert len(found) == count
        assert len(found & important) >= min(count, 3)


def test_a_resumed_run_equals_a_straight_one():
    params = known_network()
    learner = sj.pss_learner(
        loss_fn, params, config=sj.PSSBudgets((0.05, 0.1, 0.2), "model", steps=7)
    )
    start = learner.init(params, BATCHES, key=KEY)
    straight, whole = learner.run(params, BATCHES, start, learner.steps)
    state, losses = start, []
    for steps in (1, 3, 3):
        # Through the host, as a checkpoint would go.
        data = jax.random.key_data(state.key)
        saved = jax.tree.map(np.asarray, state._replace(key=data))
        state = saved._replace(key=jax.random.wrap_key_data(saved.key))
        state, metrics = learner.run(params, BATCHES, state, steps)
        losses.append(metrics.loss)
    jax.tree.map(
        np.testing.assert_array_equal, state._replace(key=None), straight._replace(key=None)
    )
    np.testing.assert_array_equal(np.concatenate(losses), whole.loss)
    again, _ = learner.run(params, BATCHES, start, learner.steps)
    np.testing.assert_array_equal(again.damage["a"], straight.damage["a"])
    other = learner.init(params, BATCHES, key=jax.random.key(1))
    other, _ = learner.run(params, BATCHES, other, learner.steps)
    assert (np.asarray(other.damage["a"]) != straight.damage["a"]).any()


def test_narrow_weights():
    params = known_network()
    params |= {name: jnp.asarray(params[name], jnp.bfloat16) for name in IMPORTANT}

    def loss(params, x):
        return loss_fn(params | {n: params[n].astype(jnp.float32) for n in IMPORTANT}, x)

    config = sj.PSSBudgets((3 / 80,), "model", steps=40)
    (mask,) = sj.nested_masks(
        sj.pss(loss, params, BATCHES, key=KEY, config=config),
        config.shares,
        scope="model",
    )
    for name, places in IMPORTANT.items():
        assert set(map(tuple, np.argwhere(mask[name]).tolist())) == set(places)


def test_steps_that_overflow_teach_nothing():
    def overflows(params, x):  # once the most important weight is far off
        far = jnp.abs(params["b"][2, 2] - 1) > 0.5
        return jnp.where(far, jnp.inf, 1.0) * loss_fn(params, x)

    config = sj.PSSBudgets((2 / 80,), "model", steps=40)
    scores = sj.pss(overflows, known_network(), BATCHES, key=KEY, config=config)
    assert all(np.isfinite(scores[name]).all() for name in IMPORTANT)

    def never(params, x):
        untouched = known_network()
        same = jnp.all(params["a"] == untouched["a"]) & jnp.all(params["b"] == untouched["b"])
        return jnp.where(same, 1.0, jnp.inf)

    with pytest.raises(ValueError, match="got none in all steps"):
        sj.pss(never, known_network(), BATCHES, key=KEY, config=config)


# --------------------------------------------------------------------------- its parts, by oracles

finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@settings(max_examples=50, deadline=None)
@given(
    leaves=st.lists(hnp.arrays(np.float32, st.integers(1, 6), elements=finite), min_size=1),
    data=st.data(),
)
def test_the_least_of_the_best(leaves, data):
    everything = np.sort(np.concatenate(leaves))[::-1] + 0.0  # without negative zeros
    count = data.draw(st.integers(1, len(everything)))
    found = _least([_ordered(jnp.asarray(leaf) + 0.0) for leaf in leaves], jnp.int32(count))
    assert found == _ordered(jnp.asarray(everything[count - 1]))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_expected_is_a_regression_without_negative_weights(seed):
    rng = np.random.default_rng(seed)
    learn = AtBudgets(
        Frozen(loss_fn, known_network(), "^a$", "weight", "HWIO"), sj.PSSBudgets((0.5,))
    )
    slope, size = rng.standard_normal((8, 6)), rng.random((8, 6))
    damage = (seed % 3 - 1) * slope + (seed // 3 - 0.2) * size + rng.standard_normal((8, 6)) / 4
    features = np.stack([slope.ravel(), size.ravel()])
    best, _ = scipy.optimize.nnls(features.T, damage.ravel())
    if not best.any():
        best = np.array([0, 1e-6])  # by size, if nothing fits
    found = learn._expected(
        {"a": jnp.asarray(size, jnp.float32)},
        {"a": jnp.asarray(slope, jnp.float32)},
        (
            jnp.asarray(features @ features.T, jnp.float32),
            jnp.asarray(features @ damage.ravel(), jnp.float32),
        ),
    )
    expected = best[0] * slope + best[1] * size
    np.testing.assert_allclose(found["a"], expected, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sj.PSSBudgets(()), "shares: expected 1 to 127 shares, got 0"),
        (lambda: sj.PSSBudgets((8,)), r"shares\[0\]: expected a share .* For 8 % pass 0.08"),
        (lambda: sj.PSSBudgets((0.2, 0.1)), "shares: expected ascending shares"),
        (lambda: sj.PSSBudgets((0.1,), "layer"), "scope: expected 'leaf' or 'model'"),
        (lambda: sj.PSSBudgets((0.1, 0.2), steps=1), "steps: expected at least one per budget, 2"),
        (
            lambda: sj.pss_learner(loss_fn, known_network(), config=sj.PSSBudgets((0.001, 0.1))),
            r"shares\[0\]: expected a budget that adds a group, got 0.001: 0 of .* scope=\"model\"",
        ),
        (
            lambda: sj.pss_learner(
                loss_fn, known_network(), config=sj.PSSBudgets((0.1, 0.101), "model")
            ),
            r"shares\[1\]: expected a budget that adds a group, got 0.101: 8 of .* after 8",
        ),
        (
            lambda: sj.pss(
                lambda p, x: -jnp.mean(x**2),
                known_network(),
                BATCHES,
                key=KEY,
                config=sj.PSSBudgets((0.1,)),
            ),
            "loss_fn: expected a finite, positive loss of the untouched network, got -",
        ),
        (
            lambda: sj.pss(
                # Fine at first, negative for the other batches.
                lambda p, x: loss_fn(p, x) - jnp.where(x[0, 0] == BATCHES[0, 0, 0], 0.0, 1e3),
                known_network(),
                BATCHES,
                key=KEY,
                config=sj.PSSBudgets((0.1,), steps=40),
            ),
            "expected a finite loss, got -.* at step 1.*cannot become negative",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("config", [sj.PSSBudgets((0.1,), steps=20), sj.PSSConfig(steps=60)])
def test_leaves_that_the_loss_ignores_are_named(config):
    def loss(params, x):
        return loss_fn(params | {"b": known_network()["b"]}, x)

    with pytest.warns(UserWarning, match="the loss does not depend on 'b'"):
        sj.pss(loss, known_network(), BATCHES, key=KEY, config=config)
