"""The file under attack, with its owner's keys and masks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from .._ciphers.dprm import Cipher, decrypt, encrypt
from .._ciphers.window import WindowCipher
from .._tree.names import is_array, named_leaves


class Protected(NamedTuple):
    """A file, with the masks and keys, which the attacker does not have.

    Attributes:
        params: parameters as shipped.
        masks: masks of the levels.
        keys: keys of the levels.
        cipher: cipher of the rings.
        seal: cipher of the seal over everything, under the key of level 1; None for a plain rest.
    """

    params: PyTree
    masks: Sequence[PyTree]
    keys: Any
    cipher: Cipher | None
    seal: WindowCipher | None = None

    def closed(self, level: int) -> PyTree:
        """A mask of the weights that stay encrypted for the holder of a level."""
        if level:
            return masks_between(self.masks[level - 1], self.masks[-1])
        return self.masks[-1] if self.seal is None else True

    def sealed(self) -> "Protected":
        """The same file with a sealed rest."""
        seal = WindowCipher.fit(self.params)
        params = encrypt(self.params, [True], self.keys[:1], cipher=seal)
        return self._replace(params=params, seal=seal)

    def opened(self, level: int) -> PyTree:
        """The parameters that a key of this level gives; as shipped for level 0."""
        params = self.params
        if not level:
            return params
        if self.seal is not None:
            params = decrypt(params, [True], self.keys[:1], cipher=self.seal)
        return decrypt(params, self.masks[:level], self.keys[:level], cipher=self.cipher)


def masks_between(lower: PyTree, upper: PyTree) -> PyTree:
    """The weights that the upper of two nested masks adds."""
    below = named_leaves(lower).leaves
    tree = named_leaves(upper)
    return tree.rebuild(
        {n: mask & np.logical_not(below[n]) for n, mask in tree.leaves.items() if is_array(mask)}
    )
