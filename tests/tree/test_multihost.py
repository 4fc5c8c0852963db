"""Several processes, each with its own devices, as on several hosts."""

import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from selcrypt_jax import (
    LosslessCipher,
    Protected,
    Secret,
    SigningKey,
    inspect_file,
    level_key,
    open_model,
    protect_file,
    unlock,
    verify_file,
)
from selcrypt_jax._io.arrays import ArraySource

WORKER = Path(__file__).parent.parent / "multihost_worker.py"
SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(32))
pytestmark = pytest.mark.slow


def start(folder, task, count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, WORKER, str(port), str(count), str(index), folder, task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        )
        for index in range(count)
    ]


def together(folder, task, count):
    workers = start(folder, task, count)
    try:
        for index, worker in enumerate(workers):
            out, err = worker.communicate(timeout=300)
            assert worker.returncode == 0, err[-4000:]
            assert json.loads(out.splitlines()[-1]) == {"index": index, "done": task}
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize("count", [2, 4])
def test_the_bits_of_one_process(tmp_path, count):
    together(tmp_path, "bits", count)


@pytest.mark.parametrize("count", [2, 4])
def test_a_checkpoint_goes_through_orbax(tmp_path, count):
    together(tmp_path, "write", count)
    public = tmp_path / "public"
    assert [item.name for item in tmp_path.iterdir()] == ["public"]
    assert verify_file(public, signer=SIGNING.public).files == 1
    together(tmp_path, "read", count)
    # And it is what one process reads and writes.
    model_id = bytes.fromhex(inspect_file(public).model_id)
    key = level_key(SECRET, model_id, level=2, levels=2)
    opened = open_model(public, key)
    conv = np.random.default_rng(9).standard_normal((3, 3, 16, 32), np.float32)  # as the worker's
    assert opened["conv"].tobytes() == conv.tobytes()


def test_processes_that_differ_are_told(tmp_path):
    together(tmp_path, "different", 2)


def test_a_killed_process_loses_nothing(tmp_path):
    before = tmp_path / "before"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(before, {"w": np.arange(10.0)})
    shutil.copytree(before, tmp_path / "copy")
    workers = start(tmp_path, "write-kill", 2)
    try:
        for worker in reversed(workers):
            worker.communicate(timeout=200)  # JAX ends the first one when its partner is gone
        assert workers[1].returncode == -9
        assert workers[0].returncode != 0
    finally:
        for worker in workers:
            worker.kill()
    assert not (tmp_path / "public").exists()
    same = filecmp.dircmp(before, tmp_path / "copy")
    assert not same.diff_files
    assert not same.left_only


def test_orbax_folders_of_one_process(tmp_path):
    tensors = {"w": np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", tensors)
    protect_file(
        tmp_path / "plain",
        tmp_path / "public",
        secret=SECRET,
        levels=[0.5],
        cipher=LosslessCipher(),
    )
    released = Protected.load_orbax(tmp_path / "public", tensors)
    key = level_key(SECRET, released.model_id, level=1, levels=1)
    assert unlock(released, key)["w"].tobytes() == tensors["w"].tobytes()
    released.save_orbax(tmp_path / "again")
    assert open_model(tmp_path / "again", key)["w"].tobytes() == tensors["w"].tobytes()
    with pytest.raises(FileExistsError, match="again"):
        released.save_orbax(tmp_path / "again")
    with pytest.raises(ValueError, match=r"without selcrypt\.json"):
        Protected.load_orbax(tmp_path / "plain", tensors)
    with pytest.raises(FileNotFoundError, match="nothing"):
        Protected.load_orbax(tmp_path / "nothing", tensors)
    with pytest.raises(ValueError, match="Orbax cannot read it"):
        Protected.load_orbax(tmp_path / "public", {"v": np.zeros(3)})


def test_parts_of_a_spread_array_are_read_from_all_of_it(monkeypatch):
    """Reads as in the search for equal tensors; an array is gathered once while it is held."""

    class Spread:
        is_fully_addressable = False
        dtype, shape = np.dtype("float32"), (4,)

    gathered = []

    def gather(array):
        gathered.append(array)
        return np.arange(4, dtype=np.float32)

    monkeypatch.setattr("selcrypt_jax._tree.hosts.gathered", gather)
    source = ArraySource({"w": Spread()})
    part = memoryview(bytearray(8))
    source.read_into("w", 4, part)
    assert np.frombuffer(part, np.float32).tolist() == [1, 2]
    with source.held("w"):
        source.read_into("w", 8, part)
        assert np.frombuffer(source.read("w"), np.float32).tolist() == [0, 1, 2, 3]
    assert np.frombuffer(part, np.float32).tolist() == [2, 3]
    assert len(gathered) == 2
