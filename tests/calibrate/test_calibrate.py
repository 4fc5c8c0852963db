"""Levels that meet targets: the search on known curves, and the complete path on networks."""

import dataclasses
import itertools
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import selcrypt_jax as sj
from selcrypt_jax import Select, Targets, calibrate_levels, importance, nested_masks
from selcrypt_jax._calibrate import network as _measured
from selcrypt_jax._calibrate.curve import Curve, isotonic
from selcrypt_jax._calibrate.network import Network, settled_counts
from selcrypt_jax._calibrate.search import Search
from selcrypt_jax._masks.selection import is_few
from selcrypt_jax.cli import main

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": RNG.standard_normal((3, 3, 20, 30)).astype(np.float32)},
    "head": {
        "kernel": RNG.standard_normal((40, 50)).astype(np.float32),
        "bias": np.ones(50, np.float32),
    },
    "name": "toy",
}
SCORES = importance.l2(PARAMS)
FINE = importance.l2(PARAMS, granularity="weight")


@pytest.fixture(autouse=True)
def model_ids(monkeypatch):
    """Fresh model ids that repeat in each run, so that the searches do too."""
    numbers = itertools.count()
    monkeypatch.setattr(_measured, "new_model_id", lambda: next(numbers).to_bytes(16, "little"))


def intact(params):
    """Percentage of unchanged kernel weights; a JAX scalar, as a metric may be."""
    same = [
        np.mean(np.asarray(params[name]["kernel"]) == PARAMS[name]["kernel"])
        for name in ("conv", "head")
    ]
    return jnp.asarray(100 * np.mean(same), jnp.float32)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


# --- the pieces -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 9)), min_size=1, max_size=12))
def test_isotonic_is_that_of_scipy(points):
    values, weights = np.array(points).T
    ours = isotonic(values, weights)
    theirs = scipy.optimize.isotonic_regression(values, weights=weights).x
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_a_curve_goes_through_what_was_measured():
    curve = Curve(rising=False, power=0)
    curve.expect(0, 100.0, 1)
    curve.expect(10, 1.0, 0.1)
    curve.add(10, 60.0, 1)  # in place of what was expected
    curve.add(100, 18.0, 1)
    curve.add(100, 24.0, 2)  # averaged
    assert curve.at(10) == pytest.approx(60)
    assert curve.at(100) == pytest.approx(22)
    middle = math.sqrt(11 * 101) - 1  # of logarithms of one more
    assert curve.at(round(middle)) == pytest.approx(41, abs=0.2)
    assert curve.crossing(41, 1, 1000) == round(middle)
    assert curve.crossing(41, 50, 1000) == 50
    assert curve.crossing(5, 1, 1000) == 1000  # there is nothing on that side
    curve.forget_beyond(50)
    assert curve.measured == {10}


def test_an_expectation_that_is_wrong_is_measured():
    curve = Curve(rising=True, power=1)
    curve.expect(100, 50.0, 0.1)  # in truth it is 80, as everywhere near it
    curve.add(1000, 90.0, 1)
    tried = []
    while 100 not in tried and len(tried) < 5:
        tried.append(curve.crossing(70, 0, 1000))
        curve.add(tried[-1], 80.0, 1)
    assert tried[-1] == 100
    assert curve.crossing(70, 0, 1000) == 0  # now it looks further


@given(st.integers(1, 10**7), st.data())
def test_a_count_has_a_share(groups, data):
    count = data.draw(st.integers(1, groups))
    share = Network.fraction(SimpleNamespace(groups=groups), count)  # type: ignore[arg-type]
    assert 0 < share <= 1
    assert math.floor(Fraction(str(share)) * groups) == count


class KnownNetwork:
    """The levels' quality is a formula, with noise."""

    sign, params = 1.0, None
    steady = False
    fraction, sample = Network.fraction, Network.sample

    def __init__(self, *, half, power, opening, noise=0.0, keys=1, back=0.0):
        self.half, self.power, self.opening, self.back = half, power, opening, back
        self.noise, self.keys, self.groups, self.calls = noise, keys, 100_000, 0
        self.rng = np.random.default_rng(0)

    def true(self, opened, count):
        closed = (count / self.half) ** self.power * (1 - (opened / count) ** self.opening)
        # Far out the metric may come back a little.
        return 100 - 90 * closed / (1 + closed) + self.back * (count / self.groups)

    def _drawn(self, opened, count):
        self.calls += 1
        true = self.true(opened, count)
        return true + self.noise * min(1, (100 - true) / 20) * self.rng.standard_normal()

    def measure(self, params):
        return 100.0

    def refusal(self, counts):
        rising = all(b > a for a, b in zip([0, *counts], counts, strict=False))
        return None if rising else "a level adds no groups"

    def renew(self):
        pass

    def draw(self, level, counts):
        return self._drawn(counts[level - 1] if level else 0, counts[-1])

    def check(self, counts, precision):
        levels = [0, *counts[:-1]]
        return np.array([[self._drawn(m, counts[-1]) for m in levels] for _ in range(self.keys)])


