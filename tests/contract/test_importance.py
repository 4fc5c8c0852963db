"""What every importance function has in common; a new one is one row of MEMBERS."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import selcrypt_jax as sj
from selcrypt_jax import importance

# The network of these tests is not trained.
pytestmark = pytest.mark.filterwarnings("ignore:.*is no better than with noise")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 4), (3, 8, 5)))
SHAPES = {"conv": (3, 3, 4, 5), "line": (1, 4, 5), "dense": (4, 5)}
WEIGHTS = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
REST = {
    "bias": np.ones(5, np.float32),
    "step": np.arange(6).reshape(2, 3),
    "name": "toy",
    "act": jax.nn.relu,
}


def oihw(leaf: Any) -> Any:
    """An HWIO leaf in PyTorch's order."""
    return leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))


def hwio(leaf: Any) -> Any:
    return leaf.transpose(*range(2, leaf.ndim), 1, 0)


def loss(params: Any, batch: Any, *, layout: str = "HWIO") -> jax.Array:
    """Each leaf is a linear layer, its spatial weights added up, with a square loss of its own."""
    x, y = batch
    total = jnp.float32(0)
    for name in sorted(set(SHAPES) & set(params)):
        leaf = jnp.asarray(params[name]).astype(jnp.float32)
        leaf = hwio(leaf) if layout == "OIHW" else leaf
        total += jnp.square(x @ leaf.reshape(-1, 4, 5).sum(0) - y).mean()
    return total


def products(name: str) -> np.ndarray:
    """Weight times gradient of the loss, by hand, ``[batches, ...]``."""
    weight = WEIGHTS[name]
    matrix = weight.reshape(-1, 4, 5).sum(0)
    gradients = [2 * x.T @ (x @ matrix - y) / y.size for x, y in zip(X, Y, strict=True)]
    return np.stack([weight * gradient for gradient in gradients])


def grouped(leaf: np.ndarray, granularity: str) -> np.ndarray:
    """``[groups..., weights in a group]`` of an HWIO leaf."""
    kept = {"kernel": leaf.shape[-2:], "filter": leaf.shape[-1:], "weight": leaf.shape}
    return np.moveaxis(leaf.reshape(-1, *kept[granularity]), 0, -1)


def size(groups: np.ndarray) -> np.ndarray:
    return np.abs(groups.mean(-1))


class Member(NamedTuple):
    """An importance function, and what it promises.

    Attributes:
        scores: ``(params, loss, **options) -> scores``.
        of_weights: the scores from the groups of a leaf, in NumPy.
        of_products: the scores from weight times gradient, for one batch.
        learns: whether it takes a loss, and therefore only floats.
        jit: whether it runs under ``jit``.
        exact: whether scores follow from values alone, whatever the order of axes.
    """

    scores: Callable[..., Any]
    of_weights: Callable[[np.ndarray], np.ndarray] | None = None
    of_products: Callable[[np.ndarray], np.ndarray] | None = None
    learns: bool = False
    jit: bool = True
    exact: bool = True


def closed(name: str, **options: Any) -> Callable[..., Any]:
    function = getattr(importance, name)
    return lambda params, _loss, **more: function(params, **options, **more)


def by_gradient(name: str) -> Callable[..., Any]:
    function = getattr(importance, name)
    return lambda params, loss, batches=(X, Y), **more: function(loss, params, batches, **more)


def learned(objective: Any) -> Callable[..., Any]:
    config = sj.PSSConfig(objective, steps=1, sampled=False)
    return lambda params, loss, batches=(X, Y), **more: sj.pss(
        loss, params, batches, key=KEY, config=config, **more
    )


def at_budgets(params: Any, loss: Any, batches: Any = (X, Y), **more: Any) -> Any:
    config = sj.PSSBudgets((0.5,), "model", steps=1)
    return sj.pss(loss, params, batches, key=KEY, config=config, **more)


