"""Windows of exponents, and the bits of a weight that the window cipher masks. See `window`."""

from typing import NamedTuple

from .._tree.dtypes import DTYPES, Dtype

FEWEST = 3
"""No window has fewer than 2^3 exponents: a leaf of ones does not reveal that it is one."""


class Window(NamedTuple):
    """The range of a leaf's exponents, as coarse as the cipher reveals it.

    It ends with the largest exponent of the leaf and begins at its smallest one or below. A wider
    window would reveal less, but sealed weights spread over all of it: with half of all exponents,
    some are so much larger than the leaf's own, and some variances so much smaller, that VGG19's
    outputs overflow.

    Attributes:
        lowest: the first biased exponent inside.
        exponents: k; the window has 2^k exponents.
        sign: whether the sign is masked too. It is not if all weights have the same sign, since a
            variance that turns negative would make the network's outputs NaN.

    Examples:
        >>> Window(lowest=120, exponents=3, sign=True)  # any float32 from 2^-7 to less than 2
        Window(lowest=120, exponents=3, sign=True)
    """

    lowest: int
    exponents: int
    sign: bool


def exponent_bits(dtype: Dtype) -> int:
    """The number of exponent bits of a float."""
    return dtype.bits - dtype.mantissa - dtype.signed


def sealed_words(dtype: Dtype) -> Dtype:
    """The numbers that are masked in a tensor: complex ones in halves, codes byte by byte."""
    if dtype.name == "complex64":
        return DTYPES["float32"]
    return dtype if dtype.bits >= 8 else DTYPES["uint8"]


def has_window(dtype: Dtype) -> bool:
    """Whether a dtype has exponents; others are masked whole."""
    return sealed_words(dtype).kind == "float"


def fits(window: Window, dtype: Dtype) -> bool:
    """Whether a window is valid for this dtype."""
    dtype = sealed_words(dtype)
    most = exponent_bits(dtype)
    inside = window.exponents <= most and window.lowest + (1 << window.exponents) <= 1 << most
    return inside and (dtype.signed or not window.sign)


def offset_and_mask(dtype: Dtype, window: Window | None) -> tuple[int, int]:
    """The numbers o and m of the definition; without a window, m is every bit that a dtype uses."""
    if dtype.name == "bool":
        return 0, 1  # it stays a boolean
    dtype = sealed_words(dtype)
    if window is None:
        return 0, (1 << dtype.bits) - 1
    mask = (1 << (window.exponents + dtype.mantissa)) - 1
    return window.lowest << dtype.mantissa, mask | window.sign << (dtype.bits - 1)