def search_of(network, targets, tolerance=1.0, evaluations=None):
    asked = Targets(targets, network.measure, tolerance=tolerance, evaluations=evaluations)
    return Search(network, targets, asked, None)


KNOWN = {
    "half": st.floats(500, 10_000),
    "power": st.floats(0.7, 1.8),
    "opening": st.floats(0.6, 1.4),
}


@given(targets=st.lists(st.floats(40, 99), min_size=1, max_size=5).map(sorted), **KNOWN)
def test_every_target_is_met_with_few_evaluations(targets, half, power, opening):
    network = KnownNetwork(half=half, power=power, opening=opening)
    search = search_of(network, targets)
    values, _ = search.run()
    assert search.evaluations <= 8 * len(targets) + 8
    np.testing.assert_allclose(values, targets, atol=1.0)
    assert (np.diff(values) >= 0).all()
    assert sorted(set(search.bounds)) == search.bounds


@given(**KNOWN)
def test_noise_is_averaged_over_keys(half, power, opening):
    network = KnownNetwork(half=half, power=power, opening=opening, noise=1.0, keys=16)
    search = search_of(network, [60, 75, 85, 95], 1.5)
    search.run()
    assert search.evaluations <= 40
    true = [network.true(n, search.bounds[-1]) for n in (0, *search.bounds[:-1])]
    np.testing.assert_allclose(true, [60, 75, 85, 95], atol=2.5)


def test_a_metric_that_comes_back_far_out_is_followed_on_the_near_side():
    network = KnownNetwork(half=500, power=1.5, opening=1.0, back=60)
    assert network.true(0, network.groups) > 60
    search = search_of(network, [20, 60])
    values, _ = search.run()
    np.testing.assert_allclose(values, [20, 60], atol=1.0)


def test_steps_that_are_too_large_are_told():
    network = KnownNetwork(half=2, power=1.5, opening=1.0)
    with pytest.raises(ValueError, match=r"targets\[0\]: cannot reach 60 within 0\.5") as error:
        search_of(network, [60.0], 0.5).run()
    assert "it gave 55 at 2e-05 and 76.4917 at 1e-05" in str(error.value)
    assert "smaller steps" in str(error.value)


class KnownRelease(KnownNetwork):
    """The same under fixed keys: each ring in each leaf adds its own noise."""

    steady = True
    leaves = (0.4, 0.3, 0.15, 0.1, 0.05)

    def __init__(self, **options):
        super().__init__(**options)
        self.renewed = -1
        self.renew()

    def renew(self):
        self.renewed += 1

    def refusal(self, counts):
        assert sorted(counts) == counts
        return super().refusal(counts[: len(counts) // 2])

    def draw(self, level, counts):
        half = len(counts) // 2
        opened, ends = [0, *counts[:half]], [*counts[: half - 1 : -1], counts[half - 1]]
        error = 0.0
        for ring in range(level + 1, half + 1):
            bounds = (opened[ring - 1], opened[ring], ends[ring], ends[ring - 1])
            share = (bounds[1] - bounds[0] + bounds[3] - bounds[2]) / (ends[level] - opened[level])
            for leaf, part in enumerate(self.leaves):
                seed = [self.renewed, ring, leaf, *(int(bound * part) for bound in bounds)]
                draw = np.random.default_rng(seed).standard_normal()
                error += self.noise * math.sqrt(share * part) * draw
        true = self.true(opened[level], ends[level])
        self.calls += 1
        return true + error * min(1, (100 - true) / 20)


@given(seed=st.integers(0, 10**6), **KNOWN)
def test_a_release_meets_every_target(seed, half, power, opening):
    network = KnownRelease(half=half, power=power, opening=opening, noise=3.0)
    network.renewed = seed
    search = search_of(network, [60, 75, 85, 95], evaluations=200)
    values, spreads = search.run()
    assert not spreads.any()
    np.testing.assert_allclose(values, [60, 75, 85, 95], atol=1.0)
    assert sorted(values) == list(values)
    assert [network.draw(level, search.bounds) for level in range(4)] == list(values)


def test_a_release_takes_few_evaluations():
    found = []
    for seed in range(20):
        network = KnownRelease(half=1000 + 300 * seed, power=1.2, opening=0.8, noise=3.0)
        search = search_of(network, [60, 75, 85, 95], evaluations=200)
        search.run()
        found.append(search.evaluations)
    assert np.median(found) <= 25
    assert np.quantile(found, 0.9) <= 40


def test_a_level_may_open_less_than_a_third_of_the_budget():
    """Everything is encrypted, and the most important groups alone give most of the quality."""
    network = KnownRelease(half=50_000, power=1.2, opening=0.05, noise=1.0)
    search = search_of(network, [None, 65, 80])
    values, _ = search.run()
    np.testing.assert_allclose(values[1:], [65, 80], atol=1.0)
    assert search.bounds[1] < search.bounds[-1] / 3
    assert search.evaluations <= 20


def test_a_release_goes_on_while_values_lie_on_both_sides():
    found = []
    for seed in range(12):
        network = KnownRelease(half=1000 + 300 * seed, power=1.2, opening=0.8, noise=12.0)
        search = search_of(network, [60, 85])
        values, _ = search.run()
        np.testing.assert_allclose(values, [60, 85], atol=1.0)
        found.append(search.evaluations)
    assert max(found) > 8 * 2 + 8  # it would have ended there
    assert max(found) <= 4 * (8 * 2 + 8)
    hardest = int(np.argmax(found))
    network = KnownRelease(half=1000 + 300 * hardest, power=1.2, opening=0.8, noise=12.0)
    search = search_of(network, [60, 85], evaluations=24)  # who names a number gets no more
    with pytest.raises(ValueError, match=r"cannot reach .* in 24 evaluations: it gave .* and "):
        search.run()


class Jump(KnownRelease):
    """A level gives much or little, and nothing in between."""

    def true(self, opened, count):
        return 99.0 if opened > count / 2 else 10.0


def test_a_jump_is_said_with_what_would_help():
    search = search_of(Jump(half=1, power=1, opening=1), [None, 70])
    words = r"targets\[1\]: cannot reach 70 within 1 in 96 evaluations: it gave 10 at .* and 99 at "
    with pytest.raises(ValueError, match=words) as caught:
        search.run()
    assert "It jumps over the target: try a budget such as 0.3," in str(caught.value)
    assert "Allow more evaluations" not in str(caught.value)


class Lucky(KnownRelease):
    """Everything is encrypted, and chance is better than level 1."""

    def true(self, opened, count):
        return super().true(opened, count) if opened else 90.0


def test_a_lowest_level_better_than_the_next_is_said():
    search = search_of(Lucky(half=50_000, power=1.2, opening=0.5), [None, 65])
    with pytest.raises(ValueError, match=r"targets\[0\]: expected no more than the level above"):
        search.run()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6).map(sorted), st.sampled_from([1, 9]))
