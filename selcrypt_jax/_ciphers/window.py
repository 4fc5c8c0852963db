"""The window cipher: it masks every bit of a weight within a range of exponents.

It seals whole tensors. A keystream as wide as the dtype masks the sign, the mantissa and the
exponent's offset in a *window*: exponents ``lowest`` to ``lowest + 2^k - 1``. On the bit pattern b
of a weight, modulo two to the width of the dtype::

    c = ((b - o) XOR (r AND m)) + o          b = ((c - o) XOR (r AND m)) + o

with ``o = lowest << mantissa bits`` and m the mantissa, k bits of the exponent, and the sign. If
all weights of a leaf lie inside, they reveal only the window; and if the window ends below the
exponent of Inf and NaN, neither occurs. A weight outside the window reveals more of its exponent;
it still decrypts exactly. Integers are masked whole.

No weight is moved, so any part of a leaf can be opened alone: number i of the keystream, which is
``bits(fold_in(key of the ring in the leaf, 2))``, masks weight i of the leaf in C order.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._tree.dtypes import DTYPES, Dtype
from .windows import Window, exponent_bits, fits, has_window


@dataclass(frozen=True)
class WindowCipher:
    """Masks whole weights with a keystream: elementwise and exact; it does not preserve any order.

    It reveals nothing of the selected weights but their leaf's window. To reveal nothing of a leaf,
    select all of it: weights that are not selected stay plain. This cipher seals the tensors of a
    protected file (``rest="sealed"``), under the key of level 1.

    Attributes:
        windows: a leaf's name → its window; see `fit`. Without windows, and for leaves that are
            not named, the whole exponent is masked: Inf and NaN occur. They also occur in a leaf
            that spans more than half of all exponents, for example with both a zero and a 2: the
            cipher must decrypt every value exactly.

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
        """A cipher with the windows of these parameters.

        Args:
            params: pytree of arrays, not traced; leaves without exponents need no window.

        Raises:
            TypeError: the parameters are traced.
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
        """The window of a leaf; the widest if none is known, None for numbers without exponents."""
        if not has_window(dtype):
            return None
        return (self.windows or {}).get(name) or Window(0, exponent_bits(dtype), dtype.signed)

    def check(self, ring: Any, leaf: Any) -> None:
        """Refuses dtypes without a cipher."""
        dtype = DTYPES.get(str(leaf.dtype))
        if dtype is None or dtype.kind == "other" or dtype.bits < 8:
            raise ValueError(
                f"params {ring.name!r}: expected floats or integers of 8 bits or more, got "
                f"{leaf.dtype}. Exclude it (mask False)."
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

        del inverse, donate  # the cipher is its own inverse
        return run_window(self, leaves, rings, keys)
