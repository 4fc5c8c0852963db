"""What is distributed: the sdist, the wheel, and the program in its own environment."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import selcrypt_jax as sj

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
# What this suite's own process found in PYTHONPATH must not be found there.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


class Built(NamedTuple):
    sdist: Path
    wheel: Path  # from the sdist
    from_tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    # Without isolation: it then checks that this environment has what the build requires.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    both, alone = tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("alone")
    for arguments in ([*command, both, ROOT], [*command, alone, "--wheel", ROOT]):
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (sdist,), (wheel,), (from_tree,) = both.glob("*.tar.gz"), both.glob("*.whl"), alone.iterdir()
    return Built(sdist, wheel, from_tree)


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def files(folder: str) -> set[str]:
    """Names of the repository's files, except those that Python and the tests leave behind."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_wheel_has_the_package_and_nothing_else(built):
    info = f"selcrypt_jax-{sj.__version__}.dist-info"
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    package = files("selcrypt_jax")
    assert {f"selcrypt_jax/{n}" for n in ("py.typed", "__init__.pyi")} < package
    assert "selcrypt_jax/audit/report.html.jinja" in package
    assert members(built.wheel).keys() == package | {f"{info}/{name}" for name in about}


def test_the_sdist_has_what_builds_and_what_the_tests_read(built):
    with tarfile.open(built.sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    folders = ("selcrypt_jax", "tests", "train", "colab", "docs", "benchmarks")
    top = {path.name for path in ROOT.glob("*.md")}
    top |= {"CITATION.cff", "LICENSE", "Makefile", "mkdocs.yml", "pyproject.toml"}
    expected = top.union(*map(files, folders))
    # The last two are added by the builder.
    assert names == expected | {".gitignore", "PKG-INFO"}


def test_both_ways_give_the_same_wheel(built):
    assert built.wheel.name == built.from_tree.name
    assert members(built.wheel) == members(built.from_tree)


def metadata(wheel: Path) -> Message:
    (text,) = (text for name, text in members(wheel).items() if name.endswith("/METADATA"))
    return email.message_from_bytes(text)


def test_what_a_registry_shows(built):
    about = metadata(built.wheel)
    assert (about["Name"], about["Version"]) == ("selcrypt-jax", sj.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == ">=3.11"
    assert about["Description-Content-Type"] == "text/markdown"
    text = about.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert {"Summary", "Keywords", "Classifier"} <= set(about)
    extras = {"age", "audit", "bench", "demo", "dev", "docs", "networks", "onnx", "test", "train"}
    assert set(about.get_all("Provides-Extra", [])) == extras


# --- installed, with the dependencies of the package alone --------------------------------------


@pytest.fixture(scope="module")
def programs(built, tmp_path_factory) -> Path:
    """A new environment's folder with `python` and `selcrypt`."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    # This environment's pip serves that one, and Python compiles what is imported only: twice as
    # fast as an environment with a pip of its own.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}))
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-compile"]
    done = subprocess.run(
        [*pip, "-q", built.wheel], capture_output=True, text=True, check=False, env=CLEAN
    )
    assert done.returncode == 0, done.stderr
    return programs


def test_a_file_goes_all_the_way(programs, tmp_path):
    def selcrypt(command: str) -> str:
        done = subprocess.run(
            [programs / "selcrypt", *command.split()],
            capture_output=True, text=True, check=False, env=CLEAN, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    kernel = np.random.default_rng(0).standard_normal((64, 32, 3, 3), np.float32)
    save_file({"conv.weight": kernel, "conv.bias": kernel[:, 0, 0, 0]}, tmp_path / "m.safetensors")
    assert selcrypt("version").strip() == sj.__version__
    assert "protect" in selcrypt("--help")
    selcrypt("keygen -o keys")
    secrets = "--secret keys/secret.key --signing keys/signing.key"
    selcrypt(
        f"protect m.safetensors -o p.safetensors {secrets} --budget 0.1 --levels 2 --rest plain"
    )
    selcrypt("grant p.safetensors --level 2 --secret keys/secret.key -o top.grant")
    selcrypt("unlock p.safetensors --grant top.grant -o u.safetensors")
    selcrypt("verify p.safetensors --signer keys/signing.pub")
    changed = load_file(tmp_path / "p.safetensors")["conv.weight"] != kernel
    assert 0.05 < changed.mean() < 0.15
    before, after = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "mu")
    assert after == before


# What needs an extra says which; all else is there without.
IMPORTS = """
import contextlib, importlib.util, io
import numpy as np
import selcrypt_jax as sj
from selcrypt_jax import audit, cli, importance, models

extras = ("dm_pix", "jinja2", "matplotlib", "PIL", "pyrage", "skimage", "sklearn")
assert not [name for name in extras if importlib.util.find_spec(name)]
for module in (sj, audit, importance, models):
    for name in dir(module):
        getattr(module, name)
    print("from", module.__file__)

cli.main(["keygen", "-o", "keys"])
params = {"a": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)}
mask = {"a": np.arange(4096).reshape(64, 64) % 8 == 0}
secret = sj.Secret.read("keys/secret.key")
protected = sj.protect(params, [mask], secret=secret, rest="plain")
protected.save("p.safetensors")
assert not audit.changed(params, protected.params).mask["a"][~mask["a"]].any()
assert not audit.zero_fill(protected.params, mask)["a"][mask["a"]].any()

def message(function, *args, **options):
    try:
        function(*args, **options)
    except ModuleNotFoundError as error:
        return str(error)

assert "pip install '.[audit]'" in message(audit.detect, params, mask, [], seed=0)
key = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
for extra, command in {
    "age": "grant p.safetensors --level 1 --secret keys/secret.key --signer unsigned -o a.grant "
    f"--to {key}",
    "audit,demo": "audit demo -o report",
    "demo": "demo --out out",
}.items():
    with contextlib.redirect_stderr(io.StringIO()) as text:
        assert cli.main(command.split()) == 1
    assert f"pip install '.[{extra}]'" in text.getvalue(), text.getvalue()
"""


def test_names_need_no_extra(programs, tmp_path):
    done = subprocess.run(
        [programs / "python", "-W", "error", "-c", IMPORTS],
        capture_output=True, text=True, check=False, env=CLEAN, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # From the environment, not from the repository.
    places = [line[5:] for line in done.stdout.splitlines() if line.startswith("from ")]
    assert len(places) == 4
    assert all(place.startswith(str(programs.parent)) for place in places), places
