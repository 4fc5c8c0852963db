"""Orbax folders crafted to exhaust memory, to hang, or to read other files.

All of them are opened in a separate process, which is ended if it hangs, and reports how much
memory each took. Run as a program, this file is that process.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from selcrypt_jax import (
    IntegrityError,
    Protected,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    issue_grant,
    level_key,
    open_model,
    protect_file,
    rotate_file,
    unlock_file,
    verify_file,
)
from selcrypt_jax._io.folders import read_regular, regular_files
from selcrypt_jax._io.ocdbt import zstd_bound
from selcrypt_jax._io.orbax import OrbaxCheckpoint
from selcrypt_jax._tree.names import named_leaves

SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(range(32, 64)))
OPTIONS: dict[str, Any] = {
    "secret": SECRET, "levels": [0.3, 0.6], "selection": Select(granularity="weight", small=0)
}  # fmt: skip
GIGABYTE = 1 << 30
MOST = 64 << 20  # bytes that an attack may take
SECONDS = 120


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((40, 50), np.float32), "steps": 7}


# --- what is done to a folder ---------------------------------------------------------------------


def zeros(size: int, head: bytes = b"") -> bytes:
    """A Zstandard frame of some bytes and many zeros, of four bytes for each 128 KiB."""
    blocks = [(len(head), 0, head)] + [(1 << 17, 1, b"\0")] * (size >> 17)
    frame = bytes.fromhex("28b52ffd0038")
    for number, (count, kind, content) in enumerate(blocks, 1):
        last = number == len(blocks)
        frame += (last | kind << 1 | count << 3).to_bytes(3, "little") + content
    return frame


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def node_of(magic: str, content: bytes) -> bytes:
    """A manifest or node of OCDBT, compressed."""
    size = 14 + len(content) + 4
    data = bytes.fromhex(magic) + size.to_bytes(8, "little") + b"\0\1" + content
    return data + crc32c(data).to_bytes(4, "little")


def manifest_of_zeros(folder: Path) -> None:
    # Configuration, and then a table of 100,000,000 files, whose names are empty.
    head = bytes.fromhex("7f893aac8ce13ac0c8f8e3d5888f84b8 00 8008 80c2d72f 04 01 00000000")
    bomb = node_of("0cdb3a2a", zeros(GIGABYTE, head + bytes.fromhex("80c2d72f")))
    (folder / "manifest.ocdbt").write_bytes(bomb)


def node_of_zeros(folder: Path) -> None:
    base = ts.KvStore.open(f"file://{folder}/").result()
    place = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    _, parent, name, start, length = place.split(":")
    blocks, rest = divmod(int(length) - 18 - 9, 4)
    bomb = node_of("0cdb20de", zeros(blocks << 17, bytes(rest)))
    assert len(bomb) == int(length)
    data = bytearray((folder / parent / name).read_bytes())
    data[int(start) : int(start) + int(length)] = bomb
    (folder / parent / name).write_bytes(data)


def store(folder: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()


def zarr(key: str = "a", chunk: bytes | None = None, **fields: Any) -> Callable[[Path], None]:
    """Changes an array's metadata, and its only chunk."""

    def tamper(folder: Path) -> None:
        found = store(folder)
        old = json.loads(found[f"{key}/.zarray"])
        found[f"{key}/.zarray"] = json.dumps(old | fields)
        if chunk is not None:
            name = ".".join("0" for _ in fields["shape"]) or "0"
            found[f"{key}/{name}"] = chunk

    return tamper


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def zarray_text(content: bytes) -> Callable[[Path], None]:
    return lambda folder: store(folder).write("a/.zarray", content).result() and None


def pipe(name: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / name)

    return tamper


