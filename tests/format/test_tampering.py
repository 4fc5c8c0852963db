"""Whatever is done to a protected file is harmless, or refused with a reason.

Every case is tried on a signed file, where the signature detects it, and on an unsigned one, where
the seals of the boxes have to: their associated data cover the manifest.
"""

import base64
import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from protected_files import (
    ATTACKER,
    CALLER,
    LEVELS,
    SIGNING,
    WITH_DATA,
    Expected,
    Parts,
    Stored,
    World,
    assert_refused,
    attempts,
    checkpoint,
    children,
    protected,
    released,
    to_json,
)

from selcrypt_jax import GrantError, IntegrityError, unlock_file
from selcrypt_jax._format.envelope import signed_message
from selcrypt_jax._tree.dtypes import SAFETENSORS

NO_SIGNATURE, DIGEST, TABLE, ENTRIES = "signature", "digest", "table", "metadata"
MODEL, BOX = "model", "box"
BY_KIND = {"signed": NO_SIGNATURE, "unsigned": BOX}
"""An altered manifest or box: only a signature tells without a grant."""


def test_the_files_themselves_open(world):
    path = world.folder / "intact"
    for given in (world.model, world.again, world.rotated, world.other):
        path.write_bytes(given.parts.to_bytes())
        for attempt in attempts(world, given, path).values():
            attempt()
        expected = checkpoint(1) if given is world.other else world.plain
        assert Parts.of(path.with_name("out")) == expected
        path.with_name("out").unlink()


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_bit_in_a_tensor(world, name, where):
    parts = world.parts()
    dtype, shape, data = parts.tensors[name]
    bit = {"first": 0, "middle": 4 * len(data), "last": 8 * len(data) - 1}[where]
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    parts.tensors[name] = Stored(dtype, shape, bytes(changed))
    assert_refused(world, parts.to_bytes(), DIGEST)


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


TENSORS: dict[str, tuple[Tampering, Expected]] = {
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


@pytest.mark.parametrize(("tamper", "expected"), TENSORS.values(), ids=TENSORS)
def test_tensors(world, tamper, expected):
    parts = world.parts()
    assert_refused(world, (tamper(world, parts) or parts).to_bytes(), expected)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "length only": lambda data: data[:8],
    "half of the header": lambda data: data[:1000],
    "no data": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "a byte short": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "two of it": lambda data: data + data,
    "a first byte gone": lambda data: data[1:],
    "a byte of data inserted": lambda data: data[:-99] + b"\0" + data[-99:],
}


@pytest.mark.parametrize("change", BYTES.values(), ids=BYTES)
def test_bytes(world, change):
    assert_refused(world, change(world.model.parts.to_bytes()), "file")


# --- metadata entries -----------------------------------------------------------------------------


def entry(key: str, value: str | None) -> Tampering:
    def tamper(_: World, parts: Parts) -> None:
        parts.entries.pop(key, None)
        if value is not None:
            parts.entries[key] = value

    return tamper


def without_ours(_: World, parts: Parts) -> Parts:
    return Parts(parts.tensors, {k: v for k, v in parts.entries.items() if k in CALLER})


def from_file(which: str, pattern: str) -> Tampering:
    """Splices in entries from another file of the same owner."""

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


# The customer of the model looks for the model's id; who only verifies has the digests.
SPLICED = (MODEL, DIGEST)

ENTRY: dict[str, tuple[Tampering, Expected]] = {
    "caller's entry changed": (entry("note", "u"), ENTRIES),
    "caller's entry in another normal form": (entry("note", "u\u0308"), ENTRIES),
    "caller's entry removed": (entry("format", None), ENTRIES),
    "caller's entry added": (entry("more", ""), ENTRIES),
    "caller's entry of a long name added": (entry("x" * 100_000, ""), ENTRIES),
    "caller's key close to ours": (entry("selcrypt-box", ""), ENTRIES),
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
    "manifest removed": (entry("selcrypt", None), "unprotected"),
    "ours removed": (without_ours, "unprotected"),
    "emptied": (lambda _, parts: Parts(parts.tensors, {}), "unprotected"),
    "dropped": (lambda _, parts: Parts(parts.tensors, None), "unprotected"),
    "boxes 1 and 2 swapped": (swap_boxes(1, 2), BY_KIND),
    "boxes 2 and 3 swapped": (swap_boxes(2, 3), BY_KIND),
    "boxes 1 and 3 swapped": (swap_boxes(1, 3), BY_KIND),
    "box 1 of another model": (from_file("other", "selcrypt.box.1"), BY_KIND),
    "box 3 of another model": (from_file("other", "selcrypt.box.3"), BY_KIND),
    "box 2 of another protection": (from_file("again", "selcrypt.box.2"), BY_KIND),
    "boxes of another protection": (from_file("again", "selcrypt.box.*"), BY_KIND),
    "manifest of another model": (
        from_file("other", "selcrypt"), {"signed": NO_SIGNATURE, "unsigned": MODEL},
    ),
    "manifest of another protection": (
        from_file("again", "selcrypt"), {"signed": NO_SIGNATURE, "unsigned": MODEL},
    ),
    "all of another model": (from_file("other", "selcrypt.*"), SPLICED),
    "all of another protection": (from_file("again", "selcrypt.*"), SPLICED),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "expected"), ENTRY.values(), ids=ENTRY)
