"""The seal over whole tensors, under the key of level 1. See FORMAT.md."""

from .._ciphers.engine_window import find_window, mask_words, seal_key_of
from .._ciphers.windows import Window
from .._keys.material import DerivedKey
from .._tree.dtypes import SAFETENSORS, Dtype
from .manifest import Tensor


def seal_tensor(data: memoryview, dtype: Dtype, name: str, secret: DerivedKey) -> Window | None:
    """Seals a tensor in place.

    Args:
        data: the tensor's bytes.
        dtype: the tensor's dtype.
        name: the tensor's name.
        secret: the cipher key of level 1.

    Returns:
        The tensor's window, if its numbers have exponents.
    """
    window = find_window(data, dtype)
    mask_words(data, seal_key_of(bytes(secret), name), dtype, window)
    return window


def unseal_part(
    data: memoryview, tensor: Tensor, name: str, secret: DerivedKey, start: int
) -> None:
    """Removes the seal from a part of a tensor in place, starting at byte ``start``."""
    dtype = SAFETENSORS[tensor.dtype]
    mask_words(data, seal_key_of(bytes(secret), name), dtype, tensor.window, start)
