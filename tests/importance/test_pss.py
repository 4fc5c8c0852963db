"""Gates and learned importance, on a network whose important weights are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from important_weights import BATCHES, IMPORTANT, known_network, loss_fn

import selcrypt_jax as sj
from selcrypt_jax._importance.gates import hard_concrete, probability_open

KEY = jax.random.key(0)


def uniform(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random(shape, np.float32))


# ---------------------------------------------------------------------------------------- gates


def test_probability_open_is_the_share_of_sampled_gates_that_are_not_zero():
    log_alpha = jnp.linspace(-4, 4, 9)
    gates = hard_concrete(jnp.tile(log_alpha, (20_000, 1)), uniform=uniform(20_000, 9))
    share = np.mean(np.asarray(gates) > 0, axis=0)
    np.testing.assert_allclose(share, probability_open(log_alpha), atol=0.015)


def test_gates_are_closed_and_open_with_some_probability():
    gates = np.asarray(hard_concrete(jnp.zeros(20_000), uniform=uniform(20_000)))
    assert gates.min() == 0
    assert gates.max() == 1
    # At log α = 0 the stretched interval is symmetric: P(z = 0) = P(z = 1) = 1 − P(z ≠ 0).
    closed = 1 - 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1)))
    assert np.mean(gates == 0) == pytest.approx(closed, abs=0.01)
    assert np.mean(gates == 1) == pytest.approx(closed, abs=0.01)


def test_median_gate():
    # u = ½ has logit 0: s = σ(log α / β).
    log_alpha = np.array([-3.0, -1.0, 0.0, 0.5, 3.0], np.float32)
    s = 1 / (1 + np.exp(-log_alpha / (2 / 3)))
    np.testing.assert_allclose(
        hard_concrete(jnp.asarray(log_alpha), uniform=None),
        np.clip(s * 1.2 - 0.1, 0, 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("beta", [2 / 3, 1e-4])
def test_gates_and_gradients_stay_finite(dtype, beta):
    log_alpha = jnp.array([-80, -1, 0, 1, 80], dtype)
    noise = uniform(500, 5).at[0].set(0).at[1].set(1).astype(dtype)

    def total(log_alpha):
        gates = hard_concrete(jnp.tile(log_alpha, (500, 1)), uniform=noise, beta=beta)
        return (gates.sum() + probability_open(log_alpha, beta=beta).sum()).astype("float32")

    value, gradient = jax.jit(jax.value_and_grad(total))(log_alpha)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------ PSS

CONFIGS = {
    "break": sj.PSSConfig("break", steps=300, penalty=0.02, cap=100.0),
    "break, layer by layer": sj.PSSConfig(
        "break", steps=120, penalty=0.3, cap=100.0, layerwise=True
    ),
    "keep": sj.PSSConfig("keep", steps=120, penalty=1e-2),
    "keep, as the release": sj.PSSConfig(
        "keep",
        steps=120,
        penalty=2e-2,
        initial_log_alpha=1.0,
        sampled=False,
        layerwise=True,
        optimizer=optax.sgd(1.0, momentum=0.9, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_the_weights_that_matter(name):
    params, seen = known_network(), []

    def progress(state, metrics):
        seen.append((int(state.step), len(metrics.loss)))

    config = CONFIGS[name]
    scores = sj.pss(loss_fn, params, BATCHES, key=KEY, config=config, progress=progress)
    assert seen[-1][0] == sum(steps for _, steps in seen)
    assert seen[-1][0] == config.steps * (2 if config.layerwise else 1)
    assert scores["act"] is False
    assert scores["name"] is False
    for leaf, places in IMPORTANT.items():
        score = np.asarray(scores[leaf])
        assert score.shape == params[leaf].shape
        assert (score >= math.log(0.01) - 1e-6).all()
        assert (score <= math.log(100) + 1e-6).all()
        top = np.argsort(-score.ravel())[: len(places)]
        found = {tuple(int(i) for i in np.unravel_index(i, score.shape)) for i in top}
        assert found == set(places)


@pytest.mark.parametrize("layerwise", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_equals_a_straight_one(layerwise):
    config = sj.PSSConfig(steps=4, layerwise=layerwise, cap=100.0)
    params = known_network()
    learner = sj.pss_learner(loss_fn, params, config=config)
    assert learner.steps == (8 if layerwise else 4)
    start = learner.init(params, BATCHES, key=KEY)
    straight, whole = learner.run(params, BATCHES, start, learner.steps)
    state, states, parts = start, [], []
    for steps in (1, learner.steps // 2 - 1, learner.steps // 2):
        # Through the host, as a checkpoint would go.
        data = jax.random.key_data(state.key)
        saved = jax.tree.map(np.asarray, state._replace(key=data))
        state = saved._replace(key=jax.random.wrap_key_data(saved.key))
        state, metrics = learner.run(params, BATCHES, state, steps)
        states.append(state.log_alpha)
        parts.append(metrics)
    for leaf in IMPORTANT:
        np.testing.assert_array_equal(state.log_alpha[leaf], straight.log_alpha[leaf])
    np.testing.assert_array_equal(np.concatenate([part.loss for part in parts]), whole.loss)
    if layerwise:  # one leaf at a time
        _, first, second = states
        np.testing.assert_array_equal(first["b"], start.log_alpha["b"])
        assert (first["a"] != start.log_alpha["a"]).all()
        np.testing.assert_array_equal(second["a"], first["a"])
        assert (second["b"] != start.log_alpha["b"]).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_key_decides_the_noise_and_nothing_else_does(sampled):
    config = sj.PSSConfig("keep", steps=2, sampled=sampled)
    params = known_network()
    # "keep" takes a loss that may be negative.
    learner = sj.pss_learner(lambda params, x: loss_fn(params, x) - 5, params, config=config)

    def scores(seed):
        state = learner.init(params, BATCHES, key=jax.random.key(seed))
        return learner.scores(learner.run(params, BATCHES, state, 2)[0])["a"]

    first = scores(0)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, scores(0))
    # Without sampling there is no noise at all in "keep".
    assert (first != scores(1)).any() == sampled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sj.pss(lambda p, x: -jnp.mean(x**2), known_network(), BATCHES, key=KEY),
            "loss_fn: expected a finite, positive loss of the untouched network, got -",
        ),
        (
            lambda: sj.pss(lambda p, x: jnp.nan * x.sum(), known_network(), BATCHES, key=KEY),
            "loss_fn: expected a finite, positive loss",
        ),
        (lambda: sj.PSSConfig("drop"), "objective: expected 'keep' or 'break', got 'drop'"),
        (lambda: sj.PSSConfig(steps=0), "steps: expected at least 1"),
        (lambda: sj.PSSConfig(cap=-1.0), "cap: expected a positive loss"),
        (lambda: sj.PSSConfig(penalty=math.nan), "penalty: expected at least 0"),
        (lambda: sj.PSSConfig(clamp=(1, -1)), "clamp: expected bounds around the start"),
        (
            lambda: sj.pss(
                # Fine at first, negative for the other batches.
                lambda p, x: loss_fn(p, x) - jnp.where(x[0, 0] == BATCHES[0, 0, 0], 0.0, 1e3),
                known_network(),
                BATCHES,
                key=KEY,
            ),
            "expected a finite loss, got -.* at step 1.*cannot become negative",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_that_never_learned_is_told():
    config = sj.PSSConfig(steps=1, cap=1e3)
    weights = np.random.default_rng(0).standard_normal((8, 6), np.float32)

    def loss(params, x):  # the weights themselves are its worst
        return jnp.exp(-jnp.mean((params["a"] - weights) ** 2))

    with pytest.warns(UserWarning, match="is no better than with noise"):
        sj.pss(loss, {"a": weights}, BATCHES, key=KEY, config=config)


def test_a_loss_that_becomes_infinite_is_named_with_its_step():
    def loss(params, x):
        broken = jnp.abs(params["a"][0, 3] - 1) > 1e-6
        return jnp.where(broken, jnp.inf, 1.0) + 0 * params["b"].sum() + x.sum() * 0

    config = sj.PSSConfig("keep", steps=50, sampled=True, initial_log_alpha=0.0)
    with pytest.raises(ValueError, match=r"expected a finite loss, got inf at step \d+"):
        sj.pss(loss, known_network(), BATCHES, key=KEY, config=config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sj.PSSConfig(optimizer=3), "optimizer: expected an optax transformation"),
        (lambda: sj.PSSConfig(steps=2.5), "integer"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
