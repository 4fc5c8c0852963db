"""What makes a safetensors file a protected one: manifest, sealed boxes, signature. See FORMAT.md.

All of it is text in the file's ``__metadata__``, beside the caller's own entries:

======================  ===========================================================================
``selcrypt``            the manifest: JSON that names model, cipher, levels, signer, every tensor
``selcrypt.box.m``      the positions of ring m, sealed under the key of level m, in base64
``selcrypt.signature``  Ed25519 over the manifest and all boxes, in base64; optional
======================  ===========================================================================

Nothing is ever re-encoded in order to be checked: signature and seals are over the very text that
stands in the file, so there is no canonical form that two programs could disagree about.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .._ciphers.lossless import LosslessCipher
from .._io.strict_json import json_object, show
from .._keys.keys import MAX_LEVELS, MODEL_ID_BYTES, LevelKey, SigningKey, verify_signature
from .._tree.dtypes import SAFETENSORS

FORMAT = "selcrypt-v1"
MANIFEST = "selcrypt"
_BOX = "selcrypt.box."
_SIGNATURE = "selcrypt.signature"
_NONCE_BYTES = 12
_MAX_AXES = 63  # NumPy has one more, which the table of positions takes
DAMAGED = "The file was damaged or altered: get it anew from its owner."
NO_DIGEST = "0" * 64


class IntegrityError(ValueError):
    """A protected file is not what its owner made."""


class Tensor(NamedTuple):
    """A tensor as it is shipped.

    Attributes:
        dtype: safetensors' name, such as ``"F32"``.
        shape: its shape.
        sha256: of its bytes in the file, in hex.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class LevelSize(NamedTuple):
    """How much one level adds to the one below.

    Attributes:
        groups: number of groups in the ring.
        weights: number of weights in them.
    """

    groups: int
    weights: int


class SealedRing(NamedTuple):
    """What the box of a level says of one tensor.

    Attributes:
        tensor: its name.
        mask_shape: of the ring's mask, one size an axis of the tensor: 1 inside a group.
        groups: how many the ring has.
        bitmap: the mask in C order, eight groups a byte, the first in the highest bit; zlib.
        sha256: of the ring's plaintext, in hex.
    """

    tensor: str
    mask_shape: tuple[int, ...]
    groups: int
    bitmap: bytes
    sha256: str

    def weights(self, shape: Sequence[int]) -> int:
        """How many weights of a tensor of that shape the ring has."""
        return self.groups * math.prod(shape) // max(math.prod(self.mask_shape), 1)


