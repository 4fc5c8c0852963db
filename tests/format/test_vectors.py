"""The files in vectors/protected, read by us and by a reader written from FORMAT.md alone."""

import base64
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from protected_files import reason_of

from selcrypt_jax import LevelKey, Secret, level_key, unlock_file

FOLDER = Path(__file__).parent.parent / "vectors" / "protected"
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
GOOD = {vector["file"]: vector for vector in VECTORS["good"]}
FAILURES = json.loads((FOLDER.parent / "failures.json").read_text())
TOP = len(VECTORS["good"][0]["levels"])


# --- an independent reader: nothing of the package, everything from FORMAT.md --------------------

NUMBERS = {  # dtype → NumPy's unsigned one, mantissa or None for an integer
    "F64": ("<u8", 52),
    "F32": ("<u4", 23),
    "C64": ("<u4", 23),  # two of them
    "F16": ("<u2", 10),
    "I8": ("<u1", None),
}


def hkdf(key: bytes, info: bytes, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(key)


def stream(key: bytes, domain: bytes, counter: int, size: int) -> bytes:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def fold(key: bytes, number: int) -> bytes:
    return stream(key, b"fold_in", number, 32)


def read_protected(path: Path, level_key: bytes, level: int) -> dict[str, bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = head.pop("__metadata__")
    text = metadata["selcrypt"].encode()
    manifest = json.loads(text)
    count = len(manifest["levels"])
    boxes = [metadata[f"selcrypt.box.{m}"] for m in range(1, count + 1)]
    if manifest["signer"] is not None:
        message = b"selcrypt/v1/signature\0" + hashlib.sha256(text).digest()
        message += b"".join(hashlib.sha256(box.encode()).digest() for box in boxes)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(manifest["signer"])).verify(
            base64.b64decode(metadata["selcrypt.signature"]), message
        )
    tensors = {name: bytearray(data[slice(*e["data_offsets"])]) for name, e in head.items()}
    assert tensors.keys() == manifest["tensors"].keys()
    for name, content in tensors.items():
        chunks = [content[i : i + 2**22] for i in range(0, len(content), 2**22)]
        found = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
        assert found == manifest["tensors"][name]["sha256"]
    if manifest["rest"] == "sealed" and level:
        first = level_key
        for _ in range(level - 1):
            first = hkdf(first, b"selcrypt/v1/down")
        for name, content in tensors.items():
            window = manifest["tensors"][name]["window"]
            unseal(content, name, head[name]["dtype"], window, hkdf(first, b"selcrypt/v1/cipher"))
    for m in range(level, 0, -1):
        box = base64.b64decode(boxes[m - 1])
        context = b"selcrypt/v1/box\0" + m.to_bytes(4, "little") + hashlib.sha256(text).digest()
        seal = ChaCha20Poly1305(hkdf(level_key, b"selcrypt/v1/seal"))
        content = seal.decrypt(box[:12], box[12:], context)
        end = 4 + int.from_bytes(content[:4], "little")
        for ring in json.loads(content[4:end])["rings"]:
            raw = zlib.decompress(content[end : end + ring["bytes"]])
            end += ring["bytes"]
            decrypt_ring(
                tensors[ring["tensor"]],
                head[ring["tensor"]],
                ring,
                raw,
                hkdf(level_key, b"selcrypt/v1/cipher"),
                manifest["cipher"],
            )
        level_key = hkdf(level_key, b"selcrypt/v1/down")
    return {name: bytes(content) for name, content in tensors.items()}


def leaf_key(key: bytes, name: str) -> bytes:
    digest = hashlib.sha256(b"selcrypt/v1/leaf\0" + name.encode()).digest()
    for word in range(8):
        key = fold(key, int.from_bytes(digest[4 * word : 4 * word + 4], "little"))
    return key


def unseal(content, name, dtype, window, key):
    kind, mantissa = NUMBERS.get(dtype, ("<u1", None))
    width = np.dtype(kind).itemsize
    offset, mask = 0, 256**width - 1
    if dtype == "BOOL":
        mask = 1
    elif window is not None:
        lowest, exponents, sign = window
        offset = lowest << mantissa
        mask = (1 << (mantissa + exponents)) - 1 | sign << (8 * width - 1)
    drawn = stream(fold(leaf_key(key, name), 2), b"random_bits", 0, len(content))
    for at in range(0, len(content), width):
        word = int.from_bytes(content[at : at + width], "little")
        r = int.from_bytes(drawn[at : at + width], "little")
        word = (((word - offset) ^ (r & mask)) + offset) % 256**width
        content[at : at + width] = word.to_bytes(width, "little")


def decrypt_ring(content, entry, ring, raw, key, cipher):
    shape, mask_shape = entry["shape"], ring["mask_shape"]
    if ring["coding"] == "bitmap":
        bits = "".join(f"{byte:08b}" for byte in raw)
    else:
        bits = "".join("0" * 255 if byte == 255 else "0" * byte + "1" for byte in raw)
        bits += "0" * (math.prod(mask_shape) - len(bits))
    group_of = np.arange(math.prod(mask_shape)).reshape(mask_shape)
    group_of = np.broadcast_to(group_of, shape).ravel()
    members: dict[int, list[int]] = {g: [] for g in range(group_of.max() + 1) if bits[g] == "1"}
    for position, group in enumerate(group_of):
        if group in members:
            members[group].append(position)
    if cipher["unit"] == "group":
        units = list(members.values())
    else:
        units = [[position] for position in sorted(p for group in members.values() for p in group)]
    kind, mantissa = NUMBERS[entry["dtype"]]
    numbers = np.frombuffer(content, kind)
    width = numbers.dtype.itemsize

    key = leaf_key(key, ring["tensor"])
    if cipher["permute"]:
        fine = 2 ** (mantissa - 3) - 1 if mantissa else 0
    else:
        fine = 2 ** (8 * width) - 1 if mantissa is None else 2 ** (8 * width - 1) + 2**mantissa - 1
    order = list(range(len(units)))
    blocks = -(-len(units) // 4096)
    for r in range(blocks if cipher["permute"] else 0):
        block = list(range(r, len(units), blocks))
        words = stream(fold(key, 0), b"random_bits", 256 * r, 16384)
        rank = [int.from_bytes(words[4 * j : 4 * j + 4], "little") >> 12 for j in range(4096)]
        for place, j in enumerate(sorted(range(len(block)), key=lambda j: rank[j])):
            order[block[place]] = block[j]

    plain = np.empty((len(units), len(units[0])), numbers.dtype)
    for i, unit in enumerate(units):
        for w, position in enumerate(unit):
            number = i * len(unit) + w
            words = stream(fold(key, 1), b"random_bits", number * width // 64, 64)
            at = number * width % 64
            k = int.from_bytes(words[at : at + width], "little")
            plain[order[i], w] = int(numbers[position]) ^ (k & fine)
    for unit, values in zip(units, plain, strict=True):
        numbers[unit] = values
    digest = hashlib.sha256(b"selcrypt/v1/ring\0" + plain.tobytes()).hexdigest()
    assert digest == ring["sha256"]


def digests(tensors: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, TOP])
@pytest.mark.parametrize("name", GOOD)
def test_the_format_page_says_all_that_a_reader_needs(name, level):
    expected = GOOD[name]["levels"][level - 1]
    found = read_protected(FOLDER / name, bytes.fromhex(expected["key"]), level)
    assert digests(found) == expected["tensors"]


# --- our reader ---------------------------------------------------------------------------------


def unlock(name: str, key: LevelKey, out: Path) -> dict[str, str]:
    unlock_file(FOLDER / name, out, key)
    raw = out.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    metadata = head.pop("__metadata__")
    if key.level < TOP:
        said = json.loads(metadata.pop("selcrypt-unlocked"))
        assert said == {"model_id": key.model_id.hex(), "level": key.level, "levels": TOP}
    assert metadata == VECTORS["metadata"]
    return digests({n: raw[8 + size :][slice(*e["data_offsets"])] for n, e in head.items()})


def top_key(vector: dict) -> LevelKey:
    key = bytes.fromhex(vector["levels"][-1]["key"])
    return LevelKey(key, level=TOP, model_id=bytes.fromhex(vector["model_id"]))


@pytest.mark.parametrize("name", GOOD)
def test_good_files_open_at_every_level(name, tmp_path):
    model_id = bytes.fromhex(GOOD[name]["model_id"])
    secret = Secret(bytes.fromhex(VECTORS["secret"]))
    for level, expected in enumerate(GOOD[name]["levels"], 1):
        key = level_key(secret, model_id, level=level, levels=TOP)
        assert bytes(key).hex() == expected["key"]
        assert unlock(name, key, tmp_path / f"{level}") == expected["tensors"]
    assert (tmp_path / f"{TOP}").read_bytes() == (FOLDER / "original.safetensors").read_bytes()


def test_every_bad_file_has_a_reason():
    assert FAILURES.keys() == {vector["file"] for vector in VECTORS["bad"]}


@pytest.mark.parametrize(("name", "reason"), FAILURES.items(), ids=FAILURES)
def test_bad_files_are_refused(name, reason, tmp_path):
    with pytest.raises(ValueError, match=name) as caught:
        unlock_file(FOLDER / name, tmp_path / "out", top_key(GOOD["weight.safetensors"]))
    assert reason_of(caught.value) == reason
    assert not list(tmp_path.iterdir())
