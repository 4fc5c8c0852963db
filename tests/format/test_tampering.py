"""Whatever is done to a protected file is harmless or refused with a reason: nothing in between.

Every case is tried on a signed file, where the signature notices, and on one without a signature,
where the seals of the boxes have to: their associated data cover the manifest.
"""

import base64
import copy
import json
import math
import os
import random
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from selcrypt_jax import (
    Grant,
    IntegrityError,
    LevelKey,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    level_key,
    protect_file,
    rotate_file,
    unlock_file,
    verify_file,
)
from selcrypt_jax._ciphers.engine_numpy import rewrite_leaf
from selcrypt_jax._ciphers.lossless import LosslessCipher
from selcrypt_jax._format.envelope import _context, _signed_message
from selcrypt_jax._io.safetensors import SafetensorsFile, header
from selcrypt_jax._tree.dtypes import SAFETENSORS

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(range(32, 64)))
ATTACKER = SigningKey(b"\1" * 32)
LEVELS = 3
CALLER = {"format": "np", "note": "ü"}
KINDS = ["signed", "unsigned"]

NO_SIGNATURE = "the signature does not fit"
DIGEST = "expected SHA-256 "
TABLE = "as the manifest says, got"
ENTRIES = "too much or too little"
CALLERS = "are not those that were protected"
MODEL = r"is model \w{32}, but the grant is for model"
PLAIN = "is not a protected file"


def does_not_open(level: int) -> str:
    return f"box of level {level}: does not open"


def by_kind(signed: str, unsigned: str) -> dict[str, str]:
    return {"signed": signed, "unsigned": unsigned}


# --- files, taken apart and put together ---------------------------------------------------------


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Parts:
    """A safetensors file as an attacker sees it; all of it may be changed."""

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
    """A protected file, and what opens it."""

    parts: Parts
    key: LevelKey
    signer: bytes | None

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

    def words(self, words: str | dict[str, str]) -> str:
        return words if isinstance(words, str) else words[self.kind]


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


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, World]:
    worlds = {}
    with pytest.MonkeyPatch.context() as patch:
        # The same ids and nonces in every run, so that a seed of the fuzzer means something.
        patch.setattr(os, "urandom", random.Random(0).randbytes)
        for kind in KINDS:
            signing = SIGNING if kind == "signed" else None
            folder = tmp_path_factory.mktemp(kind)
            plain = checkpoint(0)
            model, again, other = (
                released(protected(folder, parts, signing), signing)
                for parts in (plain, plain, checkpoint(1))
            )
            (folder / "model").write_bytes(model.parts.to_bytes())
            rotate_file(folder / "model", secret=SECRET, signing=signing)
            rotated = released(folder / "model", signing)
            worlds[kind] = World(kind, plain, model, again, other, rotated)
    return worlds


@pytest.fixture(params=KINDS)
def world(request, files, tmp_path) -> World:
    world = files[request.param]
    world.folder = tmp_path
    return world


# --- how it is refused ---------------------------------------------------------------------------


def check_refusal(error: Exception, path: Path, given: Released) -> None:
    """What holds for every error: its type, the file's name, a bearable length, and no secrets."""
    text = str(error)
    assert type(error) in (ValueError, IntegrityError), repr(error)
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
    world: World, data: bytes, words: str | dict[str, str], given: Released | None = None
) -> None:
    """By all that reads tensors, for the customer of `World.model` or of another file."""
    given = given or world.model
    path = world.folder / "tampered.safetensors"
    path.write_bytes(data)
    for attempt in attempts(world, given, path).values():
        with pytest.raises(ValueError, match=world.words(words)) as caught:
            attempt()
        check_refusal(caught.value, path, given)


def test_the_files_themselves_open(world):
    path = world.folder / "intact"
    for given in (world.model, world.again, world.rotated, world.other):
        path.write_bytes(given.parts.to_bytes())
        for attempt in attempts(world, given, path).values():
            attempt()
        expected = checkpoint(1) if given is world.other else world.plain
        assert Parts.of(path.with_name("out")) == expected
        path.with_name("out").unlink()


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_bit_in_a_tensor(world, name, where):
    parts = world.parts()
    dtype, shape, data = parts.tensors[name]
    bit = {"first": 0, "middle": 4 * len(data), "last": 8 * len(data) - 1}[where]
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    parts.tensors[name] = Stored(dtype, shape, bytes(changed))
    assert_refused(world, parts.to_bytes(), f"tensor '{name}': {DIGEST}")


Tampering = Callable[[World, Parts], Parts | None]
"""Changes the parts, or returns others."""


def swap_data(one: str, two: str) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        a, b = parts.tensors[one], parts.tensors[two]
        parts.tensors |= {one: a._replace(data=b.data), two: b._replace(data=a.data)}

    return tamper


def rename(names: dict[str, str]) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        parts.tensors = {names.get(name, name): t for name, t in parts.tensors.items()}

    return tamper


def retype(name: str, **fields: Any) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        parts.tensors[name] = parts.tensors[name]._replace(**fields)

    return tamper


def drop(name: str) -> Tampering:
    return lambda _, parts: Parts(
        {n: t for n, t in parts.tensors.items() if n != name}, parts.metadata
    )


def add(name: str, like: str) -> Tampering:
    return lambda _, parts: Parts({**parts.tensors, name: parts.tensors[like]}, parts.metadata)