def test_entries(world, tamper, expected):
    parts = world.parts()
    assert_refused(world, (tamper(world, parts) or parts).to_bytes(), expected)


@pytest.mark.parametrize("which", ["other", "again"])
def test_spliced_for_the_customer_of_the_other_file(world, which):
    """Customers who have a grant for the model that the metadata are from."""
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
    with pytest.raises(GrantError) as caught:
        unlock_file(path, world.folder / "out", world.rotated.grant)
    assert caught.value.reason == MODEL


@pytest.mark.parametrize("without", [None, {}], ids=["absent", "empty"])
def test_entries_added_where_there_were_none(world, without):
    plain = Parts(world.plain.tensors, without)
    signing = SIGNING if world.model.signer else None
    given = released(protected(world.folder, plain, signing), signing)
    (world.folder / "plain").unlink()
    (world.folder / "public").unlink()
    given.parts.entries["note"] = ""
    assert_refused(world, given.parts.to_bytes(), ENTRIES, given)


# --- boxes and signature as text ------------------------------------------------------------------


def other_character(text: str, index: int) -> str:
    """Another base64 character in this place."""
    index %= len(text)
    return text[:index] + ("B" if text[index] == "A" else "A") + text[index + 1 :]


def not_canonical(text: str) -> str:
    """The same bytes to a decoder that ignores the bits after the last byte."""
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
def test_a_box(world, change):
    for level in range(1, LEVELS + 1):
        parts = world.parts()
        key = f"selcrypt.box.{level}"
        parts.entries[key] = change(parts.entries[key])
        assert_refused(world, parts.to_bytes(), BY_KIND)


SIGNATURES: dict[str, Callable[[World, Parts], str]] = {
    **{
        name: lambda _, parts, change=change: change(parts.entries["selcrypt.signature"])
        for name, change in TEXTS.items()
    },
    "of another model": lambda world, _: world.other.parts.entries["selcrypt.signature"],
    "of another protection": lambda world, _: world.again.parts.entries["selcrypt.signature"],
    "of zeros": lambda *_: base64.b64encode(bytes(64)).decode(),
    "by an attacker": lambda _, parts: signature_of(parts),
}


@pytest.fixture
def signed(files, tmp_path) -> World:
    world = files["signed"]
    world.folder = tmp_path
    return world


@pytest.mark.parametrize("make", SIGNATURES.values(), ids=SIGNATURES)
def test_the_signature(signed, make):
    parts = signed.parts()
    parts.entries["selcrypt.signature"] = make(signed, parts)
    assert_refused(signed, parts.to_bytes(), NO_SIGNATURE)


# --- the manifest ---------------------------------------------------------------------------------


def signature_of(parts: Parts) -> str:
    boxes = [parts.entries[f"selcrypt.box.{level}"] for level in range(1, LEVELS + 1)]
    message = signed_message(parts.entries["selcrypt"], boxes)
    return base64.b64encode(ATTACKER.sign(message)).decode()


def test_the_signature_removed_and_the_signer_too(signed):
    """A downgrade: the customer's grant still names the signer."""
    parts = signed.parts()
    manifest = json.loads(parts.entries["selcrypt"])
    parts.entries["selcrypt"] = to_json({**manifest, "signer": None})
    del parts.entries["selcrypt.signature"]
    assert_refused(signed, parts.to_bytes(), "signer")
    # A customer whose grant names nobody is told nothing by the signature, but the boxes do.
    path, out = signed.folder / "tampered.safetensors", signed.folder / "out"
    path.write_bytes(parts.to_bytes())
    with pytest.raises(IntegrityError) as caught:
        unlock_file(path, out, signed.model.key)
    assert caught.value.reason == BOX
    assert not out.exists()


