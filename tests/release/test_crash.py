"""Kills, interrupts, full disks: what protect, unlock and rotate leave behind.

The output is complete or absent, the input is unchanged, and no plaintext is left in an unrequested
file.
"""

import random
import signal
from typing import Any

import pytest
from crash_server import COMMANDS, INDEX, SIGNING, TEMPORARY, Scene, Server, contents, files, run

from selcrypt_jax import (
    IntegrityError,
    verify_file,
)
from selcrypt_jax._io.safetensors import SafetensorsFile

# --- kills ---------------------------------------------------------------------------------------


def run_to_the_end(scene: Scene, server: Server, **options: Any) -> float:
    """The seconds of an undisturbed run, which leaves nothing but its output."""
    status, seconds = server.timed(*scene.args, **scene.options, **options)
    assert status == 0, server.errors
    scene.check(ended=True)
    assert scene.leftovers() == []
    scene.clean()
    return seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_a_few_kills(command, server, large, unnamed, tmp_path):
    """Kills before a read, a write or a name change: at the same places on any machine."""
    scene = Scene(large, command, tmp_path)
    run_to_the_end(scene, server, step=None)
    steps = int(server.errors)
    for step in (steps // 4, steps // 2, steps - 5):
        assert server(*scene.args, **scene.options, step=step) == -signal.SIGKILL
        scene.check()
        assert scene.plaintext() == []
        assert scene.leftovers() == []
        scene.clean()
    run_to_the_end(scene, server)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_fifty_kills_at_any_time(command, server, large, unnamed, tmp_path):
    scene = Scene(large, command, tmp_path)
    durations = [run_to_the_end(scene, server) for _ in range(2)]  # first with cold caches
    rng = random.Random(command)
    hit = 0
    for number in range(50):
        status = server(*scene.args, **scene.options, delay=rng.uniform(0, min(durations)))
        assert status in (0, -signal.SIGKILL), server.errors
        hit += status < 0
        scene.check(ended=status == 0)
        assert scene.plaintext() == []
        assert scene.leftovers() == []
        scene.clean()
        if number % 5 == 0:
            run_to_the_end(scene, server)
    assert hit  # how many depends on what else this machine does


@pytest.mark.parametrize("command", COMMANDS)
def test_kills_before_every_step(command, server, small, unnamed, tmp_path):
    scene = Scene(small, command, tmp_path)
    assert server(*scene.args, **scene.options, step=None) == 0, server.errors
    steps = int(server.errors)
    assert steps > 10
    scene.clean()
    for step in range(steps):
        assert server(*scene.args, **scene.options, step=step) == -signal.SIGKILL, step
        scene.check()
        assert scene.plaintext() == []
        # To replace a file, the new one needs a name of its own for a moment.
        left = scene.leftovers()
        assert len(left) <= (command == "rotate in place")
        for path in left:
            assert path.match(TEMPORARY)
            verify_file(path, signer=SIGNING.public)
        scene.clean()
    assert server(*scene.args, **scene.options) == 0, server.errors
    scene.check(ended=True)


@pytest.mark.parametrize("command", ["protect", "rotate", "rotate in place"])
def test_files_that_have_a_name_while_written_have_no_plaintext(command, server, small, tmp_path):
    scene = Scene(small, command, tmp_path)
    assert server(*scene.args, **scene.options, named=True, step=None) == 0, server.errors
    steps = int(server.errors)
    scene.clean()
    for step in range(steps):
        assert server(*scene.args, **scene.options, named=True, step=step) == -signal.SIGKILL
        scene.check()
        assert scene.plaintext() == []
        assert all(path.match(TEMPORARY) for path in scene.leftovers())
        if scene.output != scene.input:
            scene.output.unlink(missing_ok=True)
    assert len(scene.leftovers()) > 5  # which are in nobody's way
    assert server(*scene.args, **scene.options, named=True) == 0, server.errors
    scene.check(ended=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["protect", "unlock", "rotate"])
def test_kills_before_every_step_of_several_files(command, server, several, unnamed, tmp_path):
    scene = Scene(several, command, tmp_path)
    assert server(*scene.args, **scene.options, step=None) == 0, server.errors
    steps = int(server.errors)
    assert sorted(path.name for path in scene.output.iterdir()) == [
        "model-0.safetensors",
        "model-1.safetensors",
        "model-2.safetensors",
        INDEX,
    ]
    scene.check(ended=True)
    scene.clean()
    empty = 0
    for step in range(steps):
        assert server(*scene.args, **scene.options, step=step) == -signal.SIGKILL, step
        scene.check()
        left = scene.leftovers()
        assert len(left) <= 1
        if left:
            assert left[0].match(TEMPORARY)
            empty += not files(left[0])
            # All tensors of all files have been checked before the first of them has a name.
            for name, data in files(left[0]).items():
                if command == "unlock" and name.endswith(".safetensors"):
                    assert data in scene.original
        if command != "unlock":
            assert scene.plaintext() == []
        scene.clean()
    assert empty > 10  # all the time that it takes to write, nothing is to be seen
    assert server(*scene.args, **scene.options) == 0, server.errors
    scene.check(ended=True)
    assert scene.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted(command, number, server, large, unnamed, tmp_path):
    scene = Scene(large, command, tmp_path)
    for fraction in (0.3, 0.8):
        status, seconds = server.timed(*scene.args, **scene.options)
        assert status == 0, server.errors
        scene.check(ended=True)
        scene.clean()
        status = server(*scene.args, **scene.options, delay=fraction * seconds, signal=number)
        # What is slow to start may be through before.
        ways: tuple[int, ...] = (0, -number)
        if number == signal.SIGINT and status == 1:
            assert "KeyboardInterrupt" in server.errors
            ways = (1,)
        assert status in ways
        scene.check(ended=status == 0)
        assert scene.leftovers() == []
        scene.clean()


# --- errors half way ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_at_every_read(command, error, small, tmp_path, monkeypatch):
    scene = Scene(small, command, tmp_path)
    real = SafetensorsFile._fill
    left = 0

    def read(self: SafetensorsFile, buffer: memoryview, start: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error("no luck")
        real(self, buffer, start)

    reads = 0
    while True:
        left = reads
        with monkeypatch.context() as patched:
            patched.setattr(SafetensorsFile, "_fill", read)
            try:
                run(*scene.args, **scene.options)
                break
            except error:
                pass
        assert contents(scene.input) == scene.before
        assert list(scene.work.iterdir()) == ([scene.input] if scene.input == scene.output else [])
        reads += 1
    assert reads > 5
    scene.check(ended=True)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("named", [False, True])
def test_full_disk(command, named, server, small, tmp_path):
    scene = Scene(small, command, tmp_path)
    assert server(*scene.args, **scene.options) == 0, server.errors
    scene.check(ended=True)
    size = scene.output.stat().st_size
    scene.clean()
    for limit in (0, 4096, size // 2, size - 1):
        assert server(*scene.args, **scene.options, limit=limit, named=named) == 1
        error = server.errors.splitlines()[-1]
        assert f"File too large; nothing was written: '{scene.output}'" in error
        assert contents(scene.input) == scene.before
        assert scene.output == scene.input or not scene.output.exists()
        assert scene.leftovers() == []
    assert server(*scene.args, **scene.options, limit=size + 100, named=named) == 0, server.errors
    scene.check(ended=True)


@pytest.mark.parametrize("command", ["protect", "unlock", "rotate"])
def test_full_disk_with_several_files(command, server, several, tmp_path):
    scene = Scene(several, command, tmp_path)
    for limit in (0, 64, 50_000):
        assert server(*scene.args, **scene.options, limit=limit) == 1
        assert "File too large; nothing was written" in server.errors
        assert contents(scene.input) == scene.before
        assert list(scene.work.iterdir()) == []


def test_damage_in_the_last_tensor_is_found_before_there_is_an_output(small, tmp_path):
    scene = Scene(small, "unlock", tmp_path)
    data = bytearray(scene.input.read_bytes())
    data[-1] ^= 1
    scene.input.write_bytes(data)
    for command in ("unlock", "rotate"):
        with pytest.raises(IntegrityError, match="'table1'") as caught:
            run(command, scene.input, scene.output)
        assert caught.value.reason == "digest"
        assert list(scene.work.iterdir()) == []
    scene.output.write_bytes(b"old")
    for command in ("unlock", "rotate"):
        with pytest.raises(IntegrityError, match="'table1'"):
            run(command, scene.input, scene.output, force=True)
        assert files(scene.work) == {scene.output.name: b"old"}
    with pytest.raises(IntegrityError, match="'table1'"):
        run("rotate in place", scene.input, scene.input)
    assert scene.input.read_bytes() == data
