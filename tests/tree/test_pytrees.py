"""Every kind of container from importance to decryption, and masks that cross between them."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from strategies import assert_same, is_array, octets

from selcrypt_jax import decrypt, encrypt, importance, mask_counts, nested_masks

KEYS = jax.random.split(jax.random.key(0), 2)
KEY = jax.random.key(1)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(9, (3, 3))(x))
        return nn.Dense(7)(x)


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(5, 9, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(9, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(9, 7, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])


class Branch(NamedTuple):
    w: Any
    none: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    w: Any
    rest: Any
    size: int = dataclasses.field(default=3, metadata={"static": True})


@flax.struct.dataclass
class Struct:
    w: Any
    rest: Any
    label: str = flax.struct.field(pytree_node=False, default="static")


def filled(shapes: Any) -> Any:
    """Arrays in place of shapes: compiling an initialiser takes a second."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return KEY
        return jnp.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, shapes)


def linen() -> Any:
    return filled(jax.eval_shape(Linen().init, KEY, jnp.ones((1, 4, 4, 5))))


def equinox() -> Any:
    def make() -> Any:
        layers = [
            eqx.nn.Linear(7, 9, key=KEY),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Dropout(0.5),
            eqx.nn.MLP(7, 7, width_size=9, depth=1, activation=jnp.tanh, key=KEY),
        ]
        return eqx.nn.Sequential(layers)

    return filled(eqx.filter_eval_shape(make))


def haiku() -> Any:
    net = hk.transform(lambda x: hk.nets.MLP([9, 7])(x))
    return filled(jax.eval_shape(net.init, jax.random.key_data(KEY), jnp.ones((1, 7))))


def leaf(*shape: int) -> jax.Array:
    return filled(jax.ShapeDtypeStruct(shape, jnp.float32))


TREES = {
    "linen dict": linen,
    "FrozenDict": lambda: freeze(linen()),
    "nnx.State": lambda: filled(nnx.state(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))))),
    "equinox": equinox,
    "haiku": haiku,
    "lists": lambda: [leaf(9, 7), [leaf(3), (leaf(3, 3, 5, 9), "text", 0.5, True)]],
    "odd nodes": lambda: {
        "branch": Branch(leaf(9, 7), None),
        "empty": [{}, (), optax.EmptyState(), np.zeros((0, 3), np.float32)],
        "number": np.float32(3),
        "numpy": np.asarray(leaf(9, 7)),
        "l[0].w": leaf(9, 7),
    },
    "dataclass": lambda: Registered(leaf(9, 7), {"b": leaf(3), "f": jnp.tanh}),
    "flax dataclass": lambda: Struct(leaf(9, 7), [leaf(3), leaf(9, 7)]),
    "one array": lambda: leaf(9, 7),
}


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


@pytest.mark.parametrize("kind", TREES)
def test_the_whole_way(kind):
    params = TREES[kind]()
    before = [octets(x) if is_array(x) else x for x in leaves(params)]
    masks = nested_masks(importance.l2(params), [0.5, 1.0])
    protected = encrypt(params, masks, KEYS)
    opened = decrypt(protected, masks, KEYS)
    for tree in (*masks, protected, opened):
        assert is_array(params) or type(tree) is type(params)
        assert jax.tree.structure(tree) == jax.tree.structure(params)

    changed = 0
    for old, new, back, mask in zip(
        *map(leaves, (params, protected, opened, masks[1])), strict=True
    ):
        if mask is False or not np.size(old):
            assert new is old
            assert back is old
            continue
        changed += 1
        assert old.ndim >= 2
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert (np.asarray(new) != np.asarray(old)).mean() > 0.99
        assert octets(back) == octets(old)
    assert changed == sum(is_array(x) and x.ndim >= 2 and x.size > 0 for x in leaves(params))
    after = [octets(x) if is_array(x) else x for x in leaves(params)]
    assert all(
        a is b if not isinstance(a, bytes) else a == b for a, b in zip(after, before, strict=True)
    )

    # Level 1 has what it may open, and the rest is still as it was shipped.
    basic = decrypt(protected, masks[:1], KEYS[:1])
    for old, new, half, mask in zip(
        *map(leaves, (params, protected, basic, masks[0])), strict=True
    ):
        if mask is not False:
            expected = np.where(mask, np.asarray(old), np.asarray(new))
            assert octets(half) == octets(expected)