TENSORS: dict[str, tuple[Tampering, str]] = {
    "data of two encrypted tensors swapped": (swap_data("a/kernel", "b/kernel"), DIGEST),
    "data of two plain tensors swapped": (swap_data("a/bias", "b/bias"), DIGEST),
    "names swapped": (rename({"a/kernel": "b/kernel", "b/kernel": "a/kernel"}), DIGEST),
    "names of two dtypes swapped": (
        rename({"c/kernel": "d/kernel", "d/kernel": "c/kernel"}), TABLE
    ),
    "renamed": (rename({"a/kernel": "a/kernel "}), TABLE),
    "renamed in another normal form": (rename({"a/bias": "a/bi\u00e4s"}), TABLE),
    "renamed at length": (rename({"a/bias": "x" * 100_000}), TABLE),
    "a hundred thousand axes": (retype("steps", shape=(1,) * 100_000), TABLE),
    "float to integer": (retype("a/kernel", dtype="I32"), TABLE),
    "half to bfloat16": (retype("c/kernel", dtype="BF16"), TABLE),
    "plain float to integer": (retype("a/bias", dtype="U32"), TABLE),
    "transposed shape": (retype("a/kernel", shape=(3, 3, 16, 8)), TABLE),
    "flat shape": (retype("d/kernel", shape=(1152,)), TABLE),
    "axis added": (retype("a/bias", shape=(1, 16)), TABLE),
    "scalar to vector": (retype("steps", shape=(1,)), TABLE),
    "other empty shape": (retype("empty", shape=(3, 0)), TABLE),
    "other empty dtype": (retype("empty", dtype="F16"), TABLE),
    "emptied": (retype("a/kernel", shape=(0, 3), data=b""), TABLE),
    "encrypted one dropped": (drop("b/kernel"), TABLE),
    "plain one dropped": (drop("steps"), TABLE),
    "empty one dropped": (drop("empty"), TABLE),
    "duplicated": (add("copy", "a/kernel"), TABLE),
    "plain one duplicated": (add("copy", "a/bias"), TABLE),
    "empty one added": (add("", "empty"), TABLE),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "words"), TENSORS.values(), ids=TENSORS)
def test_tensors(world, tamper, words):
    parts = world.parts()
    assert_refused(world, (tamper(world, parts) or parts).to_bytes(), words)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "at least 8 bytes, got 0"),
    "length only": (lambda data: data[:8], "expected .* bytes, as it says, got 0"),
    "half of the header": (lambda data: data[:1000], "as it says, got 992. It is cut off"),
    "no data": (lambda data: data[: 8 + int.from_bytes(data[:8], "little")], "It is cut off"),
    "a byte short": (lambda data: data[:-1], "It is cut off"),
    "a byte more": (lambda data: data + b"\0", "1 bytes behind the last tensor"),
    "two of it": (lambda data: data + data, "behind the last tensor"),
    "a first byte gone": (lambda data: data[1:], "header: expected"),
    "a byte of data inserted": (lambda data: data[:-99] + b"\0" + data[-99:], "1 bytes behind"),
}


@pytest.mark.parametrize(("change", "words"), BYTES.values(), ids=BYTES)
def test_bytes(world, change, words):
    assert_refused(world, change(world.model.parts.to_bytes()), words)


# --- metadata entries ----------------------------------------------------------------------------


def entry(key: str, value: str | None) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        parts.entries.pop(key, None)
        if value is not None:
            parts.entries[key] = value

    return tamper


def without_ours(_: World, parts: Parts) -> Parts:
    return Parts(parts.tensors, {k: v for k, v in parts.entries.items() if k in CALLER})


def from_file(which: str, pattern: str) -> Tampering:
    """Splices in entries of another file of the same owner."""

    def tamper(world: World, parts: Parts) -> None:
        theirs = getattr(world, which).parts.entries
        parts.metadata = {
            key: theirs[key] if re.fullmatch(pattern, key) else value
            for key, value in parts.entries.items()
        }

    return tamper


def swap_boxes(one: int, two: int) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        a, b = f"selcrypt.box.{one}", f"selcrypt.box.{two}"
        parts.entries.update({a: parts.entries[b], b: parts.entries[a]})

    return tamper


def box_words(level: int) -> dict[str, str]:
    return by_kind(NO_SIGNATURE, does_not_open(level))


# The customer of the model looks for the model's id; who only verifies has the digests.
SPLICED = f"{MODEL}|{DIGEST}"

ENTRY: dict[str, tuple[Tampering, str | dict[str, str]]] = {
    "caller's entry changed": (entry("note", "u"), CALLERS),
    "caller's entry in another normal form": (entry("note", "u\u0308"), CALLERS),
    "caller's entry removed": (entry("format", None), CALLERS),
    "caller's entry added": (entry("more", ""), CALLERS),
    "caller's entry of a long name added": (entry("x" * 100_000, ""), CALLERS),
    "caller's key close to ours": (entry("selcrypt-box", ""), CALLERS),
    "unknown entry": (entry("selcrypt.x", "y"), ENTRIES),
    "long unknown entry": (entry("selcrypt." + "x" * 100_000, "y"), ENTRIES),
    "entry without a name": (entry("selcrypt.", ""), ENTRIES),
    "box 0": (entry("selcrypt.box.0", ""), ENTRIES),
    "box 01": (entry("selcrypt.box.01", ""), ENTRIES),
    "box 4": (entry("selcrypt.box.4", ""), ENTRIES),
    "box 2 removed": (entry("selcrypt.box.2", None), ENTRIES),
    "signature removed or added": (
        lambda world, parts: entry(
            "selcrypt.signature", None if world.kind == "signed" else "A" * 86 + "=="
        )(world, parts),
        ENTRIES,
    ),
    "manifest removed": (entry("selcrypt", None), PLAIN),
    "ours removed": (without_ours, PLAIN),
    "emptied": (lambda _, parts: Parts(parts.tensors, {}), PLAIN),
    "dropped": (lambda _, parts: Parts(parts.tensors, None), PLAIN),
    "boxes 1 and 2 swapped": (swap_boxes(1, 2), box_words(1)),
    "boxes 2 and 3 swapped": (swap_boxes(2, 3), box_words(2)),
    "boxes 1 and 3 swapped": (swap_boxes(1, 3), box_words(1)),
    "box 1 of another model": (from_file("other", "selcrypt.box.1"), box_words(1)),
    "box 3 of another model": (from_file("other", "selcrypt.box.3"), box_words(3)),
    "box 2 of another protection": (from_file("again", "selcrypt.box.2"), box_words(2)),
    "boxes of another protection": (from_file("again", "selcrypt.box.*"), box_words(1)),
    "manifest of another model": (
        from_file("other", "selcrypt"), by_kind(NO_SIGNATURE, MODEL),
    ),
    "manifest of another protection": (
        from_file("again", "selcrypt"), by_kind(NO_SIGNATURE, MODEL),
    ),
    "all of another model": (from_file("other", "selcrypt.*"), SPLICED),
    "all of another protection": (from_file("again", "selcrypt.*"), SPLICED),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "words"), ENTRY.values(), ids=ENTRY)
