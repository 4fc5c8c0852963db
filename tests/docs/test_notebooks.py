"""The notebooks in colab/: saved as they ran, run again, and able to install the package."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ALL = sorted((ROOT / "colab").glob("*.ipynb"))
NOTEBOOKS = pytest.mark.parametrize("notebook", ALL, ids=lambda path: path.name)


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def install_cell(notebook):
    return "".join(code_cells(notebook)[0]["source"])


@NOTEBOOKS
def test_notebook_is_saved_as_it_ran(notebook):
    cells = code_cells(notebook)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))  # all of them, in order, in a new kernel
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error", output["evalue"]
        assert output.get("name") != "stderr", output["text"]
    assert notebook.stat().st_size < 300_000


def test_all_notebooks_install_in_the_same_way():
    own = re.compile(r"^(EXTRAS|NEEDED) = .*$", re.MULTILINE)
    assert len({own.sub("", install_cell(notebook)) for notebook in ALL}) == 1


def what_it_installs(notebook, monkeypatch):
    """Runs the install cell where nothing is installed; returns what it passes to pip."""
    commands = []
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [])
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(install_cell(notebook), {})
    ((*start, target),) = commands
    assert start == [sys.executable, "-m", "pip", "install", "-q"]
    path, bracket, extras = target.partition("[")
    return Path(path), bracket + extras


@NOTEBOOKS
@pytest.mark.parametrize(
    "folder", [ROOT, ROOT / "colab", ROOT.parent], ids=["root", "colab", "above"]
)
def test_install_from_a_clone(notebook, folder, monkeypatch, tmp_path):
    if folder == ROOT.parent:  # as on Colab after git clone
        folder = tmp_path
        (folder / "clone").symlink_to(ROOT)
    monkeypatch.chdir(folder)
    path, extras = what_it_installs(notebook, monkeypatch)
    assert path.resolve() == ROOT
    assert extras in ("", "[demo]", "[audit]")


def test_install_from_a_wheel(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "selcrypt_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert what_it_installs(ALL[0], monkeypatch)[0] == wheel


def test_install_without_a_source(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a clone or a wheel"):
        what_it_installs(ALL[0], monkeypatch)


def test_nothing_is_installed_twice(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    for notebook in ALL:
        exec(install_cell(notebook), {})


@pytest.mark.slow
@NOTEBOOKS
def test_notebook(notebook, tmp_path):
    # A process of its own: readers do not have this suite's strict settings.
    code = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-exact: True" in done.stdout
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
