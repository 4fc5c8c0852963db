"""A small network of chosen weights, for testing a cipher."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._ciphers.dprm import Cipher, encrypt
from .._ciphers.gaussian import GaussianCipher
from .._masks.masks import nested_masks
from .._tree.dtypes import DTYPES
from .._tree.groups import group_positions, group_shape
from .._tree.names import named_leaves
from .._tree.rings import split_rings
from ._records import CipherCheck

SHARES = (0.375, 0.75)  # so that both rings of a leaf have the same size
ALARM = 1e-8  # probability that a sound cipher fails a check; below 1e-6 for all checks together
_SHAPES = {"conv": (2, 2, 64, 64), "twin": (2, 2, 64, 64), "dense": (64, 128), "bias": (128,)}
_CLOSE = 1e-3  # rounding error allowed for the Gaussian cipher, in standard deviations

Where = tuple[str, int]  # a ring: leaf and level


class Chosen(NamedTuple):
    """Synthetic weights, and the cipher under test.

    ``twin`` is a copy of ``conv``, so only the leaf's name can make their ciphertexts differ.

    Attributes:
        cipher: params → the cipher; a Gaussian one is fitted to them.
        tolerance: allowed error of decryption, in standard deviations; 0 for an exact cipher.
        refusal: why the cipher does not accept this dtype, or None if it does.
        params: name → NumPy array.
        masks: nested masks of two levels.
        groups: ring → flat positions of its weights, ``[groups, weights per group]``.
    """

    cipher: Callable[[Mapping[str, Any]], Cipher]
    tolerance: float
    refusal: str | None
    params: dict[str, np.ndarray]
    masks: tuple[Any, ...]
    groups: dict[Where, np.ndarray]

    @classmethod
    def make(cls, cipher: Cipher, dtype: str, seed: int) -> "Chosen":
        """Draws normally distributed weights of this dtype."""
        rng = np.random.default_rng(seed)
        scale = 40 if DTYPES[dtype].kind == "integer" else 0.05
        params, scores = {}, {}
        for name, shape in _SHAPES.items():
            if name == "dense" and dtype != "float32":
                continue  # saves time: each shape and dtype is compiled separately
            params[name] = (scale * rng.standard_normal(shape)).clip(-127, 127).astype(dtype)
            scores[name] = rng.random(group_shape(shape, "kernel", "HWIO"))
        params["twin"], scores["twin"] = params["conv"], scores["conv"]
        masks = nested_masks(scores, SHARES)
        rings = list(split_rings(named_leaves(params), masks))
        groups = {(r.name, r.level): group_positions(_SHAPES[r.name], r.mask) for r in rings}
        if isinstance(cipher, GaussianCipher):
            refusal = None if dtype == "float32" else "too coarse for the Gaussian cipher"

            def fitted(params: Mapping[str, Any]) -> Cipher:
                return GaussianCipher.fit(params, masks, wrap=cipher.wrap)

            return cls(fitted, _CLOSE, refusal, params, masks, groups)
        refusal = None
        try:
            for ring in rings:
                cipher.check(ring, params[ring.name])
        except ValueError as error:
            if dtype == "float32":
                raise
            refusal = f"the cipher refuses it ({error})"
        return cls(lambda params: cipher, 0.0, refusal, params, masks, groups)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all weights."""
        return self.params["conv"].dtype

    def weights(self, where: Where) -> np.ndarray:
        """Flat positions of a ring's weights, ascending."""
        return np.sort(self.groups[where], axis=None)

    def words(self, params: Mapping[str, np.ndarray], where: Where) -> np.ndarray:
        """The bits of a ring's weights."""
        return bits_of(params[where[0]]).ravel()[self.weights(where)]

    def encrypt_with(self, values: Mapping[Where, Any], keys: Any) -> dict[Where, np.ndarray]:
        """Encrypts rings with these values as their weights; the bits of each ring."""
        params = {name: leaf.copy() for name, leaf in self.params.items()}
        for where, chosen in values.items():
            params[where[0]].reshape(-1)[self.weights(where)] = chosen
        public = on_host(encrypt(params, self.masks, keys, cipher=self.cipher(params)))
        return {where: self.words(public, where) for where in values}


def on_host(tree: Any) -> dict[str, np.ndarray]:
    """Leaves as NumPy arrays."""
    return {name: np.asarray(leaf) for name, leaf in jax.device_get(tree).items()}


def bits_of(array: np.ndarray) -> np.ndarray:
    """The bits of an array, as unsigned integers of the same width."""
    return array.view(f"uint{8 * array.dtype.itemsize}")


def skipped(name: str, why: str) -> CipherCheck:
    """A check that does not apply."""
    return CipherCheck(name, None, math.nan, f"does not apply: {why}")


def pairs(rings: Iterable[Where], shared: int) -> list[tuple[Where, Where]]:
    """Pairs of rings in the same leaf (shared 0) or at the same level (shared 1)."""
    return [(a, b) for a, b in itertools.combinations(rings, 2) if a[shared] == b[shared]]
