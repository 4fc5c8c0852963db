"""Kills, full disks, closed folders and odd outputs: what protect, unlock and rotate leave behind.

The output is whole or absent, the input as it was, and no plaintext lies in a file that nobody
asked for. To be killed, commands run in forks of one server (this file, run as a program), which
has imported all that they need and has not started JAX.
"""

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from selcrypt_jax import (
    Grant,
    IntegrityError,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    level_key,
    protect_file,
    rotate_file,
    unlock_file,
    verify_file,
)
from selcrypt_jax._io import atomic as _atomic
from selcrypt_jax._io.safetensors import SafetensorsFile, header

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(32))
# Sixteen weights, which are one kernel of 4 × 4 in PyTorch's order: 64 bytes in a row. Large, so
# that they are selected at every level, and with all bits of the mantissa in use.
MARKER = (100 * np.random.default_rng(0).standard_normal(16)).astype("<f4")
COMMANDS = ("protect", "unlock", "rotate", "rotate in place")
INDEX = "model.safetensors.index.json"
TEMPORARY = ".*.selcrypt-tmp"


# --- what is run --------------------------------------------------------------------------------


def grant_of(path: Path) -> Grant:
    model_id = bytes.fromhex(inspect_file(path).model_id)
    return Grant(level_key(SECRET, model_id, level=3, levels=3), SIGNING.public)


def run(
    command: str,
    path: Path,
    output: Path | str,
    *,
    importance: Path | None = None,
    force: bool = False,
) -> None:
    """One command in this process."""
    if command == "protect":
        protect_file(
            path,
            output,
            secret=SECRET,
            levels=[0.02, 0.05, 0.08],
            selection=Select(importance=importance),
            signing=SIGNING,
            force=force,
        )
    elif command == "unlock":
        unlock_file(path, output, grant_of(path), force=force)
    elif command == "rotate":
        rotate_file(path, output, secret=SECRET, signing=SIGNING, force=force)
    else:
        rotate_file(path, secret=SECRET, signing=SIGNING)


def patch(holder: Any, name: str, before: Callable[[], None]) -> None:
    """Has something called before a function is."""
    function = getattr(holder, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    setattr(holder, name, patched)


def die_before(step: int | None) -> list[int]:
    """Kills this process before its nth read, write, or change of a name; counts them."""
    count = [0]

    def before() -> None:
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    patch(SafetensorsFile, "_read", before)
    patch(_atomic._Output, "write", before)
    for name in ("link", "rename", "replace", "unlink", "mkdir", "chmod", "fchmod", "fsync"):
        patch(os, name, before)
    return count


def job(options: dict[str, Any]) -> int:
    """What a fork does; its exit status."""
    with open(options.pop("log"), "w") as log:
        os.dup2(log.fileno(), 2)
    if (limit := options.pop("limit", None)) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if (uid := options.pop("uid", None)) is not None:
        os.setuid(uid)
    if options.pop("named", False):
        del os.O_TMPFILE
    count = die_before(options.pop("step")) if "step" in options else None
    try:
        run(options.pop("command"), Path(options.pop("path")), options.pop("output"), **options)
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    if count:
        print(count[0], end="", file=sys.stderr, flush=True)
    return 0


def serve() -> None:
    """A job a line; the answer is how it ended."""
    for line in sys.stdin:
        options = json.loads(line)
        delay, number = options.pop("delay", None), options.pop("signal", signal.SIGKILL)
        start = time.perf_counter()
        child = os.fork()
        if not child:
            os._exit(job(options))
        if delay is not None:
            time.sleep(delay)
            # It has not been waited for, so that its number is nobody else's.
            os.kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, time.perf_counter() - start]), flush=True)


