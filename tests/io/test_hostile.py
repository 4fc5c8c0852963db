"""Files by somebody who means harm: what they cost, and what is said of them."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from selcrypt_jax import IntegrityError, Secret, inspect_file, level_key, open_model, protect_file
from selcrypt_jax._io.strict_json import json_object

SECRET = Secret(bytes(range(32)))


def save(path: Path, tree) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    plain = save(tmp_path / "plain", {"w": rng.standard_normal((64, 64)).astype(np.float32)})
    protect_file(plain, tmp_path / "public", secret=SECRET, levels=2)
    return tmp_path / "public"


def key_of(path: Path):
    return level_key(SECRET, bytes.fromhex(inspect_file(path).model_id), levels=2)


def test_links_and_pipes_are_refused_before_anything_is_read(folder, tmp_path):
    key = key_of(folder)
    assert open_model(folder, key)["w"].shape == (64, 64)
    (tmp_path / "elsewhere").write_bytes(b"{}")
    for name in ("selcrypt.json", "_METADATA", "more"):
        for make, what in (
            (lambda path: path.symlink_to(tmp_path / "elsewhere"), "a symbolic link"),
            (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
            (os.mkfifo, "a pipe or device"),
        ):
            path = folder / name
            before = path.read_bytes() if path.exists() else None
            path.unlink(missing_ok=True)
            make(path)
            # Without a file of that name it is no Orbax checkpoint at all.
            expected = f"got {what}|expected one .*safetensors"
            with pytest.raises(ValueError, match=expected):
                open_model(folder, key)
            path.unlink()
            if before is not None:
                path.write_bytes(before)
    assert open_model(folder, key)["w"].shape == (64, 64)


def test_other_shapes_are_refused_before_arrays_are_made(folder, tmp_path):
    """Zeros of 2 GB take some kilobytes on a disk."""
    metadata = (folder / "selcrypt.json").read_bytes()
    bomb = save(tmp_path / "bomb", {"w": np.zeros((1 << 14, 1 << 13), np.float32)})
    (bomb / "selcrypt.json").write_bytes(metadata)
    program = (
        "import sys, resource\n"
        "from selcrypt_jax import open_model, inspect_file\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "inspect_file(sys.argv[2])\n"
        "before = peak()\n"
        "try:\n"
        "    open_model(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, bomb, folder], capture_output=True, text=True, timeout=100
    )
    message, megabytes = done.stdout.strip().splitlines()
    assert "tensor 'w': expected ('F32', (64, 64)) as the manifest says" in message
    assert int(megabytes) < 100
    with pytest.raises(IntegrityError) as caught:
        open_model(bomb)
    assert caught.value.reason == "table"


def test_deep_metadata_are_an_error_of_one_line(folder):
    text = (folder / "_METADATA").read_text()
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    (folder / "_METADATA").write_text(text[:-1] + ', "more": ' + deep + "}")
    with pytest.raises(ValueError, match="Orbax cannot read it"):
        open_model(folder)
    for deep in (b"[" * 100_000, b'{"a":' * 100_000):
        (folder / "selcrypt.json").write_bytes(deep)
        with pytest.raises(ValueError, match=r"selcrypt\.json"):
            open_model(folder)


def test_the_largest_metadata(folder):
    with open(folder / "selcrypt.json", "r+b") as file:
        file.truncate(100_000_001)  # sparse
    with pytest.raises(ValueError, match="expected at most 100000000 bytes"):
        open_model(folder)


@pytest.mark.parametrize("text", [b"[],", b"{},", b"[[]],"])
def test_json_that_would_fill_the_memory(tmp_path, text):
    """30 MB of empty lists would take 900 MB."""
    inside = b'{"a":[' + text * (30_000_000 // len(text)) + b"0]}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(inside).to_bytes(8, "little") + inside)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected at most \d+ lists and objects in"):
            inspect_file(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(inside)
    finally:
        tracemalloc.stop()


def test_brackets_in_text_are_no_lists():
    value = {"a": "[" * 1_000_000, "b\\": '"[{' * 100_000}
    assert json_object(json.dumps(value).encode(), "x") == value