def plain(tree: Any) -> Any:
    """The same paths, in dicts."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else unfreeze(tree)


@pytest.mark.parametrize("kind", ["nnx.State", "FrozenDict"])
def test_masks_fit_by_path_whatever_the_container(kind):
    params = TREES[kind]()
    masks = nested_masks(importance.l2(params), [0.5, 1.0])
    expected = encrypt(params, masks, KEYS)
    assert_same(encrypt(params, [plain(mask) for mask in masks], KEYS), expected)
    # And the other way round: equal paths, equal ciphertext.
    from_dict = encrypt(plain(params), masks, KEYS)
    assert type(from_dict) is dict
    assert_same(from_dict, plain(expected))


def test_lists_and_tuples_of_equal_paths():
    params = [leaf(9, 7), (leaf(7, 9),)]
    masks = nested_masks(importance.l2(params), [0.5])
    expected = encrypt(params, masks, KEYS[:1])
    restored = {"0": masks[0][0], "1": [masks[0][1][0]]}
    assert_same(encrypt(params, [restored], KEYS[:1]), expected)


@pytest.mark.parametrize("kind", ["linen dict", "nnx.State"])
def test_normalisation_statistics_take_part(kind):
    # Short vectors: 9 weights of float32 hide 180 bits and their order.
    params = TREES[kind]()
    scores = importance.l2(params, select=r"(?i)norm.*(mean|var|scale|kernel)|kernel")
    masks = nested_masks(scores, [1.0])
    protected = encrypt(params, masks, KEYS[:1])
    counts = mask_counts(params, masks[0])
    statistics = [name for name in counts if "norm" in name.lower() and "bias" not in name]
    assert len(statistics) == 3
    assert all(counts[name].weights == counts[name].total == 9 for name in statistics)
    assert_same(decrypt(protected, masks, KEYS[:1]), params)
    if kind == "nnx.State":
        assert type(protected["norm"]["mean"]) is nnx.BatchStat
        assert type(protected["norm"]["scale"]) is nnx.Param


def test_a_callable_mask_is_not_called():
    class Model(eqx.Module):
        w: Any

        def __call__(self, *_: Any) -> Any:
            raise AssertionError("called")

    params = Model(leaf(9, 7))
    masks = nested_masks(importance.l2(params), [1.0])
    assert callable(masks[0])
    assert_same(decrypt(encrypt(params, masks, KEYS[:1]), masks, KEYS[:1]), params)


def test_functions_may_stay_where_they_are_in_a_mask():
    params = {"w": leaf(9, 7), "act": jnp.tanh}
    protected = encrypt(params, ({"w": True, "act": jnp.tanh},), KEYS[:1])
    assert protected["act"] is jnp.tanh


def test_a_plain_bool_stands_for_a_subtree():
    params = {"head": {"w": leaf(9, 7), "b": leaf(3)}, "body": [leaf(7, 9), {"w": leaf(9, 7)}]}
    protected = encrypt(params, ({"head": False, "body": True},), KEYS[:1])
    assert all(
        new is old
        for new, old in zip(*map(leaves, (protected["head"], params["head"])), strict=True)
    )
    assert all(
        (a != b).any()
        for a, b in zip(*map(leaves, (protected["body"], params["body"])), strict=True)
    )


def test_a_mask_of_another_tree():
    params, other = TREES["linen dict"](), TREES["haiku"]()
    masks = nested_masks(importance.l2(other), [1.0])
    with pytest.raises(ValueError, match=r"masks\[0\]: 'batch_stats/.*mlp/~/linear_0/w"):
        encrypt(params, masks, KEYS[:1])


def test_haiku_names_with_a_separator_that_clash():
    params = {"a/b": leaf(9, 7), "a": {"b": leaf(9, 7)}}
    with pytest.raises(ValueError, match=r"'a/b'.*\['a'\]\['b'\]|\['a/b'\]"):
        encrypt(params, (True,), KEYS[:1])


def test_frozen_dict_is_returned_frozen():
    assert isinstance(encrypt(freeze({"w": leaf(9, 7)}), (True,), KEYS[:1]), FrozenDict)
