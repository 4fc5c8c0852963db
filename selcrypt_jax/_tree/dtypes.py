"""A table of dtypes, under NumPy's and safetensors' names; without JAX."""

from typing import Any, Literal, NamedTuple


class Dtype(NamedTuple):
    """The bit layout of a number.

    Attributes:
        name: its name in NumPy, ml_dtypes and JAX.
        bits: the width of an element.
        kind: ``"other"`` (booleans, complex numbers, packed codes) has no cipher.
        mantissa: for a float, the number of mantissa bits, without the implicit one.
        signed: whether the highest bit is a sign.
        code: its name in safetensors; None if safetensors has no such dtype.
    """

    name: str
    bits: int
    kind: Literal["float", "integer", "other"]
    mantissa: int = 0
    signed: bool = True
    code: str | None = None


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 64, "float", 52, code="F64"),
        Dtype("float32", 32, "float", 23, code="F32"),
        Dtype("float16", 16, "float", 10, code="F16"),
        Dtype("bfloat16", 16, "float", 7, code="BF16"),
        Dtype("float8_e3m4", 8, "float", 4),
        Dtype("float8_e4m3", 8, "float", 3),
        Dtype("float8_e4m3b11fnuz", 8, "float", 3),
        Dtype("float8_e4m3fn", 8, "float", 3, code="F8_E4M3"),
        Dtype("float8_e4m3fnuz", 8, "float", 3, code="F8_E4M3FNUZ"),
        Dtype("float8_e5m2", 8, "float", 2, code="F8_E5M2"),
        Dtype("float8_e5m2fnuz", 8, "float", 2, code="F8_E5M2FNUZ"),
        Dtype("float8_e8m0fnu", 8, "float", 0, signed=False, code="F8_E8M0"),
        *(Dtype(f"int{bits}", bits, "integer") for bits in (1, 2, 4)),
        *(Dtype(f"int{bits}", bits, "integer", code=f"I{bits}") for bits in (8, 16, 32, 64)),
        *(Dtype(f"uint{bits}", bits, "integer", signed=False) for bits in (1, 2, 4)),
        *(Dtype(f"uint{n}", n, "integer", signed=False, code=f"U{n}") for n in (8, 16, 32, 64)),
        Dtype("float4_e2m1fn", 4, "float", 1, code="F4"),
        Dtype("float6_e2m3fn", 6, "float", 3, code="F6_E2M3"),
        Dtype("float6_e3m2fn", 6, "float", 2, code="F6_E3M2"),
        Dtype("bool", 8, "other", signed=False, code="BOOL"),
        Dtype("complex64", 64, "other", code="C64"),
    )
}
"""By NumPy's name."""

SAFETENSORS: dict[str, Dtype] = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code}
"""By safetensors' name."""


def known_dtype(dtype: Any) -> Dtype | None:
    """The table's entry for an array's dtype, in either byte order; None if it is unknown.

    Args:
        dtype: a dtype of NumPy, ml_dtypes, JAX or another library.
    """
    return DTYPES.get(getattr(dtype, "name", str(dtype)))  # str() would include the byte order
