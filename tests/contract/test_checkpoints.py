"""Every form of a checkpoint through one table: a new form is one row."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from strategies import octets

from selcrypt_jax import (
    LevelKey,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    level_key,
    open_model,
    protect,
    protect_file,
    rotate_file,
    unlock,
    unlock_file,
    verify_file,
)

SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(reversed(range(32))))
LEVELS = [0.1, 0.3, 0.5]
SELECTION = Select(layout="HWIO", small=0)


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "conv/kernel": rng.standard_normal((3, 3, 16, 32)).astype(np.float32),
        "conv/bias": rng.standard_normal(32).astype(np.float32),
        "dense/kernel": jnp.asarray(rng.standard_normal((64, 40)), jnp.bfloat16),
        "steps": np.array(7, np.int32),
    }


def nested() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in tensors().items():
        *steps, last = name.split("/")
        inner = tree
        for step in steps:
            inner = inner.setdefault(step, {})
        inner[last] = leaf
    return tree


def as_numpy(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def one_file(folder: Path) -> Path:
    safetensors.numpy.save_file(as_numpy(tensors()), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def several_files(folder: Path) -> Path:
    where = folder / "plain"
    where.mkdir()
    found, shards = as_numpy(tensors()), {}
    for number, names in enumerate((["conv/kernel", "steps"], ["conv/bias", "dense/kernel"]), 1):
        shard = f"model-{number}-of-2.safetensors"
        safetensors.numpy.save_file({name: found[name] for name in names}, where / shard)
        shards |= dict.fromkeys(names, shard)
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (where / "model.safetensors.index.json").write_text(index)
    return where


def orbax(folder: Path) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / "plain").absolute(), nested())
    return folder / "plain"


FORMS = {"one file": one_file, "several files": several_files, "orbax": orbax}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def public(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    plain, options = request.param(tmp_path), {"levels": LEVELS, "selection": SELECTION}
    protect_file(
        plain, tmp_path / "public", secret=SECRET, signing=SIGNING, rest="plain", **options
    )
    return tmp_path / "public"


def key_of(path: Path, level: int, secret: Secret = SECRET) -> LevelKey:
    model_id = bytes.fromhex(inspect_file(path).model_id)
    return level_key(secret, model_id, level=level, levels=len(LEVELS))


def differing(found: dict[str, Any]) -> dict[str, int]:
    """Tensor → its weights that differ from the original."""
    return {
        name: int((np.asarray(found[name]).view("u1") != np.asarray(leaf).view("u1")).sum())
        if np.ndim(leaf)
        else int(octets(found[name]) != octets(leaf))
        for name, leaf in tensors().items()
    }


def test_the_top_level_is_the_original_and_each_level_opens_more(public):
    wrong = [differing(open_model(public, key_of(public, level))) for level in (1, 2, 3)]
    shipped = differing(open_model(public))
    for name in ("conv/kernel", "dense/kernel"):
        assert shipped[name] > wrong[0][name] > wrong[1][name] > wrong[2][name] == 0
    for name in ("conv/bias", "steps"):
        assert shipped[name] == 0


def test_unlocked_files_hold_what_open_model_gives(public, tmp_path):
    for level in (2, 3):
        unlock_file(public, tmp_path / f"level {level}", key_of(public, level))
    protect_file(
        tmp_path / "level 3", tmp_path / "again", secret=SECRET, levels=LEVELS, selection=SELECTION
    )  # what comes out is a plain checkpoint of the same form
    again = open_model(tmp_path / "again", key_of(tmp_path / "again", 3))
    assert not any(differing(again).values())
    half = open_model(public, key_of(public, 2))
    with pytest.raises(ValueError, match="is not a protected file"):
        open_model(tmp_path / "level 2")
    assert differing(half)["conv/kernel"]


def test_the_same_weights_are_encrypted_in_memory_and_on_disk(public):
    released = protect(nested(), secret=SECRET, levels=LEVELS, selection=SELECTION, rest="plain")
    shipped = open_model(public)
    opened = unlock(released, level_key(SECRET, released.model_id, level=1, levels=3))
    theirs = open_model(public, key_of(public, 1))
    for path, inner in (("conv", "kernel"), ("dense", "kernel")):
        name, plain = f"{path}/{inner}", np.asarray(nested()[path][inner])
        file, tree = np.asarray(shipped[name]), np.asarray(released.params[path][inner])
        # An encrypted weight stays as it is by chance if its 20 fine bits do, or 4 in bfloat16. Of
        # the 2,560 there, 14.5 then differ between two files (the mean of 30 pairs; Poisson): more
        # than 50 once in 1e12.
        most = {"conv": 3, "dense": 50}[path]
        assert ((file != plain) != (tree != plain)).sum() <= most
        left = np.asarray(theirs[name]) != plain, np.asarray(opened[path][inner]) != plain
        assert (left[0] != left[1]).sum() <= most


def test_a_rotated_checkpoint_opens_with_new_keys_only(public, tmp_path):
    old = key_of(public, 3)
    rotate_file(public, tmp_path / "new", secret=SECRET, signing=SIGNING)
    with pytest.raises(ValueError, match="grant is for model"):
        open_model(tmp_path / "new", old)
    assert not any(differing(open_model(tmp_path / "new", key_of(tmp_path / "new", 3))).values())


def test_verified_and_described(public):
    found = verify_file(public, signer=SIGNING.public, grant=key_of(public, 2))
    assert found == verify_file(public, grant=key_of(public, 2)) == inspect_file(
        public, key_of(public, 2)
    )  # fmt: skip
    assert [level.opens for level in found.levels] == [True, True, False]
    assert (found.tensors, found.weights) == (4, 3 * 3 * 16 * 32 + 32 + 64 * 40 + 1)


def test_protected_once(public, tmp_path):
    with pytest.raises(ValueError, match="already a protected file"):
        protect_file(public, tmp_path / "twice", secret=SECRET)
    assert not (tmp_path / "twice").exists()
