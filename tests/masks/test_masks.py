"""Budgets and nested masks against counts by hand and a NumPy oracle."""

import itertools
import math
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

import selcrypt_jax as sj
from selcrypt_jax import (
    PaperLevels,
    Secret,
    Select,
    importance,
    mask_counts,
    nested_masks,
    protect,
)
from selcrypt_jax._tree.rings import LeafCount


def counts(masks, name="w"):
    return [int(mask[name].sum()) for mask in masks]


@pytest.mark.parametrize(
    ("ratio", "levels", "groups", "expected"),
    [
        # The paper's layers: floor(0.02·4096) + 1 = 82, of which 0.68, 0.76, 0.84, 0.92 and all.
        (0.02, 5, 4096, (55, 62, 68, 75, 82)),
        (0.08, 1, 4096, (328,)),
        (0.02, 5, 25, (0, 0, 0, 0, 1)),
        (1.0, 2, 10, (8, 10)),  # not 11: there are no more
        (0.29, 1, 100, (30,)),
    ],
)
def test_levels_of_the_release(ratio, levels, groups, expected):
    assert PaperLevels(ratio, levels).counts(groups) == expected


@pytest.mark.parametrize(
    ("fraction", "groups", "expected"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.1, 30, 3), (1, 7, 7), (1.0, 7, 7)],
)
def test_a_share_is_taken_as_it_is_written(fraction, groups, expected):
    # In binary 0.29 · 100 is 28.999999999999996.
    assert counts(nested_masks({"w": np.arange(groups)}, [fraction])) == [expected]


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("value", [0.0, -1.5, np.inf, -np.inf])
def test_ties_are_counted_exactly_and_taken_from_the_front(value, scope):
    masks = nested_masks({"w": np.full((1, 1, 10, 10), value)}, [0.29, 0.5], scope=scope)
    for mask, count in zip(masks, (29, 50), strict=True):
        np.testing.assert_array_equal(mask["w"].ravel(), np.arange(100) < count)


def test_signed_zeros_tie():
    (mask,) = nested_masks({"w": np.array([-0.0, 0.0, -0.0, 0.0])}, [0.5])
    np.testing.assert_array_equal(mask["w"], [True, True, False, False])


def test_ties_over_the_model_do_not_depend_on_the_container():
    scores = {name: np.ones(4) for name in ("b", "a", "c")}
    (mask,) = nested_masks(scores, [0.5], scope="model")
    assert counts([mask], "a") + counts([mask], "b") + counts([mask], "c") == [4, 2, 0]

    class Model(eqx.Module):  # its leaves come in the order of its fields
        c: np.ndarray
        a: np.ndarray
        b: np.ndarray

    for other in (FrozenDict(scores), Model(**scores)):
        (found,) = nested_masks(other, [0.5], scope="model")
        for name in scores:
            leaf = found[name] if isinstance(found, FrozenDict) else getattr(found, name)
            np.testing.assert_array_equal(leaf, mask[name])


