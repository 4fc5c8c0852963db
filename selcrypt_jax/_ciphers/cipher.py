"""What a cipher is."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from .._tree.groups import Ring


@runtime_checkable
class Cipher(Protocol):
    """Rewrites the weights of rings, so that the leaves keep their shapes and dtypes."""

    def check(self, ring: Ring, leaf: Any) -> None:
        """Raises ValueError where the cipher cannot protect this ring of this leaf."""
        ...

    def run(
        self,
        leaves: Mapping[str, Array],
        rings: Sequence[Ring],
        keys: Key[Array, " keys"],
        *,
        inverse: bool,
    ) -> dict[str, Array]:
        """Encrypts (or, inverse, decrypts) ``rings[i]`` with ``keys[i]``.

        Args:
            leaves: name → array; it must not be changed.
            rings: non-empty, disjoint within a leaf.
            keys: typed keys, at least one a ring; further ones are padding.
            inverse: whether to decrypt.

        Returns:
            name → new array, for every name in ``leaves``.
        """
        ...
