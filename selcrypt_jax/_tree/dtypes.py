"""What the package knows of a dtype, by the names of NumPy and of safetensors; without JAX."""

from typing import Literal, NamedTuple


class Dtype(NamedTuple):
    """The bits of a number.

    Attributes:
        name: in NumPy, ml_dtypes and JAX.
        bits: width of an element.
        kind: ``"other"`` (booleans, complex numbers, packed codes) has no cipher.
        mantissa: of a float, the lowest bits, without the implicit one.
        signed: whether the highest bit is a sign.
    """

    name: str
    bits: int
    kind: Literal["float", "integer", "other"]
    mantissa: int = 0
    signed: bool = True


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 64, "float", 52),
        Dtype("float32", 32, "float", 23),
        Dtype("float16", 16, "float", 10),
        Dtype("bfloat16", 16, "float", 7),
        Dtype("float8_e3m4", 8, "float", 4),
        Dtype("float8_e4m3", 8, "float", 3),
        Dtype("float8_e4m3b11fnuz", 8, "float", 3),
        Dtype("float8_e4m3fn", 8, "float", 3),
        Dtype("float8_e4m3fnuz", 8, "float", 3),
        Dtype("float8_e5m2", 8, "float", 2),
        Dtype("float8_e5m2fnuz", 8, "float", 2),
        Dtype("float8_e8m0fnu", 8, "float", 0, signed=False),
        *(Dtype(f"int{bits}", bits, "integer") for bits in (1, 2, 4, 8, 16, 32, 64)),
        *(Dtype(f"uint{bits}", bits, "integer", signed=False) for bits in (1, 2, 4, 8, 16, 32, 64)),
        Dtype("float4_e2m1fn", 4, "float", 1),
        Dtype("float6_e2m3fn", 6, "float", 3),
        Dtype("float6_e3m2fn", 6, "float", 2),
        Dtype("bool", 8, "other", signed=False),
        Dtype("complex64", 64, "other"),
    )
}
"""By NumPy's name."""

SAFETENSORS: dict[str, Dtype] = {
    code: DTYPES[name]
    for code, name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F6_E2M3": "float6_e2m3fn",
        "F6_E3M2": "float6_e3m2fn",
        "F4": "float4_e2m1fn",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
}
"""By safetensors' name."""