def test_entries(world, tamper, words):
    parts = world.parts()
    assert_refused(world, (tamper(world, parts) or parts).to_bytes(), words)


@pytest.mark.parametrize("which", ["other", "again"])
def test_spliced_for_the_customer_of_the_other_file(world, which):
    """Who has a grant of the model that the metadata are from."""
    parts = world.parts()
    from_file(which, "selcrypt.*")(world, parts)
    assert_refused(world, parts.to_bytes(), DIGEST, given=getattr(world, which))


def test_old_metadata_replayed_after_rotation(world):
    new = copy.deepcopy(world.rotated.parts)
    new.metadata = world.model.parts.metadata
    assert_refused(world, new.to_bytes(), SPLICED, given=world.rotated)
    assert_refused(world, new.to_bytes(), DIGEST)  # with the old grant
    path = world.folder / "tampered.safetensors"
    path.write_bytes(world.model.parts.to_bytes())  # the old file as it was
    with pytest.raises(ValueError, match=MODEL):
        unlock_file(path, world.folder / "out", world.rotated.grant)


@pytest.mark.parametrize("without", [None, {}], ids=["absent", "empty"])
def test_entries_added_where_there_were_none(world, without):
    plain = Parts(world.plain.tensors, without)
    given = released(protected(world.folder, plain, SIGNING if world.model.signer else None),
                     SIGNING if world.model.signer else None)  # fmt: skip
    (world.folder / "plain").unlink()
    (world.folder / "public").unlink()
    given.parts.entries["note"] = ""
    assert_refused(world, given.parts.to_bytes(), CALLERS, given)


# --- boxes and signature as text -----------------------------------------------------------------


def other_character(text: str, index: int) -> str:
    """Another one of the base64 alphabet at this place."""
    index %= len(text)
    return text[:index] + ("B" if text[index] == "A" else "A") + text[index + 1 :]


def not_canonical(text: str) -> str:
    """The same bytes for a decoder that does not look at the bits behind the last byte."""
    body = text.rstrip("=")
    if len(body) == len(text):
        return text + "="
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + text[len(body) :]


