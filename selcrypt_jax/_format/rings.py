"""Sealed rings at work: masks from their bitmaps, and the rings of a tensor rewritten."""

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._ciphers.engine_numpy import rewrite_leaf
from .._ciphers.lossless import LosslessCipher
from .._io.errors import IntegrityError
from .._tree.dtypes import SAFETENSORS
from .boxes import SealedRing
from .checks import DAMAGED, Checker
from .manifest import NO_DIGEST


def seal_mask(tensor: str, mask: np.ndarray) -> SealedRing:
    """The ring of a mask; its plaintext is not known yet."""
    # Runs of zeros are what there is to find; zlib's own search takes a hundred times as long.
    stream = zlib.compressobj(9, strategy=zlib.Z_RLE)
    bitmap = stream.compress(np.packbits(mask).tobytes()) + stream.flush()
    return SealedRing(tensor, mask.shape, int(mask.sum()), bitmap, NO_DIGEST)


def ring_mask(ring: SealedRing, level: int, what: str) -> np.ndarray:
    """The mask of a ring, unpacked.

    Args:
        ring: as it lay in its box.
        level: of the box, for messages.
        what: the file, for messages.

    Raises:
        IntegrityError: a bitmap that does not fit the mask's shape or the number of groups.
    """
    size = math.prod(ring.mask_shape)
    expected = -(-size // 8)
    stream = zlib.decompressobj()
    try:
        # Never more than what the shape allows, whatever the compressed bytes claim.
        packed = stream.decompress(ring.bitmap, expected + 1)
    except zlib.error:
        packed = b""
    whole = stream.eof and not stream.unused_data and len(packed) == expected
    mask = np.unpackbits(np.frombuffer(packed if whole else b"", np.uint8)).view(bool)
    if not whole or mask[size:].any() or np.count_nonzero(mask) != ring.groups:
        raise Checker(f"{what}: box of level {level}", "ring").error(
            f"tensor {ring.tensor!r}: expected a bitmap of {expected} bytes with {ring.groups} "
            "groups, got another"
        )
    return mask[:size].reshape(ring.mask_shape)


def rewrite_tensor(
    data: bytearray,
    info: Any,
    rings: Sequence[tuple[int, SealedRing]],
    keys: Mapping[int, bytes],
    cipher: LosslessCipher,
    *,
    inverse: bool,
    what: str,
) -> list[tuple[int, SealedRing]]:
    """Encrypts or decrypts rings of one tensor.

    Args:
        data: the tensor's bytes; rewritten in place.
        info: its dtype (safetensors' name) and shape.
        rings: with their levels; at least one.
        keys: level → cipher key.
        cipher: see `LosslessCipher`.
        inverse: whether to decrypt.
        what: the file, for messages.

    Returns:
        The rings with the digests of their plaintext.

    Raises:
        IntegrityError: decrypted to other weights than were encrypted.
    """
    dtype = SAFETENSORS[info.dtype]
    bits = np.frombuffer(data, f"<u{dtype.bits // 8}")
    masks: list[tuple[np.ndarray, bytes]] = []
    taken = np.False_
    for level, ring in rings:
        mask = ring_mask(ring, level, what)
        if (taken & mask).any():
            raise Checker(f"{what}: box of level {level}", "ring").error(
                f"tensor {ring.tensor!r}: its ring overlaps with that of a lower level"
            )
        taken = taken | mask
        masks.append((mask, keys[level]))
    name, fine = rings[0][1].tensor, cipher.fine_mask(dtype)
    plain = rewrite_leaf(bits, info.shape, masks, name, cipher=cipher, fine=fine, inverse=inverse)
    done = []
    for (level, ring), weights in zip(rings, plain, strict=True):
        digest = hashlib.sha256(b"selcrypt/v1/ring\0")
        digest.update(np.ascontiguousarray(weights).data)
        if inverse and digest.hexdigest() != ring.sha256:
            raise IntegrityError(
                f"{what}: tensor {ring.tensor!r}, level {level}: was decrypted to other weights "
                f"than were encrypted. {DAMAGED}",
                reason="plaintext",
            )
        done.append((level, ring._replace(sha256=digest.hexdigest())))
    return done
