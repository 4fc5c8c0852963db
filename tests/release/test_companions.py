"""Configuration and tokenizer are copied with a folder's weights, and nothing else is."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import selcrypt_jax as sj
from selcrypt_jax import IntegrityError, protect_file, rotate_file, unlock_file, verify_file
from selcrypt_jax._io import companions as module
from selcrypt_jax.cli import main

SECRET, SIGNING = sj.Secret.generate(), sj.SigningKey.generate()
BESIDE = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "spiece.model": b"\n\x0e\n\x05<unk>",
    "vocab.txt": b"[PAD]\n",
    "README.md": b"# model",
    "LICENSE": b"Apache",
    "empty": b"",
    "1_Pooling/config.json": b"{}",
    "a/b/c.yaml": b"x: 1",
    "a/__init__.py": b"",
}
LEFT_OUT = {
    "pytorch_model.bin": (b"PK\x03\x04", "weights"),
    "optimizer.pt": (b"PK\x03\x04", "weights"),
    "2_Dense/model.safetensors": (b"", "weights"),
    "2_Dense/model.safetensors.index.json": (b"{}", "weights"),
    "scores.npy": (b"\x93NUMPY", "weights"),
    "model.onnx": (b"\x08\x07", "weights"),
    "onnx/model": (b"\x08\x08\x12\x07pytorch", "weights"),
    "onnx/model.onnx_data_1": (b"\0\0\0\0", "weights"),
    "onnx/model.onnx.data": (b"\0\0\0\0", "weights"),
    "onnx/onnx__MatMul_12": (b"\0\0\0\0", "weights"),
    "onnx/layer.0.dense.weight": (b"\0\0\0\0", "weights"),
    "checkpoint_100": (b"\x81\xa6params\x81", "weights"),
    "model.ckpt.data-00000-of-00001": (b"\0\0\0\0", "weights"),
    "extra.unknown": (b"\x93NUMPY\x01", "weights"),
    "renamed.dat": (b"\x10" + bytes(7) + b'{"__metadata__":', "weights"),
    "data": (b"\x80\x04\x95abc", "a pickle, which may hold weights"),
    "backup": (b"PK\x03\x04abc", "an archive, which may hold weights"),
    "keys/secret.key": (b"selcrypt-secret-v1", "a selcrypt key or grant"),
    "id_ed25519": (b"-----BEGIN OPENSSH PRIVATE KEY-----", "a key"),
    "lfs.json": (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
}
WEIGHTS = {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"}
HIDDEN = [".git/config", ".env", ".gitattributes", "__pycache__/m.pyc"]


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    files = BESIDE | {name: data for name, (data, _) in LEFT_OUT.items()}
    for name, data in (files | dict.fromkeys(HIDDEN, b"x")).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shards = {}
    for number in (1, 2):
        tensors = {f"w{number}": np.random.default_rng(number).standard_normal((64, 64), "f4")}
        save_file(tensors, folder / f"model-{number}.safetensors")
        shards |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "outside.json").write_text("a secret")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def assert_left_out(beside: module.Companions | None) -> None:
    assert beside is not None
    assert sorted(beside.copied) == sorted(BESIDE)
    for name, (_, reason) in LEFT_OUT.items():
        assert beside.left_out[name].startswith(reason), name
    assert not any(name in beside.left_out for name in HIDDEN)


def test_the_whole_folder_comes_along_twice(model):
    done = protect_file(model, "public", secret=SECRET, signing=SIGNING, levels=2, copy_config=True)
    assert_left_out(done.beside)
    beside = {n: d for n, d in files(Path("public")).items() if n not in WEIGHTS}
    assert beside == BESIDE
    verify_file("public", signer=SIGNING.public)
    grant = sj.issue_grant("public", level=2, secret=SECRET, signer=SIGNING.public)
    opened = unlock_file("public", "opened", grant, copy_config=True)
    assert opened is not None
    assert (sorted(opened.copied), opened.left_out) == (sorted(BESIDE), {})
    shipped = {n: d for n, d in files(model).items() if n in {*BESIDE, *WEIGHTS}}
    assert files(Path("opened")) == shipped
    assert Path("opened").stat().st_mode & 0o077 == 0


def test_rotation_takes_it_along(model):
    protect_file(model, "public", secret=SECRET, signing=SIGNING, levels=2, copy_config=True)
    Path("public/stray.npy").write_bytes(b"\x93NUMPY")
    done = rotate_file("public", "next", secret=SECRET, signing=SIGNING, copy_config=True)
    assert done.beside is not None
    assert sorted(done.beside.copied) == sorted(BESIDE)
    assert done.beside.left_out == {"stray.npy": "weights"}
    assert {n: d for n, d in files(Path("next")).items() if n not in WEIGHTS} == BESIDE
    assert verify_file("next", signer=SIGNING.public).model_id == done.model_id.hex()
    bare = rotate_file("public", "bare", secret=SECRET, signing=SIGNING)
    assert bare.beside is None
    assert set(files(Path("bare"))) == WEIGHTS


def test_nothing_comes_along_unasked(model):
    done = protect_file(model, "public", secret=SECRET, levels=2)
    assert done.beside is None
    assert set(files(Path("public"))) == WEIGHTS


def test_links_do_not_lead_out(model):
    (model / "inside.json").symlink_to("config.json")
    (model / "out.json").symlink_to("../outside.json")
    (model / "absolute.json").symlink_to(Path("outside.json").absolute())
    (model / "nowhere.json").symlink_to("nothing")
    (model / "folder").symlink_to(model.parent)
    (model / "same").symlink_to("1_Pooling")
    (model / "two.json").symlink_to("out.json")
    (model / "weights.json").symlink_to("model-1.safetensors")
    (model / "hidden.json").symlink_to(".env")
    done = protect_file(model, "public", secret=SECRET, levels=2, copy_config=True)
    assert done.beside is not None
    assert set(done.beside.copied) == {*BESIDE, "inside.json"}
    assert not Path("public/inside.json").is_symlink()
    left = done.beside.left_out
    for name in ("out.json", "absolute.json", "two.json", "folder"):
        assert left[name].startswith("a link that leads out of the folder"), name
    assert left["nowhere.json"] == "a link that leads nowhere"
    assert left["same"] == "a link to a folder"
    assert left["weights.json"] == "weights"
    assert left["hidden.json"] == "a link to a hidden file"
    assert b"a secret" not in files(Path("public")).values()


def test_a_snapshot_of_the_hugging_face_cache_is_links_into_its_store(model):
    cache = Path("models--me--it")
    snapshot, store = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    store.mkdir()
    names = ["config.json", *WEIGHTS]
    for number, name in enumerate(names):
        (store / f"b{number}").write_bytes((model / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/b{number}")
    (snapshot / "other.json").symlink_to("../../../outside.json")
    done = protect_file(snapshot, "public", secret=SECRET, levels=2, copy_config=True)
    assert done.beside is not None
    assert done.beside.copied == ("config.json",)
    assert list(done.beside.left_out) == ["other.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_what_would_make_it_wait_or_is_too_large_stays_behind(model, monkeypatch):
    os.mkfifo(model / "pipe.json")
    monkeypatch.setattr(module, "MOST", 1 << 20)
    (model / "large.json").write_bytes(b" " * ((1 << 20) + 1))
    orbax = model / "step"
    orbax.mkdir()
    (orbax / "manifest.ocdbt").write_bytes(b"x")
    (orbax / "data.json").write_bytes(b"x")
    found = module.companions(model)
    assert sorted(found.copied) == sorted(BESIDE)
    assert found.left_out["pipe.json"] == "a pipe, socket or device"
    assert found.left_out["large.json"] == "larger than 1 MiB, as weights are"
    assert found.left_out["step"] == "an Orbax checkpoint"


def test_nothing_is_replaced_and_nothing_stays_after_a_failure(model, monkeypatch):
    target = model.parent / "target"
    target.mkdir()
    (target / "config.json").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        module.companions(model).copy_to(target)
    assert (target / "config.json").read_bytes() == b"mine"

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Companions, "copy_to", fails)
    with pytest.raises(OSError, match="No space left"):
        protect_file(model, "public", secret=SECRET, levels=2, copy_config=True)
    assert not list(model.parent.glob("*public*"))


def test_it_is_for_folders(model):
    shard = model / "model-1.safetensors"
    with pytest.raises(ValueError, match="copy_config: expected the folder of a model, got a file"):
        protect_file(shard, "public", secret=SECRET, copy_config=True)
    save_file({"w": np.ones((64, 64), "f4")}, "one.safetensors")
    with pytest.raises(ValueError, match=r"copy_config: .* copy the other files yourself"):
        protect_file("one.safetensors", "other", secret=SECRET, copy_config=True)
    protect_file("one.safetensors", "other", secret=SECRET, levels=1)
    with pytest.raises(ValueError, match="copy_config: expected the folder of a model, got a file"):
        rotate_file("other", secret=SECRET, copy_config=True)
    assert not Path("public").exists()


def test_weights_are_checked_as_ever(model):
    protect_file(model, "public", secret=SECRET, levels=2, copy_config=True)
    data = bytearray(Path("public/model-1.safetensors").read_bytes())
    data[-1] ^= 1
    Path("public/model-1.safetensors").write_bytes(data)
    grant = sj.issue_grant("public", level=2, secret=SECRET, signer="unsigned")
    with pytest.raises(IntegrityError):
        unlock_file("public", "opened", grant, copy_config=True)
    assert not Path("opened").exists()


def test_commands_say_what_they_copied(model, capsys):
    assert main(["keygen", "-o", "k"]) == 0
    keys = "--secret k/secret.key --signing k/signing.key"
    capsys.readouterr()
    assert main(f"protect model -o public {keys} --copy-config".split()) == 0
    out = capsys.readouterr().out
    assert (
        "\nAlso copied: 1_Pooling/config.json, LICENSE, README.md, a/__init__.py, a/b/c.yaml, "
        in out
    )
    assert "\nLeft out: keys/secret.key (a selcrypt key or grant).\n" in out
    assert main(["grant", "public", "--level", "1", "--secret", "k/secret.key", "-o", "g"]) == 0
    capsys.readouterr()
    assert main(["unlock", "public", "-g", "g", "-o", "opened", "--copy-config"]) == 0
    assert "\nAlso copied: 1_Pooling/config.json, " in capsys.readouterr().out
    assert main(["unlock", "public", "-g", "g", "-o", "again", "--copy-config", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (sorted(found["copied"]), found["left_out"]) == (sorted(BESIDE), {})
    assert main(f"rotate public -o next {keys} --copy-config".split()) == 0
    assert "\nAlso copied: 1_Pooling/config.json, " in capsys.readouterr().out
