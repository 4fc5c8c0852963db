"""The server that runs commands to be killed, and the checkpoints they run on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import crash_server
import pytest
from crash_server import Checkpoint, Server, checkpoint, has_unnamed_files

from selcrypt_jax._io.safetensors import SafetensorsFile


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-W", "ignore", crash_server.__file__]  # JAX warns of every fork
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Server(process, tmp_path_factory.mktemp("log") / "errors")
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("small"), outputs=4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """20 MB, which take some time to write."""
    return checkpoint(tmp_path_factory.mktemp("large"), outputs=512)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("several"), outputs=4, shards=3)


@pytest.fixture
def unnamed(tmp_path: Path) -> None:
    if not has_unnamed_files(tmp_path):
        pytest.skip("on this file system, a file has a name while it is written")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads a tensor."""
    real = SafetensorsFile.read

    def read(self: SafetensorsFile, name: str) -> bytearray:
        if "scores" in self.path.name:
            pytest.fail("the scores were read before the output was looked at")
        pytest.fail("a tensor was read before the output was looked at")
        return real(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", read)
