"""Outputs that are either complete or absent, whatever happens in between."""

import errno
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .places import check_folder_name

_SUFFIX = ".selcrypt-tmp"
# Errors of file systems (network, container) that do not support a call at all.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY}

# Errors if a file cannot be linked: no links, or no access through /proc.
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.ENOENT, errno.EMLINK}


@contextmanager
def new_file(
    path: str | os.PathLike[str], *, force: bool = False, private: bool = False, keep: bool = True
) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name only when the block ends.

    The data are on disk before the name is. After an exception, there is no file, or the old
    one. On Linux the new file has no name while it is written, so that even a killed process
    leaves nothing behind (except, with `force`, in the moment in which a complete file waits to
    replace another one). On other systems a file ``.NAME.XXXX.selcrypt-tmp`` may then remain; it
    does no harm.

    Args:
        path: the file's path. With `force`, a link is followed, and stays a link.
        force: replace an existing file.
        private: only its owner may read and write a new file, from the first byte on; otherwise
            it gets the permissions that the umask allows.
        keep: a replaced file keeps its permissions and, if the system allows it, its owner and
            group (not its hard links).

    Yields:
        A buffered, seekable binary file to write to.

    Raises:
        FileExistsError: the file exists and `force` is not set, or it appeared in the meantime.
        OSError: the folder is missing or not writable; or writing failed, for example because
            the disk is full.
        ValueError: the path is a pipe or device.

    Warns:
        UserWarning: the file system lets more people read the file than it should.
    """
    with new_files() as create:
        yield create(path, force=force, private=private, keep=keep)


@contextmanager
def new_files() -> Iterator[Callable[..., BinaryIO]]:
    """Several such files, which appear together when the block ends, or not at all.

    Yields:
        A function that takes the arguments of `new_file`, and returns a file.

    Raises:
        The errors of `new_file`. If one file fails to get its name, those that already have one are
        removed again; one that replaced an older file stays, and the error says so.
    """
    outputs: list[_NewFile] = []

    def create(path: str | os.PathLike[str], **options: bool) -> BinaryIO:
        outputs.append(_NewFile(Path(path), **options))
        return outputs[-1].file  # pyright: ignore[reportReturnType] - a BinaryIO in all but name

    try:
        yield create
        for output in outputs:
            output.finish()
        for output in outputs:
            output.appear()
    except BaseException as error:
        stayed = [str(output.target) for output in outputs if not output.undo()]
        if stayed and isinstance(error, OSError):
            alone = f"only {' and '.join(stayed)} was replaced"
            text = str(error.strerror).replace("nothing was written", alone)
            raise OSError(error.errno, text, error.filename) from error
        raise
    finally:
        for output in outputs:
            output.close()
    for folder in dict.fromkeys(output.target.parent for output in outputs):
        _sync_names(folder)


class _NewFile:
    """A file that has no name yet, or a temporary one."""

    def __init__(
        self, path: Path, *, force: bool = False, private: bool = False, keep: bool = True
    ) -> None:
        self.target, self._old = _check_target(path, force)
        self._force, self._appeared = force, False
        self._mode = 0o600 if private else None
        if self._old is not None and (keep or not private):
            self._mode = stat.S_IMODE(self._old.st_mode) & 0o777
        with _blame(self.target):
            # Never more permissive than the result. What the umask removes is only visible on a
            # file that was made with all permissions.
            closed = self._mode is not None
            self._descriptor, self._temporary = _open(self.target, 0o600 if closed else 0o666)
        self._raw = _Output(self._descriptor, "wb")
        self._raw.target = self.target
        # Not a `with`, which after an exception would write out the rest for nothing.
        self.file = io.BufferedWriter(self._raw)

    def finish(self) -> None:
        """Flushes the data to disk, and sets the permissions."""
        self.file.flush()
        with _blame(self.target):
            if self._mode is not None:
                _give(self._descriptor, self._mode, self._old, self.target)
            _sync(self._descriptor)

    def appear(self) -> None:
        """Gives the file its name."""
        with _blame(self.target):
            self._temporary = self._temporary or _name_file(
                self._descriptor, self.target, self._force
            )
            if self._temporary is not None:
                self._raw.close()  # some systems cannot rename open files
                _rename(self._temporary, self.target, self._force)
                self._temporary = None
        self._appeared = True

    def undo(self) -> bool:
        """Removes the name again, unless it replaced a file; whether nothing of it is left."""
        if not self._appeared:
            return True
        if self._old is None:
            self.target.unlink(missing_ok=True)
        return self._old is None

    def close(self) -> None:
        """Closes the file, and removes its temporary name if it still has one."""
        self._raw.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """A folder to fill, which appears under its name only when the block ends.

    Args:
        path: the folder's path. Nothing may exist there yet, not even an empty folder.
        private: only its owner may enter it.

    Yields:
        The folder ``.NAME.XXXX.selcrypt-tmp`` beside it, private while it is filled. It
        is removed after an exception; a killed process leaves it behind.

    Raises:
        FileExistsError: something of this name already exists.
        NotADirectoryError: see `check_folder_name`.
        OSError: the parent folder is missing or not writable, or writing failed.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):
        raise _exists(target, "Remove it, or name another folder")
    check_folder_name(target)
    _check_parent(target)
    temporary = _sibling(target)
    with _blame(target):
        temporary.mkdir()
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask allows, without reading it
        with _blame(target):
            closed = _set_mode(temporary, mode & ~0o077)
        if private and not closed:
            _warn(target, "folder")
        yield temporary
        with _blame(target):
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync_path(Path(folder, name))
                _sync_path(Path(folder))
            if not private:
                _set_mode(temporary, mode)
            try:
                # A rename doesn't merge: it fails if files have appeared there.
                temporary.rename(target)
            except OSError:
                if os.path.lexists(target):
                    raise _appeared(target) from None
                raise
    except BaseException:
        import shutil  # slow to import; readers do not need it

        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_names(target.parent)