def test_signed_by_another(world):
    """Nothing else is changed: an attacker claims the model as theirs."""
    parts = world.parts()
    manifest = json.loads(parts.entries["selcrypt"])
    parts.entries["selcrypt"] = to_json({**manifest, "signer": ATTACKER.public.hex()})
    parts.entries["selcrypt.signature"] = signature_of(parts)
    assert_refused(world, parts.to_bytes(), {"signed": "signer", "unsigned": BOX})


TWICE = "\0twice"


def variants(value: Any) -> Iterator[Any]:
    """Other values for one in a JSON document; `TWICE` is a key to be renamed."""
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


def edits(value: Any) -> Iterator[Any]:
    """The document with one value changed, for every place and variant."""
    yield from variants(value)
    for key in children(value):
        for changed in edits(value[key]):
            result = copy.copy(value)
            result[key] = changed
            yield result


FIELDS = [
    "format", "model_id", "cipher", "rest", "levels", "metadata", "shard", "signer", "tensors"
]  # fmt: skip
FORMED = {
    "format": ("version",), "metadata": (ENTRIES,), "signer": ("signer", ENTRIES),
    "levels": (ENTRIES,),
}  # fmt: skip
"""What is detected before the signature is checked, apart from malformed values."""


@pytest.mark.parametrize("resigned", [False, True], ids=["", "signed by an attacker"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_the_manifest(world, name, resigned):
    text = world.model.parts.entries["selcrypt"]
    manifest = json.loads(text)
    assert set(manifest) == set(FIELDS)
    assert to_json(manifest) == text
    expected = ["manifest", *FORMED.get(name, ())]
    if world.kind == "signed":
        expected.append("signer" if resigned else NO_SIGNATURE)
    else:
        expected += [BOX, TABLE, MODEL]
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
            assert_refused(world, parts.to_bytes(), tuple(expected))
        except BaseException as error:
            error.add_note(f"{name}: {to_json(changed)}")
            raise
        count += 1
    assert count >= 4 or (resigned and name == "signer")


MALFORMED: dict[str, Callable[[dict[str, Any]], str]] = {
    **{
        f"without {name}": lambda fields, name=name: to_json(
            {k: v for k, v in fields.items() if k != name}
        )
        for name in FIELDS
    },
    **{
        f"{name} twice": (
            lambda fields, name=name: f'{{"{name}":{to_json(fields[name])},{to_json(fields)[1:]}'
        )
        for name in FIELDS
    },
    "with a field": lambda fields: to_json({**fields, "more": None}),
    "a long field": lambda fields: to_json({**fields, "x" * 100_000: 0}),
    "too many levels": lambda fields: to_json({**fields, "levels": [fields["levels"][0]] * 257}),
    "a tensor with a long name": lambda fields: to_json({**fields, "tensors": {"x" * 100_000: 0}}),
    "deep": lambda _: '{"format":' + "[" * 50_000 + "]" * 50_000 + "}",
    "a long number": lambda _: '{"format":' + "1" * 50_000 + "}",
    "not a number": lambda _: '{"format":NaN}',
    "a surrogate": lambda _: '{"format":"\\ud800"}',
    "a list": lambda _: "[]",
    "empty": lambda _: "",
    "a byte order mark": lambda fields: "\ufeff" + to_json(fields),
}
REWRITTEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "a space behind": lambda fields: to_json(fields) + " ",
    "spaces within": lambda fields: json.dumps(fields, ensure_ascii=False),
    "in another order": lambda fields: to_json(dict(reversed(fields.items()))),
    "an escape": lambda fields: to_json(fields).replace("lossless", "lossles\\u0073"),
}
"""The meaning is the same, but signature and seals cover the text."""
TEXT: dict[str, tuple[Callable[[dict[str, Any]], str], Expected]] = {
    **{name: (change, "manifest") for name, change in MALFORMED.items()},
    **{name: (change, BY_KIND) for name, change in REWRITTEN.items()},
    "a later version": (lambda _: to_json({"format": "selcrypt-v2"}), "version"),
    "the most levels": (
        lambda fields: to_json({**fields, "levels": [fields["levels"][0]] * 256}), ENTRIES,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), TEXT.values(), ids=TEXT)
def test_the_text_of_the_manifest(world, change, expected):
    parts = world.parts()
    parts.entries["selcrypt"] = change(json.loads(parts.entries["selcrypt"]))
    assert_refused(world, parts.to_bytes(), expected)


# --- what is no tampering -------------------------------------------------------------------------


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
