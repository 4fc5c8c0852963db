"""Boxes forged by a customer who has the keys of some levels: their contents are checked too."""

import base64
import math
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from protected_files import (
    SECRET,
    Parts,
    Released,
    Stored,
    World,
    assert_refused,
    check_refusal,
    peak_memory,
    reason_of,
    to_json,
)

from selcrypt_jax import IntegrityError, level_key, unlock_file, verify_file
from selcrypt_jax._ciphers.engine_numpy import leaf_key, rewrite_ring
from selcrypt_jax._ciphers.lossless import LosslessCipher
from selcrypt_jax._format.boxes import box_context
from selcrypt_jax._tree.dtypes import SAFETENSORS
from selcrypt_jax._tree.groups import unit_places


def bitmap(mask: np.ndarray) -> bytes:
    return zlib.compress(np.packbits(mask).tobytes(), 9)


def zeros(size: int) -> bytes:
    """A zlib stream of that many zero bytes, without holding them in memory."""
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
"""Tensors chosen by the forger."""


def numbers(code: str, shape: tuple[int, ...]) -> Stored:
    size = math.prod(shape) * SAFETENSORS[code].bits // 8
    return Stored(code, shape, np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes())


def ring(name: str = "w", mask: np.ndarray | None = None, **changed: Any) -> dict[str, Any]:
    """An entry of a box's table, and under ``bitmap`` the data after it."""
    mask = np.arange(512).reshape(SHAPE) % 2 == 0 if mask is None else mask
    made = {
        "tensor": name,
        "mask_shape": list(mask.shape),
        "groups": int(mask.sum()),
        "coding": "bitmap",
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
    """A file forged by someone who has a level's key, for other key holders.

    Attributes:
        boxes: the content of box 1, 2, …
        tensors: names in `ODD`.
        levels: what the manifest says about the levels.
        fine_bits: the fine bits of the manifest's cipher.
        given: the forger's key, and the files of the model.
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
            "rest": "plain",
            "levels": self.levels,
            "metadata": None,
            "shard": None,
            "signer": None,
            "tensors": {
                name: {
                    "dtype": t.dtype,
                    "shape": t.shape,
                    "sha256": [sha256(t.data).hexdigest()] if t.data else [],
                    "window": None,
                }
                for name, t in tensors.items()
            },
        }  # fmt: skip
        text = to_json(manifest)
        metadata = {"selcrypt": text}
        for level, plain in enumerate(self.boxes, 1):
            seal = ChaCha20Poly1305(key.lower(level).seal_key())
            sealed = seal.encrypt(bytes(12), plain, box_context(text, level))
            metadata[f"selcrypt.box.{level}"] = base64.b64encode(bytes(12) + sealed).decode()
        return Parts(tensors, metadata).to_bytes()


def forged(
    given: Released, rings: list[dict[str, Any]], plain: bytes | None = None, **options: Any
) -> Forgery:
    """A forgery with one level, whose manifest agrees with the table as far as it can."""
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


ONE = np.ones((1, 1), bool)

RINGS: dict[str, list[dict[str, Any]]] = {
    "unknown tensor": [ring("none")],
    "tensor twice": [ring(), ring()],
    "no tensor's name": [ring(tensor=7)],
    "an axis too few": [ring(mask_shape=[512])],
    "an axis too many": [ring(mask_shape=[16, 32, 1])],
    "no axes": [ring(mask_shape=[])],
    "shape that does not broadcast": [ring(mask_shape=[16, 31])],
    "shape larger than the tensor": [ring(mask_shape=[16, 64])],
    "huge shape": [ring(mask_shape=[1 << 62, 1 << 62])],
    "huge numbers": [ring(mask_shape=[10**30, 10**400])],
    "shape of zeros": [ring(mask_shape=[0, 0])],
    "negative shape": [ring(mask_shape=[-16, -32])],
    "fractional shape": [ring(mask_shape=[16.0, 32])],
    "truth as a shape": [ring(mask_shape=[True, True])],
    "text as a shape": [ring(mask_shape="ab")],
    "a group too many": [ring(groups=257)],
    "a group too few": [ring(groups=255)],
    "more groups than the mask": [ring(groups=513)],
    "no groups": [ring(groups=0)],
    "empty mask": [ring(mask=np.zeros(SHAPE, bool))],
    "negative groups": [ring(groups=-1)],
    "huge number of groups": [ring(groups=10**18)],
    "text as groups": [ring(groups="1")],
    "negative bytes": [ring(bytes=-1)],
    "bytes beyond the end": [ring(bytes=10**6)],
    "huge number of bytes": [ring(bytes=10**19)],
    "bytes too few": [ring(bytes=3)],
    "bytes of two shifted": [ring(bytes=2), ring("bytes", ONE, bytes=len(ring()["bitmap"]) + 7)],
    "no digest": [ring(sha256="")],
    "digest of other weights": [ring()],
    "unknown field": [ring(more=1)],
    "long unknown field": [ring(**{"x" * 100_000: 1})],
    "long name": [ring("x" * 100_000)],
    "unknown coding": [ring(coding="list")],
    "gaps beyond the end": [ring(coding="gaps", bitmap=zlib.compress(b"\1" * 255 + b"\3"))],
    "gaps that end in an escape": [
        ring(coding="gaps", bitmap=zlib.compress(b"\0" * 256 + b"\xff"))
    ],
    "gaps of nothing": [ring(coding="gaps", bitmap=zlib.compress(b""))],
    "a bomb of gaps": [ring(coding="gaps", bitmap=zeros(1 << 28))],
    "an empty bitmap for a few": [ring(mask=np.arange(512).reshape(SHAPE) % 64 == 0)],
    "no zlib": [ring(bitmap=b"\xff" * 64)],
    "empty bitmap": [ring(bitmap=b"")],
    "bitmap too short": [ring(bitmap=zlib.compress(bytes(63)))],
    "bitmap too long": [ring(bitmap=zlib.compress(b"\xff" * 32 + bytes(33)))],
    "bitmap cut off": [ring(bitmap=ring()["bitmap"][:-2])],
    "something behind the bitmap": [ring(bitmap=ring()["bitmap"] + b"\0")],
    "dictionary": [ring(bitmap=b"\x78\xbb" + ring()["bitmap"])],
    "bits behind the last": [ring("scale", np.ones((), bool), bitmap=zlib.compress(b"\xff"))],
    "zlib bomb": [ring(bitmap=zeros(1 << 28))],
    "zlib bomb in a huge mask": [
        ring("huge and empty", mask_shape=[1 << 40, 1], bitmap=zeros(1 << 28))
    ],
    "mask over nothing": [ring("nothing", np.ones((1, 32), bool))],
    "mask over nothing, of zeros": [ring("nothing", mask_shape=[0, 32])],
    "huge group of nothing": [ring("huge and empty", ONE)],
    "large group of nothing": [ring("large and empty", ONE)],
    "overflowing group of nothing": [ring("overflowing and empty", np.ones((1, 1, 1), bool))],
    "booleans": [ring("flags")],
    "packed codes": [ring("packed")],
    "codes of six bits": [ring("six bits")],
    "complex numbers": [ring("complex")],
    "too many axes": [ring("many axes", np.ones((1,) * 60, bool), mask_shape=[1] * 72)],
    "one group of all": [ring(mask=ONE)],
}

TABLES: dict[str, bytes] = {
    "empty box": b"",
    "three bytes": bytes(3),
    "length beyond the end": (1 << 31).to_bytes(4, "little") + table_of([ring()]),
    "largest length": b"\xff" * 4 + table_of([ring()]),
    "length of zero": bytes(4),
    "not JSON": content([], b"{rings"),
    "not UTF-8": content([], b'{"rings": "\xff"}'),
    "a surrogate": content([], b'{"rings": "\\ud800"}'),
    "not a number": content([], b'{"rings": [NaN]}'),
    "deep": content([], b'{"rings":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a list": content([], b"[]"),
    "no rings": content([], b"{}"),
    "rings no list": content([], b'{"rings":{}}'),
    "ring no object": content([], b'{"rings":[1]}'),
    "rings twice": content([], b'{"rings":[],"rings":[]}'),
    "key twice in a ring": content([ring()], table_of([ring()]).replace(b"{", b'{"groups":1,', 2)),
    "something behind": content([ring()]) + b"\0",
    "rings left out": content([], table_of([])),
}

PLAINTEXT = ("digest of other weights", "one group of all")
"""Well-formed forgeries that decrypt to anything."""


def assert_forgery_refused(forgery: Forgery, folder: Path, reason: str = "ring") -> None:
    path = folder / "forged.safetensors"
    path.write_bytes(forgery.to_bytes())
    grant = forgery.given.grant

    def unlock() -> None:
        with pytest.raises(ValueError, match="forged") as caught:
            unlock_file(path, folder / "out", grant)
        check_refusal(caught.value, path, forgery.given)
        assert reason_of(caught.value) == reason, caught.value

    assert peak_memory(unlock) < 2 * path.stat().st_size + (1 << 20)
    with pytest.raises(ValueError, match="forged") as caught:
        verify_file(path, grant=grant)
    assert reason_of(caught.value) == reason


@pytest.mark.parametrize("name", RINGS)
def test_a_forged_ring(files, tmp_path, name):
    forgery = forged(files["unsigned"].model, RINGS[name])
    assert_forgery_refused(forgery, tmp_path, "plaintext" if name in PLAINTEXT else "ring")


@pytest.mark.parametrize("plain", TABLES.values(), ids=TABLES)
def test_a_forged_box(files, tmp_path, plain):
    assert_forgery_refused(forged(files["unsigned"].model, [ring()], plain), tmp_path)


@pytest.mark.parametrize("bits", [11, 17, 10**18])
def test_more_fine_bits_than_there_are(files, tmp_path, bits):
    assert_forgery_refused(forged(files["unsigned"].model, [ring()], fine_bits=bits), tmp_path)


def forged_digests(given: Released, masks: list[np.ndarray]) -> Forgery:
    """Rings whose digests match whatever they decrypt to; making them takes the keys."""
    stored = numbers(*ODD["w"])
    bits = np.frombuffer(bytearray(stored.data), "<u2")
    key, cipher = given.key.lower(len(masks)), LosslessCipher()
    boxes, levels = [], []
    for level, mask in enumerate(masks, 1):
        plain = rewrite_ring(
            bits,
            unit_places(SHAPE, mask.shape, np.flatnonzero(mask), "weight"),
            leaf_key(key.lower(level).cipher_key(), "w"),
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
    """A control: a forged box without a fault opens, as FORMAT.md says."""
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
    assert_forgery_refused(forgery, tmp_path)


def test_forged_boxes_do_not_pass_for_a_signed_file(files, tmp_path):
    """A well-formed box 1 by its customer, in place of the owner's."""
    world: World = files["signed"]
    parts, key = world.parts(), world.model.key.lower(1)
    sealed = base64.b64decode(parts.entries["selcrypt.box.1"])
    seal, data = ChaCha20Poly1305(key.seal_key()), box_context(parts.entries["selcrypt"], 1)
    plain = seal.decrypt(sealed[:12], sealed[12:], data)
    again = base64.b64encode(bytes(12) + seal.encrypt(bytes(12), plain, data)).decode()
    parts.entries["selcrypt.box.1"] = again
    world.folder = tmp_path
    assert_refused(world, parts.to_bytes(), "signature")


def test_many_rings_of_one_tensor_are_refused_by_their_number(files, tmp_path):
    """Each of 256 boxes claims all weights of a tensor: none of their positions is unpacked."""
    given = files["unsigned"].model
    key = level_key(SECRET, given.key.model_id, levels=256)
    everything = ring(mask=np.ones(SHAPE, bool))
    forgery = Forgery(
        [content([everything])] * 256,
        ["w"],
        [{"groups": 512, "weights": 512}] * 256,
        Released(given.parts, key, None),
    )
    path = tmp_path / "forged.safetensors"
    path.write_bytes(forgery.to_bytes())
    with pytest.raises(IntegrityError, match="hold more weights than it has") as caught:
        unlock_file(path, tmp_path / "out", key)
    assert caught.value.reason == "ring"