def link(name: str, to: str | None = None) -> Callable[[Path], None]:
    """A link to another place, or to the same content."""

    def tamper(folder: Path) -> None:
        if to is None:
            shutil.copy(folder / name, folder.parent / f"other.{folder.name}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to or folder.parent / f"other.{folder.name}")

    return tamper


def chunks(change: Callable[[str], Callable[[Path], None]]) -> Callable[[Path], None]:
    """Alters a file that holds arrays."""

    def tamper(folder: Path) -> None:
        found = sorted(folder.glob("d/*"))[0]
        change(str(found.relative_to(folder)))(folder)

    return tamper


def array_file(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Alters the file with the numbers, which is the largest."""

    def tamper(folder: Path) -> None:
        files = [f for f in folder.glob("*/d/*") if f.is_file()]
        change(max(files, key=lambda file: file.stat().st_size))

    return tamper


def sparse(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 10 * GIGABYTE)


NESTED = b'{"tree_metadata":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
LISTS = b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"
HUGE = [1 << 14, 1 << 14]
LINK, PIPE = "got a symbolic link", "got a pipe, socket or device"

# What is done, and what the error says: of a protected folder, and of any.
PROTECTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "huge shape": (zarr(shape=HUGE, chunks=HUGE, chunk=zeros(GIGABYTE)), "as the manifest says"),
    "huge shape, nothing stored": (zarr(shape=HUGE, chunks=[1, 1]), "as the manifest says"),
    "huge scalar": (
        zarr("steps", shape=[1 << 27], chunks=[1 << 27], chunk=zeros(GIGABYTE)),
        "as the manifest says",
    ),
    "pipe for selcrypt.json": (pipe("selcrypt.json"), PIPE),
    "/dev/zero for selcrypt.json": (link("selcrypt.json", "/dev/zero"), LINK),
    "link for selcrypt.json": (link("selcrypt.json"), LINK),
    "large selcrypt.json": (sparse("selcrypt.json"), "expected at most 100000000 bytes, got 107"),
    "selcrypt.json of lists": (text("selcrypt.json", LISTS), "lists and objects in 30000010 bytes"),
    "selcrypt.json nested": (text("selcrypt.json", NESTED), "maximum recursion depth"),
}
ANY: dict[str, tuple[Callable[[Path], None], str]] = {
    "large chunk": (zarr(shape=[40, 50], chunks=HUGE, chunk=zeros(GIGABYTE)),
                    "at most the shape [40, 50], got [16384, 16384]"),
    "long chunk": (zarr(shape=[40, 50], chunks=[40, 50], chunk=zeros(GIGABYTE)), "Orbax cannot"),
    "blosc": (zarr(compressor={"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0}),
              "got 'blosc'"),
    "dtype of a size": (zarr("steps", dtype="|V1000000000"), "dtype: expected a numeric dtype"),
    "dtype of arrays": (zarr("steps", dtype=[["x", "<f4", [1 << 28]]]),
                        "dtype: expected a numeric dtype"),
    "nested .zarray": (zarray_text(b"[" * 1_000_000 + b"]" * 1_000_000), "at most 10000 bytes"),
    "nested small .zarray": (zarray_text(b"[" * 4_000 + b"]" * 4_000), "maximum recursion depth"),
    ".zarray of a number": (zarray_text(b"7"), "expected a JSON object, got 7"),
    ".zarray without chunks": (zarray_text(b'{"compressor":null,"shape":[1]}'), "'chunks'"),
    "manifest.ocdbt of zeros": (manifest_of_zeros, "crafted to exhaust memory"),
    "node of zeros": (node_of_zeros, "crafted to exhaust memory"),
    "empty manifest.ocdbt": (text("manifest.ocdbt", b"\0"), "an OCDBT node, version 0"),
    "large manifest.ocdbt": (sparse("manifest.ocdbt"), "expected at most 100000000 bytes"),
    "cut numbers": (array_file(lambda file: os.truncate(file, 5)), "bytes, got 5. It is truncated"),
    "no numbers": (array_file(Path.unlink), "in the folder, got none. Download the whole"),
    "cut manifest.ocdbt": (lambda folder: os.truncate(folder / "manifest.ocdbt", 60),
                           "a frame that is truncated. It is truncated or damaged: download the"),
    "no manifest.ocdbt": (lambda folder: (folder / "manifest.ocdbt").unlink(),
                          "expected arrays, in manifest.ocdbt or in folders of their own, got"),
    "no _METADATA": (lambda folder: (folder / "_METADATA").unlink(),
                     "expected _METADATA in this folder of an Orbax checkpoint, got none. Down"),
    "pipe for _METADATA": (pipe("_METADATA"), PIPE),
    "pipe for a chunk": (chunks(pipe), PIPE),
    "pipe beside": (pipe("more/pipe"), PIPE),
    "/dev/zero for _METADATA": (link("_METADATA", "/dev/zero"), LINK),
    "/dev/zero for a chunk": (chunks(lambda name: link(name, "/dev/zero")), LINK),
    "/dev/zero for _sharding": (link("_sharding", "/dev/zero"), LINK),
    "link for a chunk": (chunks(link), LINK),
    "link for a folder": (lambda folder: (folder / "e").symlink_to(".."), LINK),
    "link to nothing": (link("f", "nothing"), LINK),
    "large _METADATA": (sparse("_METADATA"), "expected at most 100000000 bytes"),
    "_METADATA of lists": (text("_METADATA", LISTS), "lists and objects"),
    **{f"nested {name}": (text(name, NESTED), "maximum recursion depth")
       for name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "_strings.json")},
    "_METADATA without a tree": (text("_METADATA", b"{}"), "Orbax cannot read it"),
    "_METADATA of other things": (text("_METADATA", b'{"tree_metadata":[7]}'), "Orbax cannot"),
}  # fmt: skip
NOT_READING = {"inspect", "grant"}  # the arrays


# --- the process that opens them ------------------------------------------------------------------


def entry_points(
    path: Path, out: Path, like: Any, *, model_id: bytes
) -> dict[str, Callable[[], Any]]:
    """Every function that reads a protected folder."""
    key = level_key(SECRET, model_id, levels=2)
    return {
        "inspect": lambda: inspect_file(path),
        "grant": lambda: issue_grant(path, level=1, secret=SECRET, signer=SIGNING.public),
        "verify": lambda: verify_file(path, signer=SIGNING.public),
        "unlock": lambda: unlock_file(path, out, key),
        "rotate": lambda: rotate_file(path, out, secret=SECRET, signing=SIGNING),
        "open": lambda: open_model(path, key),
        "open like": lambda: open_model(path, key, like=like),
        "load": lambda: Protected.load_orbax(path, like),
    }


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(folder: Path, chosen: list[str]) -> None:
    """Opens folders in some ways; prints a line of JSON for each."""
    like = {"a": np.zeros((40, 50), np.float32), "steps": np.zeros((), np.int64)}
    model_id = bytes.fromhex((folder / "model-id").read_text())
    out = folder / "out"
    for path in [folder / "public", *sorted(folder.glob("protected.*")), *folder.glob("plain.*")]:
        if path.name.startswith("plain"):
            ways: dict[str, Any] = {"protect": lambda p=path: protect_file(p, out, **OPTIONS)}
        else:
            ways = entry_points(path, out, like, model_id=model_id)
        for way, call in ways.items():
            if way not in chosen:
                continue
            before, said = peak(), None
            try:
                call()
            except ValueError as error:
                said = str(error)
            print(json.dumps([path.name, way, said, peak() - before, out.exists()]), flush=True)
            shutil.rmtree(out, ignore_errors=True)


# --- the tests ------------------------------------------------------------------------------------


CASES = [
    *(
        (f"protected.{number}", name, *case)
        for number, (name, case) in enumerate((PROTECTED | ANY).items())
    ),
    *((f"plain.{number}", name, *case) for number, (name, case) in enumerate(ANY.items())),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a plain checkpoint and a protected one."""
    folder = tmp_path_factory.mktemp("hostile")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "plain", tensors())
    protect_file(folder / "plain", folder / "public", signing=SIGNING, **OPTIONS)
    (folder / "model-id").write_text(inspect_file(folder / "public").model_id)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        ["protect", "inspect", "load"],
        pytest.param(
            ["protect", "grant", "verify", "unlock", "rotate", "open", "open like"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["quick", "all"],
)
def opened(folder, request) -> dict[str, dict[str, tuple[str | None, int, bool]]]:
    """Folder → what opened it → the error, the memory it took, and whether there is an output."""
    for old in [*folder.glob("protected.*"), *folder.glob("plain.*"), *folder.glob("other.*")]:
        old.unlink() if old.is_file() else shutil.rmtree(old)
    for name, _, tamper, _ in CASES:
        shutil.copytree(
            folder / name.partition(".")[0].replace("protected", "public"), folder / name
        )
        tamper(folder / name)
    command = [sys.executable, "-W", "error", __file__, str(folder), *request.param]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode == 0, f"{ran.stdout[-500:]}\n{ran.stderr[-3000:]}"
    assert "Traceback" not in ran.stderr, ran.stderr[-3000:]  # of reads that went on
    found: dict[str, dict[str, tuple[str | None, int, bool]]] = {}
    for line in ran.stdout.splitlines():
        name, way, *rest = json.loads(line)
        found.setdefault(name, {})[way] = tuple(rest)
    return found


def test_untouched_they_open(opened):
    assert {way: said for way, (said, _, _) in opened["public"].items() if said} == {}


@pytest.mark.parametrize(
    ("name", "words"), [(c[0], c[3]) for c in CASES], ids=[f"{c[0]} {c[1]}" for c in CASES]
)
def test_a_hostile_folder_is_refused_and_named_and_costs_no_memory(name, words, opened, folder):
    for way, (said, took, left) in opened[name].items():
        if words == "Orbax cannot" and way in NOT_READING and said is None:
            continue
        assert said is not None, way
        assert words in said, f"{way}: {said}"
        assert str(folder / name) in said
        assert said.endswith(".")
        assert ".." not in said.replace("...", "")
        assert took < MOST, f"{way}: {took}"
        assert not left


# --- what is read, and when -----------------------------------------------------------------------


@pytest.fixture
def public(folder, tmp_path) -> Path:
    return shutil.copytree(folder / "public", tmp_path / "public")


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("not yet")


def test_inspect_reads_no_arrays(public, monkeypatch):
    monkeypatch.setattr(OrbaxCheckpoint, "_restore", refuse)
    found = inspect_file(public)
    assert (found.tensors, found.weights) == (2, 2001)
    assert found.file_bytes == sum(f.stat().st_size for f in public.rglob("*") if f.is_file())
    issue_grant(public, level=1, secret=SECRET, signer=SIGNING.public)
    with pytest.raises(AssertionError, match="not yet"):
        verify_file(public)


@pytest.mark.parametrize("way", entry_points(Path(), Path(), None, model_id=bytes(16)))
def test_the_signature_comes_before_orbax(way, public, monkeypatch, tmp_path):
    monkeypatch.setattr(OrbaxCheckpoint, "_tree", property(refuse))
    model_id = bytes.fromhex(json.loads(entries(public)["selcrypt"])["model_id"])
    ways = entry_points(public, tmp_path / "out", tensors(), model_id=model_id)
    with pytest.raises(AssertionError, match="not yet"):
        ways[way]()
    for change in ({"selcrypt.box.1": "AAAA"}, {"selcrypt.signature": "A" * 86 + "=="}):
        (public / "selcrypt.json").write_text(json.dumps(entries(public) | change))
        with pytest.raises(IntegrityError, match="signature does not match") as caught:
            ways[way]()
        assert caught.value.reason == "signature"


def entries(public: Path) -> dict[str, str]:
    return json.loads((public / "selcrypt.json").read_text())


def test_the_folder_itself_may_be_a_link(public, tmp_path):
    (tmp_path / "link").symlink_to(public)
    assert verify_file(tmp_path / "link").tensors == 2


def test_a_path_may_go_up(public, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    key = level_key(SECRET, bytes.fromhex(inspect_file(public).model_id), levels=2)
    unlock_file("../public", "../out", key)
    assert OrbaxCheckpoint("../out").tensors.keys() == {"a", "steps"}


@pytest.mark.parametrize("zarr3", [False, True], ids=["zarr", "zarr3"])
@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_whatever_orbax_writes_is_read(zarr3, ocdbt, compressed, tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "chunks": jnp.asarray(rng.standard_normal((64, 64)), jnp.bfloat16),
        "list": [np.zeros(3), {"x": np.array([True])}],
        "step": 7,
        # Small, alike and many: what a database compresses most.
        "zeros": {str(number): np.zeros(200, np.float32) for number in range(500)},
    }
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=zarr3, use_ocdbt=ocdbt, use_compression=compressed
    )
    options = jax.tree.map(lambda leaf: ocp.SaveArgs(), tree)
    options["chunks"] = ocp.SaveArgs(chunk_byte_size=1024)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "a", args=ocp.args.PyTreeSave(tree, save_args=options))
    found = OrbaxCheckpoint(tmp_path / "a")
    leaves = named_leaves(tree).leaves
    assert found.tensors.keys() == leaves.keys()
    assert all(found.read(name) == np.asarray(leaf).tobytes() for name, leaf in leaves.items())


READ = """
import sys
from selcrypt_jax._io.orbax import OrbaxCheckpoint
for _ in range(5):
    try:
        OrbaxCheckpoint(sys.argv[1]).tree
    except ValueError as error:
        assert "Orbax cannot read it" in str(error)
    else:
        raise AssertionError
"""


def test_one_damaged_array_leaves_no_read_behind(tmp_path):
    # The others are read meanwhile, and printed a traceback each once nobody waited for them.
    rng = np.random.default_rng(0)
    tree = {str(n): rng.standard_normal((300, 300 if n else 3), np.float32) for n in range(9)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "a", args=ocp.args.PyTreeSave(tree))
    (tmp_path / "a" / "0" / "0.0").write_bytes(b"damaged")
    command = [sys.executable, "-c", READ, str(tmp_path / "a")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    assert "WARNING" not in ran.stderr, ran.stderr


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 128 << 10, 1_000_000])
@pytest.mark.parametrize("noise", [0, 3, 255])
def test_the_bound_of_zstandard(size, noise, tmp_path):
    content = np.random.default_rng(0).integers(0, noise + 1, size).astype(np.uint8)
    metadata = {"shape": [size], "chunks": [size], "dtype": "|u1",
                "compressor": {"id": "zstd", "level": 3}}  # fmt: skip
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/", "metadata": metadata,
            "store_data_equal_to_fill_value": True}  # fmt: skip
    array = ts.open(spec, create=True).result()
    array.write(content).result()
    frame = (tmp_path / "0").read_bytes()
    assert size <= zstd_bound(frame) <= size + (2 << 17)
    assert zstd_bound(frame * 2) == 2 * zstd_bound(frame)
    assert zstd_bound(bytes.fromhex("502a4d1802000000") + b"ab" + frame) == zstd_bound(frame)
    for damaged in (frame[:-1], frame[:5], frame + b"x"):
        with pytest.raises(ValueError, match="Zstandard"):
            zstd_bound(damaged)


def test_the_bound_of_zeros():
    assert zstd_bound(zeros(GIGABYTE)) == GIGABYTE
    assert zstd_bound(b"") == 0


@given(st.binary(max_size=200))
def test_the_bound_of_anything(data):
    with contextlib.suppress(ValueError):
        assert zstd_bound(bytes.fromhex("28b52ffd") + data) >= 0


def test_files_are_read_within_bounds(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f").write_bytes(b"abc")
    assert regular_files(tmp_path) == {"e/f": 3}
    file = tmp_path / "e" / "f"
    assert read_regular(file, 3) == b"abc"
    assert read_regular(file, 2, 1, 3) == b"bc"
    with pytest.raises(ValueError, match="f: expected at most 2 bytes, got 3"):
        read_regular(file, 2)
    with pytest.raises(ValueError, match="f: expected 9 bytes or more, got 3"):
        read_regular(file, 9, 1, 9)
    with pytest.raises(ValueError, match="expected a regular file, got a folder"):
        read_regular(tmp_path / "e", 9)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_regular(tmp_path / "nothing", 9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