class Server:
    """Runs commands in processes of their own."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def __call__(self, command: str, path: Path, output: Path | str, **options: Any) -> int:
        """The exit status; negative for a signal."""
        return self.timed(command, path, output, **options)[0]

    def timed(
        self, command: str, path: Path, output: Path | str, **options: Any
    ) -> tuple[int, float]:
        """The exit status, and seconds."""
        assert self.process.stdin
        assert self.process.stdout
        options |= {"command": command, "path": path, "output": output, "log": self.log}
        self.process.stdin.write(json.dumps(options, default=str) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds

    @property
    def errors(self) -> str:
        """What the last one wrote."""
        return self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-W", "ignore", __file__]  # JAX warns of every fork
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Server(process, tmp_path_factory.mktemp("log") / "errors")
        assert process.stdin
        process.stdin.close()


# --- what it is run on --------------------------------------------------------------------------


def tensors(number: int, outputs: int) -> dict[str, np.ndarray]:
    """Of 16 KiB an output channel, and a quarter of it that takes no part."""
    rng = np.random.default_rng(number)
    kernel = rng.standard_normal((outputs, 256, 4, 4)).astype("<f4")
    kernel[:: max(outputs // 16, 1), 7] = MARKER.reshape(4, 4)
    plain = rng.standard_normal((outputs, 1024)).astype("<f4")
    return {f"conv{number}.weight": kernel, f"table{number}": plain}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        file.write(header([(n, "F32", a.shape) for n, a in arrays.items()], {"format": "pt"}))
        for array in arrays.values():
            file.write(array.data)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Checkpoint(NamedTuple):
    """A checkpoint, scores for it, and what it is when protected; none of them to be changed."""

    plain: Path
    scores: Path
    public: Path

    @property
    def folder(self) -> bool:
        return self.plain.is_dir()

    def input(self, command: str) -> Path:
        return self.plain if command == "protect" else self.public


def checkpoint(folder: Path, *, outputs: int, shards: int = 0) -> Checkpoint:
    parts = [tensors(number, outputs) for number in range(shards or 2)]
    whole = {name: array for part in parts for name, array in part.items()}
    scores = {n: np.abs(a).max((2, 3), keepdims=True) for n, a in whole.items() if a.ndim == 4}
    result = Checkpoint(
        folder / ("plain" if shards else "plain.safetensors"),
        write(folder / "scores.safetensors", scores),
        folder / ("public" if shards else "public.safetensors"),
    )
    if shards:
        result.plain.mkdir()
        for number, part in enumerate(parts):
            write(result.plain / f"model-{number}.safetensors", part)
        owner = {name: f"model-{n}.safetensors" for n, part in enumerate(parts) for name in part}
        (result.plain / INDEX).write_text(json.dumps({"weight_map": owner}))
    else:
        write(result.plain, whole)
    run("protect", result.plain, result.public, importance=result.scores)
    assert MARKER.tobytes() in b"".join(contents(result.plain).values())
    assert MARKER.tobytes() not in b"".join(contents(result.public).values())
    return result


def contents(path: Path) -> dict[str, bytes]:
    """Of a checkpoint, in one file or several."""
    return files(path) if path.is_dir() else {path.name: path.read_bytes()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("small"), outputs=4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """20 MB, which take a while to write."""
    return checkpoint(tmp_path_factory.mktemp("large"), outputs=512)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("several"), outputs=4, shards=3)


class Scene:
    """One command on a copy of a checkpoint, and what may be seen afterwards."""

    def __init__(self, given: Checkpoint, command: str, folder: Path) -> None:
        self.command, self.original = command, list(contents(given.plain).values())
        self.work = folder / "work"
        self.work.mkdir()
        self.input = folder / given.input(command).name
        if command == "rotate in place":
            self.input = self.work / given.public.name
        (shutil.copytree if given.folder else shutil.copyfile)(given.input(command), self.input)
        self.output = self.work / ("result" if given.folder else "result.safetensors")
        if command == "rotate in place":
            self.output = self.input
        self.before = contents(self.input)
        self.options = {"importance": given.scores} if command == "protect" else {}

    @property
    def args(self) -> tuple[str, Path, Path]:
        return self.command, self.input, self.output

    def leftovers(self) -> list[Path]:
        """What lies beside the output."""
        return [path for path in self.work.iterdir() if path != self.output]

    def plaintext(self) -> list[str]:
        """What holds weights that are encrypted, of all that nobody asked for."""
        ours = self.output.name if self.command == "unlock" else ""
        found = files(self.work).items()
        return [name for name, data in found if MARKER.tobytes() in data and name != ours]

    def check_whole(self) -> None:
        """The output is what a run to the end gives."""
        path = self.output
        if self.command != "unlock":
            verify_file(path, signer=SIGNING.public)
            path = self.work.parent / "opened"
            run("unlock", self.output, path)
        assert list(contents(path).values()) == self.original
        if path != self.output:
            (shutil.rmtree if path.is_dir() else os.unlink)(path)

    def check(self, *, ended: bool = False) -> None:
        """The output is whole, or as before; the input is as before."""
        if self.input == self.output:
            if (now := contents(self.input)) != self.before:
                self.check_whole()
                self.before = now
            else:
                assert not ended
            return
        assert contents(self.input) == self.before
        assert self.output.exists() or not ended
        if self.output.exists():
            self.check_whole()

    def clean(self) -> None:
        for path in [*self.leftovers(), self.output]:
            if path != self.input and path.exists():
                (shutil.rmtree if path.is_dir() else os.unlink)(path)


def has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_WRONLY | os.O_TMPFILE))
    except (OSError, AttributeError):
        return False
    return True


@pytest.fixture
def unnamed(tmp_path: Path) -> None:
    if not has_unnamed_files(tmp_path):
        pytest.skip("on this file system, a file has a name while it is written")


# --- kills --------------------------------------------------------------------------------------


def run_to_the_end(scene: Scene, server: Server, **options: Any) -> float:
    """A run that nothing disturbs, and that leaves nothing but its output; in seconds."""
    status, seconds = server.timed(*scene.args, **scene.options, **options)
    assert status == 0, server.errors
    scene.check(ended=True)
    assert scene.leftovers() == []
    scene.clean()
    return seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_a_few_kills(command, server, large, unnamed, tmp_path):
    """Before a read, a write or a change of a name, and so at the same places on any machine."""
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
    real = SafetensorsFile._read
    left = 0

    def read(self: SafetensorsFile, start: int, stop: int) -> bytearray:
        nonlocal left
        left -= 1
        if left < 0:
            raise error("no luck")
        return real(self, start, stop)

    reads = 0
    while True:
        left = reads
        with monkeypatch.context() as patched:
            patched.setattr(SafetensorsFile, "_read", read)
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


# --- outputs ------------------------------------------------------------------------------------

NEW = ("protect", "unlock", "rotate")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading as much as a tensor is work."""
    real = SafetensorsFile.read

    def read(self: SafetensorsFile, name: str) -> bytearray:
        if "scores" in self.path.name:
            pytest.fail("the scores were read before the output was looked at")
        pytest.fail("a tensor was read before the output was looked at")
        return real(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", read)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("how", ["itself", "link", "hard link", "relative", "dots"])
@pytest.mark.parametrize("command", NEW)
def test_the_output_is_the_input(command, how, force, small, no_work, tmp_path, monkeypatch):
    scene = Scene(small, command, tmp_path)
    monkeypatch.chdir(tmp_path)
    output: Path = tmp_path / "other"
    if how == "itself":
        output = scene.input
    elif how == "link":
        output.symlink_to(scene.input.name)
    elif how == "hard link":
        output.hardlink_to(scene.input)
    elif how == "relative":
        output = Path(scene.input.name)
    else:
        output = Path("work", "..", scene.input.name)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="expected another file than the input"):
        run(command, scene.input, output, force=force, **scene.options)
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", NEW)
def test_the_output_is_the_folder_of_the_input(command, several, no_work, tmp_path, monkeypatch):
    scene = Scene(several, command, tmp_path)
    link = tmp_path / "link"
    link.symlink_to(scene.input.name)
    monkeypatch.chdir(scene.input)
    before = files(tmp_path)
    for output in (scene.input, link, Path(), scene.input / INDEX):
        for path in (scene.input, scene.input / INDEX):
            with pytest.raises((ValueError, FileExistsError), match=r"another file|exists already"):
                run(command, path, output, force=True, **scene.options)
    assert files(tmp_path) == before