@dataclass(frozen=True)
class Manifest:
    """What a protected file says of itself, in the clear.

    Attributes:
        model_id: 16 random bytes, new for each protection.
        cipher: how the rings are encrypted.
        levels: size of ring 1..M.
        tensors: every tensor of the file by name, in no particular order.
        signer: Ed25519 public key, or None for a file that is not signed.
        metadata: digest of the caller's own entries of ``__metadata__``, or None if the file that
            was protected had no ``__metadata__``.
        shard: number of this file and of all files, from 1, of a checkpoint in several files.
    """

    model_id: bytes
    cipher: LosslessCipher
    levels: tuple[LevelSize, ...]
    tensors: Mapping[str, Tensor]
    signer: bytes | None = None
    metadata: str | None = None
    shard: tuple[int, int] | None = None

    def to_text(self) -> str:
        """The JSON that is shipped."""
        fields = {
            "format": FORMAT,
            "model_id": self.model_id.hex(),
            "cipher": {
                "name": "lossless",
                "unit": self.cipher.unit,
                "permute": self.cipher.permute,
                "fine_bits": self.cipher.fine_bits,
            },
            "levels": [level._asdict() for level in self.levels],
            "metadata": self.metadata,
            "shard": None if self.shard is None else list(self.shard),
            "signer": None if self.signer is None else self.signer.hex(),
            "tensors": {name: tensor._asdict() for name, tensor in self.tensors.items()},
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, what: str) -> "Manifest":
        """Reads the JSON, strictly.

        Raises:
            ValueError: of a later version of the format.
            IntegrityError: anything that this version would not have written.
        """
        try:
            fields = json_object(text.encode(), f"{what}: manifest")
        except ValueError as error:
            raise IntegrityError(f"{error} {DAMAGED}") from None
        if fields.get("format") != FORMAT:
            given = fields.get("format")
            if isinstance(given, str) and given.startswith("selcrypt-v"):
                raise ValueError(
                    f"{what}: expected format {FORMAT}, got {given[:20]}. It was written by "
                    "another version: update selcrypt-jax."
                )
        check = _Checker(f"{what}: manifest")
        check.keys(
            fields,
            "",
            "format model_id cipher levels metadata shard signer tensors",
        )
        check.that(fields["format"] == FORMAT, "format", FORMAT)
        cipher = fields["cipher"]
        check.keys(cipher, "cipher", "name unit permute fine_bits")
        check.that(cipher["name"] == "lossless", "cipher.name", "'lossless'")
        check.that(cipher["unit"] in ("weight", "group"), "cipher.unit", "'weight' or 'group'")
        check.that(isinstance(cipher["permute"], bool), "cipher.permute", "true or false")
        fine = cipher["fine_bits"]
        check.that(fine is None or _is_count(fine), "cipher.fine_bits", "null or a number")
        levels = fields["levels"]
        check.that(
            isinstance(levels, list) and 1 <= len(levels) <= MAX_LEVELS,
            "levels",
            f"a list of 1 to {MAX_LEVELS}",
        )
        for level in levels:
            check.keys(level, "levels", "groups weights")
            check.that(all(map(_is_count, level.values())), "levels", "numbers")
        shard = fields["shard"]
        check.that(
            shard is None
            or (
                isinstance(shard, list)
                and len(shard) == 2
                and all(map(_is_count, shard))
                and 1 <= shard[0] <= shard[1]
            ),
            "shard",
            "null or [number, count]",
        )
        tensors = fields["tensors"]
        check.that(isinstance(tensors, dict), "tensors", "an object")
        for name, tensor in tensors.items():
            check.keys(tensor, f"tensors {name!r}", "dtype shape sha256")
            check.that(isinstance(tensor["dtype"], str), f"tensors {name!r}: dtype", "text")
            shape = tensor["shape"]
            check.that(
                isinstance(shape, list) and all(map(_is_count, shape)),
                f"tensors {name!r}: shape",
                "a list of numbers",
            )
            check.hex(tensor["sha256"], f"tensors {name!r}: sha256", 32)
        if fields["metadata"] is not None:
            check.hex(fields["metadata"], "metadata", 32)
        return cls(
            model_id=check.hex(fields["model_id"], "model_id", MODEL_ID_BYTES),
            cipher=LosslessCipher(unit=cipher["unit"], permute=cipher["permute"], fine_bits=fine),
            levels=tuple(LevelSize(**level) for level in levels),
            tensors={
                name: Tensor(tensor["dtype"], tuple(tensor["shape"]), tensor["sha256"])
                for name, tensor in tensors.items()
            },
            signer=None if fields["signer"] is None else check.hex(fields["signer"], "signer", 32),
            metadata=fields["metadata"],
            shard=None if shard is None else (shard[0], shard[1]),
        )


