"""Windows of exponents, and the bits of a weight that the window cipher masks. See `window`."""

from typing import NamedTuple

from .._tree.dtypes import DTYPES, Dtype


class Window(NamedTuple):
    """The exponents of a leaf, as coarsely as the cipher tells them.

    Attributes:
        lowest: the first biased exponent inside.
        exponents: k, of the 2^k exponents inside.
        sign: whether the sign is masked too. It is not where all weights have the same one, since
            a variance that turns negative would make a network NaN.

    Examples:
        >>> Window(lowest=0, exponents=7, sign=True)  # any float32 of less than 2
        Window(lowest=0, exponents=7, sign=True)
    """

    lowest: int
    exponents: int
    sign: bool


def exponent_bits(dtype: Dtype) -> int:
    """How many bits the exponent of a float has."""
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
    """Whether a window is one of this dtype."""
    dtype = sealed_words(dtype)
    most = exponent_bits(dtype)
    inside = window.exponents <= most and window.lowest + (1 << window.exponents) <= 1 << most
    return inside and (dtype.signed or not window.sign)


def offset_and_mask(dtype: Dtype, window: Window | None) -> tuple[int, int]:
    """The numbers o and m of the definition; without a window every bit that a dtype uses."""
    if dtype.name == "bool":
        return 0, 1  # it stays a boolean
    dtype = sealed_words(dtype)
    if window is None:
        return 0, (1 << dtype.bits) - 1
    mask = (1 << (window.exponents + dtype.mantissa)) - 1
    return window.lowest << dtype.mantissa, mask | window.sign << (dtype.bits - 1)
