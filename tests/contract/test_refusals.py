"""One table of failures for every form of a checkpoint: the same reason, and nothing opened.

tests/format alters files byte by byte; the vectors in tests/vectors give the same reasons to other
readers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protected_files import Parts, Stored, reason_of, to_json

from selcrypt_jax import (
    Grant,
    LevelKey,
    Protected,
    Secret,
    Select,
    SigningKey,
    importance,
    level_key,
    nested_masks,
    open_model,
    protect,
    protect_file,
    unlock,
)
from selcrypt_jax._format.envelope import Envelope
from selcrypt_jax._io.arrays import ArraySource, as_array
from selcrypt_jax._io.orbax import OrbaxCheckpoint, save_tree

SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(range(32, 64)))
LEVELS = (0.3, 0.6)
INDEX = "model.safetensors.index.json"


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a": (40, 50), "b": (60, 30), "c": (30,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def parts_of(arrays: ArraySource, metadata: Any) -> Parts:
    tensors = {n: Stored(*info, bytes(arrays.read(n))) for n, info in arrays.tensors.items()}
    return Parts(tensors, dict(metadata))


def arrays_of(parts: Parts) -> dict[str, np.ndarray]:
    return {name: as_array(t.data, t.dtype, t.shape) for name, t in parts.tensors.items()}


# --- the forms: protected parts, and opening them again -------------------------------------------

OPTIONS: dict[str, Any] = {
    "secret": SECRET,
    "signing": SIGNING,
    "levels": LEVELS,
    "selection": Select(granularity="weight", layout="HWIO"),
}


def write_files(folder: Path, files: list[Parts]) -> Path:
    """One file, or several with an index."""
    folder.mkdir()
    if len(files) == 1:
        path = folder / "model.safetensors"
        path.write_bytes(files[0].to_bytes())
        return path
    names = [f"model-{number}.safetensors" for number in range(len(files))]
    for name, parts in zip(names, files, strict=True):
        (folder / name).write_bytes(parts.to_bytes())
    owner = {t: name for name, parts in zip(names, files, strict=True) for t in parts.tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": owner}))
    return folder


def protected_files(folder: Path, names: list[list[str]]) -> list[Parts]:
    plain = parts_of(ArraySource(parameters()), {})
    files = [Parts({n: plain.tensors[n] for n in here}, {}) for here in names]
    path = write_files(folder / "plain", files)
    protect_file(path, folder / "public", **OPTIONS)
    public = folder / "public"
    return [Parts.of(p) for p in sorted(public.glob("*.safetensors"))] or [Parts.of(public)]


def open_files(folder: Path, files: list[Parts], grant: Grant) -> dict[str, np.ndarray]:
    return open_model(write_files(folder / "altered", files), grant)


def protected_orbax(folder: Path) -> list[Parts]:
    save_tree(folder / "plain", parameters(), {})
    protect_file(folder / "plain", folder / "public", **OPTIONS)
    found = OrbaxCheckpoint(folder / "public")
    return [parts_of(found, found.metadata)]


def open_orbax(folder: Path, files: list[Parts], grant: Grant) -> dict[str, np.ndarray]:
    (parts,) = files
    save_tree(folder / "altered", arrays_of(parts), parts.entries)
    return open_model(folder / "altered", grant)


def protected_tree(_: Path) -> list[Parts]:
    params = parameters()
    masks = nested_masks(importance.l2(params, granularity="weight"), LEVELS)
    released = protect(params, masks, secret=SECRET, signing=SIGNING)
    return [parts_of(ArraySource(released.params), released.metadata)]


def open_tree(_: Path, files: list[Parts], grant: Grant) -> dict[str, np.ndarray]:
    (parts,) = files
    return unlock(Protected(arrays_of(parts), parts.entries), grant)


FORMS: dict[str, tuple[Callable[[Path], list[Parts]], Callable[..., Any]]] = {
    "file": (lambda folder: protected_files(folder, [["a", "b", "c"]]), open_files),
    "shards": (lambda folder: protected_files(folder, [["a", "c"], ["b"]]), open_files),
    "Orbax": (protected_orbax, open_orbax),
    "tree": (protected_tree, open_tree),
}


# --- the failures ---------------------------------------------------------------------------------


@dataclass
class Case:
    """Everything that an attacker or a mistake may change: the files, and the grant."""

    files: list[Parts]
    grant: Grant

    @property
    def parts(self) -> Parts:
        return self.files[0]

    @property
    def key(self) -> LevelKey:
        return self.grant.key


def entry(name: str, change: Callable[[str], str]) -> Callable[[Case], None]:
    def tamper(case: Case) -> None:
        case.parts.entries[name] = change(case.parts.entries.get(name, ""))

    return tamper


def tensor(change: Callable[[Stored], Stored]) -> Callable[[Case], None]:
    def tamper(case: Case) -> None:
        case.parts.tensors["a"] = change(case.parts.tensors["a"])

    return tamper


def grant(make: Callable[[LevelKey], LevelKey]) -> Callable[[Case], None]:
    def tamper(case: Case) -> None:
        case.grant = replace(case.grant, key=make(case.key))

    return tamper


def strange_signer(case: Case) -> None:
    case.grant = replace(case.grant, signer=SigningKey(bytes(32)).public)


def unsigned(case: Case) -> None:
    """A downgrade, for a customer whose grant names no signer."""
    case.grant = Grant(case.key)
    for parts in case.files:
        manifest = json.loads(parts.entries["selcrypt"]) | {"signer": None}
        parts.entries["selcrypt"] = to_json(manifest)
        del parts.entries["selcrypt.signature"]


def flip_digest(manifest: str) -> str:
    place = manifest.rindex('"sha256":["') + 11
    return manifest[:place] + f"{int(manifest[place], 16) ^ 1:x}" + manifest[place + 1 :]


FAILURES: dict[str, tuple[str, Callable[[Case], None]]] = {
    "no manifest": ("unprotected", lambda case: case.parts.entries.pop("selcrypt")),
    "later version": ("version", entry("selcrypt", lambda t: t.replace("-v1", "-v2"))),
    "manifest cut": ("manifest", entry("selcrypt", lambda text: text[:-1])),
    "unknown entry": ("metadata", entry("selcrypt.x", lambda _: "")),
    "caller's entry": ("metadata", entry("note", lambda _: "mine")),
    "another signer": ("signer", strange_signer),
    "digest in the manifest": ("signature", entry("selcrypt", flip_digest)),
    "box of zeros": ("signature", entry("selcrypt.box.1", lambda text: "A" * len(text))),
    "another shape": ("table", tensor(lambda t: t._replace(shape=(50, 40)))),
    "another dtype": ("table", tensor(lambda t: t._replace(dtype="I32"))),
    "another model": ("model", grant(lambda key: LevelKey(
        bytes(key), level=2, model_id=bytes(16)))),
    "level above": ("level", grant(lambda key: LevelKey(
        bytes(key), level=3, model_id=key.model_id))),
    "wrong key": ("box", grant(lambda key: LevelKey(
        bytes(32), level=2, model_id=key.model_id))),
    "level of a lower key": ("box", grant(lambda key: LevelKey(
        bytes(key.lower(1)), level=2, model_id=key.model_id))),
    "no signature": ("box", unsigned),
    "a bit of a tensor": ("digest", tensor(lambda t: t._replace(
        data=bytes([t.data[0] ^ 1]) + t.data[1:]))),
}  # fmt: skip


@pytest.fixture(scope="module")
def protected(tmp_path_factory) -> Callable[[str], list[Parts]]:
    made: dict[str, list[Parts]] = {}

    def get(form: str) -> list[Parts]:
        if form not in made:
            made[form] = FORMS[form][0](tmp_path_factory.mktemp("protected"))
        return [Parts(dict(parts.tensors), dict(parts.entries)) for parts in made[form]]

    return get


def case_of(files: list[Parts]) -> Case:
    manifest = Envelope.from_metadata(files[0].metadata, "test").manifest
    key = level_key(SECRET, manifest.model_id, levels=len(LEVELS))
    return Case(files, Grant(key, SIGNING.public))


@pytest.mark.parametrize("form", FORMS)
def test_untouched_it_opens_to_the_original(form, protected, tmp_path):
    files = protected(form)
    opened = FORMS[form][1](tmp_path, files, case_of(files).grant)
    for name, array in parameters().items():
        np.testing.assert_array_equal(np.asarray(opened[name]).view("u4"), array.view("u4"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("reason", "tamper"), FAILURES.values(), ids=FAILURES)
def test_refused(form, reason, tamper, protected, tmp_path):
    files = protected(form)
    case = case_of(files)
    tamper(case)
    with pytest.raises(ValueError, match=r"\w") as caught:
        FORMS[form][1](tmp_path, files, case.grant)
    assert reason_of(caught.value) == reason, caught.value