class _Checker(NamedTuple):
    """Errors that name the field."""

    what: str

    def that(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise IntegrityError(
                f"{self.what}: field {show(field)}: expected {expected}, got something else. "
                f"{DAMAGED}"
            )

    def keys(self, value: Any, field: str, names: str) -> None:
        expected = names.split()
        if not isinstance(value, dict) or set(value) != set(expected):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            where = f"field {show(field)}: " if field else ""
            raise IntegrityError(
                f"{self.what}: {where}expected an object with {expected}, got {show(got)}. "
                f"{DAMAGED}"
            )

    def hex(self, value: Any, field: str, size: int) -> bytes:
        lower = isinstance(value, str) and set(value) <= set("0123456789abcdef")
        self.that(lower and len(value) == 2 * size, field, f"{2 * size} digits in hex")
        return bytes.fromhex(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the caller's entries, in hex: sorted, every text with its length before it."""
    digest = hashlib.sha256(b"selcrypt/v1/metadata\0")
    for key, value in sorted((k.encode(), v.encode()) for k, v in metadata.items()):
        for text in (key, value):
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _is_ours(key: str) -> bool:
    return key == MANIFEST or key.startswith(MANIFEST + ".")


def check_unprotected(metadata: Mapping[str, str] | None, what: str) -> None:
    """Refuses to protect twice.

    Raises:
        ValueError: the file has entries of ours.
    """
    ours = sorted(filter(_is_ours, metadata or {}))
    if MANIFEST in ours:
        raise ValueError(
            f"{what}: is a protected file already, expected a plain checkpoint. Unlock it at the "
            "top level first, or give it new keys with rotate."
        )
    if ours:
        raise ValueError(
            f"{what}: metadata {ours} have names that the protected file needs. Rename them."
        )


@dataclass(frozen=True)
class Envelope:
    """Manifest, boxes and signature as they stand in a file.

    Attributes:
        what: the file, for messages.
        text: the manifest's JSON; `manifest` is what it says.
        manifest: see `Manifest`.
        boxes: the sealed box of level 1..M, base64.
        signature: 64 bytes, or None.
        own: the caller's entries of ``__metadata__``, or None if the checkpoint had none at all.
    """

    what: str
    text: str
    manifest: Manifest
    boxes: tuple[str, ...]
    signature: bytes | None
    own: Mapping[str, str] | None

    @classmethod
    def seal(
        cls,
        manifest: Manifest,
        own: Mapping[str, str] | None,
        rings: Sequence[Sequence[SealedRing]],
        key: LevelKey,
        signing: SigningKey | None,
        what: str,
    ) -> "Envelope":
        """Seals ``rings[m - 1]`` for level m, and signs.

        Args:
            manifest: complete, its `signer` the public half of ``signing``.
            own: see `own`.
            rings: one sequence a level.
            key: of the top level.
            signing: of the owner, or None.
            what: the file, for messages.
        """
        text = manifest.to_text()
        boxes = tuple(
            _seal_box(level_key, text, level_rings)
            for level_key, level_rings in zip(key.all(), rings, strict=True)
        )
        signature = None if signing is None else signing.sign(_signed_message(text, boxes))
        return cls(what, text, manifest, boxes, signature, own)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, what: str) -> "Envelope":
        """Reads what `entries` made, and checks the caller's entries. No seal is opened yet.

        Raises:
            ValueError: not a protected file, or one of a later version.
            IntegrityError: entries that are missing, unknown or malformed.
        """
        metadata = metadata or {}
        if MANIFEST not in metadata:
            raise ValueError(
                f"{what}: is not a protected file: its metadata have no entry {MANIFEST!r}. "
                "Expected what selcrypt protect wrote. (Some programs drop metadata when they "
                "save a file again.)"
            )
        text = metadata[MANIFEST]
        manifest = Manifest.from_text(text, what)
        names = [f"{_BOX}{level}" for level in range(1, len(manifest.levels) + 1)]
        expected = {MANIFEST, *names} | ({_SIGNATURE} if manifest.signer else set())
        actual = set(filter(_is_ours, metadata))
        if actual != expected:
            wrong = sorted(actual ^ expected)
            raise IntegrityError(
                f"{what}: metadata: expected the entries {show(sorted(expected))}, got "
                f"{show(wrong)} too much or too little. {DAMAGED}"
            )
        own = {key: value for key, value in metadata.items() if not _is_ours(key)}
        digest = None if manifest.metadata is None and not own else metadata_digest(own)
        if digest != manifest.metadata:
            raise IntegrityError(
                f"{what}: metadata: the entries {show(sorted(own))} are not those that were "
                f"protected. {DAMAGED}"
            )
        signature = None
        if manifest.signer:
            signature = _from_base64(metadata[_SIGNATURE], f"{what}: signature")
        boxes = tuple(metadata[name] for name in names)
        return cls(what, text, manifest, boxes, signature, None if digest is None else own)

    def entries(self) -> dict[str, str]:
        """The entries of ``__metadata__``, without the caller's."""
        result = {MANIFEST: self.text}
        result |= {f"{_BOX}{level}": box for level, box in enumerate(self.boxes, 1)}
        if self.signature is not None:
            result[_SIGNATURE] = base64.b64encode(self.signature).decode()
        return result

    def check_signature(self, signer: bytes | None = None) -> None:
        """Checks who made the file.

        Args:
            signer: the public key that is expected; None takes the file's own word for it.

        Raises:
            IntegrityError: another signer, none where one is expected, or a wrong signature.
        """
        actual = self.manifest.signer
        if signer is not None and signer != actual:
            raise IntegrityError(
                f"{self.what}: expected a file signed by {signer.hex()}, got one "
                + (f"signed by {actual.hex()}" if actual else "without a signature")
                + ". It is another's, or was altered: get it from its owner."
            )
        if actual is None:
            return
        message = _signed_message(self.text, self.boxes)
        if self.signature is None or not verify_signature(actual, message, self.signature):
            raise IntegrityError(
                f"{self.what}: the signature does not fit: the manifest or a box is not what "
                f"{actual.hex()} signed. {DAMAGED}"
            )

    def check_key(self, key: LevelKey) -> None:
        """Refuses a key of another model, or of a level that does not exist.

        Raises:
            ValueError: so it is.
        """
        if key.model_id != self.manifest.model_id:
            raise ValueError(
                f"{self.what}: is model {self.manifest.model_id.hex()}, but the grant is for model "
                f"{key.model_id.hex()}. Ask the owner for a grant of this file."
            )
        if key.level > len(self.manifest.levels):
            raise ValueError(
                f"{self.what}: has {len(self.manifest.levels)} levels, but the grant is for level "
                f"{key.level}. Ask the owner for a grant of this file."
            )

    def open(
        self, key: LevelKey, *, owner: bool = False
    ) -> dict[str, list[tuple[int, SealedRing]]]:
        """Opens the boxes of levels 1..m.

        Args:
            key: of level m.
            owner: whether the key comes from the owner's secret, for messages.

        Returns:
            Tensor → its rings with their levels.

        Raises:
            ValueError: a key of another model.
            IntegrityError: a box that does not open, or does not fit the manifest.
        """
        self.check_key(key)
        result: dict[str, list[tuple[int, SealedRing]]] = {}
        for level, (lower, box) in enumerate(zip(key.all(), self.boxes, strict=False), 1):
            size = LevelSize(0, 0)
            for ring in _open_box(lower, self.text, box, self.what, owner=owner):
                weights = self._weights(ring, level)
                size = LevelSize(size.groups + ring.groups, size.weights + weights)
                result.setdefault(ring.tensor, []).append((level, ring))
            expected = self.manifest.levels[level - 1]
            if size != expected:
                raise IntegrityError(
                    f"{self.what}: box of level {level}: expected {expected} as the manifest says, "
                    f"got {size}. {DAMAGED}"
                )
        return result

    def _weights(self, ring: SealedRing, level: int) -> int:
        """How many weights a ring has, once it is sure to fit its tensor."""
        where = f"{self.what}: box of level {level}"
        tensor = self.manifest.tensors.get(ring.tensor)
        fits = (
            tensor is not None
            # A mask over no weights could be as large as its forger likes.
            and 0 not in tensor.shape
            and len(tensor.shape) <= _MAX_AXES
            and len(ring.mask_shape) == len(tensor.shape)
            and all(m in (1, n) for m, n in zip(ring.mask_shape, tensor.shape, strict=True))
            and 1 <= ring.groups <= math.prod(ring.mask_shape)
        )
        if tensor is None or not fits:
            raise IntegrityError(
                f"{where}: the ring of tensor {show(ring.tensor)} does not fit it. {DAMAGED}"
            )
        try:
            self.manifest.cipher.fine_mask(SAFETENSORS[tensor.dtype])
        except ValueError as error:
            raise IntegrityError(
                f"{where}: tensor {show(ring.tensor)}: {error}. {DAMAGED}"
            ) from None
        return ring.weights(tensor.shape)


def _signed_message(text: str, boxes: Sequence[str]) -> bytes:
    parts = [hashlib.sha256(part.encode()).digest() for part in (text, *boxes)]
    return b"selcrypt/v1/signature\0" + b"".join(parts)


def _seal_box(key: LevelKey, text: str, rings: Sequence[SealedRing]) -> str:
    table = [
        {
            "tensor": ring.tensor,
            "mask_shape": list(ring.mask_shape),
            "groups": ring.groups,
            "bytes": len(ring.bitmap),
            "sha256": ring.sha256,
        }
        for ring in rings
    ]
    head = json.dumps({"rings": table}, ensure_ascii=False, separators=(",", ":")).encode()
    plain = len(head).to_bytes(4, "little") + head + b"".join(ring.bitmap for ring in rings)
    # The key is new with each protection; the nonce is random all the same, so that sealing a
    # second time under the same key, as when a protection is repeated, does no harm.
    nonce = os.urandom(_NONCE_BYTES)
    sealed = ChaCha20Poly1305(key.seal_key()).encrypt(nonce, plain, _context(text, key.level))
    return base64.b64encode(nonce + sealed).decode()


def _open_box(key: LevelKey, text: str, box: str, file: str, *, owner: bool) -> list[SealedRing]:
    what = f"{file}: box of level {key.level}"
    sealed = _from_base64(box, what)
    nonce, sealed = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        plain = ChaCha20Poly1305(key.seal_key()).decrypt(nonce, sealed, _context(text, key.level))
    except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
        whose, remedy = (
            ("this secret did not protect this file", "Use the secret that it was protected with.")
            if owner
            else (
                "the key is not this file's",
                "Get the file anew, and then the grant.",
            )
        )
        raise IntegrityError(
            f"{what}: does not open: {whose}, or the manifest or the box was altered. {remedy}"
        ) from None
    # Whoever has the key of a level can seal boxes of it, so what is in them is checked too.
    end = 4 + int.from_bytes(plain[:4], "little")
    check = _Checker(what)
    check.that(len(plain) >= end, "table", "a table of the given length")
    try:
        table = json_object(plain[4:end], what)
    except ValueError as error:
        raise IntegrityError(f"{error} {DAMAGED}") from None
    check.keys(table, "table", "rings")
    check.that(isinstance(table["rings"], list), "rings", "a list")
    rings = []
    for entry in table["rings"]:
        check.keys(entry, "rings", "tensor mask_shape groups bytes sha256")
        shape = entry["mask_shape"]
        check.that(isinstance(entry["tensor"], str), "tensor", "text")
        check.that(isinstance(shape, list) and all(map(_is_count, shape)), "mask_shape", "numbers")
        check.that(_is_count(entry["groups"]) and _is_count(entry["bytes"]), "groups", "numbers")
        check.hex(entry["sha256"], "sha256", 32)
        bitmap = plain[end : end + entry["bytes"]]
        end += entry["bytes"]
        rings.append(
            SealedRing(entry["tensor"], tuple(shape), entry["groups"], bitmap, entry["sha256"])
        )
    check.that(end == len(plain), "table", "bitmaps up to the end of the box")
    names = {ring.tensor for ring in rings}
    check.that(len(names) == len(rings), "tensor", "each tensor once")
    return rings


def _context(text: str, level: int) -> bytes:
    """Associated data of a box: what it belongs to."""
    digest = hashlib.sha256(text.encode()).digest()
    return b"selcrypt/v1/box\0" + level.to_bytes(4, "little") + digest


def _from_base64(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = None
    # One text for each content: base64 would let the last character vary.
    if data is None or base64.b64encode(data).decode() != text:
        raise IntegrityError(f"{what}: expected base64, got something else. {DAMAGED}")
    return data