MEMBERS = {
    "random": Member(closed("random", key=KEY), exact=False),
    "l2": Member(closed("l2"), lambda groups: np.sqrt((groups**2).sum(-1))),
    "descend": Member(closed("descend"), size),
    "ascend": Member(closed("ascend"), lambda groups: -size(groups)),
    "mean": Member(closed("mean"), lambda groups: -np.abs(size(groups) - size(groups).mean())),
    "taylor": Member(
        by_gradient("taylor"), of_products=lambda groups: np.abs(groups.sum(-1)), learns=True
    ),
    "fisher": Member(
        by_gradient("fisher"), of_products=lambda groups: (groups**2).sum(-1), learns=True
    ),
    "pss keep": Member(learned("keep"), learns=True, jit=False),
    "pss budgets": Member(at_budgets, learns=True, jit=False, exact=False),
    "pss break": Member(learned("break"), learns=True, jit=False, exact=False),
}
GRANULARITIES = ["kernel", "filter", "weight"]


def having(test: Callable[[Member], bool] = lambda member: True) -> pytest.MarkDecorator:
    """Parametrises a test by members."""
    chosen = {name: member for name, member in MEMBERS.items() if test(member)}
    return pytest.mark.parametrize("member", chosen.values(), ids=chosen)


# Each program of pss takes a second to compile: where the same code serves all, one is enough.
@pytest.mark.parametrize(
    ("name", "granularity"),
    [(n, g) for n, m in MEMBERS.items() for g in GRANULARITIES if m.jit or g == "filter"],
)
def test_scores(name, granularity):
    params, member = {**WEIGHTS, **REST}, MEMBERS[name]
    scores = member.scores(params, loss, granularity=granularity)
    assert scores.keys() == params.keys()
    assert all(scores[name] is False for name in REST)  # by default, kernels and the like
    for name, leaf in WEIGHTS.items():
        groups = grouped(leaf, granularity).shape[:-1]
        assert scores[name].shape == (1,) * (leaf.ndim - len(groups)) + groups
        assert scores[name].dtype == jnp.float32
        assert np.isfinite(scores[name]).all()
        expected = None
        if member.of_weights:
            expected = member.of_weights(grouped(leaf, granularity))
        if member.of_products:
            each = [member.of_products(grouped(part, granularity)) for part in products(name)]
            expected = np.mean(each, 0)
        if expected is not None:
            np.testing.assert_allclose(scores[name].reshape(groups), expected, rtol=1e-4, atol=1e-6)


@having(lambda member: member.exact)
def test_layouts_agree_on_what_a_group_is(member):
    def torch_loss(params, batch):
        return loss(params, batch, layout="OIHW")

    params = {"conv": WEIGHTS["conv"]}
    ours = member.scores(params, loss, granularity="filter")
    params = {"conv": oihw(WEIGHTS["conv"])}
    theirs = member.scores(params, torch_loss, granularity="filter", layout="OIHW")
    for name, score in ours.items():
        assert theirs[name].shape == (5,) + (1,) * (score.ndim - 1)
        np.testing.assert_allclose(hwio(theirs[name]), score, rtol=1e-4, atol=1e-6)


@having(lambda member: member.jit)
def test_jit_gives_the_same(member):
    eager = member.scores(WEIGHTS, loss)
    jitted = jax.jit(lambda params: member.scores(params, loss))(WEIGHTS)
    for name, score in eager.items():
        np.testing.assert_allclose(jitted[name], score, rtol=1e-5, atol=1e-6)


@jax.tree_util.register_pytree_with_keys_class
class Container(dict):
    """A container that no library knows."""

    def tree_flatten_with_keys(self):
        keys = [jax.tree_util.GetAttrKey(name) for name in self]
        return list(zip(keys, self.values(), strict=True)), tuple(self)

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(zip(names, leaves, strict=True))


CONTAINERS = {
    "nnx.State": lambda params: nnx.State({n: nnx.Param(leaf) for n, leaf in params.items()}),
    "FrozenDict": FrozenDict,
    "its own": Container,
}


@having()
def test_any_container(member):
    def of_any(params, batch):
        return loss({name: jnp.asarray(params[name]) for name in dense}, batch)

    dense = {"dense": WEIGHTS["dense"], "line": WEIGHTS["line"]}
    expected = member.scores(dense, loss)
    for make in list(CONTAINERS.values())[: None if member.jit else 1]:
        params = make(dict(reversed(dense.items())))
        # Whatever the container, equal paths have equal scores.
        scores = member.scores(params, of_any)
        assert jax.tree.structure(scores) == jax.tree.structure(params)
        for name in dense:
            np.testing.assert_array_equal(jnp.asarray(scores[name]), expected[name])


