"""Sealed boxes: the positions of a level's ring, under the key of that level. See FORMAT.md."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .._io.errors import GrantError, IntegrityError
from .._keys.keys import LevelKey
from .checks import COUNT, COUNTS, LIST, TEXT, Checker, hex_of, one_of

_NONCE_BYTES, _TAG_BYTES = 12, 16
_RULES = {
    "tensor": TEXT,
    "mask_shape": COUNTS,
    "groups": COUNT,
    "coding": one_of("gaps", "bitmap"),
    "bytes": COUNT,
    "sha256": hex_of(hashlib.sha256().digest_size),
}


class SealedRing(NamedTuple):
    """The entry of one tensor in a level's box.

    Attributes:
        tensor: its name.
        mask_shape: shape of the ring's mask, one size per axis of the tensor: 1 inside a group.
        groups: the number of groups in the ring.
        coding: how the positions are encoded.
        positions: which elements of the mask, in C order, are in the ring; see FORMAT.md.
        sha256: digest of the ring's plaintext, in hex.
    """

    tensor: str
    mask_shape: tuple[int, ...]
    groups: int
    coding: str
    positions: bytes | memoryview
    sha256: str

    def weights(self, shape: Sequence[int]) -> int:
        """The number of weights that the ring has in a tensor of this shape."""
        return self.groups * math.prod(shape) // max(math.prod(self.mask_shape), 1)


Rings = Mapping[str, list[tuple[int, SealedRing]]]
"""Tensor → its rings, with their levels."""


def seal_box(key: LevelKey, manifest: str, rings: Sequence[SealedRing]) -> str:
    """The box of a level, in base64.

    Args:
        key: the level's key.
        manifest: the manifest's text, which the box is bound to.
        rings: the rings to put in the box.
    """
    # The key is new with each protection. The nonce is random all the same, so that sealing
    # twice under one key, for example when a protection is repeated, does no harm.
    nonce = os.urandom(_NONCE_BYTES)
    aead = ChaCha20Poly1305(key.seal_key())
    sealed = nonce + aead.encrypt(nonce, _content(rings), box_context(manifest, key.level))
    return base64.b64encode(sealed).decode()


def box_length(rings: Sequence[SealedRing]) -> int:
    """The number of characters that `seal_box` makes of these rings, whatever their digests."""
    sealed = _NONCE_BYTES + len(_content(rings)) + _TAG_BYTES
    return 4 * -(-sealed // 3)


def open_box(key: LevelKey, manifest: str, box: str, file: str, *, owner: bool) -> list[SealedRing]:
    """The rings in a box.

    Args:
        key: the level's key.
        manifest: the text that the box is bound to.
        box: see `seal_box`.
        file: the file, for messages.
        owner: whether the key is derived from the owner's secret.

    Raises:
        GrantError: the box does not open, and the key is derived from the owner's secret.
        IntegrityError: the box does not open, or is malformed.
    """
    what = f"{file}: box of level {key.level}"
    sealed = memoryview(Checker(what, "box").base64(box))
    nonce, sealed = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    aead = ChaCha20Poly1305(key.seal_key())
    try:
        plain = aead.decrypt(nonce, sealed, box_context(manifest, key.level))
    except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
        altered = "or the manifest or the box was altered"
        if owner:
            raise GrantError(
                f"{what}: does not open: this secret did not protect this file, {altered}. Use the "
                "secret that it was protected with.",
                reason="secret",
            ) from None
        raise IntegrityError(
            f"{what}: does not open: the key is not this file's, {altered}. Download the file "
            "again, or ask for the grant again.",
            reason="box",
        ) from None
    # A level's key is enough to seal boxes of that level, so their content is checked too.
    check = Checker(what, "ring")
    end = 4 + int.from_bytes(plain[:4], "little")
    check.that(len(plain) >= end, "table", "a table of the given length")
    table = check.fields(check.json(plain[4:end]), "table", rings=LIST)
    rings: dict[str, SealedRing] = {}
    for entry in table["rings"]:
        check.fields(entry, "rings", **_RULES)
        name, shape, groups, coding, size, digest = (entry[field] for field in _RULES)
        check.that(name not in rings, "tensor", "each tensor once")
        positions = memoryview(plain)[end : end + size]
        rings[name] = SealedRing(name, tuple(shape), groups, coding, positions, digest)
        end += size
    check.that(end == len(plain), "table", "positions up to the end of the box")
    return list(rings.values())


def box_context(manifest: str, level: int) -> bytes:
    """Associated data of a box, which binds it to its place."""
    digest = hashlib.sha256(manifest.encode()).digest()
    return b"selcrypt/v1/box\0" + level.to_bytes(4, "little") + digest


def _content(rings: Sequence[SealedRing]) -> bytes:
    table = [
        dict(zip(_RULES, ring._replace(positions=len(ring.positions)), strict=True))
        for ring in rings
    ]
    head = json.dumps({"rings": table}, ensure_ascii=False, separators=(",", ":")).encode()
    return len(head).to_bytes(4, "little") + head + b"".join(ring.positions for ring in rings)
