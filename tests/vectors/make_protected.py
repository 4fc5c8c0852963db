"""Makes the vectors of the protected file: ``python tests/vectors/make_protected.py``.

Files of version 1 never change, so this is run again only for another version. (Model ids and
nonces are random: a second run gives other files.)
"""

import base64
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

from selcrypt_jax import (
    LosslessCipher,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    level_key,
    protect_file,
    rotate_file,
    unlock_file,
)

HERE = Path(__file__).parent / "protected"
SECRET = Secret(hashlib.sha256(b"the secret of the vectors").digest())
SIGNING = SigningKey(hashlib.sha256(b"the signing key of the vectors").digest())
LEVELS = 3


def take_apart(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(path: Path, head: dict, data: bytes) -> None:
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def digests(path: Path) -> dict[str, str]:
    head, data = take_apart(path)
    head.pop("__metadata__", None)
    return {
        name: hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest()
        for name, entry in head.items()
    }


def flip(text: str, position: int) -> str:
    """Replaces a digit or letter with another one."""
    return text[:position] + ("0" if text[position] != "0" else "1") + text[position + 1 :]


def make_source(path: Path) -> None:
    rng = np.random.default_rng(2105)
    tensors = {
        "conv/kernel": rng.standard_normal((3, 3, 8, 16)).astype(np.float32),
        "conv/bias": rng.standard_normal(16).astype(np.float32),
        "dense/kernel": rng.standard_normal((40, 30)).astype(np.float16),
        "long": rng.integers(-128, 128, (2, 7000), np.int8),
        "quantised": rng.integers(-128, 128, (30, 20), np.int8),
        "steps": np.array(7, np.int64),
        "double": rng.uniform(3, 90, 50),
        "waves": rng.standard_normal((9, 2)).astype(np.float32).view(np.complex64),
        "flags": rng.random(33) < 0.5,
        "empty": np.zeros((0, 3), np.float32),
    }
    safetensors.numpy.save_file(tensors, path, {"format": "np", "note": 'ü "quoted"'})


def make() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    source = HERE / "original.safetensors"
    make_source(source)
    good = []
    for name, cipher, signing, rest in [
        ("weight", LosslessCipher(), SIGNING, "sealed"),
        ("plain", LosslessCipher(), SIGNING, "plain"),
        ("group", LosslessCipher(unit="group"), None, "plain"),
        ("stream", LosslessCipher(permute=False), SIGNING, "sealed"),
    ]:
        path = HERE / f"{name}.safetensors"
        protect_file(
            source,
            path,
            secret=SECRET,
            levels=[0.3, 0.6, 0.9],
            selection=Select(layout="HWIO", select="kernel|long|quantised"),
            signing=signing,
            cipher=cipher,
            rest=rest,
        )
        model_id = bytes.fromhex(inspect_file(path).model_id)
        keys = [level_key(SECRET, model_id, level=m, levels=LEVELS) for m in (1, 2, 3)]
        levels = []
        for key in keys:
            out = HERE / "out"
            unlock_file(path, out, key)
            levels.append({"key": bytes(key).hex(), "tensors": digests(out)})
            out.unlink()
        good.append({"file": path.name, "model_id": model_id.hex(), "levels": levels})
    vectors = {
        "secret": bytes(SECRET).hex(),
        "signer": SIGNING.public.hex(),
        "metadata": {"format": "np", "note": 'ü "quoted"'},
        "good": good,
        "bad": list(make_bad(HERE / "weight.safetensors")),
    }
    (HERE / "vectors.json").write_text(json.dumps(vectors, indent=1, ensure_ascii=False) + "\n")


def make_bad(path: Path):
    """Files to refuse with the top level's key, and why."""
    head, data = take_apart(path)
    metadata = head["__metadata__"]

    def bad(name: str, why: str, *, meta=None, tensors=None, body=data):
        changed = dict(head if tensors is None else tensors)
        changed["__metadata__"] = metadata if meta is None else meta
        put_together(HERE / f"bad-{name}.safetensors", changed, body)
        return {"file": f"bad-{name}.safetensors", "why": why}

    manifest = json.loads(metadata["selcrypt"])
    digest = manifest["tensors"]["conv/bias"]["sha256"][0]
    spot = metadata["selcrypt"].index(digest)
    start = head["conv/kernel"]["data_offsets"][0]
    bit = bytearray(data)
    bit[start] ^= 1
    yield bad("tensor", "a bit of a tensor's data", body=bytes(bit))
    yield bad(
        "manifest", "a digit of a digest in the manifest",
        meta=metadata | {"selcrypt": flip(metadata["selcrypt"], spot)},
    )  # fmt: skip
    one, two = "selcrypt.box.1", "selcrypt.box.2"
    yield bad(
        "boxes", "boxes 1 and 2 in each other's place",
        meta=metadata | {one: metadata[two], two: metadata[one]},
    )  # fmt: skip
    unsigned = {key: value for key, value in metadata.items() if key != "selcrypt.signature"}
    yield bad("no-signature", "a signer in the manifest, and no signature", meta=unsigned)
    text = metadata["selcrypt"].replace(f'"{manifest["signer"]}"', "null")
    yield bad(
        "downgraded", "made into an unsigned file: no box opens", meta=unsigned | {"selcrypt": text}
    )
    other = SigningKey(bytes(32))
    text = metadata["selcrypt"].replace(manifest["signer"], other.public.hex())
    boxes = [metadata[f"selcrypt.box.{m}"] for m in (1, 2, 3)]
    message = b"selcrypt/v1/signature\0" + b"".join(
        hashlib.sha256(part.encode()).digest() for part in (text, *boxes)
    )
    yield bad(
        "other-signer", "signed anew by somebody else: no box opens",
        meta=metadata
        | {"selcrypt": text, "selcrypt.signature": base64.b64encode(other.sign(message)).decode()},
    )  # fmt: skip
    yield bad("metadata", "an entry of the caller changed", meta=metadata | {"note": "another"})
    yield bad("entry", "an entry that is not in the table", meta=metadata | {"selcrypt.x": ""})
    yield bad(
        "version", "a later version",
        meta=metadata | {"selcrypt": metadata["selcrypt"].replace("selcrypt-v1", "selcrypt-v2")},
    )  # fmt: skip
    renamed = {("conv/scale" if name == "conv/bias" else name): e for name, e in head.items()}
    yield bad("renamed", "a tensor under another name", tensors=renamed)
    shape = head | {"dense/kernel": head["dense/kernel"] | {"shape": [30, 40]}}
    yield bad("shape", "another shape, the same bytes", tensors=shape)
    rotated = HERE / "rotated"
    rotate_file(path, rotated, secret=SECRET, signing=SIGNING)
    other_head, _ = take_apart(rotated)
    rotated.unlink()
    yield bad("spliced", "the manifest of another protection", meta=other_head["__metadata__"])
    yield bad("plain", "not protected", meta={"format": "np"})


if __name__ == "__main__":
    make()
