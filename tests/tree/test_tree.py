"""Names, selectors, groups: the basis of everything else."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same

from selcrypt_jax._tree import groups as _groups
from selcrypt_jax._tree import names as _tree


class Pair(NamedTuple):
    x: object
    y: object


class Module(eqx.Module):
    weight: object
    label: str = eqx.field(static=True, default="static")


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"b": 1, "a": {"c": 2}}, ["a/c", "b"]),
        (FrozenDict({"a": {"c": 2}}), ["a/c"]),
        ([1, (2, {"k": 3})], ["0", "1/0", "1/1/k"]),
        (Pair(1, [2]), ["x", "y/0"]),
        (Module({"k": 1}), ["weight/k"]),
        ({"mlp/~/linear_0": {"w": 1}}, ["mlp/~/linear_0/w"]),
        ({"a": None, "b": {}, "c": (), "d": optax.EmptyState(), "e": 1}, ["e"]),
        (3.0, [""]),
        ({3: 1, 20: 2}, ["3", "20"]),
        ({"é": 1, "e\u0301": 2, "l[0].w": 3}, ["e\u0301", "l[0].w", "é"]),
        (nnx.State({"l": {"w": nnx.Param(jnp.ones(2)), "m": nnx.BatchStat(jnp.ones(2))}}),
         ["l/m", "l/w"]),
        ({"v": nnx.Param(jnp.ones(2)), "value": {"value": 1}}, ["v", "value/value"]),
    ],
)  # fmt: skip
def test_names(tree, names):
    named = _tree.named_leaves(tree)
    assert list(named.leaves) == names
    assert_same(named.rebuild({}), tree)
    assert jax.tree.leaves(named.rebuild(dict.fromkeys(names, 7))) == [7] * len(names)


def test_two_leaves_of_one_name():
    with pytest.raises(ValueError, match="two leaves are called 'a/b'") as caught:
        _tree.named_leaves({"a/b": 1, "a": {"b": 2}})
    message = str(caught.value)
    assert all(part in message for part in ("['a/b']", "['a']['b']", "rename"))


PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": np.ones(4, np.float32), "count": np.array(3)},
    "embed": jnp.ones((5, 2), jnp.bfloat16),
    "codes": jnp.ones((5, 2), jnp.int8),
    "flags": np.ones((2, 2), bool),
    "act": jax.nn.relu,
    "rate": 0.1,
    "key": jax.random.key(0),
}


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, ["conv/kernel", "embed"]),
        ("kernel$", ["conv/kernel"]),
        ("^(conv|norm)/", ["conv/bias", "conv/kernel", "norm/count", "norm/scale"]),
        (lambda name, leaf: getattr(leaf, "ndim", 0) == 1, ["conv/bias", "norm/scale"]),
        ("codes", ["codes"]),
    ],
)
def test_selectors(select, names):
    chosen = _tree.select_leaves(PARAMS, select)
    assert list(chosen) == names
    assert all(chosen[name] is _tree.named_leaves(PARAMS).leaves[name] for name in names)


def nothing(name, leaf):
    return False


@pytest.mark.parametrize(
    ("select", "parts"),
    [
        ("kernels", ["'kernels'", "matches no leaf", "'conv/kernel'", "change `select`"]),
        (nothing, ["'nothing'", "matches no leaf", "'conv/kernel'"]),
        ("[", ["'['", "regular expression"]),
        ("act", ["'act'", "got", "Change `select`"]),
        ("rate", ["'rate'", "float"]),
        ("flags", ["'flags'", "bool"]),
        ("^key", ["'key'", "key<fry>"]),
    ],
)
def test_bad_selectors(select, parts):
    with pytest.raises(ValueError, match="select") as caught:
        _tree.select_leaves(PARAMS, select)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_nothing_to_select():
    with pytest.raises(ValueError, match=r"the default.*two axes.*'b'"):
        _tree.select_leaves({"b": np.ones(3)})


@pytest.mark.parametrize(
    ("shape", "granularity", "layout", "axes"),
    [
        ((3, 3, 8, 16), "kernel", "HWIO", (0, 1)),
        ((3, 3, 8, 16), "filter", "HWIO", (0, 1, 2)),
        ((16, 8, 3, 3), "kernel", "OIHW", (2, 3)),
        ((16, 8, 3, 3), "filter", "OIHW", (1, 2, 3)),
        ((16, 8, 3, 3), "weight", "OIHW", ()),
        ((8, 16), "kernel", "HWIO", ()),
        ((8, 16), "filter", "HWIO", (0,)),
        ((16, 8), "filter", "OIHW", (1,)),
        ((5, 8, 16), "kernel", "HWIO", (0,)),
        ((16,), "filter", "HWIO", ()),
        ((), "kernel", "HWIO", ()),
    ],
)
def test_axes_inside_a_group(shape, granularity, layout, axes):
    assert _groups.inner_axes(shape, granularity, layout) == axes


@pytest.mark.parametrize("names", [("kernels", "HWIO"), ("kernel", "NCHW")])
def test_unknown_granularity_or_layout(names):
    with pytest.raises(ValueError, match=r"kernels|NCHW"):
        _groups.inner_axes((3, 3, 8, 16), *names)


@given(
    shape=st.lists(st.integers(1, 4), max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_positions_of_groups(shape, seed, data):
    inside = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    groups = [1 if inner else size for inner, size in zip(inside, shape, strict=True)]
    mask = np.random.default_rng(seed).random(groups) < 0.5
    number = np.broadcast_to(np.arange(mask.size).reshape(groups), shape).ravel()
    expected = [np.flatnonzero(number == group) for group in np.flatnonzero(mask)]
    found = _groups.group_positions(shape, mask)
    assert found.shape == (mask.sum(), math.prod(shape) // mask.size)
    np.testing.assert_array_equal(found, np.reshape(expected, found.shape))


def test_few_padded_sizes():
    sizes = [_tree.padded(count) for count in range(100_000)]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes))
    assert len(set(sizes)) < 80


def test_long_lists_are_cut():
    assert _tree.listed([]) == "none"
    assert _tree.listed("abc", limit=2) == "'a', 'b' and 1 more"


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({1: 0, "1": 0}, ["[1]", "['1']"]),
        ({"a": [{"b": {None: 0, "x": 0}}]}, ["['a'][0]['b'][None]", "['a'][0]['b']['x']"]),
        ({"a": Pair({(1, "a"): 0, 2: 0}, 0)}, ["['a'].x[(1, 'a')]", "['a'].x[2]"]),
        ({"a": 0, "b": 0, 3: 0}, ["['a']", "[3]"]),
        ({"m": FrozenDict({1: 0, "1": 0})}, ["['m'][1]", "['m']['1']"]),
    ],
)
def test_keys_that_cannot_be_sorted_are_named(tree, paths):
    with pytest.raises(ValueError, match="params: expected keys that can be sorted") as caught:
        _tree.named_leaves(tree)
    assert all(path in str(caught.value) for path in paths), caught.value
    assert str(caught.value).endswith("under different names.")


def test_keys_of_a_state_that_cannot_be_sorted_are_named():
    with pytest.raises(ValueError, match=r"got \[1\] and \['1'\] in one dict"):
        _tree.named_leaves(nnx.State({1: nnx.Param(jnp.ones(2)), "1": nnx.Param(jnp.ones(2))}))


def test_an_error_of_a_node_of_the_users_own_stays():
    class Broken:
        pass

    def flatten(_: object):
        raise ValueError("mine")

    jax.tree_util.register_pytree_node(Broken, flatten, lambda *_: Broken())
    with pytest.raises(ValueError, match="mine"):
        _tree.named_leaves({"a": Broken()})