TEXTS: dict[str, Callable[[str], str]] = {
    "first character": lambda text: other_character(text, 0),
    "middle character": lambda text: other_character(text, len(text) // 2),
    "last character": lambda text: other_character(text, len(text.rstrip("=")) - 1),
    "cut by three bytes": lambda text: text[:-4],
    "cut by a character": lambda text: text[:-1],
    "shorter than a nonce": lambda text: text[:8],
    "only a nonce": lambda text: text[:16],
    "empty": lambda text: "",
    "longer": lambda text: "AAAA" + text,
    "twice": lambda text: text + text,
    "line break": lambda text: text[:64] + "\n" + text[64:],
    "space behind": lambda text: text + " ",
    "not ASCII": lambda text: text[:-4] + "äöüß",
    "other alphabet": lambda text: "-_-_" + text[4:],
    "bits behind the last byte": not_canonical,
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_a_box(world, level, change):
    parts = world.parts()
    key = f"selcrypt.box.{level}"
    parts.entries[key] = change(parts.entries[key])
    words = f"{does_not_open(level)}|box of level {level}: expected base64"
    assert_refused(world, parts.to_bytes(), by_kind(NO_SIGNATURE, words))


SIGNATURES: dict[str, tuple[Callable[[World, Parts], str], str]] = {
    **{
        name: (
            lambda _, parts, change=change: change(parts.entries["selcrypt.signature"]),
            f"{NO_SIGNATURE}|signature: expected base64",
        )
        for name, change in TEXTS.items()
    },
    "of another model": (
        lambda world, _: world.other.parts.entries["selcrypt.signature"], NO_SIGNATURE,
    ),
    "of another protection": (
        lambda world, _: world.again.parts.entries["selcrypt.signature"], NO_SIGNATURE,
    ),
    "of zeros": (lambda *_: base64.b64encode(bytes(64)).decode(), NO_SIGNATURE),
    "by an attacker": (lambda _, parts: signature_of(parts), NO_SIGNATURE),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), SIGNATURES.values(), ids=SIGNATURES)
def test_the_signature(files, tmp_path, make, words):
    world = files["signed"]
    world.folder = tmp_path
    parts = world.parts()
    parts.entries["selcrypt.signature"] = make(world, parts)
    assert_refused(world, parts.to_bytes(), words)


# --- the manifest --------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def signature_of(parts: Parts) -> str:
    boxes = [parts.entries[f"selcrypt.box.{level}"] for level in range(1, LEVELS + 1)]
    message = _signed_message(parts.entries["selcrypt"], boxes)
    return base64.b64encode(ATTACKER.sign(message)).decode()


def test_the_signature_removed_and_the_signer_too(files, tmp_path):
    """A downgrade: the customer's grant still names the signer."""
    world = files["signed"]
    world.folder = tmp_path
    parts = world.parts()
    manifest = json.loads(parts.entries["selcrypt"])
    parts.entries["selcrypt"] = to_json({**manifest, "signer": None})
    del parts.entries["selcrypt.signature"]
    assert_refused(world, parts.to_bytes(), "expected a file signed by .*, got one without")
    # A customer whose grant names nobody is told nothing by the signature, but the boxes do.
    (tmp_path / "tampered.safetensors").write_bytes(parts.to_bytes())
    with pytest.raises(IntegrityError, match=does_not_open(1)):
        unlock_file(tmp_path / "tampered.safetensors", tmp_path / "out", world.model.key)
    assert not (tmp_path / "out").exists()


def test_signed_by_another(world):
    """Nothing else is changed: an attacker claims the model."""
    parts = world.parts()
    manifest = json.loads(parts.entries["selcrypt"])
    parts.entries["selcrypt"] = to_json({**manifest, "signer": ATTACKER.public.hex()})
    parts.entries["selcrypt.signature"] = signature_of(parts)
    words = f"expected a file signed by {SIGNING.public.hex()}, got .* {ATTACKER.public.hex()}"
    assert_refused(world, parts.to_bytes(), by_kind(words, does_not_open(1)))


TWICE = "\0twice"


def variants(value: Any) -> Iterator[Any]:
    """Other values in the place of one in a JSON document; `TWICE` is a key to be renamed."""
    if isinstance(value, bool):
        yield from (not value, int(value), None)
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value - 1, value + 0.5, str(value), 2**70, 2**63, None)
    elif isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        for digit in (0, len(value) // 2, len(value) - 1):
            other = f"{int(value[digit], 16) ^ 1:x}"
            yield value[:digit] + other + value[digit + 1 :]
        yield from (value.upper(), value[:-1], value[:-2], value + "00", "", " " + value[1:], None)
    elif isinstance(value, str):
        yield from (value + "x", value[:-1], value.swapcase(), "", 7, None)
    elif value is None:
        yield from (0, 1, False, "", "0" * 64, [], [1, 1], [1, 2], {})
    elif isinstance(value, list):
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        yield from (value[::-1], value + value[-1:], [*value, 0], {}, None)
    else:
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield {**value, TWICE + key: value[key]}
            yield {**value, TWICE + key: None}
            yield {(k + "x" if k == key else k): v for k, v in value.items()}
        yield from ({**value, "more": None}, {}, [], None)


def children(value: Any) -> list[Any]:
    """Keys of an object, numbers of a list."""
    return list(
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )


def edits(value: Any) -> Iterator[Any]:
    """The document with one place of it changed, for every place and variant."""
    yield from variants(value)
    for key in children(value):
        for changed in edits(value[key]):
            result = copy.copy(value)
            result[key] = changed
            yield result


FIELDS = ["format", "model_id", "cipher", "levels", "metadata", "shard", "signer", "tensors"]
FORMED = {
    "format": "expected format selcrypt-v1, got",
    "metadata": CALLERS,
    "signer": f"expected a file signed by|{ENTRIES}",
    "levels": ENTRIES,
}
"""What is noticed before the signature is checked, beside what is malformed."""


@pytest.mark.parametrize("resigned", [False, True], ids=["", "signed by an attacker"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_the_manifest(world, name, resigned):
    text = world.model.parts.entries["selcrypt"]
    manifest = json.loads(text)
    assert set(manifest) == set(FIELDS)
    assert to_json(manifest) == text
    words = [rf"manifest: field ['\"]{name}", "manifest: expected UTF-8 JSON, each key once"]
    words += [FORMED[name]] if name in FORMED else []
    if world.kind == "signed":
        words.append("expected a file signed by" if resigned else NO_SIGNATURE)
    else:
        words += [does_not_open(1), TABLE, MODEL]
    count = 0
    for changed in edits(manifest[name]):
        parts = world.parts()
        fields = {**manifest, name: changed}
        if resigned:
            fields["signer"] = ATTACKER.public.hex()
        altered = to_json(fields).replace(json.dumps(TWICE)[:-1], '"')
        if altered == text:
            continue
        parts.entries["selcrypt"] = altered
        if resigned:
            parts.entries["selcrypt.signature"] = signature_of(parts)
        try:
            assert_refused(world, parts.to_bytes(), "|".join(words))
        except BaseException as error:
            error.add_note(f"{name}: {to_json(changed)}")
            raise
        count += 1
    assert count >= 4 or (resigned and name == "signer")


TEXT: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    **{
        f"without {name}": (
            lambda fields, name=name: to_json({k: v for k, v in fields.items() if k != name}),
            "manifest: expected an object with",
        )
        for name in FIELDS
    },
    **{
        f"{name} twice": (
            lambda fields, name=name: f'{{"{name}":{to_json(fields[name])},{to_json(fields)[1:]}',
            f"manifest: expected UTF-8 JSON, each key once, got: '{name}' twice",
        )
        for name in FIELDS
    },
    "with a field": (
        lambda fields: to_json({**fields, "more": None}), "manifest: expected an object with",
    ),
    "a long field": (
        lambda fields: to_json({**fields, "x" * 100_000: 0}), "manifest: expected an object with",
    ),
    "a later version": (
        lambda fields: to_json({"format": "selcrypt-v2"}), "got selcrypt-v2. It was written by",
    ),
    "too many levels": (
        lambda fields: to_json({**fields, "levels": [fields["levels"][0]] * 65537}),
        "'levels': expected a list of 1 to 65536",
    ),
    "the most levels": (
        lambda fields: to_json({**fields, "levels": [fields["levels"][0]] * 65536}), ENTRIES,
    ),
    "a tensor with a long name": (
        lambda fields: to_json({**fields, "tensors": {"x" * 100_000: 0}}), "field .tensors",
    ),
    "deep": (lambda _: '{"format":' + "[" * 50_000 + "]" * 50_000 + "}", "expected UTF-8 JSON"),
    "a long number": (lambda _: '{"format":' + "1" * 50_000 + "}", "expected an object with"),
    "not a number": (lambda _: '{"format":NaN}', "expected UTF-8 JSON"),
    "a surrogate": (lambda _: '{"format":"\\ud800"}', "expected Unicode, got a lone surrogate"),
    "a list": (lambda _: "[]", "expected a JSON object"),
    "empty": (lambda _: "", "expected UTF-8 JSON"),
    "a byte order mark": (lambda fields: "\ufeff" + to_json(fields), "expected UTF-8 JSON"),
    # The meaning stays, but signature and seals are over the text.
    "a space behind": (lambda fields: to_json(fields) + " ", ""),
    "spaces within": (lambda fields: json.dumps(fields, ensure_ascii=False), ""),
    "in another order": (lambda fields: to_json(dict(reversed(fields.items()))), ""),
    "an escape": (lambda fields: to_json(fields).replace("lossless", "lossles\\u0073"), ""),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), TEXT.values(), ids=TEXT)
def test_the_text_of_the_manifest(world, change, words):
    parts = world.parts()
    parts.entries["selcrypt"] = change(json.loads(parts.entries["selcrypt"]))
    assert_refused(world, parts.to_bytes(), words or by_kind(NO_SIGNATURE, does_not_open(1)))


# --- what is no tampering ------------------------------------------------------------------------


def shuffled(items: dict[str, Any]) -> dict[str, Any]:
    return dict(random.Random(1).sample(list(items.items()), len(items)))


def stock_save(parts: Parts) -> bytes:
    assert ml_dtypes.bfloat16  # imported so that NumPy knows the name
    arrays = {
        name: np.frombuffer(t.data, SAFETENSORS[t.dtype].name).reshape(t.shape)
        for name, t in parts.tensors.items()
    }
    return safetensors.numpy.save(arrays, parts.metadata)


def other_header(change: Callable[[dict[str, Any]], str]) -> Callable[[Parts], bytes]:
    """The same data under the same header, written in another way."""

    def save(parts: Parts) -> bytes:
        data = parts.to_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        text = change(json.loads(data[8:start])).encode()
        return len(text).to_bytes(8, "little") + text + data[start:]

    return save


SAVED: dict[str, Callable[[Parts], bytes]] = {
    "stock library": stock_save,
    "tensors in another order": lambda parts: Parts(
        shuffled(parts.tensors), parts.metadata
    ).to_bytes(),
    "entries in another order": lambda parts: Parts(
        parts.tensors, shuffled(parts.entries)
    ).to_bytes(),
    "header keys in another order": other_header(lambda fields: to_json(shuffled(fields))),
    "fields in another order": other_header(
        lambda fields: to_json({k: dict(reversed(v.items())) for k, v in fields.items()})
    ),
    "spaces behind the header": other_header(lambda fields: to_json(fields) + " " * 1001),
    "spaces in the header": other_header(lambda fields: json.dumps(fields, indent=1)),
    "escapes in the header": other_header(lambda fields: json.dumps(fields, ensure_ascii=True)),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_saved_again(world, save):
    path = world.folder / "again.safetensors"
    path.write_bytes(save(world.model.parts))
    for attempt in attempts(world, world.model, path).values():
        attempt()
    assert Parts.of(world.folder / "out") == world.plain


# --- boxes that a customer forged ----------------------------------------------------------------


class Traced(NamedTuple):
    seconds: float
    peak: int


def traced(action: Callable[[], object]) -> Traced:
    """Time and memory of something."""
    tracemalloc.start()
    start = time.process_time()  # others run on this machine too
    try:
        action()
    finally:
        seconds = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Traced(seconds, peak)


def bitmap(mask: np.ndarray) -> bytes:
    return zlib.compress(np.packbits(mask).tobytes(), 9)


def zeros(size: int) -> bytes:
    """A zlib stream of that many zero bytes, without holding them."""
    packer = zlib.compressobj(9)
    chunks = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*chunks, packer.flush()])


