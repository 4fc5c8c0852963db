"""The seal over whole tensors, under the key of level 1. See FORMAT.md."""

import numpy as np

from .._ciphers.engine_window import find_window, mask_words, seal_key_of
from .._ciphers.windows import Window, has_window, sealed_words
from .._tree.dtypes import Dtype
from .manifest import Tensor


def seal_tensor(data: memoryview, dtype: Dtype, name: str, secret: bytes) -> Window | None:
    """Seals a tensor in place.

    Args:
        data: its bytes.
        dtype: of the tensor.
        name: of the tensor.
        secret: cipher key of level 1.

    Returns:
        Its window, if its numbers have exponents.
    """
    window = None
    if has_window(dtype):
        words = np.frombuffer(data, f"<u{sealed_words(dtype).bits // 8}")
        window = find_window(words, dtype)
    mask_words(data, seal_key_of(secret, name), dtype, window)
    return window


def unseal_part(
    data: memoryview, dtype: Dtype, tensor: Tensor, name: str, secret: bytes, start: int
) -> None:
    """Takes the seal off a part of a tensor, from byte number ``start`` on, in place."""
    mask_words(data, seal_key_of(secret, name), dtype, tensor.window, start)
