"""The manifest: a protected file's plaintext description of itself. See FORMAT.md."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .._ciphers.lossless import LosslessCipher
from .._ciphers.windows import Window, fits, has_window
from .._io.strict_json import show
from .._keys.keys import MAX_LEVELS, MODEL_ID_BYTES
from .._keys.material import KEY_BYTES
from .._keys.signing import VerifyKey
from .._tree.dtypes import SAFETENSORS
from .checks import COUNT, COUNTS, FLAG, LIST, OBJECT, Checker, Rule, hex_of, one_of, or_null

FORMAT = "selcrypt-v1"
_DIGEST_BYTES = 32
NO_DIGEST = "0" * (2 * _DIGEST_BYTES)
CHUNK = 1 << 22
"""The number of bytes of a tensor that share a digest, and can be read alone."""

Rest = Literal["sealed", "plain"]
"""Weights that are in no ring: sealed under the key of level 1, or left plain."""

_DIGEST = hex_of(_DIGEST_BYTES)
_DIGESTS = Rule(
    lambda value: isinstance(value, list) and all(map(_DIGEST.fits, value)), "a list of digests"
)
_DTYPE = one_of(*SAFETENSORS)
_WINDOW = or_null(
    Rule(
        lambda value: COUNTS.fits(value) and len(value) == 3 and value[2] in (0, 1),
        "[lowest, exponents, 0 or 1]",
    )
)


class Tensor(NamedTuple):
    """A tensor as shipped.

    Attributes:
        dtype: safetensors' name, such as ``"F32"``.
        shape: its shape.
        sha256: digest of each `CHUNK` of its bytes in the file, in hex; none for an empty tensor.
        window: the seal's window; None without a seal, and for numbers without exponents.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: tuple[str, ...]
    window: Window | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Tensor":
        """Reads the JSON value."""
        window = entry["window"]
        if window is not None:
            window = Window(window[0], window[1], window[2] == 1)
        return cls(entry["dtype"], tuple(entry["shape"]), tuple(entry["sha256"]), window)

    def entry(self) -> dict[str, Any]:
        """The JSON value."""
        window = None if self.window is None else [int(number) for number in self.window]
        return self._asdict() | {"window": window}


class LevelSize(NamedTuple):
    """The groups and weights that one level adds to the one below.

    Attributes:
        groups: number of groups in the ring.
        weights: number of weights in them.
    """

    groups: int
    weights: int


@dataclass(frozen=True)
class Manifest:
    """A protected file's plaintext description of itself.

    Attributes:
        model_id: 16 random bytes, new for each protection.
        cipher: how the rings are encrypted.
        rest: see `Rest`.
        levels: size of ring 1..M.
        tensors: every tensor of the file by name, in no particular order.
        signer: the owner, or None for an unsigned file.
        metadata: digest of the caller's own entries of ``__metadata__``, or None if the original
            file had no ``__metadata__``.
        shard: for a checkpoint in several files: the number of this file, from 1, and of all files.
    """

    model_id: bytes
    cipher: LosslessCipher
    rest: Rest
    levels: tuple[LevelSize, ...]
    tensors: Mapping[str, Tensor]
    signer: VerifyKey | None = None
    metadata: str | None = None
    shard: tuple[int, int] | None = None

    def to_text(self) -> str:
        """The JSON as shipped."""
        fields = {
            "format": FORMAT,
            "model_id": self.model_id.hex(),
            "cipher": {"name": "lossless", **vars(self.cipher)},
            "rest": self.rest,
            "levels": [level._asdict() for level in self.levels],
            "metadata": self.metadata,
            "shard": self.shard,
            "signer": None if self.signer is None else self.signer.hex(),
            "tensors": {name: tensor.entry() for name, tensor in self.tensors.items()},
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, what: str) -> "Manifest":
        """Reads the JSON, strictly.

        Raises:
            ValueError: the format has a later version.
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
        check.fields(
            fields, "", format=one_of(FORMAT), model_id=hex_of(MODEL_ID_BYTES), cipher=OBJECT,
            rest=one_of("sealed", "plain"), levels=LIST, metadata=or_null(hex_of(_DIGEST_BYTES)),
            shard=or_null(COUNTS), signer=or_null(hex_of(KEY_BYTES)), tensors=OBJECT,
        )  # fmt: skip
        levels, shard, signer = fields["levels"], fields["shard"], fields["signer"]
        check.that(1 <= len(levels) <= MAX_LEVELS, "levels", f"a list of 1 to {MAX_LEVELS}")
        for level in levels:
            check.fields(level, "levels", groups=COUNT, weights=COUNT)
        ordered = shard is None or (len(shard) == 2 and 1 <= shard[0] <= shard[1])
        check.that(ordered, "shard", "null or [number, count]")
        cipher = check.fields(
            fields["cipher"], "cipher", name=one_of("lossless"), unit=one_of("weight", "group"),
            permute=FLAG, fine_bits=or_null(COUNT),
        )  # fmt: skip
        tensors = {}
        for name, entry in fields["tensors"].items():
            what = f"tensors {show(name)}"
            check.fields(entry, what, dtype=_DTYPE, shape=COUNTS, sha256=_DIGESTS, window=_WINDOW)
            tensor = tensors[name] = Tensor.of(entry)
            expected = chunk_count(tensor.dtype, tensor.shape)
            check.that(len(tensor.sha256) == expected, f"{what}: sha256", f"{expected} digests")
            dtype, window = SAFETENSORS[tensor.dtype], tensor.window
            wanted = fields["rest"] == "sealed" and has_window(dtype) and expected > 0
            good = wanted and fits(window, dtype) if window is not None else not wanted
            check.that(good, f"{what}: window", "a window of its dtype, or null")
        return cls(
            model_id=bytes.fromhex(fields["model_id"]),
            cipher=LosslessCipher(cipher["unit"], cipher["permute"], cipher["fine_bits"]),
            rest=fields["rest"],
            levels=tuple(LevelSize(**level) for level in levels),
            tensors=tensors,
            signer=None if signer is None else VerifyKey(bytes.fromhex(signer)),
            metadata=fields["metadata"],
            shard=None if shard is None else (shard[0], shard[1]),
        )


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """The number of bytes in a tensor."""
    return math.prod(shape) * SAFETENSORS[dtype].bits // 8


def chunk_count(dtype: str, shape: Sequence[int]) -> int:
    """The number of chunks in a tensor."""
    return -(-byte_count(dtype, shape) // CHUNK)


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the caller's entries, in hex: sorted, every text preceded by its length."""
    digest = hashlib.sha256(b"selcrypt/v1/metadata\0")
    for key, value in sorted((k.encode(), v.encode()) for k, v in metadata.items()):
        for text in (key, value):
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