SHAPE = (16, 32)
ODD = {
    "w": ("F16", SHAPE),
    "flags": ("BOOL", SHAPE),
    "packed": ("F4", SHAPE),
    "six bits": ("F6_E2M3", SHAPE),
    "complex": ("C64", SHAPE),
    "scale": ("F32", ()),
    "nothing": ("F32", (0, 32)),
    "huge and empty": ("F32", (1 << 40, 0)),
    "large and empty": ("F32", (0, 1 << 31)),
    "overflowing and empty": ("F32", (0, 1 << 62, 1 << 62)),
    "many axes": ("F16", (1,) * 70 + SHAPE),
    "bytes": ("I8", (8, 16)),
}
"""Tensors of the forger's choice."""


def numbers(code: str, shape: tuple[int, ...]) -> Stored:
    size = math.prod(shape) * SAFETENSORS[code].bits // 8
    return Stored(code, shape, np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes())


def ring(name: str = "w", mask: np.ndarray | None = None, **changed: Any) -> dict[str, Any]:
    """An entry of a box's table, and under ``bitmap`` what follows."""
    mask = np.arange(512).reshape(SHAPE) % 2 == 0 if mask is None else mask
    made = {
        "tensor": name,
        "mask_shape": list(mask.shape),
        "groups": int(mask.sum()),
        "bitmap": bitmap(mask),
        "sha256": "0" * 64,
        **changed,
    }
    return {"bytes": len(made["bitmap"]), **made}


def table_of(rings: list[dict[str, Any]]) -> bytes:
    table = [{k: v for k, v in ring.items() if k != "bitmap"} for ring in rings]
    return to_json({"rings": table}).encode()


def content(rings: list[dict[str, Any]], table: bytes | None = None) -> bytes:
    table = table_of(rings) if table is None else table
    bitmaps = b"".join(ring["bitmap"] for ring in rings)
    return len(table).to_bytes(4, "little") + table + bitmaps


@dataclass(frozen=True)
class Forgery:
    """A file by someone who has the key of a level, for the others who have one.

    Attributes:
        boxes: the content of box 1, 2, …
        tensors: names in `ODD`.
        levels: what the manifest says of the levels.
        fine_bits: of the manifest's cipher.
        given: the key, and who is to open it.
    """

    boxes: list[bytes]
    tensors: list[str]
    levels: list[dict[str, int]]
    given: Released
    fine_bits: int | None = None

    def to_bytes(self) -> bytes:
        tensors = {name: numbers(*ODD[name]) for name in self.tensors}
        key = self.given.key
        manifest = {
            "format": "selcrypt-v1",
            "model_id": key.model_id.hex(),
            "cipher": {
                "name": "lossless", "unit": "weight", "permute": True, "fine_bits": self.fine_bits
            },
            "levels": self.levels,
            "metadata": None,
            "shard": None,
            "signer": None,
            "tensors": {
                name: {"dtype": t.dtype, "shape": t.shape, "sha256": sha256(t.data).hexdigest()}
                for name, t in tensors.items()
            },
        }  # fmt: skip
        text = to_json(manifest)
        metadata = {"selcrypt": text}
        for level, plain in enumerate(self.boxes, 1):
            seal = ChaCha20Poly1305(key.lower(level).seal_key())
            sealed = seal.encrypt(bytes(12), plain, _context(text, level))
            metadata[f"selcrypt.box.{level}"] = base64.b64encode(bytes(12) + sealed).decode()
        return Parts(tensors, metadata).to_bytes()


