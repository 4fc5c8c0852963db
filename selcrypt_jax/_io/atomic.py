"""Outputs that are whole or absent, whatever happens meanwhile."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_SUFFIX = ".selcrypt-tmp"


@contextmanager
def new_file(
    path: str | os.PathLike[str], *, force: bool = False, private: bool = False
) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends, and only then.

    The bytes are on the disk before the name is. After an exception, there is no file, or the old
    one. On Linux the new file has no name while it is written, so that even a killed process
    leaves nothing behind (but for the moment, with `force`, in which a whole file waits to take
    the place of another); elsewhere a file ``.NAME.XXXX.selcrypt-tmp`` may stay then, which is in
    nobody's way.

    Args:
        path: of the file. With `force`, a link is followed, and stays a link.
        force: replace an existing file, whose permissions are kept (not its hard links). A new
            file has the permissions that the umask gives it.
        private: only its owner may read and write the file, from the first byte on.

    Yields:
        A buffered binary file, to write and to seek.

    Raises:
        FileExistsError: there is such a file and no `force`, or it appeared meanwhile.
        OSError: the folder is missing or closed to us; or the disk is full, and so on, while
            writing.
        ValueError: a pipe or device.
    """
    target, mode = _check_target(Path(path), force)
    mode = 0o600 if private else mode
    with _blame(target):
        descriptor, temporary = _open(target, 0o600 if private else 0o666)
    raw = _Output(descriptor, "wb")
    raw.target = target
    try:
        # Not a `with`, which after an exception would write out what is left, to no purpose.
        file = io.BufferedWriter(raw)
        yield file  # pyright: ignore[reportReturnType] - a BinaryIO in all but name
        file.flush()
        with _blame(target):
            if mode is not None:
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
            temporary = temporary or _name_file(descriptor, target, force)
            if temporary is not None:
                raw.close()  # some systems don't rename open files
                _rename(temporary, target, force)
                temporary = None
        _sync(target.parent)
    finally:
        raw.close()
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which appears under its name when the block ends, and only then.

    Args:
        path: of the folder. There must be nothing of this name yet, not even an empty folder.

    Yields:
        The folder ``.NAME.XXXX.selcrypt-tmp`` beside it, closed to others while it is filled. It
        is removed after an exception; a killed process leaves it.

    Raises:
        FileExistsError: there is something of this name already.
        OSError: the folder around it is missing or closed to us, or the writing failed.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):
        raise _exists(target, "Remove it, or name another folder")
    _check_parent(target)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask gives, without asking it
        temporary.chmod(mode & ~0o077)
        yield temporary
        with _blame(target):
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            temporary.chmod(mode)
            try:
                # A rename doesn't merge: it fails if there are files there meanwhile.
                temporary.rename(target)
            except OSError:
                if os.path.lexists(target):
                    raise _appeared(target) from None
                raise
    except BaseException:
        import shutil  # with all that it knows to pack, which readers need not wait for

        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def check_output(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Checks that an output isn't one of the inputs, by whatever name or link.

    Raises:
        ValueError: it is.
    """
    for path in inputs:
        try:
            same = os.path.samefile(output, path)
        except FileNotFoundError:
            continue  # what doesn't exist is nothing else
        if same:
            raise ValueError(
                f"{os.fspath(output)}: expected another file than the input, got "
                f"{os.fspath(path)} again. Name another output."
            )


class _Output(io.FileIO):
    """Says whose error it is: that of a full disk has no file name."""

    target: Path

    def write(self, data: Any, /) -> int | None:
        with _blame(self.target):
            return super().write(data)


@contextmanager
def _blame(target: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        text = f"{error.strerror}; nothing was written"
        if error.errno == errno.ENOSPC:
            text += ". Free some space, or write elsewhere"
        raise OSError(error.errno, text, str(target)) from error


def _check_target(path: Path, force: bool) -> tuple[Path, int | None]:
    """Where to write, and the permissions to keep."""
    path = path.absolute()  # the block may change the working folder
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        text = "expected a file as output, got a folder. Name a file in it"
        raise IsADirectoryError(errno.EISDIR, text, str(path))
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(
            f"{path}: expected a regular file as output, got a pipe or device. Write a file, "
            "and pass it on when it is whole."
        )
    if not force and os.path.lexists(path):
        raise _exists(path, "Name another file, or replace it with force (--force)")
    # Followed, since a link to a model on a larger disk is to stay one.
    target = Path(os.path.realpath(path)) if force else path
    _check_parent(target)
    return target, None if mode is None else mode & 0o777


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not parent.is_dir():
        text = "there is no such folder for the output; make it first"
        raise FileNotFoundError(errno.ENOENT, text, str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        text = "the folder for the output is read-only; name another one"
        raise PermissionError(errno.EACCES, text, str(parent))


def _open(target: Path, mode: int) -> tuple[int, Path | None]:
    """A descriptor, and the temporary name if it has one."""
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed and os.path.isdir("/proc/self/fd"):  # without it, no way to a name later
        try:
            return os.open(target.parent, os.O_WRONLY | unnamed, mode), None
        except OSError as error:
            # How file systems and kernels say that they don't know it.
            unknown = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
            if error.errno not in unknown:
                raise
    temporary = _sibling(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(temporary, flags, mode), temporary


def _name_file(descriptor: int, target: Path, force: bool) -> Path | None:
    """Gives an unnamed file its name; a temporary one, which is returned, to replace another."""
    name = _sibling(target) if force else target
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # With a folder's descriptor, since without one Python calls link(2), which would link
        # the link in /proc.
        os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        raise _appeared(target) from None
    finally:
        os.close(folder)
    return name if force else None


def _rename(temporary: Path, target: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, target)  # unlike a rename, it replaces nothing
        except OSError:  # there is such a file, or links are unknown to the file system
            if os.path.lexists(target):
                raise _appeared(target) from None
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)


def _sibling(target: Path) -> Path:
    # Cut, since names have a limit of 255 bytes, and a character up to 4.
    return target.with_name(f".{target.name[:40]}.{os.urandom(4).hex()}{_SUFFIX}")


def _sync(path: Path) -> None:
    if os.name != "nt":  # where only files that are open for writing can be synced
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exists(path: Path, advice: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"the output exists already. {advice}", str(path))


def _appeared(path: Path) -> FileExistsError:
    return _exists(path, "It appeared meanwhile; nothing was written")


def writable_folder(path: Path) -> None:
    """Makes a folder if it is missing, and tries it: better now than after minutes of work.

    Raises:
        OSError: it cannot be made or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".selcrypt-probe"
    probe.touch()
    probe.unlink()