class _Output(io.FileIO):
    """Adds the file's name to errors: that of a full disk has none."""

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


def _check_target(path: Path, force: bool) -> tuple[Path, os.stat_result | None]:
    """The path to write to, and the state of the file there."""
    path = path.absolute()  # the block may change the working folder
    try:
        old = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        old = None
    if old is not None and stat.S_ISDIR(old.st_mode):
        text = "expected a file as the output, got a folder. Name a file in it"
        raise IsADirectoryError(errno.EISDIR, text, str(path))
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise ValueError(
            f"{path}: expected a regular file as output, got a pipe or device. Write a file, "
            "and pass it on when it is complete."
        )
    if not force and os.path.lexists(path):
        raise _exists(path, "Name another file, or replace it with force (--force)")
    # Followed, so that a link to a model on a larger disk stays a link.
    target = Path(os.path.realpath(path)) if force else path
    _check_parent(target)
    return target, old


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not parent.is_dir():
        text = "no such folder for the output; create it first"
        raise FileNotFoundError(errno.ENOENT, text, str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        text = "the folder for the output is read-only; name another one"
        raise PermissionError(errno.EACCES, text, str(parent))


def _open(target: Path, mode: int) -> tuple[int, Path | None]:
    """A descriptor, and the temporary name if the file has one."""
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed and os.path.isdir("/proc/self/fd"):  # needed to name the file later
        try:
            return os.open(target.parent, os.O_WRONLY | unnamed, mode), None
        except OSError as error:
            # Errors of file systems and kernels that do not support it.
            if error.errno not in _UNKNOWN | {errno.EISDIR, errno.ENOENT}:
                raise
    temporary = _sibling(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(temporary, flags, mode), temporary


def _give(descriptor: int, mode: int, old: os.stat_result | None, target: Path) -> None:
    """Sets the permissions of a new file, and the owner and group of the one that it replaces."""
    new = os.fstat(descriptor)
    if old is not None and hasattr(os, "fchown") and (old.st_uid, old.st_gid) != new[4:6]:
        # Only root can set the owner. If the group cannot be set, another group gets no access.
        for owner in ((old.st_uid, old.st_gid), (-1, old.st_gid)):
            with suppress(OSError):
                os.fchown(descriptor, *owner)
                break
        else:
            mode &= ~0o070
    if not _set_mode(descriptor, mode):
        _warn(target, "file")


def _set_mode(file: int | Path, mode: int) -> bool:
    """Sets permissions, if the file system has any; returns whether nobody else has access."""
    actual = stat.S_IMODE(os.stat(file).st_mode)
    if actual == mode:
        return True
    try:
        os.chmod(file, mode)
    except OSError as error:
        if error.errno not in _UNKNOWN | {errno.EPERM}:
            raise
        return not actual & ~mode & 0o077
    return True


def _warn(target: Path, kind: str) -> None:
    warnings.warn(
        f"{target}: others may read this {kind}: its file system does not allow changing its "
        "permissions. Move it to one that does.",
        stacklevel=2,
    )


def _name_file(descriptor: int, target: Path, force: bool) -> Path | None:
    """Gives an unnamed file its name; or a temporary one, which is returned, to replace another."""
    name = _sibling(target) if force else target
    # Opened for its path alone: a folder may be writable but not readable.
    folder = os.open(target.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    try:
        # With a folder's descriptor, since without one Python calls link(2), which would link
        # the link in /proc.
        os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        raise _appeared(target) from None
    except OSError as error:
        if error.errno not in _UNKNOWN | _NO_LINKS:
            raise
        return _copied(descriptor, target)
    finally:
        os.close(folder)
    return name if force else None


def _copied(descriptor: int, target: Path) -> Path:
    """Copies the file to a temporary name if it cannot be linked, or not through /proc."""
    import shutil

    made = os.fstat(descriptor)
    temporary = _sibling(target)
    try:
        with (
            open(f"/proc/self/fd/{descriptor}", "rb") as source,
            open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as copy,
        ):
            shutil.copyfileobj(source, copy)
            copy.flush()
            _give(copy.fileno(), stat.S_IMODE(made.st_mode), made, target)
            _sync(copy.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _rename(temporary: Path, target: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, target)  # unlike a rename, it replaces nothing
        except OSError:  # the file exists, or the file system does not support links
            if os.path.lexists(target):
                raise _appeared(target) from None
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)


def _sibling(target: Path) -> Path:
    # Truncated, since names have a limit of 255 bytes, and a character takes up to 4.
    return target.with_name(f".{target.name[:40]}.{os.urandom(4).hex()}{_SUFFIX}")


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:  # if unsupported, nothing more can be done
            raise


def _sync_path(path: Path) -> None:
    if os.name != "nt":  # Windows can only sync files that are open for writing
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Flushes new names to disk, if the folder may be opened."""
    try:
        _sync_path(folder)
    except PermissionError:
        pass
    except OSError as error:
        text = (
            f"{error.strerror}; all data were written, but the disk does not confirm the names in "
            "this folder, so a power failure may undo them. Check the disk"
        )
        raise OSError(error.errno, text, str(folder)) from error


def _exists(path: Path, advice: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"the output already exists. {advice}", str(path))


def _appeared(path: Path) -> FileExistsError:
    return _exists(path, "It appeared in the meantime; nothing was written")