def forged(
    given: Released, rings: list[dict[str, Any]], plain: bytes | None = None, **options: Any
) -> Forgery:
    """With one level, of which the manifest says what the table does, as far as it can be said."""
    groups = weights = 0
    for entry in rings:
        count, inside = entry["groups"], entry["mask_shape"]
        shape = ODD.get(entry["tensor"], ODD["w"])[1]
        if isinstance(count, int) and count > 0 and not isinstance(inside, str):
            groups += count
            weights += int(count * math.prod(shape) // max(math.prod(inside), 1))
    names = sorted({entry["tensor"] for entry in rings} & set(ODD) | {"w"})
    boxes = [content(rings) if plain is None else plain]
    one = Released(given.parts, given.key.lower(1), None)
    return Forgery(boxes, names, [{"groups": groups, "weights": weights}], one, **options)


FIT = "does not fit it"
BITMAP = "expected a bitmap of"
FIELD = "box of level 1: field"
ONE = np.ones((1, 1), bool)

RINGS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unknown tensor": ([ring("none")], FIT),
    "tensor twice": ([ring(), ring()], f"{FIELD} 'tensor': expected each tensor once"),
    "no tensor's name": ([ring(tensor=7)], "expected text"),
    "an axis too few": ([ring(mask_shape=[512])], FIT),
    "an axis too many": ([ring(mask_shape=[16, 32, 1])], FIT),
    "no axes": ([ring(mask_shape=[])], FIT),
    "shape that does not broadcast": ([ring(mask_shape=[16, 31])], FIT),
    "shape larger than the tensor": ([ring(mask_shape=[16, 64])], FIT),
    "huge shape": ([ring(mask_shape=[1 << 62, 1 << 62])], FIT),
    "huge numbers": ([ring(mask_shape=[10**30, 10**400])], "expected numbers"),
    "shape of zeros": ([ring(mask_shape=[0, 0])], FIT),
    "negative shape": ([ring(mask_shape=[-16, -32])], "expected numbers"),
    "fractional shape": ([ring(mask_shape=[16.0, 32])], "expected numbers"),
    "truth as a shape": ([ring(mask_shape=[True, True])], "expected numbers"),
    "text as a shape": ([ring(mask_shape="ab")], "expected numbers"),
    "a group too many": ([ring(groups=257)], BITMAP),
    "a group too few": ([ring(groups=255)], BITMAP),
    "more groups than the mask": ([ring(groups=513)], FIT),
    "no groups": ([ring(groups=0)], FIT),
    "empty mask": ([ring(mask=np.zeros(SHAPE, bool))], FIT),
    "negative groups": ([ring(groups=-1)], "expected numbers"),
    "huge number of groups": ([ring(groups=10**18)], FIT),
    "text as groups": ([ring(groups="1")], "expected numbers"),
    "negative bytes": ([ring(bytes=-1)], "expected numbers"),
    "bytes beyond the end": ([ring(bytes=10**6)], "bitmaps up to the end"),
    "huge number of bytes": ([ring(bytes=10**19)], "bitmaps up to the end"),
    "bytes too few": ([ring(bytes=3)], "bitmaps up to the end"),
    "bytes of two shifted": (
        [ring(bytes=2), ring("bytes", ONE, bytes=len(ring()["bitmap"]) + 7)], BITMAP
    ),
    "no digest": ([ring(sha256="")], "expected 64 digits"),
    "digest of other weights": ([ring()], "was decrypted to other weights than were encrypted"),
    "unknown field": ([ring(more=1)], "expected an object with"),
    "long unknown field": ([ring(**{"x" * 100_000: 1})], "expected an object with"),
    "long name": ([ring("x" * 100_000)], FIT),
    "no zlib": ([ring(bitmap=b"\xff" * 64)], BITMAP),
    "empty bitmap": ([ring(bitmap=b"")], BITMAP),
    "bitmap too short": ([ring(bitmap=zlib.compress(bytes(63)))], BITMAP),
    "bitmap too long": ([ring(bitmap=zlib.compress(b"\xff" * 32 + bytes(33)))], BITMAP),
    "bitmap cut off": ([ring(bitmap=ring()["bitmap"][:-2])], BITMAP),
    "something behind the bitmap": ([ring(bitmap=ring()["bitmap"] + b"\0")], BITMAP),
    "dictionary": ([ring(bitmap=b"\x78\xbb" + ring()["bitmap"])], BITMAP),
    "bits behind the last": (
        [ring("scale", np.ones((), bool), bitmap=zlib.compress(b"\xff"))], BITMAP
    ),
    "zlib bomb": ([ring(bitmap=zeros(1 << 28))], BITMAP),
    "zlib bomb in a huge mask": (
        [ring("huge and empty", mask_shape=[1 << 40, 1], bitmap=zeros(1 << 28))], FIT
    ),
    "mask over nothing": ([ring("nothing", np.ones((1, 32), bool))], FIT),
    "mask over nothing, of zeros": ([ring("nothing", mask_shape=[0, 32])], FIT),
    "huge group of nothing": ([ring("huge and empty", ONE)], FIT),
    "large group of nothing": ([ring("large and empty", ONE)], FIT),
    "overflowing group of nothing": (
        [ring("overflowing and empty", np.ones((1, 1, 1), bool))], FIT
    ),
    "booleans": ([ring("flags")], "flags.*no cipher"),
    "packed codes": ([ring("packed")], "packed.*8 bits or more"),
    "codes of six bits": ([ring("six bits")], "six bits.*8 bits or more"),
    "complex numbers": ([ring("complex")], "complex.*no cipher"),
    "too many axes": ([ring("many axes", np.ones((1,) * 60, bool), mask_shape=[1] * 72)], FIT),
    "one group of all": ([ring(mask=ONE)], "was decrypted to other weights"),
}  # fmt: skip