def test_lower_levels_have_no_say_in_higher_ones(counts, weights):
    cipher = sj.LosslessCipher()
    settled = settled_counts(counts, weights, cipher)
    assert sorted(settled) == settled
    assert settled[-1] == counts[-1]
    for level in range(1, len(counts)):
        assert settled_counts([counts[0], *counts[level:]], weights, cipher)[1:] == settled[level:]
    rings = np.diff([0, *settled])
    if not is_few(counts[-1], weights, cipher):
        assert not any(ring and is_few(int(ring), weights, cipher) for ring in rings)


# --- on networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_levels_give_what_was_asked_for(scope):
    steps = []
    found = calibrate_levels(
        PARAMS,
        Targets([60, 75, 90], intact, progress=steps.append),
        key=KEY,
        keys=2,
        selection=Select(importance=FINE, scope=scope, small=0),
    )
    assert found.exact
    assert found.untouched == 100
    assert found.values == pytest.approx([60, 75, 90], abs=0.8)
    assert found.evaluations == len(steps) == steps[-1].number <= 32
    assert found.calls <= 2 * found.evaluations
    assert steps[-1].share == found.levels[1]
    assert [step.level for step in steps[-3:]] == [0, 1, 2]
    # The masks are those of the shares, and a release under other keys gives the same.
    for ours, theirs in zip(
        found.masks, nested_masks(FINE, found.levels, scope=scope), strict=True
    ):
        assert bits(ours) == bits(theirs)
    keys = sj.ring_keys(sj.level_key(sj.Secret.generate(), sj.new_model_id(), levels=3))
    protected = sj.encrypt(PARAMS, found.masks, keys)
    for level, value in enumerate(found.values):
        opened = sj.decrypt(protected, found.masks[:level], keys[:level])
        assert intact(opened) == pytest.approx(value, abs=0.2)


def test_small_rings_are_merged_as_protect_does():
    found = calibrate_levels(
        PARAMS,
        Targets([60, 75], intact),
        key=KEY,
        selection=Select(importance=SCORES, scope="model", small=0.02),
    )
    secret = sj.Secret.generate()
    released = sj.protect(
        PARAMS,
        rest="plain",
        secret=secret,
        levels=found.levels,
        selection=sj.Select(importance=SCORES, scope="model", small=0),
    )
    key = sj.level_key(secret, released.model_id, level=1, levels=2)
    opened = sj.unlock(released, key)
    for name in ("conv", "head"):
        closed = np.asarray(opened[name]["kernel"]) != PARAMS[name]["kernel"]
        lower, upper = (mask[name]["kernel"] for mask in found.masks)
        both = upper & ~lower
        assert (closed <= np.broadcast_to(both, closed.shape)).all()
        assert closed.sum() > 0.95 * np.broadcast_to(both, closed.shape).sum()
    assert found.masks[0]["head"]["bias"].all()


