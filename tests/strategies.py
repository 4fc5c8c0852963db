"""Leaves, trees and masks for the tests, and how they are compared: bit for bit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

FLOATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
INTEGERS = ["int8", "int16", "int32", "uint8", "uint16", "uint32"]

# Few shapes, since each one compiles. The ones in HIDING have room for two rings.
HIDING = [(7, 31), (3, 3, 8, 9), (1153,)]
SMALL = [(), (1,), (0,), (3, 0), (0, 3, 3, 64), (5,)]

# NaNs with payloads (quiet, signalling, negative), both infinities, -0.0, denormals.
SPECIAL = {
    "float32": [0x7F800001, 0x7FC12345, 0xFFC00001, 0x7F800000, 0xFF800000, 1 << 31, 1, 0x7FFFFF],
    "float16": [0x7C01, 0x7E12, 0xFE01, 0x7C00, 0xFC00, 0x8000, 1, 0x3FF],
    "bfloat16": [0x7F81, 0x7FC1, 0xFFC1, 0x7F80, 0xFF80, 0x8000, 1, 0x7F],
    "float8_e4m3fn": [0x7F, 0xFF, 0x80, 1, 7],
    "float8_e5m2": [0x7D, 0x7F, 0xFE, 0x7C, 0xFC, 0x80, 1, 3],
}


def octets(leaf: Any) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def bits(leaf: Any) -> np.ndarray:
    """The bit patterns as unsigned integers."""
    array = np.asarray(leaf)
    return array.view(f"uint{8 * array.dtype.itemsize}")


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, containers, shapes, dtypes and bits; the same object for other leaves."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        where = jax.tree_util.keystr(path)
        if not is_array(leaf):
            assert other is leaf, where
            continue
        assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype), where
        assert octets(other) == octets(leaf), where


def payload(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any bit patterns at all, with every special one among them where there is room."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    itemsize = jnp.dtype(dtype).itemsize
    patterns = rng.integers(0, 1 << 8 * itemsize, size, np.uint64).astype(f"uint{8 * itemsize}")
    special = np.array(SPECIAL.get(dtype, []), patterns.dtype)[:size]
    patterns[rng.choice(size, len(special), replace=False)] = special
    return patterns.view(jnp.dtype(dtype)).reshape(shape)


def two_rings(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Nested random masks of ``shape``, each ring with enough groups to hide in."""
    size = int(np.prod(shape))
    least = min(43, size // 2)  # 43 weights of float8_e5m2 have 129 bits of sign and mantissa
    rng = np.random.default_rng(seed)
    first = int(rng.integers(least, size - least + 1))
    second = int(rng.integers(first + least, size + 1))
    ranks = rng.permutation(size).reshape(shape)
    return ranks < first, ranks < second


class Case(NamedTuple):
    params: Any
    masks: tuple[Any, Any]


class _Leaf:  # no pytree: a leaf that holds a parameter and its two masks
    def __init__(self, leaf: Any, masks: tuple[Any, Any]):
        self.leaf, self.masks = leaf, masks


@st.composite
def _leaves(draw: st.DrawFn, where: Any) -> _Leaf:
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from(FLOATS + INTEGERS))
    kind = draw(st.sampled_from(["weights", "kernels", "whole", "upper", "plain", "small"]))
    if kind == "small":
        return _Leaf(where(payload(seed, draw(st.sampled_from(SMALL)), dtype)), (False, False))
    shape = (3, 3, 8, 9) if kind == "kernels" else draw(st.sampled_from(HIDING))
    masks: tuple[Any, Any] = {
        "weights": lambda: two_rings(seed, shape),
        "kernels": lambda: two_rings(seed, (1, 1, 8, 9)),
        "whole": lambda: (True, True),
        "upper": lambda: (False, two_rings(seed, shape)[0]),
        "plain": lambda: (False, False),
    }[kind]()
    return _Leaf(where(payload(seed, shape, dtype)), masks)


NAMES = ["w", "b", "a.b", "l[0]", "é", "e\u0301", "", "__metadata__", 'quote"\n']


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random pytree of random leaves, with two nested masks for it."""
    where = draw(st.sampled_from([jnp.asarray, np.asarray]))
    tree = draw(
        st.recursive(
            _leaves(where),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.tuples(inner, inner),
                st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            ),
            max_leaves=5,
        )
    )
    low, high = (jax.tree.map(lambda spec, m=m: spec.masks[m], tree) for m in (0, 1))
    return Case(jax.tree.map(lambda spec: spec.leaf, tree), (low, high))


JAX_CHECKERS: dict[str, Callable[[], Any]] = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
    "enable_x64": lambda: jax.enable_x64(True),
}
"""JAX's own checkers: name → the context that enables it."""
