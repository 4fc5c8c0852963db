"""The envelope of a protected file: manifest, sealed boxes, signature. See FORMAT.md.

All of it is text in the file's ``__metadata__``, beside the caller's own entries:

======================  ===========================================================================
``selcrypt``            the manifest: JSON that names model, cipher, levels, signer, every tensor
``selcrypt.box.m``      the positions of ring m, sealed under the key of level m, in base64
``selcrypt.signature``  Ed25519 over the manifest and all boxes, in base64; optional
======================  ===========================================================================

Nothing is ever re-encoded in order to be checked: signature and seals cover the very text in the
file, so there is no canonical form that two programs could disagree about.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._io.errors import GrantError, IntegrityError, counted
from .._io.safetensors import PROTECTED
from .._io.strict_json import listing, show
from .._keys.keys import LevelKey
from .._keys.signing import SigningKey, VerifyKey
from .._tree.dtypes import SAFETENSORS
from .boxes import Rings, SealedRing, box_length, open_box, seal_box
from .checks import DAMAGED, Checker
from .manifest import LevelSize, Manifest, metadata_digest

MANIFEST = PROTECTED
_BOX = "selcrypt.box."
_SIGNATURE = "selcrypt.signature"
_SIGNATURE_BYTES = 64
_MAX_AXES = 63  # NumPy allows one more, which the table of positions needs


Own = Mapping[str, str] | None
"""The entries of ``__metadata__``, or None if a file has no ``__metadata__``."""
ByLevel = Sequence[Sequence[SealedRing]]
"""The rings of level 1..M."""


def check_unprotected(metadata: Own, what: str) -> None:
    """Refuses to protect a protected file.

    Raises:
        ValueError: the file already has entries of selcrypt's.
    """
    ours = sorted(filter(_is_ours, metadata or {}))
    if MANIFEST in ours:
        raise ValueError(
            f"{what}: is already a protected file, expected a plain checkpoint. Unlock it at the "
            "top level first, or give it new keys with rotate."
        )
    if ours:
        raise ValueError(
            f"{what}: metadata: {ours} are names that the protected file needs. Rename them."
        )


@dataclass(frozen=True)
class Envelope:
    """Manifest, boxes and signature, exactly as in the file.

    Attributes:
        what: the file, for messages.
        text: the manifest's JSON; `manifest` is its parsed form.
        manifest: see `Manifest`.
        boxes: the sealed box of level 1..M, base64.
        signature: 64 bytes, or None.
        own: the caller's entries of ``__metadata__``, or None if the checkpoint had no such entry.
    """

    what: str
    text: str
    manifest: Manifest
    boxes: tuple[str, ...]
    signature: bytes | None
    own: Own

    @classmethod
    def seal(
        cls,
        manifest: Manifest,
        own: Own,
        rings: ByLevel,
        key: LevelKey,
        signing: SigningKey | None,
        what: str,
    ) -> "Envelope":
        """Seals ``rings[m - 1]`` for level m, and signs.

        Args:
            manifest: complete; its `signer` is the public half of ``signing``.
            own: see `own`.
            rings: one sequence per level.
            key: the top level's key.
            signing: the owner's signing key, or None.
            what: the file, for messages.
        """
        text = manifest.to_text()
        boxes = tuple(seal_box(k, text, found) for k, found in zip(key.all(), rings, strict=True))
        signature = None if signing is None else signing.sign(signed_message(text, boxes))
        return cls(what, text, manifest, boxes, signature, own)

    @classmethod
    def blank(cls, manifest: Manifest, own: Own, rings: ByLevel, what: str) -> "Envelope":
        """As long as the result of `seal` with digests, but neither sealed nor signed."""
        boxes = tuple("A" * box_length(found) for found in rings)
        signature = None if manifest.signer is None else bytes(_SIGNATURE_BYTES)
        return cls(what, manifest.to_text(), manifest, boxes, signature, own)

    @classmethod
    def from_metadata(cls, metadata: Own, what: str) -> "Envelope":
        """Reads the result of `entries`, and checks the caller's entries. Opens no seal yet.

        Raises:
            ValueError: not a protected file, or one of a later version.
            IntegrityError: entries that are missing, unknown or malformed.
        """
        metadata = metadata or {}
        if MANIFEST not in metadata:
            raise ValueError(
                f"{what}: is not a protected file: its metadata has no entry {MANIFEST!r}. "
                "Expected a file written by selcrypt protect. (Some programs drop metadata when "
                "they save a file again.)"
            )
        text = metadata[MANIFEST]
        manifest = Manifest.from_text(text, what)
        check = Checker(f"{what}: metadata", "metadata")
        names = [f"{_BOX}{level}" for level in range(1, len(manifest.levels) + 1)]
        expected = {MANIFEST, *names} | ({_SIGNATURE} if manifest.signer else set())
        found = {*filter(_is_ours, metadata)}
        if found != expected:
            missing, unknown = sorted(expected - found), sorted(found - expected)
            parts = [f"{listing(missing)} missing"] * bool(missing)
            parts += [f"{listing(unknown)} unknown"] * bool(unknown)
            raise check.error(
                f"expected the entries {listing(sorted(expected))}, got {' and '.join(parts)}"
            )
        own = {key: value for key, value in metadata.items() if not _is_ours(key)}
        digest = None if manifest.metadata is None and not own else metadata_digest(own)
        if digest != manifest.metadata:
            raise check.error(
                f"expected the entries that were protected, got others: {listing(sorted(own))}"
            )
        signature = None
        if manifest.signer:
            signature = Checker(f"{what}: signature", "signature").base64(metadata[_SIGNATURE])
        boxes = tuple(metadata[name] for name in names)
        return cls(what, text, manifest, boxes, signature, None if digest is None else own)

    def entries(self) -> dict[str, str]:
        """The entries of ``__metadata__``, the caller's first."""
        boxes = {f"{_BOX}{level}": box for level, box in enumerate(self.boxes, 1)}
        result = {**(self.own or {}), MANIFEST: self.text, **boxes}
        if self.signature is not None:
            result[_SIGNATURE] = base64.b64encode(self.signature).decode()
        return result

    def check_signature(self, signer: VerifyKey | None = None) -> None:
        """Checks the signer and the signature.

        Args:
            signer: the expected owner; None trusts the signer named in the file.

        Raises:
            IntegrityError: another signer, no signature where one is expected, or a wrong one.
        """
        actual = self.manifest.signer
        if signer is not None and signer != actual:
            raise IntegrityError(
                f"{self.what}: expected a file signed by {signer.hex()}, got one "
                + (f"signed by {actual.hex()}" if actual else "without a signature")
                + ". It is altered or not theirs: download it from its owner; or the grant or key "
                "is another owner's: get this file's.",
                reason="signer",
            )
        message = signed_message(self.text, self.boxes)
        if actual is not None and not actual.verify(message, self.signature or b""):
            raise IntegrityError(
                f"{self.what}: the signature does not match: the manifest or a box is not what "
                f"{actual.hex()} signed. {DAMAGED}",
                reason="signature",
            )

    def check_key(self, key: LevelKey) -> None:
        """Refuses a key of another model, or of a level that does not exist.

        Raises:
            GrantError: the key belongs to another model, or to a level that the model does not
                have.
        """
        remedy = "Ask the owner for a grant for this file."
        if key.model_id != self.manifest.model_id:
            raise GrantError(
                f"{self.what}: is model {self.manifest.model_id.hex()}, but the grant is for model "
                f"{key.model_id.hex()}. {remedy}",
                reason="model",
            )
        if key.level > len(self.manifest.levels):
            raise GrantError(
                f"{self.what}: has {counted(len(self.manifest.levels), 'level')}, but the grant is "
                f"for level {key.level}. {remedy}",
                reason="level",
            )

    def open(self, key: LevelKey, *, owner: bool = False) -> Rings:
        """Opens the boxes of levels 1..m.

        Args:
            key: the key of level m.
            owner: whether the key is derived from the owner's secret, for messages.

        Raises:
            GrantError: a key of another model, or a secret that did not protect the file.
            IntegrityError: a box does not open, or does not match the manifest.
        """
        self.check_key(key)
        result: dict[str, list[tuple[int, SealedRing]]] = {}
        held: Counter[str] = Counter()
        for lower, box, expected in zip(key.all(), self.boxes, self.manifest.levels, strict=False):
            check = Checker(f"{self.what}: box of level {lower.level}", "ring")
            groups = weights = 0
            for ring in open_box(lower, self.text, box, self.what, owner=owner):
                size = self._weights(ring, check)
                weights += size
                groups += ring.groups
                result.setdefault(ring.tensor, []).append((lower.level, ring))
                # Before any position is unpacked: no weight may be in two rings.
                held[ring.tensor] += size
                if held[ring.tensor] > math.prod(self.manifest.tensors[ring.tensor].shape):
                    raise check.error(
                        f"the rings of tensor {show(ring.tensor)} hold more weights than it has: "
                        "they overlap"
                    )
            if (actual := LevelSize(groups, weights)) != expected:
                raise check.error(
                    f"expected {counted(expected.groups, 'group')} of "
                    f"{counted(expected.weights, 'weight')}, as in the manifest, got "
                    f"{actual.groups} of {actual.weights}"
                )
        return result

    def _weights(self, ring: SealedRing, check: Checker) -> int:
        """The number of weights in a ring, after checking that it fits its tensor."""
        tensor = self.manifest.tensors.get(ring.tensor)
        if (
            tensor is None
            # A mask over no weights could be of any size that its forger likes.
            or 0 in tensor.shape
            or not len(ring.mask_shape) == len(tensor.shape) <= _MAX_AXES
            or any(m not in (1, n) for m, n in zip(ring.mask_shape, tensor.shape, strict=True))
            or not 1 <= ring.groups <= math.prod(ring.mask_shape)
        ):
            raise check.error(f"the ring of tensor {show(ring.tensor)} does not fit it")
        try:
            self.manifest.cipher.fine_mask(SAFETENSORS[tensor.dtype])
        except ValueError as error:
            raise check.error(f"tensor {show(ring.tensor)}: {error}") from None
        return ring.weights(tensor.shape)


def _is_ours(key: str) -> bool:
    return key == MANIFEST or key.startswith(MANIFEST + ".")


def signed_message(text: str, boxes: Sequence[str]) -> bytes:
    """The signed message: the digests of the manifest and of all boxes, as text."""
    parts = [hashlib.sha256(part.encode()).digest() for part in (text, *boxes)]
    return b"selcrypt/v1/signature\0" + b"".join(parts)