TABLES: dict[str, tuple[bytes, str]] = {
    "empty box": (b"", f"{FIELD} 'table'"),
    "three bytes": (bytes(3), f"{FIELD} 'table'"),
    "length beyond the end": ((1 << 31).to_bytes(4, "little") + table_of([ring()]), FIELD),
    "largest length": (b"\xff" * 4 + table_of([ring()]), f"{FIELD} 'table'"),
    "length of zero": (bytes(4), "expected UTF-8 JSON"),
    "not JSON": (content([], b"{rings"), "expected UTF-8 JSON"),
    "not UTF-8": (content([], b'{"rings": "\xff"}'), "expected UTF-8 JSON"),
    "a surrogate": (content([], b'{"rings": "\\ud800"}'), "lone surrogate"),
    "not a number": (content([], b'{"rings": [NaN]}'), "expected UTF-8 JSON"),
    "deep": (content([], b'{"rings":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "UTF-8 JSON"),
    "a list": (content([], b"[]"), "expected a JSON object"),
    "no rings": (content([], b"{}"), "expected an object with"),
    "rings no list": (content([], b'{"rings":{}}'), "expected a list"),
    "ring no object": (content([], b'{"rings":[1]}'), "expected an object with"),
    "rings twice": (content([], b'{"rings":[],"rings":[]}'), "each key once"),
    "key twice in a ring": (
        content([ring()], table_of([ring()]).replace(b"{", b'{"groups":1,', 2)), "each key once"
    ),
    "something behind": (content([ring()]) + b"\0", "bitmaps up to the end"),
    "rings left out": (content([], table_of([])), "box of level 1: expected LevelSize"),
}  # fmt: skip


def assert_forgery_refused(forgery: Forgery, words: str, folder: Path) -> None:
    path = folder / "forged.safetensors"
    path.write_bytes(forgery.to_bytes())
    grant = forgery.given.grant

    def attempt() -> None:
        with pytest.raises(ValueError, match=words) as caught:
            unlock_file(path, folder / "out", grant)
        check_refusal(caught.value, path, forgery.given)

    cost = traced(attempt)
    assert cost.seconds < 1
    assert cost.peak < 2 * path.stat().st_size + (1 << 20)
    with pytest.raises(ValueError, match=words):
        verify_file(path, grant=grant)


@pytest.mark.parametrize(("rings", "words"), RINGS.values(), ids=RINGS)
def test_a_forged_ring(files, tmp_path, rings, words):
    assert_forgery_refused(forged(files["unsigned"].model, rings), words, tmp_path)


@pytest.mark.parametrize(("plain", "words"), TABLES.values(), ids=TABLES)
def test_a_forged_box(files, tmp_path, plain, words):
    assert_forgery_refused(forged(files["unsigned"].model, [ring()], plain), words, tmp_path)


@pytest.mark.parametrize("bits", [11, 17, 10**18])
def test_more_fine_bits_than_there_are(files, tmp_path, bits):
    forgery = forged(files["unsigned"].model, [ring()], fine_bits=bits)
    assert_forgery_refused(forgery, "fine_bits.* at most 10", tmp_path)


def forged_digests(given: Released, masks: list[np.ndarray]) -> Forgery:
    """Rings whose digests fit whatever the boxes decrypt, as only who has the keys can make."""
    stored = numbers(*ODD["w"])
    bits = np.frombuffer(bytearray(stored.data), "<u2")
    key, cipher = given.key.lower(len(masks)), LosslessCipher()
    boxes, levels = [], []
    for level, mask in enumerate(masks, 1):
        (plain,) = rewrite_leaf(
            bits,
            SHAPE,
            [(mask, key.lower(level).cipher_key())],
            "w",
            cipher=cipher,
            fine=cipher.fine_mask(SAFETENSORS["F16"]),
            inverse=True,
        )
        digest = sha256(b"selcrypt/v1/ring\0" + np.ascontiguousarray(plain).tobytes())
        boxes.append(content([ring(mask=mask, sha256=digest.hexdigest())]))
        groups = int(mask.sum())
        levels.append({"groups": groups, "weights": groups * 512 // mask.size})
    return Forgery(boxes, ["w"], levels, Released(given.parts, key, None))


HALF = np.arange(512).reshape(SHAPE) < 256


def test_forgeries_reach_the_end(files, tmp_path):
    """As a control: without a fault a forged box opens, which FORMAT.md says."""
    (tmp_path / "f").write_bytes(forged_digests(files["unsigned"].model, [HALF, ~HALF]).to_bytes())
    unlock_file(tmp_path / "f", tmp_path / "out", files["unsigned"].model.key.lower(2))
    assert Parts.of(tmp_path / "out").tensors["w"].data != numbers(*ODD["w"]).data


@pytest.mark.parametrize(
    "second",
    [HALF, np.arange(512).reshape(SHAPE) >= 255, np.arange(16).reshape(16, 1) >= 7],
    ids=["the same", "by a weight", "of another shape"],
)
def test_rings_that_overlap(files, tmp_path, second):
    forgery = forged_digests(files["unsigned"].model, [HALF, second])
    assert_forgery_refused(forgery, "tensor 'w'.*overlap", tmp_path)


def test_a_signed_file_does_not_care_who_can_forge_boxes(files, tmp_path):
    """Box 1 by its customer, well-formed, in the place of the owner's."""
    world = files["signed"]
    parts, key = world.parts(), world.model.key.lower(1)
    sealed = base64.b64decode(parts.entries["selcrypt.box.1"])
    seal, data = ChaCha20Poly1305(key.seal_key()), _context(parts.entries["selcrypt"], 1)
    plain = seal.decrypt(sealed[:12], sealed[12:], data)
    again = base64.b64encode(bytes(12) + seal.encrypt(bytes(12), plain, data)).decode()
    parts.entries["selcrypt.box.1"] = again
    world.folder = tmp_path
    assert_refused(world, parts.to_bytes(), NO_SIGNATURE)


# --- anything at all -----------------------------------------------------------------------------

Mutation = Callable[[random.Random, bytes], bytes]


def place(rng: random.Random, data: bytes) -> int:
    """As often in the header as in the data, which are longer."""
    end = min(8 + int.from_bytes(data[:8], "little"), len(data))
    return rng.randrange(end if rng.random() < 0.5 else len(data))


def piece(rng: random.Random, data: bytes) -> slice:
    start = place(rng, data)
    return slice(start, min(start + rng.choice([1, 2, 8, 64, 1000]), len(data)))


def flip(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def set_byte(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.choice([b"\0", b"\xff", b" ", b'"', b"0", b"}"]) + data[at + 1 :]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 8, 64])) + data[at:]


def delete(rng: random.Random, data: bytes) -> bytes:
    part = piece(rng, data)
    return data[: part.start] + data[part.stop :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    part, at = piece(rng, data), place(rng, data)
    return data[:at] + data[part] + data[at:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    part, at = piece(rng, data), place(rng, data)
    return data[:at] + data[part] + data[at + part.stop - part.start :]


def swap(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([1, 4, 64, 1000])
    one, two = sorted(place(rng, data) // size * size for _ in range(2))
    changed = bytearray(data)
    a, b = changed[one : one + size], changed[two : two + size]
    changed[two : two + size], changed[one : one + size] = a, b
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: place(rng, data)]


def in_header(change: Callable[[random.Random, str], str]) -> Mutation:
    """Changes the text of the header, and its length with it; nothing where there is none."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        try:
            text = change(rng, data[8:end].decode()).encode()
        except (ValueError, IndexError, TypeError):
            return data
        return len(text).to_bytes(8, "little") + text + data[end:]

    return mutate


def tokens(rng: random.Random, text: str) -> str:
    """Puts one token in the place of another, or between others."""
    found = re.findall(r"[\w./+=-]+|\W", text)
    at = rng.randrange(len(found))
    found[at : at + rng.randrange(2)] = [rng.choice(found)]
    return "".join(found)


def space(rng: random.Random, text: str) -> str:
    at = rng.choice([match.end() for match in re.finditer(r"[{},:\]]", text)])
    return text[:at] + rng.choice([" ", "\n", "\t", "  "]) + text[at:]


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: what holds it, and its key."""
    for key in children(value):
        yield value, key
        yield from spots(value[key])


def edit_json(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """Another order, or another value somewhere, mostly one from elsewhere in the document."""
    found = list(spots(value))
    (one, a), (two, b) = rng.choice(found), rng.choice(found)
    match rng.randrange(5):
        case 0:
            value = dict(rng.sample(list(value.items()), len(value)))
        case 1:
            one[a], two[b] = copy.deepcopy(two[b]), copy.deepcopy(one[a])
        case 2:
            one[a] = copy.deepcopy(two[b])
        case 3:
            del one[a]
        case _:
            one[a] = rng.choice([None, 0, -1, 2**63, 2**64, 1.5, "", "x", True, [], {}])
    return value


def header_json(rng: random.Random, text: str) -> str:
    return to_json(edit_json(rng, json.loads(text)))


def manifest_json(rng: random.Random, text: str) -> str:
    fields = json.loads(text)
    manifest = json.loads(fields["__metadata__"]["selcrypt"])
    fields["__metadata__"]["selcrypt"] = to_json(edit_json(rng, manifest))
    return to_json(fields)


MUTATIONS: list[Mutation] = [
    flip, set_byte, insert, delete, repeat, overwrite, swap, truncate,
    *map(in_header, [tokens, space, header_json, manifest_json]),
]  # fmt: skip


class Figures(NamedTuple):
    """Of many mutations: how many, how many were harmless, and the worst of seconds and bytes."""

    runs: int
    opened: int
    slowest: float
    peak: int


def fuzz(world: World, seeds: range, *, measure_every: int) -> Figures:
    """Tries mutations on customers of the top level and of the lowest, in turn."""
    path, out = world.folder / "mutated.safetensors", world.folder / "out"
    original = world.model.parts.to_bytes()
    path.write_bytes(original)
    right = {}
    for level in (1, LEVELS):
        unlock_file(path, out, Grant(world.model.key.lower(level), world.model.signer), force=True)
        right[level] = Parts.of(out)
    out.unlink()
    assert right[1] != right[LEVELS] == world.plain
    runs, opened, slowest, peak = 0, 0, 0.0, 0

    def attempt() -> bool:
        try:
            unlock_file(path, out, grant)
        except (ValueError, OSError) as error:
            check_refusal(error, path, world.model)
            return False
        return True

    for seed in seeds:
        rng = random.Random(seed)
        level = LEVELS if seed % 3 else 1
        grant = Grant(world.model.key.lower(level), world.model.signer)
        data = original
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = rng.choice(MUTATIONS)(rng, data) or data
        if data == original:
            continue
        runs += 1
        path.write_bytes(data)
        try:
            start = time.process_time()
            if attempt():
                opened += 1
                assert Parts.of(out) == right[level]
                out.unlink()
            slowest = max(slowest, time.process_time() - start)
            if seed % measure_every == 0:
                peak = max(peak, traced(attempt).peak - 2 * len(data))
                out.unlink(missing_ok=True)
        except BaseException as error:
            error.add_note(f"{world.kind}, mutation {seed}; the file is {path}")
            raise
    return Figures(runs, opened, slowest, peak)


def test_random_mutations(world):
    figures = fuzz(world, range(320), measure_every=10)
    assert figures.runs >= 300
    assert 0 < figures.opened < figures.runs / 2  # there are harmless ones among them
    assert figures.peak < 1 << 20  # beyond twice the file


@pytest.mark.slow
def test_ten_thousand_random_mutations(world):
    figures = fuzz(world, range(1_000, 6_300), measure_every=50)
    print(figures)
    assert figures.runs >= 5_000  # of each kind
    assert figures.slowest < 1
    assert figures.peak < 1 << 20