def test_the_output_is_the_file_of_scores(small, tmp_path):
    scene = Scene(small, "protect", tmp_path)
    scores = shutil.copyfile(small.scores, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="expected another file than the input"):
        run("protect", scene.input, scores, importance=scores, force=True)
    assert scores.read_bytes() == small.scores.read_bytes()


@pytest.mark.parametrize("command", NEW)
def test_an_existing_output_needs_force(command, small, no_work, tmp_path):
    scene = Scene(small, command, tmp_path)
    scene.output.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="exists already"):
        run(*scene.args, **scene.options)
    assert files(scene.work) == {scene.output.name: b"old"}


@pytest.mark.parametrize("command", NEW)
def test_an_existing_output_is_replaced_by_a_whole_one(command, small, tmp_path, monkeypatch):
    scene = Scene(small, command, tmp_path)
    scene.output.write_bytes(b"old")
    scene.output.chmod(0o640)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*scene.args, force=True, **scene.options)
    assert files(scene.work) == {scene.output.name: b"old"}
    run(*scene.args, force=True, **scene.options)
    assert stat.S_IMODE(scene.output.stat().st_mode) == 0o640
    scene.check(ended=True)
    assert scene.leftovers() == []


@pytest.mark.parametrize("command", NEW)
def test_kills_while_an_output_is_replaced(command, server, small, unnamed, tmp_path):
    scene = Scene(small, command, tmp_path)
    scene.output.write_bytes(b"old")
    assert server(*scene.args, **scene.options, force=True, step=None) == 0, server.errors
    for step in range(int(server.errors)):
        scene.output.write_bytes(b"old")
        status = server(*scene.args, **scene.options, force=True, step=step)
        assert status == -signal.SIGKILL
        assert contents(scene.input) == scene.before
        if scene.output.read_bytes() != b"old":
            scene.check(ended=True)
        for path in scene.leftovers():
            assert path.match(TEMPORARY)
            path.replace(scene.output)  # it was about to be: it is whole
            scene.check(ended=True)