def test_scopes():
    scores = {"low": np.arange(10.0), "high": np.arange(100.0, 130.0), "out": False}
    (leaf,) = nested_masks(scores, [0.2])
    assert counts([leaf], "low") + counts([leaf], "high") == [2, 6]
    (model,) = nested_masks(scores, [0.2], scope="model")
    assert counts([model], "low") + counts([model], "high") == [0, 8]
    assert leaf["out"] is False
    assert model["out"] is False
    (paper,) = nested_masks(scores, PaperLevels(0.2, levels=1))  # floor(2) + 1 and floor(6) + 1
    assert counts([paper], "low") + counts([paper], "high") == [3, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8"])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray])
def test_scores_of_any_dtype(where, dtype):
    values = np.array([3, 0, 100, 7, 64]).astype(jnp.dtype(dtype))
    masks = nested_masks({"w": where(values)}, [0.4, 0.8])
    np.testing.assert_array_equal(masks[0]["w"], [False, False, True, False, True])
    np.testing.assert_array_equal(masks[1]["w"], [True, False, True, True, True])
    assert all(isinstance(mask["w"], np.ndarray) and mask["w"].dtype == bool for mask in masks)


# Few values, so that ties are the rule.
SCORES = st.lists(
    st.sampled_from([-np.inf, -1.0, -0.5, -0.0, 0.0, 0.5, 2.0, np.inf]), min_size=1, max_size=40
)


@given(
    scores=st.dictionaries(st.sampled_from("abcd"), SCORES, min_size=1),
    percents=st.lists(st.integers(1, 100), min_size=1, max_size=4, unique=True).map(sorted),
    scope=st.sampled_from(["leaf", "model"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_nested_and_exact(scores, percents, scope, dtype):
    scores = {name: np.array(values, dtype) for name, values in scores.items()}
    pooled = {"": [(n, i) for n in sorted(scores) for i in range(scores[n].size)]}
    alone = {n: [(n, i) for i in range(scores[n].size)] for n in scores}
    budgets = {}
    for pool, groups in (pooled if scope == "model" else alone).items():
        ranked = sorted(groups, key=lambda at: -scores[at[0]][at[1]])  # stable
        budgets[pool] = [
            set(ranked[: math.floor(Fraction(p, 100) * len(groups))]) for p in percents
        ]
    expected = [
        set().union(*(chosen[m] for chosen in budgets.values())) for m in range(len(percents))
    ]

    fractions = [percent / 100 for percent in percents]
    if not expected[0] or any(len(high) <= len(low) for low, high in itertools.pairwise(expected)):
        with pytest.raises(ValueError, match=r"level \d+ adds no groups"):
            nested_masks(scores, fractions, scope=scope)
        return
    masks = nested_masks(scores, fractions, scope=scope)
    got = [{(n, int(i)) for n in mask for i in np.flatnonzero(mask[n])} for mask in masks]
    assert got == expected
    assert all(low <= high for low, high in itertools.pairwise(got))


W = {"w": np.arange(100.0)}
NAN = np.ones((2, 3))
NAN[1, 2] = np.nan
BAD = {
    "zero": (W, [0.0], ValueError, ["levels[0]", "(0, 1]", "0.0"]),
    "above one": (W, [0.5, 1.5], ValueError, ["levels[1]", "(0, 1]", "1.5"]),
    "negative": (W, [-0.1], ValueError, ["levels[0]", "-0.1"]),
    "nan": (W, [math.nan], ValueError, ["levels[0]", "nan"]),
    "unsorted": (W, [0.5, 0.2], ValueError, ["0.2", "0.5", "ascending", "Sort"]),
    "none": (W, [], ValueError, ["levels", "none"]),
    "a number": (W, 0.5, TypeError, ["levels", "float", "[0.08]"]),
    "selects nothing": (W, [0.001], ValueError, ["level 1", "adds no groups", "'w'", "larger"]),
    "adds nothing": (W, [0.05, 0.051], ValueError, ["level 2", "adds no groups", "fewer levels"]),
    "nan score": ({"conv": {"w": NAN}}, [0.5], ValueError,
                  ["'conv/w'", "NaN", "1 of 6", "(1, 2)", "select"]),
    "no scores": ({"w": False, "b": False}, [0.5], ValueError, ["'b', 'w'", "at least one"]),
    "only empty ones": ({"w": np.zeros((0, 3))}, [0.5], ValueError, ["at least one", "'w'"]),
    "masks": ({"w": np.ones(9, bool)}, [0.5], TypeError, ["'w'", "bool", "not masks"]),
    "a float": ({"w": np.ones(9), "b": 1.0}, [0.5], TypeError, ["'b'", "float", "False"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    scores, fractions, error, parts = BAD[case]
    with pytest.raises(error) as caught:
        nested_masks(scores, fractions)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_bad_levels_and_scope():
    for ratio in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            PaperLevels(ratio)
    with pytest.raises(ValueError, match="levels: expected at least 1, got 0"):
        PaperLevels(0.5, levels=0)
    with pytest.raises(ValueError, match="scope: expected 'leaf' or 'model', got 'layer'"):
        nested_masks(W, [0.5], scope="layer")


def test_traced_scores_are_refused():
    with pytest.raises(TypeError, match=r"scores 'w': expected a concrete array.*outside jit"):
        jax.jit(lambda scores: nested_masks(scores, [0.5]))({"w": jnp.arange(9.0)})


def test_counts():
    params = {
        "conv": np.ones((3, 3, 8, 16)),
        "b": np.ones(16),
        "empty": np.ones((0, 3)),
        "f": "relu",
    }
    masks = nested_masks(importance.l2({"conv": jnp.ones((3, 3, 8, 16))}), [0.25])
    assert mask_counts(params, {**masks[0], "b": True, "empty": True, "f": False}) == {
        "conv": LeafCount(groups=32, weights=288, total=1152),
        "b": LeafCount(groups=1, weights=16, total=16),
        "empty": LeafCount(groups=0, weights=0, total=0),
    }
    with pytest.raises(ValueError, match="'f'"):
        mask_counts({"w": np.ones(3)}, {"w": False, "f": False})


def test_shares_in_single_precision_are_what_they_were_written_as():
    scores = {"k": np.arange(100.0)}
    for shares in (np.array([0.29], np.float32), jnp.array([0.29]), [np.float64(0.29)], [0.29]):
        (mask,) = nested_masks(scores, shares)
        assert mask["k"].sum() == 29


@pytest.mark.parametrize("shares", ["0.1", ["0.1"], [True], np.ones((1, 2))])
def test_shares_that_are_no_numbers(shares):
    with pytest.raises(TypeError, match="levels"):
        nested_masks({"k": np.arange(100.0)}, shares)


# --- small leaves -------------------------------------------------------------------------------


def network():
    rng = np.random.default_rng(0)
    shapes = {
        "first": (3, 3, 1, 8), "scale": (64,), "tiny": (5,), "middle": (60, 100), "last": (100, 50)
    }  # fmt: skip
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} | {"step": 3}


def test_small_leaves_join_every_level():
    params = network()
    scores = dict.fromkeys(params, False) | {"middle": np.abs(params["middle"])}
    masks = sj.nested_masks(scores, [0.1, 0.2])
    # Of 11,141 weights: 5 + 64 + 72 are 1.3 %.
    wide = sj.with_small_leaves(params, masks, small=0.02)
    for before, mask in zip(masks, wide, strict=True):
        np.testing.assert_array_equal(mask["middle"], before["middle"])
        assert mask["first"].all()
        assert mask["scale"].all()
        assert not np.any(mask["tiny"])  # 7 bits of order and 100 masked ones are too few
        assert mask["last"] is False
        assert mask["step"] is False
    keys = sj.ring_keys(sj.level_key(bytes(32), bytes(16), levels=2))
    for cipher in (None, sj.LosslessCipher(unit="group")):
        file = sj.encrypt(params, wide, keys, cipher=cipher)
        assert (np.asarray(file["first"]) != params["first"]).mean() > 0.9
        opened = sj.decrypt(file, wide[:1], keys[:1], cipher=cipher)
        np.testing.assert_array_equal(opened["first"], params["first"])
        np.testing.assert_array_equal(opened["scale"], params["scale"])
        assert (np.asarray(opened["middle"]) != params["middle"]).any()


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (0, set()),
        (0.001, set()),
        (0.0065, {"scale"}),
        (0.0126, {"scale"}),
        (0.0127, {"scale", "first"}),
        (0.5, {"scale", "first", "last"}),
        (1, {"scale", "first", "last", "middle"}),
    ],
)
def test_the_smallest_leaves_within_a_share(share, names):
    params = network()
    empty = dict.fromkeys(params, False)
    (mask,) = sj.with_small_leaves(params, (empty,), small=share)
    assert {name for name, leaf in mask.items() if np.any(leaf)} == names
    (mask,) = sj.with_small_leaves(params, (empty,), select="^sc|^f|^t|^m", small=share)
    assert {name for name, leaf in mask.items() if np.any(leaf)} == names - {"last"}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_bad_share_of_small_leaves(share):
    with pytest.raises(ValueError, match="expected a share of all weights"):
        sj.with_small_leaves(network(), (False,), small=share)


@pytest.mark.parametrize(
    ("params", "options", "words"),
    [
        (
            {"a": (2, 4), "b": (4,)},
            {},
            r"'a' \(none of 8 groups\); left out: 'b' \(float32\[4\]\). Encrypt a larger",
        ),
        ({"e": (0, 3), "f": (3, 0)}, {}, r"'e' \(no weights\), 'f' \(no weights\). Select tensors"),
        (
            {"a": (16, 16)},
            {"levels": 50},
            r"'a' \(20 of 256 groups, from level 50\). Encrypt a larger share",
        ),
        (
            {"big": (64, 64), "s": (8,)},
            {"levels": 200, "selection": Select(small=0.02)},
            r"\d+ of 4,096 groups, from level \d+\). Encrypt",
        ),
    ],
)
def test_leaves_that_were_left_out_are_named_with_the_reason(params, options, words):
    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal(shape, np.float32) for name, shape in params.items()}
    with pytest.raises(ValueError, match=words):
        protect(tree, secret=Secret.generate(), **options)


def test_integers_that_take_no_part_are_named():
    tree = {"scale": np.ones((2, 2), np.float32), "codes": np.ones((30, 30), np.int8)}
    with pytest.raises(ValueError, match=r"'scale' \(none of 4 groups\); .* 'codes' \(int8\[30, "):
        protect(tree, secret=Secret.generate())