def test_a_first_level_that_is_as_bad_as_it_gets():
    params = {"w": PARAMS["head"]["kernel"], "b": np.arange(40, dtype=np.float32)}

    def share(tree):
        return float(np.mean(np.asarray(tree["w"]) == params["w"]))

    found = calibrate_levels(
        params,
        Targets([None, 0.8], share),
        key=KEY,
        selection=Select(importance=importance.l2(params), budget=0.4, small=0.02),
    )
    assert found.levels[-1] == 0.4
    assert found.values == pytest.approx([0.6, 0.8], abs=0.01)
    assert found.masks[0]["b"].all()


def test_small_leaves_that_break_too_much_are_told():
    # All of the network hangs on the bias.
    def whole(params):
        same = np.asarray(params["head"]["bias"]) == 1
        return intact(params) * float(same.all())

    with pytest.raises(ValueError, match=r"targets\[0\]: cannot reach 60: .*as little as.*small=0"):
        calibrate_levels(
            PARAMS, Targets([60, 80], whole), key=KEY, selection=Select(importance=FINE, small=0.02)
        )


def test_a_calibration_prints_without_its_masks():
    masks = tuple(nested_masks(SCORES, [0.1, 0.2]))
    found = sj.Calibration(masks, (0.1, 0.2), (20.0, 21.5), (0.0, 0.0), 25.0, True, 9, 9)
    assert str(found) == (
        "Calibration(masks=<2 trees>, levels=(0.1, 0.2), values=(20.0, 21.5), "
        "spreads=(0.0, 0.0), untouched=25.0, exact=True, evaluations=9, calls=9)"
    )


def test_lower_may_be_better():
    found = calibrate_levels(
        PARAMS,
        Targets([40, 20], lambda params: 100 - intact(params), lower_is_better=True),
        key=KEY,
        keys=1,
        selection=Select(importance=FINE, small=0),
    )
    assert found.values == pytest.approx([40, 20], abs=0.8)
    assert found.untouched == 0
    assert np.isnan(found.spreads).all()


def test_a_single_target_and_equal_ones():
    one = calibrate_levels(
        PARAMS, Targets([70], intact), key=KEY, selection=Select(importance=FINE, small=0)
    )
    assert len(one.masks) == len(one.levels) == 1
    two = calibrate_levels(
        PARAMS,
        Targets([70, 70, 95], intact, tolerance=1),
        key=KEY,
        selection=Select(importance=FINE, small=0),
    )
    assert two.values == pytest.approx([70, 70, 95], abs=1)
    assert two.levels[0] < two.levels[1] < two.levels[2]


def asked(targets, options):
    """Options by name, as arguments of `calibrate_levels`."""
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (Targets, Select)]
    goal, select = ({n: options[n] for n in fields & options.keys()} for fields in names)
    rest = {name: value for name, value in options.items() if name not in goal | select}
    selection = Select(importance=FINE, **({"small": 0} | select))
    return {"targets": Targets(targets, intact, **goal), "selection": selection} | rest


BAD = {
    "none": ([], {}, r"targets: expected a number for each level"),
    "order": ([75, 60], {}, r"targets\[1\]: expected ascending targets.* got 60 after 75"),
    "losses ascend": ([1, 2], {"lower_is_better": True}, r"expected descending"),
    "nan": ([math.nan], {}, r"targets\[0\]: expected a finite number"),
    "none above": ([60, None], {}, r"targets\[1\]: expected a finite number"),
    "none alone": ([None], {}, r"targets\[0\]: expected a finite number"),
    "too good": ([60, 101.0], {"tolerance": 0.5}, r"targets\[1\]: .* untouched network gives 100"),
    "budget": ([60], {"budget": 0.2}, r"targets\[0\]: cannot reach 60: .* up to 0\.2.* leaves 8"),
    "budget range": ([60], {"budget": 0.0}, r"budget: expected a share"),
    "budget of nothing": (
        [60],
        {"budget": 1e-6},
        r"budget: expected at least 1 group, one per",
    ),
    "tolerance": ([60], {"tolerance": 0.0}, r"tolerance: expected a number above 0"),
    "keys": ([60], {"keys": 0}, r"keys: expected at least 1"),
    "scope": ([60], {"scope": "tree"}, r"scope: expected 'leaf' or 'model'"),
}


