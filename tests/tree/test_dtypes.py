"""The package's table of dtypes agrees with their libraries."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from selcrypt_jax._tree.dtypes import DTYPES, SAFETENSORS


def test_dtypes_are_as_their_library_says():
    for name, dtype in DTYPES.items():
        if not hasattr(np, name) and not hasattr(ml_dtypes, name):
            continue  # of a later version
        if dtype.kind == "float":
            info = ml_dtypes.finfo(name)
            signed = float(info.min) < 0
            actual = info.bits, info.nmant, signed
            assert actual == (dtype.bits, dtype.mantissa, dtype.signed), name
        elif dtype.kind == "integer":
            info = jnp.iinfo(name)
            assert (info.bits, info.min < 0) == (dtype.bits, dtype.signed), name
    assert {dtype.name for dtype in SAFETENSORS.values()} <= set(DTYPES)


def test_numbers_of_jax_are_known():
    for name in dir(jnp):
        scalar = getattr(jnp, name)
        if isinstance(getattr(scalar, "dtype", None), np.dtype) and jnp.issubdtype(
            scalar, jnp.number
        ):
            dtype = jax.dtypes.canonicalize_dtype(scalar.dtype)
            assert dtype.name in DTYPES or jnp.issubdtype(dtype, jnp.complexfloating), name
