"""Folders as on model hubs: variants, one file, components, and files beside the index."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from selcrypt_jax import (
    IntegrityError,
    Secret,
    Select,
    SigningKey,
    issue_grant,
    open_model,
    protect_file,
    rotate_file,
    unlock_file,
    verify_file,
)
from selcrypt_jax._release.checkpoint import open_checkpoint

SECRET, SIGNING = Secret.generate(), SigningKey.generate()
SELECT = Select(layout="OIHW", budget=0.5)


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"layer{seed}.weight": rng.standard_normal((32, 32), np.float32)}


def shards(folder: Path, names: list[str], index: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for seed, name in enumerate(names):
        save_file(weights(seed), folder / name)
        weight_map |= dict.fromkeys(weights(seed), name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def protected(path: Path, output: Path) -> Path:
    protect_file(path, output, secret=SECRET, signing=SIGNING, levels=2, selection=SELECT)
    return output


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors"], "model.safetensors.index.json"),
        (
            ["model-1-of-2.fp16.safetensors", "model-2-of-2.fp16.safetensors"],
            "model.safetensors.index.fp16.json",
        ),
        (
            ["model.fp16-1-of-2.safetensors", "model.fp16-2-of-2.safetensors"],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        (["a.non_ema.safetensors", "b.safetensors"], "a.safetensors.index.non_ema.json"),
    ],
)
@pytest.mark.parametrize("by", ["folder", "index"])
def test_indexes_and_shards_of_variants(names, index, by, tmp_path):
    shards(tmp_path / "in", names, index)
    public = tmp_path / "out"
    protected(tmp_path / "in" if by == "folder" else tmp_path / "in" / index, public)
    assert set(contents(public)) == {*names, index}
    verify_file(public, signer=SIGNING.public)
    grant = issue_grant(public / index, level=2, secret=SECRET, signer=SIGNING.public)
    unlock_file(public, tmp_path / "back", grant)
    assert contents(tmp_path / "back") == contents(tmp_path / "in")


def test_a_folder_of_two_variants_is_ambiguous(tmp_path):
    shards(tmp_path, ["a.safetensors"], "model.safetensors.index.json")
    shards(tmp_path, ["a.fp16.safetensors"], "model.safetensors.index.fp16.json")
    with pytest.raises(ValueError, match=r"expected one index .*fp16.json.*Name the right one"):
        protected(tmp_path, tmp_path / "out")
    protected(tmp_path / "model.safetensors.index.fp16.json", tmp_path / "out")


STRAYS = [
    "model.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.onnx",
    "consolidated.00.pth",
    "MODEL.SAFETENSORS",
]
HARMLESS = [
    "config.json",
    "tokenizer.json",
    "README.md",
    "model_index.json",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
]


@pytest.mark.parametrize("kind", ["index", "one file"])
def test_weights_that_nobody_signed_are_named(kind, tmp_path):
    if kind == "index":
        names = ["m-1.safetensors", "m-2.safetensors"]
        shards(tmp_path / "in", names, "m.safetensors.index.json")
    else:
        (tmp_path / "in").mkdir()
        save_file(weights(0), tmp_path / "in" / "m.safetensors")
    public = protected(tmp_path / "in", tmp_path / "public")
    for name in HARMLESS:
        (public / name).write_text("{}")
    verify_file(public)
    for name in STRAYS:
        (public / name).write_bytes(b"")
        # A second index, or a second file, is refused before: nothing says which one is meant.
        with pytest.raises(
            ValueError, match=rf"(no other weights|expected one) .*'{name}'|{name}: "
        ):
            verify_file(public)
        (public / name).unlink()
    (public / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        verify_file(public)
    assert caught.value.reason == "shard"
    for path in public.glob("m.safetensors*"):
        if path.suffix == ".json":
            with pytest.raises(IntegrityError, match=r"\['pytorch_model.bin'\].* Remove them"):
                verify_file(path)
        else:  # named by itself, it is what is loaded
            verify_file(path)


def test_weights_beside_an_orbax_checkpoint_are_named(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", weights(0))
    public = protected(tmp_path / "in", tmp_path / "public")
    verify_file(public)
    (public / "model.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"\['model.safetensors'\]"):
        verify_file(public)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_folder_with_one_file(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(weights(0), folder / name)
    (folder / "config.json").write_text("{}")
    public = protected(folder, tmp_path / "public")
    assert set(contents(public)) == {name}
    verify_file(public, signer=SIGNING.public)
    grant = issue_grant(public, level=2, secret=SECRET, signer=SIGNING.public)
    key, original = "layer0.weight", weights(0)["layer0.weight"]
    np.testing.assert_array_equal(open_model(public, grant)[key], original)
    unlock_file(public, tmp_path / "back", grant)
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()

    rotate_file(public, tmp_path / "rotated", secret=SECRET, signing=SIGNING)
    rotate_file(public, secret=SECRET, signing=SIGNING)  # in its place
    for path in (public, tmp_path / "rotated"):
        grant = issue_grant(path, level=2, secret=SECRET, signer=SIGNING.public)
        np.testing.assert_array_equal(open_model(path, grant)[key], original)
    # The next version, fine-tuned from a base that is a folder too.
    base = Select(layout="OIHW", budget=0.5, base=folder)
    (tmp_path / "next").mkdir()
    save_file({key: original + 1}, tmp_path / "next" / name)
    protect_file(tmp_path / "next", tmp_path / "based", secret=SECRET, levels=2, selection=base)
    protect_file(tmp_path / "next", tmp_path / "like", secret=SECRET, like=public)


def test_components_are_named(tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        save_file(weights(0), tmp_path / part / "model.safetensors")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    expected = r"got a folder of \['text_encoder', 'unet', 'vae'\].* such as .*text_encoder"
    with pytest.raises(ValueError, match=expected):
        protected(tmp_path, tmp_path / "out")
    protected(tmp_path / "unet", tmp_path / "out")


def test_the_output_is_not_the_folder_of_the_input(tmp_path):
    save_file(weights(0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected a different file from the input"):
        protected(tmp_path, tmp_path)
    with open_checkpoint(tmp_path) as one, open_checkpoint(tmp_path / "model.safetensors") as file:
        assert (one.folder, file.folder) == (tmp_path, None)