@pytest.mark.parametrize("command", NEW)
def test_an_existing_folder_stays(command, several, no_work, tmp_path):
    scene = Scene(several, command, tmp_path)
    scene.output.mkdir()
    for force in (False, True):
        with pytest.raises(FileExistsError, match="exists already"):
            run(*scene.args, force=force, **scene.options)
    assert list(scene.work.iterdir()) == [scene.output]
    assert list(scene.output.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["null", "pipe"])
@pytest.mark.parametrize("command", NEW)
def test_pipes_and_devices(command, kind, force, small, no_work, tmp_path):
    scene = Scene(small, command, tmp_path)
    output = Path(os.devnull) if kind == "null" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(output)
    before = output.stat()
    with pytest.raises(ValueError, match="expected a regular file as output, got a pipe or device"):
        run(command, scene.input, output, force=force, **scene.options)
    assert (output.stat().st_mode, output.stat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("command", NEW)
def test_standard_output(command, server, small, tmp_path):
    scene = Scene(small, command, tmp_path)
    # It is a pipe there; if the command wrote to it, the answer would be no JSON.
    assert server(command, scene.input, "/dev/stdout", **scene.options) == 1
    assert "/dev/stdout: expected a regular file as output, got a pipe" in server.errors


@pytest.mark.parametrize("command", NEW)
def test_a_folder_that_is_missing(command, small, several, no_work, tmp_path):
    for number, given in enumerate((small, several)):
        folder = tmp_path / str(number)
        folder.mkdir()
        scene = Scene(given, command, folder)
        with pytest.raises(FileNotFoundError, match=r"no such folder for the output.*missing"):
            run(command, scene.input, scene.work / "missing" / "out", **scene.options)
        assert list(scene.work.iterdir()) == []


@pytest.mark.parametrize("command", NEW)
def test_a_folder_in_place_of_the_output(command, small, no_work, tmp_path):
    scene = Scene(small, command, tmp_path)
    for force in (False, True):
        with pytest.raises(IsADirectoryError, match="expected a file as output, got a folder"):
            run(command, scene.input, scene.work, force=force, **scene.options)
    assert list(scene.work.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder(command, server, small, several):
    # Not in the folder of the test, which is closed to the user that root becomes.
    with tempfile.TemporaryDirectory(prefix="selcrypt test") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for number, given in enumerate((small, several)):
            if given.folder and command == "rotate in place":
                continue
            place = folder / str(number)
            place.mkdir()
            scene = Scene(given, command, place)
            if command == "protect":
                scene.options = {"importance": shutil.copyfile(given.scores, place / "scores")}
            scene.work.chmod(0o555)
            options = scene.options if os.getuid() else {**scene.options, "uid": 65534}
            assert server(*scene.args, **options) == 1
            assert "the folder for the output is read-only; name another one" in server.errors
            scene.work.chmod(0o755)
            assert contents(scene.input) == scene.before
            assert scene.leftovers() == []


@pytest.mark.parametrize("name", ["with space.safetensors", "ключ ☂ é", "-x", "é" * 127, "a\nb"])
@pytest.mark.parametrize("command", NEW)
def test_names_of_outputs(command, name, small, several, tmp_path, monkeypatch):
    for number, given in enumerate((small, several)):
        folder = tmp_path / str(number)
        folder.mkdir()
        scene = Scene(given, command, folder)
        monkeypatch.chdir(scene.work)
        run(command, Path("..", scene.input.name), name, **scene.options)
        assert os.listdir(scene.work) == [name]
        scene.output = scene.work / name
        scene.check(ended=True)


def test_rotation_in_place_through_a_link(small, tmp_path):
    scene = Scene(small, "rotate in place", tmp_path)
    scene.input.chmod(0o640)
    link = tmp_path / "link.safetensors"
    link.symlink_to("work/" + scene.input.name)
    run("rotate in place", link, link)
    assert link.is_symlink()
    assert stat.S_IMODE(scene.input.stat().st_mode) == 0o640
    scene.check(ended=True)
    assert scene.leftovers() == []


if __name__ == "__main__":
    serve()
