"""Protected files taken apart, altered and put together again, and how they are refused."""

import base64
import copy
import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from selcrypt_jax import (
    Grant,
    GrantError,
    IntegrityError,
    LevelKey,
    Secret,
    Select,
    SigningKey,
    VerifyKey,
    inspect_file,
    level_key,
    protect_file,
    unlock_file,
    verify_file,
)
from selcrypt_jax._io.safetensors import SafetensorsFile, header
from selcrypt_jax._tree.dtypes import SAFETENSORS

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(range(32, 64)))
ATTACKER = SigningKey(b"\1" * 32)
LEVELS = 3
CALLER = {"format": "np", "note": "ü"}
KINDS = ["signed", "unsigned"]

Expected = str | tuple[str, ...] | dict[str, Any]
"""A reason, several acceptable ones, or one for each kind of file."""


def reason_of(error: Exception) -> str:
    """The reason for a refusal, as in FORMAT.md; some are plain errors in this package."""
    if isinstance(error, GrantError | IntegrityError):
        return error.reason
    plain = {"is not a protected file": "unprotected", "was written by another": "version"}
    return next((reason for words, reason in plain.items() if words in str(error)), "file")


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Parts:
    """A safetensors file as an attacker sees it: they may change anything."""

    tensors: dict[str, Stored]
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, path: Path) -> "Parts":
        with SafetensorsFile(path) as file:
            tensors = {
                name: Stored(info.dtype, info.shape, bytes(file.read(name)))
                for name, info in file.tensors.items()
            }
            return cls(tensors, file.metadata)

    @property
    def entries(self) -> dict[str, str]:
        assert self.metadata is not None
        return self.metadata

    def to_bytes(self) -> bytes:
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()]
        return header(layout, self.metadata) + b"".join(t.data for t in self.tensors.values())


@dataclass(frozen=True)
class Released:
    """A protected file, and a grant that opens it."""

    parts: Parts
    key: LevelKey
    signer: VerifyKey | None

    @property
    def grant(self) -> Grant:
        return Grant(self.key, self.signer)

    def secrets(self) -> Iterator[bytes]:
        yield from (bytes(SECRET), bytes(SIGNING))
        for level in range(1, self.key.level + 1):
            key = self.key.lower(level)
            yield from (bytes(key), key.cipher_key(), key.seal_key())


@dataclass
class World:
    """One owner's files of one kind.

    Attributes:
        kind: whether they are signed.
        plain: the checkpoint.
        model: its protected file.
        again: another protection of the same checkpoint with the same secret.
        other: another checkpoint with the same names, dtypes and shapes.
        rotated: `model` after its rotation.
    """

    kind: str
    plain: Parts
    model: Released
    again: Released
    other: Released
    rotated: Released
    folder: Path = field(default_factory=Path)

    def parts(self) -> Parts:
        return copy.deepcopy(self.model.parts)

    def expected(self, reason: "Expected") -> set[str]:
        """The acceptable reasons for this kind of file."""
        reason = reason[self.kind] if isinstance(reason, dict) else reason
        return {reason} if isinstance(reason, str) else set(reason)


def checkpoint(seed: int) -> Parts:
    rng = np.random.default_rng(seed)

    def tensor(code: str, *shape: int) -> Stored:
        values = rng.standard_normal(shape).astype(SAFETENSORS[code].name)
        return Stored(code, shape, values.tobytes())

    tensors = {
        "a/kernel": tensor("F32", 3, 3, 8, 16),
        "b/kernel": tensor("F32", 3, 3, 8, 16),
        "c/kernel": tensor("F16", 3, 3, 8, 16),
        "d/kernel": tensor("BF16", 3, 3, 8, 16),
        "a/bias": tensor("F32", 16),
        "b/bias": tensor("F32", 16),
        "steps": Stored("I64", (), (7).to_bytes(8, "little")),
        "empty": Stored("F32", (0, 3), b""),
    }
    return Parts(tensors, dict(CALLER))


WITH_DATA = [name for name, tensor in checkpoint(0).tensors.items() if tensor.data]


def released(path: Path, signing: SigningKey | None) -> Released:
    model_id = bytes.fromhex(inspect_file(path).model_id)
    key = level_key(SECRET, model_id, level=LEVELS, levels=LEVELS)
    return Released(Parts.of(path), key, None if signing is None else signing.public)


def protected(folder: Path, plain: Parts, signing: SigningKey | None) -> Path:
    (folder / "plain").write_bytes(plain.to_bytes())
    protect_file(
        folder / "plain",
        folder / "public",
        secret=SECRET,
        levels=[0.2, 0.4, 0.6],
        selection=Select(layout="HWIO", select=".*kernel"),
        signing=signing,
        force=True,
    )
    return folder / "public"


def check_refusal(error: Exception, path: Path, given: Released) -> None:
    """Checks every error: its type, the file's name, a reasonable length, and no secrets."""
    text = str(error)
    assert type(error) in (ValueError, GrantError, IntegrityError), repr(error)
    assert str(path) in text
    assert len(text) < 5000
    for secret in given.secrets():
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form not in text
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def attempts(world: World, given: Released, path: Path) -> dict[str, Callable[[], object]]:
    grant = None if world.kind == "signed" else given.grant
    return {
        "unlock": lambda: unlock_file(path, path.with_name("out"), given.grant),
        "verify": lambda: verify_file(path, signer=given.signer, grant=grant),
    }


def assert_refused(
    world: World, data: bytes, expected: Expected, given: Released | None = None
) -> None:
    """Opens it in every way that reads tensors, for a customer of `World.model` or another."""
    given = given or world.model
    path = world.folder / "tampered.safetensors"
    path.write_bytes(data)
    for attempt in attempts(world, given, path).values():
        with pytest.raises(ValueError, match=path.name) as caught:
            attempt()
        check_refusal(caught.value, path, given)
        assert reason_of(caught.value) in world.expected(expected), caught.value


def peak_memory(action: Callable[[], object]) -> int:
    """The peak of the bytes that Python holds while something runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def children(value: Any) -> list[Any]:
    """Keys of an object, numbers of a list."""
    return list(
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
