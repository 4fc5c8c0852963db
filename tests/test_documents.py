"""What the documents show runs: the README's example and the notebooks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import selcrypt_jax as sj
from selcrypt_jax import audit
from selcrypt_jax.cli import main

ROOT = Path(__file__).parent.parent


def run(code: str, folder: Path) -> str:
    # A process of its own: readers do not have this suite's strict settings.
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_example_of_the_readme(tmp_path):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"## In ten lines\n+```python\n(.*?)```", text, re.DOTALL)
    run(example, tmp_path)


def test_commands_of_the_readme(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    section = re.findall(r"in five commands\n(.*?)\n## ", text, re.DOTALL)[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    kernel = np.random.default_rng(0).standard_normal((64, 32, 3, 3), np.float32)
    safetensors.numpy.save_file({"conv.weight": kernel}, "model.safetensors")
    for line in commands.splitlines():
        program, *args = line.split()
        assert program == "selcrypt"
        assert main(args) == 0, line
    scope: dict = {}
    exec(example, scope)
    alice = safetensors.numpy.load_file("alice.safetensors")["conv.weight"]
    assert (scope["params"]["conv.weight"] == alice).all()
    assert (alice != kernel).any()


@pytest.mark.slow
def test_training_commands_of_the_readme(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    section = re.findall(r"## Train, learn importance, evaluate\n(.*?)\n## ", text, re.DOTALL)[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for folder in ("photographs", "set12"):
        Path(folder).mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (48, 48), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/0.png")
    main(["keygen", "-o", "keys"])
    short = {
        "train/dncnn.py": "--depth 4 --width 32 --steps 2 --every 1 --batch 8 --patch 24",
        "train/importance.py": "--steps 2 --every 1 --patch 24",
    }
    for line in commands.splitlines():
        program, script, *args = line.split()
        if program == "selcrypt":
            # So few kernels need a larger share to hide among each other.
            args[args.index("--budget") + 1] = "0.5"
            assert main([script, *args]) == 0, line
            continue
        command = [sys.executable, ROOT / script, *args, *short.get(script, "").split()]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    rows = json.loads(Path("levels/levels.json").read_text())
    assert [row["level"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["psnr"] > rows[0]["psnr"]


def test_names_in_the_readme_exist():
    (section,) = re.findall(
        r"## What there is\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL
    )
    named = set(re.findall(r"`(?:selcrypt_jax\.)?([A-Za-z]\w*)(?:\.\w+)*`", section))
    here = {*dir(sj), *dir(sj.importance), *dir(sj.LosslessCipher), *dir(audit)}
    parts = {"DnCNN", "models", "audit", "run"}  # of selcrypt_jax.models and of Cipher
    assert named - parts - here == set()


NOTEBOOKS = pytest.mark.parametrize(
    "notebook", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.name
)


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


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


@pytest.mark.slow
@NOTEBOOKS
def test_notebook(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    code = ["".join(cell["source"]) for cell in code_cells(notebook)]
    assert "bit-exact: True" in run("\n".join(code), tmp_path)