@having()
def test_low_precision_is_measured_in_float32(member):
    for dtype in ("bfloat16", "float16") if member.jit else ("bfloat16",):
        narrow = {"dense": WEIGHTS["dense"].astype(jnp.dtype(dtype))}
        wide = {"dense": narrow["dense"].astype(np.float32)}
        scores = member.scores(narrow, loss)["dense"]
        assert scores.dtype == jnp.float32
        if not member.jit:  # one program, not two; what it learns is that of test_pss
            assert np.isfinite(scores).all()
            continue
        # Gradients are in the dtype of the weights.
        rtol = 2e-2 if member.learns else 0
        np.testing.assert_allclose(scores, member.scores(wide, loss)["dense"], rtol=rtol)


@having()
def test_integers_are_measured_or_refused(member):
    whole = (WEIGHTS["conv"] * 40).astype(np.int8)
    params = {"conv": whole}
    if member.learns:
        with pytest.raises(
            ValueError, match="floats, which have gradients, got integers in 'conv'"
        ):
            member.scores(params, loss, select="conv")
        return
    scores = member.scores(params, loss, select="conv")["conv"]
    as_floats = member.scores({"conv": whole.astype(np.float32)}, loss)["conv"]
    np.testing.assert_array_equal(scores, as_floats)
    codes = {"conv": whole.view(np.uint8)}
    if member is MEMBERS["random"]:
        member.scores(codes, loss, select="conv")
        return
    with pytest.raises(ValueError, match=r"'conv'.* got uint8.*packed.*importance.random"):
        member.scores(codes, loss, select="conv")


@having()
def test_a_weight_that_is_no_number_is_told(member):
    params = {"conv": WEIGHTS["conv"].copy()}
    params["conv"][0, 0, 1, 2] = np.nan
    if member is MEMBERS["random"]:  # which does not look at weights
        assert np.isfinite(member.scores(params, loss)["conv"]).all()
        return
    with pytest.raises(ValueError, match=r"'conv': expected (finite weights|numbers), got NaN"):
        sj.nested_masks(member.scores(params, loss), [0.5])


BAD = {
    "selects nothing": ({"select": "embed"}, r"'embed' matches no leaf. There are: .*'conv'"),
    "selects a function": ({"select": "act"}, "'act': expected an array of floats or integers"),
    "selects booleans": ({"select": "mask"}, "'mask': expected .* got bool"),
    "expression": ({"select": "("}, "not a regular expression"),
    "granularity": ({"granularity": "kernels"}, "expected 'kernel', 'filter' or .* 'kernels'"),
    "layout": ({"layout": "NHWC"}, "layout: expected 'HWIO' or 'OIHW', got 'NHWC'"),
}


@having()
@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(member, options, message):
    params = {**WEIGHTS, **REST, "mask": np.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=message):
        member.scores(params, loss, **options)


@having()
def test_nothing_to_select_by_default(member):
    with pytest.raises(ValueError, match=r"the default .* matches no leaf"):
        member.scores({"bias": REST["bias"]}, loss)


@having(lambda member: member.learns)
def test_bad_losses_and_batches_are_refused(member):
    params = {"dense": WEIGHTS["dense"]}
    for bad, message in (
        (lambda params, batch: (loss(params, batch), 0), "expected a scalar array, got tuple"),
        (lambda params, batch: loss(params, batch)[None], r"expected a scalar .* shape \(1,\)"),
    ):
        with pytest.raises(TypeError, match=f"loss_fn: {message}"):
            member.scores(params, bad)
    for batches in ((), (X, Y[:2]), (X, np.float32(1))):
        with pytest.raises(ValueError, match="batches: expected arrays with the same first axis"):
            member.scores(params, loss, batches=batches)
    for listed in ([(X[0], Y[0]), (X[1], Y[1])], ((X[0], Y[0]),), [(X[0], Y[0]), (X[1][:2], Y[1])]):
        message = rf"got a {type(listed).__name__} of {len(listed)}. Stack them.*jax.tree.map"
        with pytest.raises(ValueError, match=message):
            member.scores(params, loss, batches=listed)
