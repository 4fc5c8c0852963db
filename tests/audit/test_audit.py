"""Attacks on small networks whose answers are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

import selcrypt_jax as sj
from selcrypt_jax import audit
from selcrypt_jax.audit._detection import group_features

KEY = jax.random.key(0, impl="rbg")  # which compiles in a quarter of the time


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture
def params():
    return {"conv": normal(0, (3, 3, 4, 5)), "bias": normal(1, (5,)), "act": jnp.tanh}


@pytest.fixture
def mask():
    chosen = np.random.default_rng(2).random((1, 1, 4, 5)) < 0.3
    return {"conv": chosen, "bias": False, "act": False}


# --- without training ---------------------------------------------------------------------------

FILLS = {
    "zero": audit.zero_fill,
    "mean": audit.mean_fill,
    "resample": lambda params, mask: audit.resample(params, mask, key=KEY),
    "clip": lambda params, mask: audit.clip_norm(params, mask, quantile=0),
}


@pytest.mark.parametrize("name", FILLS)
def test_what_is_not_suspected_stays(params, mask, name):
    before = params["conv"].copy()
    filled = FILLS[name](params, mask)
    suspected = np.broadcast_to(mask["conv"], before.shape)
    np.testing.assert_array_equal(np.asarray(filled["conv"])[~suspected], before[~suspected])
    assert (np.asarray(filled["conv"])[suspected] != before[suspected]).mean() > 0.3
    assert filled["bias"] is params["bias"]
    assert filled["act"] is jnp.tanh
    np.testing.assert_array_equal(params["conv"], before)


def test_fills_are_those_of_numpy(params, mask):
    conv = params["conv"]
    suspected = np.broadcast_to(mask["conv"], conv.shape)
    assert (np.asarray(audit.zero_fill(params, mask)["conv"])[suspected] == 0).all()
    mean = np.asarray(audit.mean_fill(params, mask)["conv"])[suspected]
    np.testing.assert_allclose(mean, conv[~suspected].mean(), rtol=1e-5)
    drawn = np.asarray(FILLS["resample"](params, mask)["conv"])[suspected]
    assert np.isin(drawn, conv[~suspected]).all()
    assert len(np.unique(drawn)) > drawn.size / 4
    clipped = np.asarray(audit.clip_norm(params, mask, quantile=0.25)["conv"])
    norms = np.sqrt((conv**2).sum((0, 1), keepdims=True))
    limit = np.quantile(norms[~mask["conv"]], 0.25)
    expected = np.where(mask["conv"] & (norms > limit), conv * limit / norms, conv)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)


def test_a_leaf_of_suspects_alone(params):
    mask = {"conv": np.ones((1, 1, 4, 5), bool), "bias": True, "act": False}
    for name in ("zero", "mean", "resample"):
        filled = FILLS[name](params, mask)
        assert (np.asarray(filled["conv"]) == 0).all()
        assert (np.asarray(filled["bias"]) == 0).all()
    np.testing.assert_array_equal(audit.clip_norm(params, mask)["conv"], params["conv"])


def test_quantiles_out_of_range(params, mask):
    with pytest.raises(ValueError, match=r"quantile: expected a number in \[0, 1\], got 2"):
        audit.clip_norm(params, mask, quantile=2)


# --- detection ----------------------------------------------------------------------------------


def smooth_network(seed):
    """Kernels as trained ones are: of different size, and smooth inside."""
    rng = np.random.default_rng(seed)
    shape = (3, 3, 24, 24)
    size = np.exp(0.5 * rng.standard_normal((1, 1, 24, 24)))
    level = rng.standard_normal((1, 1, 24, 24))
    return {"conv": (size * (level + 0.2 * rng.standard_normal(shape))).astype(np.float32)}


def protected(seed, cipher=None, share=0.2):
    params = smooth_network(seed)
    masks = sj.nested_masks(sj.importance.random(params, key=jax.random.key(seed)), [share])
    keys = sj.ring_keys(sj.level_key(sj.Secret(bytes([seed]) * 32), bytes([seed]) * 16, levels=1))
    return params, masks[0], sj.encrypt(params, masks, keys, cipher=cipher)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cipher", "low", "high"),
    [
        # Single weights change places: kernels are rough. Whole kernels stay what they were.
        (sj.LosslessCipher(unit="weight"), 0.9, 1.0),
        (sj.LosslessCipher(unit="group"), 0.4, 0.65),
    ],
)
def test_detection_sees_the_trace_of_a_cipher(cipher, low, high):
    own = []
    for seed in (1, 2):
        _, mask, public = protected(seed, cipher)
        own.append((public, mask))
    params, mask, public = protected(3, cipher)
    found = audit.detect(public, mask, own, seed=0, original=params)
    assert low <= found.auc <= high
    assert 0.4 <= found.baseline <= 0.65  # random groups
    scores = found.scores["conv"]
    assert scores.shape == mask["conv"].shape
    assert found.auc == pytest.approx(roc_auc_score(mask["conv"].ravel(), scores.ravel()))
    again = audit.detect(public, mask, own, seed=0)
    assert again.auc == found.auc
    assert again.baseline is None


def test_features_are_those_of_the_definition():
    leaf = normal(0, (3, 3, 4, 5))
    features = group_features(leaf, (1, 1, 4, 5)).reshape(4, 5, -1)
    kernel = leaf[:, :, 2, 3].astype(float)
    norm = np.linalg.norm(kernel)
    log = np.log(np.sqrt((leaf.astype(float) ** 2).sum((0, 1))))
    rough = ((kernel[1:] - kernel[:-1]) ** 2).sum() + ((kernel[:, 1:] - kernel[:, :-1]) ** 2).sum()

    def cosine(other):
        return (kernel * other).sum() / norm / np.linalg.norm(other)

    expected = [
        np.log(norm) - log.mean(),
        (log < np.log(norm)).sum() / 19,
        kernel.mean() / norm,
        abs(kernel).max() / norm,
        abs(kernel.mean()) / norm,
        rough / norm**2,
        cosine(leaf[:, :, :, 3].mean(-1)),
        cosine(leaf[:, :, 2].mean(-1)),
        0,
        0,
    ]
    np.testing.assert_allclose(features[2, 3], expected, rtol=1e-5, atol=1e-7)


def test_detection_needs_both_kinds(params, mask):
    full = {"conv": np.ones((1, 1, 4, 5), bool), "bias": False, "act": False}
    with pytest.raises(ValueError, match="own: expected at least one protected network"):
        audit.detect(params, mask, [], seed=0)
    with pytest.raises(ValueError, match=r"mask: expected some groups .* got 20 of 20"):
        audit.detect(params, full, [(params, mask)], seed=0)
    nothing = {"conv": False, "bias": False, "act": False}
    with pytest.raises(ValueError, match="expected a leaf with more than one group"):
        audit.detect(params, nothing, [(params, mask)], seed=0)


# --- training -----------------------------------------------------------------------------------

X = normal(5, (64, 6))
TRUE = normal(6, (6, 3))
Y = X @ TRUE + 0.1 * normal(7, (64, 3))


def squared(params, batch):
    x, y = batch
    return jnp.mean((params["act"](x @ params["w"] + params["b"][None]) - y) ** 2)


def linear():
    return {"w": normal(8, (6, 3)), "b": np.zeros(3, np.float32), "act": lambda x: x}


def test_fine_tuning_finds_least_squares():
    start = linear()
    stops = (1, 50, 400)
    found = list(
        audit.fine_tune(start, squared, lambda n: (X, Y), stops=stops, optimizer=optax.adam(0.05))
    )
    assert [checkpoint.step for checkpoint in found] == [1, 50, 400]
    assert found[0].loss > found[1].loss > found[2].loss
    best, *_ = np.linalg.lstsq(np.c_[X, np.ones(64)], Y, rcond=None)
    np.testing.assert_allclose(found[2].params["w"], best[:-1], atol=1e-3)
    np.testing.assert_allclose(found[2].params["b"], best[-1], atol=1e-3)
    np.testing.assert_array_equal(start["w"], normal(8, (6, 3)))


def test_the_average_is_over_the_last_steps():
    """Weights in proportion to (step + 6) · (step + 5) ⋯ step, the seventh rising power."""
    stops = tuple(range(1, 31))
    found = list(
        audit.fine_tune(
            linear(), squared, lambda n: (X, Y), stops=stops, optimizer=optax.sgd(1.0), rate=0.1
        )
    )
    for last in (1, 2, 30):
        shares = np.array([math.prod(range(n, n + 7)) for n in stops[:last]], float)
        for name in ("w", "b"):
            seen = np.stack([np.asarray(each.params[name], float) for each in found[:last]])
            expected = np.tensordot(shares / shares.sum(), seen, 1)
            np.testing.assert_allclose(found[last - 1].average[name], expected, rtol=1e-5)


def test_an_average_of_half_precision_does_not_stand_still():
    """A share of the last bit would be lost."""
    start = {"w": jnp.ones(4, jnp.bfloat16)}
    (found,) = audit.fine_tune(
        start, lambda p, _: p["w"].sum(), lambda n: 0, stops=[150], optimizer=optax.sgd(1.0),
        rate=lambda n: -1 / 128 if n == 20 else 0.0,
    )  # fmt: skip
    assert found.average["w"].dtype == jnp.bfloat16
    for params in (found.params, found.average):
        np.testing.assert_array_equal(np.asarray(params["w"], np.float32), 1 + 1 / 128)


def test_what_is_not_trained_keeps_its_bits():
    mask = {"w": np.arange(6)[:, None] == 2, "b": False, "act": False}
    optimizer = optax.adamw(0.05, weight_decay=0.5)  # decay moves everything, if it may
    (found,) = audit.fine_tune(
        linear(), squared, lambda n: (X, Y), stops=[20], optimizer=optimizer, trainable=mask
    )
    rest = np.arange(6) != 2
    for params in (found.params, found.average):
        np.testing.assert_array_equal(np.asarray(params["w"])[rest], linear()["w"][rest])
    assert (np.asarray(found.params["w"])[2] != linear()["w"][2]).all()
    np.testing.assert_array_equal(found.params["b"], 0)


def test_batches_come_by_number_and_a_rate_that_fails_ends_early():
    seen = []

    def batch(number):
        seen.append(number)
        return X, Y

    stops = (1, 2, 60)
    optimizer = optax.sgd(1e6)
    found = list(audit.fine_tune(linear(), squared, batch, stops=stops, optimizer=optimizer))
    assert seen == list(range(1, 61))
    assert [checkpoint.step for checkpoint in found] == [1, 2]


@pytest.mark.parametrize("stops", [(), (0, 5), (5, 5), (9, 3)])
def test_stops_must_ascend(stops):
    with pytest.raises(ValueError, match="stops: expected ascending step numbers from 1"):
        next(audit.fine_tune(linear(), squared, lambda n: 0, stops=stops, optimizer=optax.sgd(1)))


def test_something_must_be_trained():
    nothing = {"w": False, "b": False, "act": False}
    with pytest.raises(ValueError, match="trainable: expected a mask that selects some floats"):
        next(
            audit.fine_tune(
                linear(), squared, lambda n: 0, stops=[1], optimizer=optax.sgd(1),
                trainable=nothing,
            )
        )  # fmt: skip


# --- advantage ----------------------------------------------------------------------------------


def test_advantage_of_the_design():
    # DESIGN's table: 28.15 dB after the attack, 27.2 with everything encrypted, 29.06 untouched.
    found = audit.advantage([28.15], [27.2], 29.06)
    assert found.mean == pytest.approx(0.51, abs=0.005)
    assert found.low == found.high == found.mean


def test_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        recovered, baseline = rng.normal(5, 1, 12), rng.normal(2, 1, 12)
        found = audit.advantage(recovered, baseline, 10.0, seed=trial)
        held += found.low <= (5 - 2) / (10 - 2) <= found.high
    assert 0.85 <= held / 200 <= 0.99


def test_what_data_do_to_both_is_no_uncertainty():
    baseline = [20.0, 24.0, 22.0]
    recovered = [value + 1 for value in baseline]
    apart, together = (
        audit.advantage(recovered, baseline, 32.0, paired=paired) for paired in (0, 1)
    )
    assert apart.mean == pytest.approx(0.1)
    assert together.mean == apart.mean
    assert apart.low < 0
    assert 0.08 < together.low < together.high < 0.13
    # An attacker who leaves the file alone has nothing of it, however many keys there are.
    assert audit.advantage(baseline, baseline, 32.0, paired=True) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected pairs, got 3 and 1"):
        audit.advantage(recovered, baseline[:1], 32.0, paired=True)


def test_a_draw_without_room_says_nothing():
    found = audit.advantage([60.0, 60.0, 60.0], [50.0, 100.0, 50.0], 100.0)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1.0], 2.0), "expected one value per key, got none"),
        (([1.0], [2.0], 2.0), "clean: expected more than the baseline, 2, got 2"),
    ],
)
def test_nothing_to_steal(arguments, message):
    with pytest.raises(ValueError, match=message):
        audit.advantage(*arguments)
