"""Sealed rings in use: packs and unpacks positions, and rewrites the rings of a tensor."""

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._ciphers.engine_numpy import leaf_key, rewrite_ring
from .._ciphers.lossless import LosslessCipher
from .._io.errors import IntegrityError, counted
from .._keys.material import DerivedKey
from .._tree.dtypes import SAFETENSORS
from .._tree.groups import unit_places
from .boxes import SealedRing
from .checks import DAMAGED, Checker
from .manifest import NO_DIGEST

_ESCAPE = 255  # this many elements are skipped, and the gap continues
_DENSE = 8  # a bitmap may be used if at least one element in this many is selected


def seal_mask(tensor: str, mask: np.ndarray) -> SealedRing:
    """The ring of a mask; its plaintext is not known yet."""
    groups = np.flatnonzero(mask)
    coding, positions = "gaps", _packed(_gaps(groups))
    if len(groups) * _DENSE >= mask.size:
        bitmap = _packed(np.packbits(mask))
        if len(bitmap) < len(positions):
            coding, positions = "bitmap", bitmap
    return SealedRing(tensor, mask.shape, len(groups), coding, positions, NO_DIGEST)


def _packed(array: np.ndarray) -> bytes:
    # The data consist of runs; zlib's own search takes a hundred times as long.
    stream = zlib.compressobj(6, strategy=zlib.Z_RLE)
    return stream.compress(array.tobytes()) + stream.flush()


def _gaps(groups: np.ndarray) -> np.ndarray:
    """The distance of each group to the one before, in bytes."""
    gaps = np.diff(groups, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1)
    result = np.full(int(ends[-1]) if len(ends) else 0, _ESCAPE, np.uint8)
    result[ends - 1] = gaps % _ESCAPE
    return result


def ring_groups(ring: SealedRing, level: int, what: str) -> np.ndarray:
    """The elements of its mask that a ring has, ascending.

    Args:
        ring: as read from its box.
        level: the box's level, for messages.
        what: the file, for messages.

    Raises:
        IntegrityError: positions that do not match the mask's shape or the number of groups.
    """
    size, count = math.prod(ring.mask_shape), ring.groups
    if ring.coding == "bitmap":
        # A nearly empty one would waste time and memory.
        raw = _unpacked(ring.positions, -(-size // 8)) if count * _DENSE >= size else b""
        bits = np.unpackbits(np.frombuffer(raw, np.uint8)).view(bool)
        good = len(raw) == -(-size // 8) and not bits[size:].any()
        groups = np.flatnonzero(bits)
    else:
        raw = _unpacked(ring.positions, count + (size - count) // _ESCAPE)
        gaps = np.frombuffer(raw, np.uint8)
        last = gaps != _ESCAPE
        groups = np.cumsum(gaps + last, dtype=np.intp)
        groups = groups if last.all() else groups[last]
        groups -= 1
        good = len(raw) > 0 and bool(last[-1]) and len(groups) == count and groups[-1] < size
    if not good or len(groups) != count:
        raise Checker(f"{what}: box of level {level}", "ring").error(
            f"tensor {ring.tensor!r}: expected the positions of {counted(count, 'group')} out of "
            f"{size}, got others"
        )
    return groups


def _unpacked(data: bytes | memoryview, most: int) -> bytes:
    """The unpacked data; empty if they are damaged, or larger than allowed."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, most + 1)
    except zlib.error:
        return b""
    return raw if stream.eof and not stream.unused_data and len(raw) <= most else b""


def rewrite_tensor(
    data: memoryview | bytearray,
    info: Any,
    rings: Sequence[tuple[int, SealedRing]],
    keys: Mapping[int, DerivedKey],
    cipher: LosslessCipher,
    *,
    inverse: bool,
    what: str,
) -> list[tuple[int, SealedRing]]:
    """Encrypts or decrypts rings of one tensor, one after the other.

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
        IntegrityError: the decrypted weights are not the ones that were encrypted.
    """
    dtype = SAFETENSORS[info.dtype]
    bits = np.frombuffer(data, f"<u{dtype.bits // 8}")
    fine = cipher.fine_mask(dtype)
    taken = np.zeros(len(bits) if len(rings) > 1 else 0, bool)
    done = []
    for level, ring in rings:
        groups = ring_groups(ring, level, what)
        places = unit_places(info.shape, ring.mask_shape, groups, cipher.unit)
        if len(taken):
            rows = taken.reshape(-1, places.size) if places.size > 1 else taken
            if rows[places.runs].any():
                raise Checker(f"{what}: box of level {level}", "ring").error(
                    f"tensor {ring.tensor!r}: its ring overlaps with that of a lower level"
                )
            rows[places.runs] = True
        # Not in a local variable: crash reporters print those.
        plain = rewrite_ring(
            bits, places, leaf_key(bytes(keys[level]), ring.tensor),
            cipher=cipher, fine=fine, inverse=inverse,
        )  # fmt: skip
        digest = hashlib.sha256(b"selcrypt/v1/ring\0")
        digest.update(plain.data)
        if inverse and digest.hexdigest() != ring.sha256:
            raise IntegrityError(
                f"{what}: tensor {ring.tensor!r}, level {level}: decrypts to other weights than "
                f"were encrypted. {DAMAGED}",
                reason="plaintext",
            )
        done.append((level, ring._replace(sha256=digest.hexdigest())))
    return done
