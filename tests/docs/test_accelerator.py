"""The accelerator benchmark, on the devices of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_it_runs_on_a_cpu_and_could_do_everything(tmp_path):
    subprocess.run(
        [sys.executable, PROGRAM, "--quick", "--out", tmp_path / "out"], check=True, timeout=900
    )
    found = json.loads((tmp_path / "out" / "accelerator.json").read_text())
    assert found["failed"] == []
    assert found["bits"]
    assert all(row["equal"] for row in found["bits"])
    assert len(found["times"]) >= 12
    text = (tmp_path / "out" / "accelerator.md").read_text()
    assert (
        f"Bits identical to the CPU's: {len(found['bits'])} of {len(found['bits'])} cases." in text
    )