@pytest.mark.parametrize(("targets", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(targets, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_levels(PARAMS, key=KEY, **asked(targets, options))


def test_bad_metrics_are_refused():
    def run(eval_fn):
        return calibrate_levels(
            PARAMS,
            Targets([0.5], eval_fn, tolerance=0.1),
            key=KEY,
            selection=Select(importance=FINE, small=0),
        )

    with pytest.raises(ValueError, match="The metric is flat"):
        run(lambda _: 1.0)
    with pytest.raises(ValueError, match="got nan, at call 1"):
        run(lambda _: jnp.nan)
    with pytest.raises(ValueError, match="Encrypted weights may overflow"):
        run(lambda params: 1.0 if intact(params) == 100 else np.float32("inf"))
    with pytest.raises(TypeError, match="evaluate: expected a number, got dict"):
        run(lambda _: {"psnr": 1.0})
    with pytest.raises(ValueError, match="'conv/kernel': expected scores that broadcast"):
        calibrate_levels(
            PARAMS,
            Targets([50], intact),
            key=KEY,
            selection=Select(
                importance={**SCORES, "conv": {"kernel": np.ones((1, 1, 2, 3))}}, small=0
            ),
        )


def test_leaves_that_are_too_small_to_hide_in_are_told():
    params = {"w": np.arange(6, dtype=np.float16).reshape(2, 3)}
    with pytest.raises(ValueError, match="too small to hide in"):
        calibrate_levels(
            params,
            Targets([0.5], lambda p: float((np.asarray(p["w"]) == params["w"]).mean())),
            key=KEY,
            selection=Select(importance=importance.l2(params), small=0),
        )


# --- a release ------------------------------------------------------------------------------------

SECRET = sj.Secret(bytes(range(32)))


def jumpy(params):
    """A metric that depends on the keys: it sums changes of weights with their signs."""
    moved = [
        np.asarray(params[name]["kernel"], np.float64) - PARAMS[name]["kernel"]
        for name in ("conv", "head")
    ]
    return 100 - sum(float(np.abs(part.reshape(-1, 10).sum(0)).mean()) for part in moved)


def levels_of(released, levels, metric, secret=SECRET):
    keys = [
        sj.level_key(secret, released.model_id, level=m, levels=levels) for m in range(1, levels)
    ]
    return tuple(
        float(metric(params))
        for params in (released.params, *(sj.unlock(released, key) for key in keys))
    )


def test_progress_counts_levels_as_the_owner_does():
    found = {}
    for rest in ("plain", "sealed"):
        steps = []
        targets = sj.Targets([60, 80], intact, tolerance=5, progress=steps.append)
        select = sj.Select(importance=FINE, small=0)
        sj.protect(PARAMS, rest=rest, secret=SECRET, levels=targets, selection=select)
        found[rest] = {step.level for step in steps}
    assert min(found["plain"]) == 0
    assert found["sealed"] == {level + 1 for level in found["plain"]}


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("metric", [intact, jumpy])
def test_a_release_gives_what_was_measured(scope, metric):
    broken = np.mean([
        metric(sj.encrypt(PARAMS, nested_masks(FINE, [1.0]), [sj.chacha20_key(bytes([n]) * 32)]))
        for n in range(5)
    ])  # fmt: skip
    targets = [float(100 - part * (100 - broken)) for part in (0.5, 0.3, 0.15)]
    steps = []
    released = sj.protect(
        PARAMS,
        rest="plain",
        secret=SECRET,
        levels=sj.Targets(targets, metric, evaluations=120, progress=steps.append),
        selection=sj.Select(importance=FINE, scope=scope, small=0),
        signing=sj.SigningKey.generate(),
        metadata={"title": "toy"},
    )
    found = released.calibration
    assert found
    tolerance = 0.02 * (100 - targets[0])
    assert found.exact
    assert found.values == pytest.approx(targets, abs=tolerance)
    assert sorted(found.values) == list(found.values)
    assert found.values == levels_of(released, 3, metric)
    assert found.evaluations == found.calls == len(steps)
    assert found.spreads == (0, 0, 0)
    assert released.metadata["title"] == "toy"
    sizes = [
        sum(int(np.sum(mask[name]["kernel"])) for name in ("conv", "head")) for mask in found.masks
    ]
    assert [size / 7400 for size in sizes] == pytest.approx(found.levels, abs=0.05)
    top = sj.unlock(released, sj.level_key(SECRET, released.model_id, level=3, levels=3))
    assert bits(top) == bits(PARAMS)


def test_each_release_has_keys_of_its_own():
    ids = {
        sj.protect(
            PARAMS,
            rest="plain",
            secret=SECRET,
            levels=sj.Targets([60, 80], intact),
            selection=sj.Select(importance=FINE, small=0),
        ).model_id
        for _ in range(2)
    }
    assert len(ids) == 2


def test_a_release_with_small_leaves_or_a_single_level():
    released = sj.protect(
        PARAMS,
        rest="plain",
        secret=SECRET,
        levels=sj.Targets([None, 80], intact),
        selection=sj.Select(importance=FINE, budget=0.4, small=0.02),
    )
    found = released.calibration
    assert found
    assert found.masks[0]["head"]["bias"].all()
    assert found.levels[-1] == 0.4
    assert found.values == levels_of(released, 2, intact)
    assert found.values == pytest.approx([60, 80], abs=1)
    released = sj.protect(
        PARAMS,
        rest="plain",
        secret=SECRET,
        levels=sj.Targets([70], intact),
        selection=sj.Select(importance=FINE, small=0),
    )
    found = released.calibration
    assert found
    assert found.values == levels_of(released, 1, intact) == pytest.approx([70], abs=0.7)
    # A loss.
    released = sj.protect(
        PARAMS,
        rest="plain",
        secret=SECRET,
        levels=sj.Targets([40, 20], lambda params: 100 - intact(params), lower_is_better=True),
        selection=sj.Select(importance=FINE, small=0),
    )
    found = released.calibration
    assert found
    assert found.values == pytest.approx([40, 20], abs=0.8)


def test_what_no_release_gives_is_told():
    def run(targets, **options):
        given = asked(targets, options)
        return sj.protect(PARAMS, secret=SECRET, levels=given.pop("targets"), rest="plain", **given)

    with pytest.raises(ValueError, match=r"targets\[\d\]: cannot reach .* in 12 evaluations"):
        run([60, 75, 90], tolerance=1e-4, evaluations=12)
    with pytest.raises(ValueError, match=r"targets\[0\]: cannot reach 60: .* up to 0\.2"):
        run([60], budget=0.2)
    with pytest.raises(ValueError, match="evaluations: expected at least 1, got 0"):
        run([60], evaluations=0)
    with pytest.raises(ValueError, match="expected ascending targets"):
        run([75, 60])
    with pytest.raises(ValueError, match="metadata"):
        run([60], metadata={"selcrypt": "mine"})
    with pytest.raises(TypeError, match="expected a mapping from str to str"):
        run([60], metadata={"a": 1})


# --- on files -------------------------------------------------------------------------------------

METRIC = """
import numpy as np
import safetensors.numpy

PLAIN = safetensors.numpy.load_file("model.safetensors")

def intact(params):
    print("metrics may print")
    names = [name for name in PLAIN if PLAIN[name].ndim > 1]
    return 100 * np.mean([np.mean(np.asarray(params[name]) == PLAIN[name]) for name in names])

def wrong(params):
    return params
"""


@pytest.fixture
def files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("calibrate_metric.py").write_text(METRIC)
    monkeypatch.delitem(sys.modules, "calibrate_metric", raising=False)
    rng = np.random.default_rng(0)
    tensors = {
        "features.0.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "features.0.bias": rng.standard_normal(32).astype(np.float32),
        "classifier.weight": rng.standard_normal((40, 64)).astype(np.float16),
    }
    safetensors.numpy.save_file(tensors, "model.safetensors")
    noise = {
        "features.0.weight": rng.random((32, 16, 1, 1), np.float32),
        "classifier.weight": rng.random((40, 64), np.float32),
    }
    safetensors.numpy.save_file(noise, "scores.safetensors")
    assert main(["keygen", "-o", "keys"]) == 0
    SECRET.write("keys/secret.key", force=True)

    def run(line, *, fails=None):
        capsys.readouterr()
        status = main(line.split())
        out = capsys.readouterr()
        assert status == (0 if fails is None else 1), out.err
        assert fails is None or fails in out.err
        return out.out

    return run


@pytest.mark.parametrize(
    "options",
    ["", "--importance scores.safetensors --scope model", "--granularity filter --select features"],
)
def test_calibrate_protect_and_open_each_level(files, options):
    from calibrate_metric import intact  # of the fixture

    wanted = "any 60 80 --budget 0.7" if "features" not in options else "60 70 90"
    line = "calibrate model.safetensors --evaluate calibrate_metric:intact "
    line += f"--targets {wanted} {options}"
    found = json.loads(files(f"{line} --tolerance 2 --keys 2 --json"))
    assert found["exact"]
    protect = " ".join(found["protect"])
    files(f"protect model.safetensors -o p.safetensors --secret keys/secret.key {protect}")
    measured = [intact(safetensors.numpy.load_file("p.safetensors"))]
    for level in (1, 2, 3):
        files(
            f"grant p.safetensors --level {level} --secret keys/secret.key"
            f" --signer unsigned -o {level}.grant"
        )
        files(f"unlock p.safetensors -g {level}.grant -o {level}.safetensors")
        measured.append(intact(safetensors.numpy.load_file(f"{level}.safetensors")))
    for level, value in enumerate(measured):
        assert value == pytest.approx(found["levels"][level]["value"], abs=0.3)
        target = found["levels"][level]["target"]
        assert target is None or value == pytest.approx(target, abs=2.2)
    assert Path("3.safetensors").read_bytes() == Path("model.safetensors").read_bytes()
    assert protect in files(f"{line} --tolerance 2 --keys 2")


@pytest.mark.parametrize(
    "options",
    [
        "60 75 90 --tolerance 1 --evaluations 80 --signing keys/signing.key",
        "any 60 80 --budget 0.7 --importance scores.safetensors --scope model --tolerance 3",
        "70 90 --granularity filter --select features --tolerance 4",
        "70 85 --unit group --importance scores.safetensors --tolerance 3",
        "60 80 --importance random --tolerance 3",  # another order in each run
    ],
)
def test_a_file_gives_what_was_printed(files, options):
    from calibrate_metric import intact  # of the fixture

    line = "protect model.safetensors --rest plain -o p.safetensors --secret keys/secret.key"
    line += f" --evaluate calibrate_metric:intact --targets {options}"
    found = json.loads(files(f"{line} --json"))
    table = found["calibration"]
    measured = [intact(safetensors.numpy.load_file("p.safetensors"))]
    signer = "" if "--signing" in line else " --signer unsigned"
    for level in range(1, len(table["levels"])):
        files(
            f"grant p.safetensors --level {level} --secret keys/secret.key{signer} -o {level}.grant"
        )
        files(f"unlock p.safetensors -g {level}.grant -o {level}.safetensors")
        measured.append(intact(safetensors.numpy.load_file(f"{level}.safetensors")))
    assert [row["value"] for row in table["levels"]] == measured
    for row in table["levels"][:-1]:
        assert row["target"] is None or row["value"] == pytest.approx(row["target"], abs=3)
    assert table["exact"]
    top = Path(f"{len(table['levels']) - 1}.safetensors").read_bytes()
    assert top == Path("model.safetensors").read_bytes()
    assert (found["signer"] is not None) == ("--signing" in options)


def test_a_calibrated_file_encrypts_copies_alike(files):
    tensors = safetensors.numpy.load_file("model.safetensors")
    tensors["tied.weight"] = tensors["classifier.weight"]
    safetensors.numpy.save_file(tensors, "model.safetensors")
    text = files(
        "protect model.safetensors --rest plain -o p.safetensors --secret keys/secret.key "
        "--targets 60 80 --evaluate calibrate_metric:intact --importance scores.safetensors"
    )
    assert re.search(r"level +opens +target +gives\n +0 +0.0000% +60 +\d", text)
    public = safetensors.numpy.load_file("p.safetensors")
    changed = [public[n] != tensors[n] for n in ("classifier.weight", "tied.weight")]
    assert changed[0].mean() > 0.2
    assert (changed[0] == changed[1]).mean() > 0.9  # but for weights that stay by chance


def test_targets_of_a_checkpoint_in_several_files(files):
    tensors = safetensors.numpy.load_file("model.safetensors")
    Path("shards").mkdir()
    names = {"features": "model-00001-of-00002.safetensors"}
    names["classifier"] = "model-00002-of-00002.safetensors"
    for part, file in names.items():
        here = {name: leaf for name, leaf in tensors.items() if name.startswith(part)}
        safetensors.numpy.save_file(here, f"shards/{file}")
    index = {"weight_map": {name: names[name.split(".")[0]] for name in tensors}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    files(
        "protect shards --rest plain -o public --secret keys/secret.key --targets 60 80 "
        "--tolerance 2 --evaluate calibrate_metric:intact --importance scores.safetensors"
    )
    public = {
        n: v for f in names.values() for n, v in safetensors.numpy.load_file(f"public/{f}").items()
    }
    from calibrate_metric import intact

    assert intact(public) == pytest.approx(60, abs=2)


def test_bad_targets_are_refused(files):
    base = "protect model.safetensors --rest plain -o p.safetensors --secret keys/secret.key"
    goal = "--targets 60 80 --evaluate calibrate_metric:intact"
    for line, message in (
        (f"{goal} --levels 3", "targets: expected no levels with them"),
        (f"{goal} --levels 0.1", "expected no levels"),
        ("--targets 60", "Add --evaluate"),
        ("--evaluate calibrate_metric:intact", "evaluate: expected targets too"),
        ("--tolerance 1 --lower-is-better", "--tolerance, --lower-is-better: expected targets"),
        ("--targets 60 good --evaluate calibrate_metric:intact", "may be \"any\", got 'good'"),
        ("--targets 60 --evaluate nowhere", "expected an import path"),
        ("--targets 60 --evaluate calibrate_metric:wrong", "expected a number"),
        (f"{goal} --tolerance 1e-9 --evaluations 9", "cannot reach"),
        (f"{goal} --budget 0.1", "--targets, value 1: cannot reach 60"),
    ):
        files(f"{base} {line}", fails=message)
        assert not Path("p.safetensors").exists()


def test_bad_commands_are_refused(files):
    base = "calibrate model.safetensors --evaluate calibrate_metric:intact --targets"
    for line, message in (
        (f"{base} 60 good", 'targets: expected numbers, of which the first may be "any"'),
        (f"{base} any", "Only the first may be any, as bad as it gets, and only if"),
        (f"{base} 60 --importance scores.safetensors --layout OIHW", "got layout too"),
        (f"{base} 60 101 --tolerance 0.1", "untouched network gives 100"),
        ("calibrate model.safetensors --evaluate nowhere --targets 1", "expected an import path"),
        ("calibrate model.safetensors --evaluate nowhere:f --targets 1", "ModuleNotFoundError"),
        (
            "calibrate model.safetensors --evaluate calibrate_metric:wrong --targets 1",
            "expected a number",
        ),
        ("calibrate missing.safetensors --evaluate calibrate_metric:intact --targets 1", "missing"),
    ):
        files(line, fails=message)


def test_protect_takes_shares_a_level(files):
    line = "protect model.safetensors --rest plain --secret keys/secret.key --small 0"
    files(f"{line} -o p.safetensors --levels 0.2 0.5")
    levels = json.loads(files("inspect p.safetensors --json"))["levels"]
    assert [level["groups"] for level in levels] == [614, 922]
    files(f"{line} -o x --levels 0.2 0.5 --budget 0.1", fails="budget: expected only with a number")
    files(f"{line} -o x --levels 0.5 0.2", fails="expected ascending shares")
    files(
        "calibrate p.safetensors --evaluate calibrate_metric:intact --targets 1",
        fails="protected file",
    )


@pytest.mark.slow
def test_levels_of_a_denoiser():
    from selcrypt_jax.demo import _train

    with jax.numpy_dtype_promotion("standard"):  # for optax
        subject = _train.train_dncnn(depth=4, width=16, steps=60, crop=96, seed=0)
    scores = importance.random(
        subject.params, key=KEY, select=r"^convs/[12]/kernel$", granularity="weight"
    )
    whole = subject.metric(subject.params)
    masks = nested_masks(scores, [0.9])
    keys = [[sj.chacha20_key(bytes([number]) * 32)] for number in range(3)]
    worst = np.mean([subject.metric(sj.encrypt(subject.params, masks, k)) for k in keys])
    targets = [whole - share * (whole - worst) for share in (0.7, 0.5, 0.3, 0.1)]
    found = calibrate_levels(
        subject.params,
        Targets(targets, subject.metric, tolerance=0.3),
        key=KEY,
        keys=40,
        selection=Select(importance=scores, small=0),
    )
    assert found.exact
    assert found.evaluations <= 40
    assert found.values == pytest.approx(targets, abs=0.3)
    assert list(found.values) == sorted(found.values)


@pytest.mark.slow
def test_a_released_denoiser_gives_its_levels_on_other_pictures():
    from selcrypt_jax.demo import _data, _train
    from selcrypt_jax.models._network import psnr

    with jax.numpy_dtype_promotion("standard"):  # for optax
        subject = _train.train_dncnn(depth=6, width=24, steps=100, crop=96, seed=0)
    # Squares of 32 pixels of photographs that it was not trained on, like those of a chess board.
    photographs = _data.test_photographs(288)
    squares = photographs.reshape(2, 9, 32, 9, 32, 1).swapaxes(2, 3).reshape(-1, 32, 32, 1)
    noise = jax.random.normal(jax.random.key(1), squares.shape)
    noisy = squares + _train.SIGMA * noise

    @jax.jit
    def quality(params):
        return psnr(subject.network(params, noisy), squares)

    def of(params, which):
        return float(quality(params)[which::2].mean())

    scores = importance.random(
        subject.params, key=KEY, select=r"^convs/[1-4]/kernel$", granularity="weight"
    )
    masks, keys = nested_masks(scores, [0.9]), [sj.chacha20_key(bytes(32))]
    whole, worst = (of(p, 0) for p in (subject.params, sj.encrypt(subject.params, masks, keys)))
    targets = [whole - share * (whole - worst) for share in (0.8, 0.6, 0.4, 0.2)]
    secret = sj.Secret(bytes(32))
    released = sj.protect(
        subject.params,
        secret=secret,
        rest="plain",
        levels=sj.Targets(targets, lambda params: of(params, 0), tolerance=0.15),
        selection=sj.Select(importance=scores, small=0),
    )
    found = released.calibration
    assert found
    assert found.exact
    assert found.evaluations <= 40
    assert found.values == levels_of(released, 4, lambda params: of(params, 0), secret)
    held_out = levels_of(released, 4, lambda params: of(params, 1), secret)
    assert held_out == pytest.approx(targets, abs=0.3)


def test_a_metric_may_change_the_dict_that_it_gets():
    params = {"a": PARAMS["head"]["kernel"], "b": PARAMS["conv"]["kernel"]}
    scores = importance.l2(params, granularity="weight")

    def fused(tensors):
        tensors["a"] = tensors["a"] * 1
        tensors["c"] = tensors.pop("b")
        return 100 * np.mean(np.asarray(tensors["a"]) == params["a"])

    released = sj.protect(
        params,
        rest="plain",
        secret=SECRET,
        levels=sj.Targets([60, 80], fused, tolerance=2),
        selection=sj.Select(importance=scores, small=0),
    )
    found = released.calibration
    assert found
    assert found.values == levels_of(released, 2, lambda tensors: fused(dict(tensors)))


@pytest.mark.parametrize(("budget", "says"), [("", True), (" --budget 0.7", False)])
def test_any_does_not_grade_everything_silently(files, capsys, budget, says):
    line = "protect model.safetensors --rest plain -o p.safetensors --secret keys/secret.key"
    line += " --evaluate calibrate_metric:intact --targets any 60 80 --scope model --tolerance 5"
    capsys.readouterr()
    assert main(f"{line} --importance scores.safetensors{budget}".split()) == 0
    said = capsys.readouterr().err
    assert ("any: all groups are graded, since no budget was given" in said) == says
