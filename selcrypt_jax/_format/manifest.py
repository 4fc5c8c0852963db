"""The manifest of a protected file: what it says of itself in the clear. See FORMAT.md."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._ciphers.lossless import LosslessCipher
from .._io.errors import IntegrityError, IntegrityReason
from .._io.strict_json import json_object, show
from .._keys.keys import MAX_LEVELS, MODEL_ID_BYTES
from .._keys.material import KEY_BYTES
from .._keys.signing import VerifyKey

FORMAT = "selcrypt-v1"
DAMAGED = "The file was damaged or altered: download it again from its owner."
_DIGEST_BYTES = 32
NO_DIGEST = "0" * (2 * _DIGEST_BYTES)


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


@dataclass(frozen=True)
class Manifest:
    """What a protected file says of itself, in the clear.

    Attributes:
        model_id: 16 random bytes, new for each protection.
        cipher: how the rings are encrypted.
        levels: size of ring 1..M.
        tensors: every tensor of the file by name, in no particular order.
        signer: the owner, or None for a file that is not signed.
        metadata: digest of the caller's own entries of ``__metadata__``, or None if the file that
            was protected had no ``__metadata__``.
        shard: number of this file and of all files, from 1, of a checkpoint in several files.
    """

    model_id: bytes
    cipher: LosslessCipher
    levels: tuple[LevelSize, ...]
    tensors: Mapping[str, Tensor]
    signer: VerifyKey | None = None
    metadata: str | None = None
    shard: tuple[int, int] | None = None

    def to_text(self) -> str:
        """The JSON that is shipped."""
        fields = {
            "format": FORMAT,
            "model_id": self.model_id.hex(),
            "cipher": {"name": "lossless", **vars(self.cipher)},
            "levels": [level._asdict() for level in self.levels],
            "metadata": self.metadata,
            "shard": self.shard,
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
        check = Checker(f"{what}: manifest", "manifest")
        fields = check.json(text.encode())
        given = fields.get("format")
        if given != FORMAT and isinstance(given, str) and given.startswith("selcrypt-v"):
            raise ValueError(
                f"{what}: expected format {FORMAT}, got {given[:20]}. It was written by "
                "another version: update selcrypt-jax."
            )
        check.fields(fields, "", "format model_id cipher levels metadata shard signer tensors")
        check.that(given == FORMAT, "format", FORMAT)
        cipher = check.fields(fields["cipher"], "cipher", "name unit permute fine_bits")
        check.that(cipher.pop("name") == "lossless", "cipher.name", "'lossless'")
        check.that(cipher["unit"] in ("weight", "group"), "cipher.unit", "'weight' or 'group'")
        check.that(isinstance(cipher["permute"], bool), "cipher.permute", "true or false")
        fine = cipher["fine_bits"]
        check.counts([] if fine is None else [fine], "cipher.fine_bits")
        levels, shard, tensors = fields["levels"], fields["shard"], fields["tensors"]
        known = isinstance(levels, list) and 1 <= len(levels) <= MAX_LEVELS
        check.that(known, "levels", f"a list of 1 to {MAX_LEVELS}")
        for level in levels:
            check.counts([*check.fields(level, "levels", "groups weights").values()], "levels")
        if shard is not None:
            check.counts(shard, "shard")
            known = len(shard) == 2 and 1 <= shard[0] <= shard[1]
            check.that(known, "shard", "null or [number, count]")
        check.that(isinstance(tensors, dict), "tensors", "an object")
        for name, tensor in tensors.items():
            check.fields(tensor, f"tensors {name!r}", "dtype shape sha256")
            check.that(isinstance(tensor["dtype"], str), f"tensors {name!r}: dtype", "text")
            tensor["shape"] = check.counts(tensor["shape"], f"tensors {name!r}: shape")
            check.hex(tensor["sha256"], f"tensors {name!r}: sha256", _DIGEST_BYTES)
        metadata, signer = fields["metadata"], fields["signer"]
        if metadata is not None:
            check.hex(metadata, "metadata", _DIGEST_BYTES)
        return cls(
            model_id=check.hex(fields["model_id"], "model_id", MODEL_ID_BYTES),
            cipher=LosslessCipher(**cipher),
            levels=tuple(LevelSize(**level) for level in levels),
            tensors={name: Tensor(**tensor) for name, tensor in tensors.items()},
            signer=None if signer is None else VerifyKey(check.hex(signer, "signer", KEY_BYTES)),
            metadata=metadata,
            shard=None if shard is None else (shard[0], shard[1]),
        )


class Checker(NamedTuple):
    """Checks of parts of a protected file, with errors that name the field.

    Attributes:
        what: the part, for messages.
        reason: of the errors.
    """

    what: str
    reason: IntegrityReason

    def error(self, problem: str) -> IntegrityError:
        """The error that says so."""
        return IntegrityError(f"{self.what}: {problem}. {DAMAGED}", reason=self.reason)

    def that(self, condition: bool, field: str, expected: str) -> None:
        """Refuses a field."""
        if not condition:
            raise self.error(f"field {show(field)}: expected {expected}, got something else")

    def json(self, raw: bytes) -> dict[str, Any]:
        """Parses an object."""
        try:
            return json_object(raw, self.what)
        except ValueError as error:
            raise IntegrityError(f"{error} {DAMAGED}", reason=self.reason) from None

    def fields(self, value: Any, field: str, names: str) -> dict[str, Any]:
        """Refuses anything but an object with exactly these fields."""
        expected = names.split()
        if not isinstance(value, dict) or set(value) != set(expected):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            where = f"field {show(field)}: " if field else ""
            raise self.error(f"{where}expected an object with {expected}, got {show(got)}")
        return value

    def counts(self, value: Any, field: str) -> tuple[int, ...]:
        """Refuses anything but a list of whole numbers from 0."""
        known = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        self.that(known, field, "numbers")
        return tuple(value)

    def hex(self, value: Any, field: str, size: int) -> bytes:
        """So many bytes as hex in lower case."""
        lower = isinstance(value, str) and set(value) <= set("0123456789abcdef")
        self.that(lower and len(value) == 2 * size, field, f"{2 * size} digits in hex")
        return bytes.fromhex(value)

    def base64(self, text: str) -> bytes:
        """Bytes in the one encoding that they have."""
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            data = None
        # base64 would let the last character vary.
        if data is None or base64.b64encode(data).decode() != text:
            raise self.error("expected base64, got something else")
        return data


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the caller's entries, in hex: sorted, every text with its length before it."""
    digest = hashlib.sha256(b"selcrypt/v1/metadata\0")
    for key, value in sorted((k.encode(), v.encode()) for k, v in metadata.items()):
        for text in (key, value):
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
