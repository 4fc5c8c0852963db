"""Outputs are complete or absent: errors, kills, full disks, links, pipes, permissions."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from selcrypt_jax._io import atomic as _atomic
from selcrypt_jax._io.atomic import new_file, new_files, new_folder
from selcrypt_jax._io.places import check_output, writable_folder

REAL_OPEN = os.open


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["unnamed", "no O_TMPFILE", "refused"])
def way(request, monkeypatch):
    """All ways to make a file that has no name yet."""
    if request.param == "no O_TMPFILE":
        monkeypatch.delattr(os, "O_TMPFILE")
    if request.param == "refused":

        def refuse(path, flags, *args, **kwargs):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(path))
            return REAL_OPEN(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)
    return request.param


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out", "a b", "é" * 127, "-x"])
def test_the_file_appears_at_the_end(name, force, way, tmp_path):
    path = tmp_path / name
    with new_file(path, force=force) as file:
        file.write(b"....three")
        file.seek(0)
        file.write(b"one ")
        assert file.tell() == 4
        assert not path.exists()
        assert names(tmp_path) == [] or way != "unnamed"
    assert path.read_bytes() == b"one three"
    assert names(tmp_path) == [name]


def test_large_writes_are_not_collected(way, tmp_path):
    with new_file(tmp_path / "out") as file:
        file.write(bytes(1 << 20))
        assert os.fstat(file.fileno()).st_size == 1 << 20


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_remains_after_an_error(error, force, way, tmp_path):
    path = tmp_path / "out"
    if force:
        path.write_bytes(b"old")
    with pytest.raises(error, match=r"^mine$"), new_file(path, force=force) as file:  # noqa: PT012
        file.write(b"new")
        raise error("mine")
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or path.read_bytes() == b"old"


def test_an_existing_file_needs_force(way, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"the output already exists.*/out"), new_file(path):
        pytest.fail("no work before the check")
    assert path.read_bytes() == b"old"
    with new_file(path, force=True) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_kept(way, tmp_path):
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="in the meantime"), new_file(path) as file:  # noqa: PT012
        file.write(b"new")
        path.write_bytes(b"of another")
    assert path.read_bytes() == b"of another"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("appears", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.ENOENT, errno.EOPNOTSUPP])
def test_file_systems_without_links(number, force, appears, way, umask, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out"
    if force:
        path.write_bytes(b"old")
        path.chmod(0o640)
    if appears and not force:
        with pytest.raises(FileExistsError, match="appeared in the meantime"), new_file(path):
            path.write_bytes(b"of another")
    else:
        with new_file(path, force=force) as file:
            file.write(b"new")
    assert path.read_bytes() == (b"of another" if appears and not force else b"new")
    assert mode_of(path) == (0o640 if force else 0o644)
    assert names(tmp_path) == ["out"]
    with new_file(tmp_path / "private", private=True) as file:
        file.write(b"key")
    assert mode_of(tmp_path / "private") == 0o600


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions(mask, mode, way, umask, tmp_path):
    umask(mask)
    path = tmp_path / "out"
    with new_file(path):
        pass
    assert mode_of(path) == mode
    path.chmod(0o640)
    with new_file(path, force=True):
        pass
    assert mode_of(path) == 0o640
    with new_folder(tmp_path / "folder") as folder:
        assert mode_of(folder) == 0o700
    assert mode_of(tmp_path / "folder") == 0o777 & ~mask


def test_links(way, tmp_path):
    (tmp_path / "disk").mkdir()
    path, real = tmp_path / "link", tmp_path / "disk" / "real"
    path.symlink_to("disk/real")
    with pytest.raises(FileExistsError), new_file(path):
        pytest.fail("a link to nothing is a name too")
    for content in (b"new", b"newer"):
        with new_file(path, force=True) as file:
            file.write(content)
        assert path.is_symlink()
        assert real.read_bytes() == content
    assert names(tmp_path / "disk") == ["real"]


def test_paths_are_those_of_the_start(way, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_folder("folder/") as folder, new_file("out") as file:
        monkeypatch.chdir("elsewhere")
        file.write(b"1")
        (folder / "inside").write_bytes(b"2")
    assert names(tmp_path) == ["elsewhere", "folder", "out"]
    assert names(tmp_path / "folder") == ["inside"]
    assert names(tmp_path / "elsewhere") == []


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    reader, writer = os.pipe()
    table = [
        (tmp_path, IsADirectoryError, "expected a file as the output, got a folder"),
        (tmp_path / "gone" / "out", FileNotFoundError, "no such folder .* create it first.*gone'$"),
        (tmp_path / "file" / "out", FileNotFoundError, "no such folder"),
        (tmp_path / "pipe", ValueError, "expected a regular file as output, got a pipe"),
        ("/dev/null", ValueError, "expected a regular file as output"),
        (f"/dev/fd/{writer}", ValueError, "expected a regular file as output"),
        (tmp_path / "loop", OSError, "symbolic links"),
    ]
    for path, error, words in table:
        for force in (False, True):
            with pytest.raises(error, match=words), new_file(path, force=force):
                pytest.fail("no work before the check")
    os.close(reader)
    os.close(writer)
    assert names(tmp_path) == ["file", "loop", "pipe"]


def test_a_read_only_folder(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # who may write everywhere, except on a read-only file system
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match="is read-only"), new_file(tmp_path / "out"):
        pytest.fail("no work before the check")
    with pytest.raises(PermissionError, match="is read-only"), new_folder(tmp_path / "out"):
        pytest.fail("no work before the check")
    tmp_path.chmod(0o700)


UNKNOWN = [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS]


def failing(monkeypatch, name, number, only=lambda _: True):
    """A system call that fails on some files."""
    real = getattr(os, name)

    def call(file, *args, **kwargs):
        if only(file):
            raise OSError(number, os.strerror(number))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, name, call)


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("number", UNKNOWN)
@pytest.mark.parametrize("only", [is_folder, lambda _: True], ids=["folders", "everything"])
def test_a_file_system_that_syncs_nothing(number, only, way, tmp_path, monkeypatch):
    failing(monkeypatch, "fsync", number, only)
    with new_file(tmp_path / "out") as file:
        file.write(b"1")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "in").write_bytes(b"2")
    assert (tmp_path / "out").read_bytes() == b"1"
    assert names(tmp_path) == ["folder", "out"]


def test_a_folder_that_fails_to_sync_is_said_to_be_written(way, tmp_path, monkeypatch):
    failing(monkeypatch, "fsync", errno.EIO, is_folder)
    words = (
        r"Input/output error; all data were written, but .* a power failure may undo them. Check"
    )
    with pytest.raises(OSError, match=words), new_file(tmp_path / "out") as file:
        file.write(b"1")
    assert (tmp_path / "out").read_bytes() == b"1"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    real = os.open

    def closed(path, flags, *args, **kwargs):
        if os.path.isdir(path) and not flags & (os.O_PATH | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", closed)
    for content in (b"1", b"2"):
        with new_file(tmp_path / "out", force=True) as file:
            file.write(content)
    assert (tmp_path / "out").read_bytes() == b"2"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_whose_permissions_are_given(number, way, umask, tmp_path, monkeypatch):
    real = os.open  # as the mount says, whatever is asked for
    given = 0o755
    opened = lambda path, flags, mode=0o777, **more: real(path, flags, given, **more)  # noqa: E731
    monkeypatch.setattr(os, "open", opened)
    for call in ("chmod", "fchmod"):
        failing(monkeypatch, call, number)
    path = tmp_path / "out"
    with pytest.warns(UserWarning, match="out: others may read this file: its file system"):  # noqa: SIM117
        with new_file(path, private=True) as file:
            file.write(b"1")
    assert path.read_bytes() == b"1"
    with new_file(path, force=True) as file:  # no warning: it was as open before
        file.write(b"2")
    given = 0o600
    with new_file(tmp_path / "other", private=True) as file:
        file.write(b"3")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o644])
def test_what_waits_is_not_more_open_than_what_it_replaces(mode, way, umask, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(mode)
    with new_file(path, force=True) as file:
        file.write(b"weights")
        file.flush()
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~mode & 0o077 == 0
    assert mode_of(path) == mode
    with new_file(tmp_path / "new", private=True) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    assert mode_of(tmp_path / "new") == 0o600
    with new_file(path, force=True, private=True):
        pass
    assert mode_of(path) == mode  # its owner chose it
    with new_file(path, force=True, private=True, keep=False):
        pass
    assert mode_of(path) == 0o600
    with new_folder(tmp_path / "closed", private=True):
        pass
    assert mode_of(tmp_path / "closed") == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_and_group_of_what_is_replaced(way, tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.chown(path, 1234, 2345)
    with new_file(path, force=True):
        pass
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (1234, 2345, 0o640)
    failing(monkeypatch, "fchown", errno.EPERM)  # as for anybody else
    with new_file(path, force=True):
        pass
    assert (path.stat().st_gid, mode_of(path)) == (0, 0o600)  # our group was not let in before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("fails", ["fsync", "link", "replace"])
def test_files_that_belong_together_appear_together(fails, force, way, tmp_path, monkeypatch):
    old = {"a": b"old a", "b": b"old b"} if force else {}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    calls, real = [], getattr(os, fails)

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, fails, second_fails)
    with contextlib.suppress(OSError), new_files() as create:
        for name in ("a", "b"):
            create(tmp_path / name, force=force).write(name.encode())
        assert names(tmp_path) == sorted(old) or way != "unnamed"
    monkeypatch.undo()
    found = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    together = found in ({"a": b"a", "b": b"b"}, old)
    assert together or (force and fails != "fsync" and found == {"a": b"a", "b": b"old b"})


def test_what_was_replaced_before_another_failed_is_named(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
    failing(monkeypatch, "replace", errno.EIO, lambda path: ".b." in str(path))
    words = r"error; only .*/a was replaced: '.*/b'"
    with pytest.raises(OSError, match=words), new_files() as create:  # noqa: PT012
        for name in ("a", "b"):
            create(tmp_path / name, force=True).write(b"new")


def test_an_error_of_the_disk_at_the_end(way, tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "out"
    with pytest.raises(OSError, match=r"error; nothing was written: '.*/out'"), new_file(path):
        pass
    assert names(tmp_path) == []
    with pytest.raises(OSError, match=r"error; nothing was written: '.*/out'"), new_folder(path):
        pass
    assert names(tmp_path) == []


def child(code, folder):
    """A process with this module, without the package's __init__, which starts JAX."""
    start = (
        "import sys, types, os; p = types.ModuleType('selcrypt_jax'); "
        "p.__path__ = [sys.argv[1]]; sys.modules['selcrypt_jax'] = p\n"
        "from selcrypt_jax._io.atomic import new_file, new_folder\n"
        # Ignored by all that is started by a shell in the background, as this suite may be.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start + code, str(Path(_atomic.__file__).parent.parent)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_while_writing(block, number, folder):
    process = child(
        f"{block}\n    file.write(bytes(1 << 20)); print('ready', flush=True); signal.pause()",
        folder,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("force", [False, True])
def test_a_killed_process_leaves_nothing(number, force, tmp_path):
    if force:
        (tmp_path / "out").write_bytes(b"old")
    kill_while_writing(f"with new_file('out', force={force}) as file:", number, tmp_path)
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or (tmp_path / "out").read_bytes() == b"old"


@pytest.mark.parametrize(
    "block",
    [
        "del os.O_TMPFILE\nwith new_file('out') as file:",
        "with new_folder('out') as folder, open(folder / 'x', 'wb') as file:",
    ],
)
def test_what_a_kill_may_leave_is_in_nobodys_way(block, tmp_path, monkeypatch):
    kill_while_writing(block, signal.SIGKILL, tmp_path)
    (left,) = names(tmp_path)
    assert left.startswith(".out.")
    assert left.endswith(".selcrypt-tmp")
    monkeypatch.chdir(tmp_path)
    with new_folder("out") as folder, new_file(folder / "x"):
        pass
    assert names(tmp_path) == [left, "out"]


@pytest.mark.parametrize("size", [1, 1 << 20])  # of a write: buffered, and not
@pytest.mark.parametrize("way", ["", "del os.O_TMPFILE"])
def test_a_full_disk(size, way, tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    process = child(
        f"{way}\nimport resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        f"with new_file('out', force=True) as file:\n    for _ in range({(1 << 20) // size}):"
        f" file.write(bytes({size}))",
        tmp_path,
    )
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    last = error.splitlines()[-1]
    assert last == f"OSError: [Errno 27] File too large; nothing was written: '{tmp_path}/out'"
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "a b"
    with new_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"1")
        assert not path.exists()
        assert folder.parent == tmp_path
    assert names(tmp_path) == ["a b"]
    assert (path / "deep" / "file").read_bytes() == b"1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_folder_remains_after_an_error(error, tmp_path):
    with pytest.raises(error, match=r"^mine$"), new_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "file").write_bytes(b"1")
        raise error("mine")
    assert names(tmp_path) == []


def test_folders_are_never_merged(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="in the meantime"), new_folder(path) as folder:  # noqa: PT012
        (folder / "file").write_bytes(b"new")
        path.mkdir()
        (path / "other").write_bytes(b"old")
    assert names(path) == ["other"]
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "out/", "file", "empty", "link", ".", ".."):
        with pytest.raises(FileExistsError, match="already exists"), new_folder(tmp_path / name):
            pytest.fail("no work before the check")
    with pytest.raises(FileNotFoundError, match="no such folder"), new_folder(path / "a" / "b"):
        pytest.fail("no work before the check")
    assert names(tmp_path) == ["empty", "file", "link", "out"]


def test_a_folder_is_not_called_like_a_file(tmp_path):
    for name in ("out.safetensors", "OUT.JSON", "out.key/"):
        with pytest.raises(NotADirectoryError, match="got the name of a"):  # noqa: SIM117
            with new_folder(tmp_path / name):
                pytest.fail("no work before the check")
        with pytest.raises(NotADirectoryError, match="got the name of a"):
            writable_folder(tmp_path / name)
    assert not names(tmp_path)
    for name in ("v1.0", "model.ckpt", "plain"):
        with new_folder(tmp_path / name):
            pass
    (tmp_path / "old.json").mkdir()
    writable_folder(tmp_path / "old.json")  # made by somebody else, or before


def test_an_output_is_no_input(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"")
    (tmp_path / "soft").symlink_to("in")
    os.link(path, tmp_path / "hard")
    (tmp_path / "other").write_bytes(b"")
    for name in ("in", "soft", "hard", "../" + tmp_path.name + "/in"):
        with pytest.raises(ValueError, match=r"different file from the input, got .*/in"):
            check_output(tmp_path / name, tmp_path / "other", path)
    check_output(tmp_path / "other", path, tmp_path / "gone")
    check_output(tmp_path / "gone", path, tmp_path / "gone")
    check_output(tmp_path / "gone")
