"""The window cipher: every bit of a weight is masked, but where in its range the exponents end.

It seals whole tensors. A keystream as wide as the dtype masks sign, mantissa and all bits of the
exponent inside a *window*: exponents ``lowest`` to ``lowest + 2^k - 1``. On the bit pattern b of a
weight, modulo two to the width of the dtype::

    c = ((b - o) XOR (r AND m)) + o          b = ((c - o) XOR (r AND m)) + o

with ``o = lowest << mantissa bits`` and m the mantissa, k bits of the exponent, and the sign. With
all of a leaf's weights inside, all that it tells is its window; and if that ends below the
exponent of Inf and NaN, none comes up. A weight outside of the window keeps more of its exponent;
nothing is lost, whatever the weights. Integers are masked whole.

No weight moves, so any part of a leaf can be opened alone: number i of the keystream, which is
``bits(fold_in(key of the ring in the leaf, 2))``, masks weight i of the leaf in C order.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._tree.dtypes import DTYPES, Dtype
from .windows import Window, exponent_bits, fits, has_window


@dataclass(frozen=True)
class WindowCipher:
    """Masks whole weights by a keystream; elementwise, exact, and without any order to learn.

    Nothing of a selected weight is told but its leaf's window. So a leaf must be selected as a
    whole for nothing to be told of it: what is left plain beside it is plain. It is what seals the
    tensors of a protected file (``rest="sealed"``), under the key of level 1.

    Attributes:
        windows: name of a leaf → its window; see `fit`. Without windows, and for leaves that are
            not named, the whole exponent is masked: Inf and NaN come up. So they do in a leaf that
            spans more than half of all exponents, as one with both a zero and a 2: what is masked
            must decrypt exactly, whatever it looks like.

    Examples:
        >>> cipher = WindowCipher.fit(params)
        >>> sealed = encrypt(params, [True], keys[:1], cipher=cipher)
        >>> opened = decrypt(sealed, [True], keys[:1], cipher=cipher)
        >>> all(jax.tree.leaves(jax.tree.map(jax.numpy.array_equal, opened, params)))
        True
    """

    windows: Mapping[str, Window] | None = None

    def __post_init__(self) -> None:
        windows = {} if self.windows is None else self.windows
        for name, window in windows.items():
            if not isinstance(window, Window):
                raise TypeError(
                    f"windows {name!r}: expected a Window, got {window!r}. Make windows with "
                    "WindowCipher.fit."
                )

    def __hash__(self) -> int:
        return hash(frozenset((self.windows or {}).items()))

    @classmethod
    def fit(cls, params: Any) -> "WindowCipher":
        """The cipher whose windows are those of these parameters.

        Args:
            params: pytree of arrays, not traced; leaves that have no exponents need no window.

        Raises:
            TypeError: traced parameters.
        """
        import numpy as np
        from jax.core import Tracer

        from .._tree.hosts import gathered
        from .._tree.names import named_leaves
        from .engine_window import find_window

        windows = {}
        for name, leaf in named_leaves(params).arrays.items():
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"params {name!r}: expected a concrete array, got a traced one. Find the "
                    "windows before jit, and close over the cipher."
                )
            if (dtype := DTYPES.get(str(leaf.dtype))) is not None and dtype.bits >= 8:
                array = np.ascontiguousarray(gathered(leaf)).reshape(-1)
                window = find_window(array.view(np.uint8).data, dtype)
                if window is not None:
                    windows[name] = window
        return cls(windows)

    def window(self, name: str, dtype: Dtype) -> Window | None:
        """Of a leaf; the widest where none is known, None for numbers without exponents."""
        if not has_window(dtype):
            return None
        return (self.windows or {}).get(name) or Window(0, exponent_bits(dtype), dtype.signed)

    def check(self, ring: Any, leaf: Any) -> None:
        """Refuses dtypes without a cipher."""
        dtype = DTYPES.get(str(leaf.dtype))
        if dtype is None or dtype.kind == "other" or dtype.bits < 8:
            raise ValueError(
                f"params {ring.name!r}: expected floats or integers of 8 bits or more, got "
                f"{leaf.dtype}. Leave it out (mask False)."
            )
        window = self.window(ring.name, dtype)
        if window is not None and not fits(window, dtype):
            raise ValueError(
                f"params {ring.name!r}: expected a window of {dtype.name}, got {window}. Make "
                "windows with WindowCipher.fit."
            )

    def run(
        self,
        leaves: Mapping[str, Any],
        rings: Sequence[Any],
        keys: Any,
        *,
        inverse: bool,
        donate: Collection[str] = (),
    ) -> dict[str, Any]:
        """See `Cipher.run`."""
        from .engine_window import run_window  # the definition alone needs no JAX

        del inverse, donate  # its own inverse
        return run_window(self, leaves, rings, keys)
