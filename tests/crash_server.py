"""Runs commands in their own processes, to be killed; and makes the checkpoints they run on.

The processes are forks of one server (this file, run as a program), which has imported everything
that they need and has not started JAX.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selcrypt_jax import (
    Grant,
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
    """Calls something before each call of a function."""
    function = getattr(holder, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    setattr(holder, name, patched)


def die_before(step: int | None) -> list[int]:
    """Kills this process before its nth read, write, or name change; counts them."""
    count = [0]

    def before() -> None:
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    patch(SafetensorsFile, "_fill", before)
    patch(_atomic._Output, "write", before)
    for name in ("link", "rename", "replace", "unlink", "mkdir", "chmod", "fchmod", "fsync"):
        patch(os, name, before)
    return count


def job(options: dict[str, Any]) -> int:
    """The work of a fork; returns its exit status."""
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
    """Reads one job per line; answers how it ended."""
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
    """Runs commands in their own processes."""

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
        """The output of the last one."""
        return self.log.read_text()


# --- what it is run on ---------------------------------------------------------------------------


def tensors(number: int, outputs: int) -> dict[str, np.ndarray]:
    """Tensors with 16 KiB per output channel; a quarter of them is not selected."""
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
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Checkpoint(NamedTuple):
    """A checkpoint, its scores, and its protected form; none of them may be changed."""

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
    """The tensors of a checkpoint, in one file or several."""
    return files(path) if path.is_dir() else {path.name: path.read_bytes()}


class Scene:
    """One command on a copy of a checkpoint, and what it leaves behind."""

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
        """The other files in the output's folder."""
        return [path for path in self.work.iterdir() if path != self.output]

    def plaintext(self) -> list[str]:
        """Unrequested files that contain weights that should be encrypted."""
        ours = self.output.name if self.command == "unlock" else ""
        found = files(self.work).items()
        return [name for name, data in found if MARKER.tobytes() in data and name != ours]

    def check_whole(self) -> None:
        """The output is the same as after a complete run."""
        path = self.output
        if self.command != "unlock":
            verify_file(path, signer=SIGNING.public)
            path = self.work.parent / "opened"
            run("unlock", self.output, path)
        assert list(contents(path).values()) == self.original
        if path != self.output:
            (shutil.rmtree if path.is_dir() else os.unlink)(path)

    def check(self, *, ended: bool = False) -> None:
        """The output is complete or unchanged; the input is unchanged."""
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


if __name__ == "__main__":
    serve()
