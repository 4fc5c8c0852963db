"""Unusual outputs: the input itself, links, folders, pipes, names, and existing files."""

import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest
from crash_server import COMMANDS, INDEX, TEMPORARY, Scene, contents, files, run

NEW = ("protect", "unlock", "rotate")


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
    with pytest.raises(ValueError, match="expected a different file from the input"):
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
            with pytest.raises(
                (ValueError, FileExistsError), match=r"different file|already exists"
            ):
                run(command, path, output, force=True, **scene.options)
    assert files(tmp_path) == before


def test_the_output_is_the_file_of_scores(small, tmp_path):
    scene = Scene(small, "protect", tmp_path)
    scores = shutil.copyfile(small.scores, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="expected a different file from the input"):
        run("protect", scene.input, scores, importance=scores, force=True)
    assert scores.read_bytes() == small.scores.read_bytes()


@pytest.mark.parametrize("command", NEW)
def test_an_existing_output_needs_force(command, small, no_work, tmp_path):
    scene = Scene(small, command, tmp_path)
    scene.output.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="already exists"):
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
        with pytest.raises(FileExistsError, match="already exists"):
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
        with pytest.raises(IsADirectoryError, match="expected a file as the output, got a folder"):
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


@pytest.mark.parametrize("name", ["with space", "ключ ☂ é", "-x", "é" * 127, "a\nb"])
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
