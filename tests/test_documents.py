"""What the documents show runs: the README's example and the notebooks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import selcrypt_jax as sj

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    # A process of its own: readers do not have this suite's strict settings.
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_example_of_the_readme():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run(example)


def test_names_in_the_readme_exist():
    (section,) = re.findall(
        r"## What there is\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL
    )
    named = set(re.findall(r"`(?:selcrypt_jax\.)?([A-Za-z]\w*)(?:\.\w+)*`", section))
    here = {*dir(sj), *dir(sj.importance), *dir(sj.LosslessCipher)}
    parts = {"DnCNN", "models", "run"}  # of selcrypt_jax.models and of Cipher
    assert named - parts - here == set()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebook(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "bit-exact: True" in run("\n".join(code))
