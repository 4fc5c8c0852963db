"""Time to open a protected file, as whole processes: ``python benchmarks/bench_unlock.py``.

The file is an 80 MB VGG19 in float32, or with ``--large`` a 696 MB transformer in bfloat16;
``--protect`` passes options on to ``selcrypt protect``.

It is compared with CryptoTensors (``pip install cryptotensors``), which encrypts the whole file
with AES-GCM, and with reading an unprotected file. Every row is a process, from start to end. The
processes run in turns (so a change in the load of the machine affects all), with the files in the
page cache, and the table shows medians. ``selcrypt unlock`` writes a file, the others read arrays
into memory. All files are in a temporary folder; TMPDIR says where.
"""

import argparse
import base64
import importlib
import importlib.metadata
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from _options import count
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

CRYPTOTENSORS = """\
import sys
from cryptotensors import register_direct_key_provider
from cryptotensors.numpy import load_file
register_direct_key_provider(files=[sys.argv[2]])
load_file(sys.argv[1])
"""
OPEN_MODEL = """\
import sys
from selcrypt_jax import open_model
open_model(sys.argv[1], sys.argv[2])
"""
SAFETENSORS = """\
import sys
from safetensors.numpy import load_file
load_file(sys.argv[1])
"""
NAMES = ("cryptotensors", "unlock", "open_model", "safetensors", "python")
LEVELS = 5

Tensors = dict[str, np.ndarray]


class Contender(NamedTuple):
    """A row of the table: a command, and its output file if it has one."""

    command: list[str | Path]
    output: Path | None = None

    def seconds(self) -> float:
        """The wall time of one run; an earlier output is removed first."""
        if self.output is not None:
            self.output.unlink(missing_ok=True)
        start = time.perf_counter()
        run(*self.command)
        return time.perf_counter() - start


def run(*command: str | Path) -> None:
    """Runs a command, which must succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def python(program: str, *arguments: Path, interpreter: str = sys.executable) -> Contender:
    """A Python program without output; -P: with the installed packages, not this folder's."""
    return Contender([interpreter, "-P", "-c", program, *arguments])


def reader(program: str, original: Path, *arguments: Path) -> Contender:
    """A program for a library that supports bfloat16 only once NumPy does."""
    with safe_open(original, framework="np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return python(("import ml_dtypes\n" if "BF16" in kinds else "") + program, *arguments)


def vgg19() -> Tensors:
    """Random float32 parameters in the shapes and under the names of PyTorch's VGG19 with BN."""
    rng = np.random.default_rng(0)
    tensors: Tensors = {}

    def affine(name: str, *shape: int) -> None:
        scale = np.float32(math.sqrt(2 / math.prod(shape[1:])))
        tensors[f"{name}.weight"] = scale * rng.standard_normal(shape, np.float32)
        tensors[f"{name}.bias"] = np.float32(0.1) * rng.standard_normal(shape[0], np.float32)

    def batch_norm(name: str, width: int) -> None:
        lows = {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}
        for part, low in lows.items():
            tensors[f"{name}.{part}"] = np.float32(low) + rng.random(width, np.float32)

    layer, width_before = 0, 3
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            affine(f"features.{layer}", width, width_before, 3, 3)
            batch_norm(f"features.{layer + 1}", width)
            layer, width_before = layer + 3, width  # convolution, normalisation, ReLU
        layer += 1  # pooling
    affine("classifier.0", 512, 512)
    affine("classifier.2", 10, 512)
    return tensors


def transformer() -> Tensors:
    """Random bfloat16 parameters, 348 million, in the shapes of a language model of 22 layers."""
    drawn = 0.02 * np.random.default_rng(0).standard_normal(1_000_003, np.float32)

    def weights(*shape: int) -> np.ndarray:
        return np.resize(drawn.astype(ml_dtypes.bfloat16), shape)

    layer = dict.fromkeys("qkvo", (1024, 1024))
    layer |= {"up": (2816, 1024), "gate": (2816, 1024), "down": (1024, 2816)}
    tensors = {"embed": weights(32000, 1024), "head": weights(32000, 1024)}
    for number in range(22):
        tensors |= {f"{number}.{name}": weights(*shape) for name, shape in layer.items()}
        tensors |= {f"{number}.norm{place}": weights(1024) for place in (1, 2)}
    return tensors


def check(what: str, found: Tensors, expected: Tensors) -> None:
    """Exits unless the arrays equal the originals, bit for bit."""
    same = found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype
        and found[name].shape == value.shape
        and found[name].tobytes() == value.tobytes()
        for name, value in expected.items()
    )
    if not same:
        raise SystemExit(f"{what}: differs from the original.")


def with_cryptotensors(folder: Path, original: Path) -> tuple[Path, Path]:
    """Encrypts every tensor with AES-256-GCM and signs; returns the file and its keys."""
    try:
        cryptotensors = importlib.import_module("cryptotensors")
    except ImportError:
        raise SystemExit("CryptoTensors is missing: pip install cryptotensors") from None
    theirs = importlib.import_module("cryptotensors.numpy")

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()  # not the base64url of other JWKs

    signing = Ed25519PrivateKey.generate()
    public = {"kty": "okp", "alg": "ed25519", "kid": "signing"}
    public["x"] = text(signing.public_key().public_bytes_raw())
    private = public | {"d": text(signing.private_bytes_raw())}
    key = {"kty": "oct", "alg": "aes256gcm", "kid": "master", "k": text(secrets.token_bytes(32))}

    file, keys = folder / "cryptotensors.safetensors", folder / "keys.jwk"
    expected = load_file(original)
    theirs.save_file(expected, file, config={"enc_key": key, "sign_key": private})
    keys.write_text(json.dumps({"keys": [key, public]}))

    for name, stored in load_file(file).items():  # a plain reader sees the ciphertext
        if stored.size and stored.tobytes() == expected[name].tobytes():
            raise SystemExit(f"CryptoTensors: {name} is not encrypted.")
    cryptotensors.register_direct_key_provider(files=[keys])
    check("CryptoTensors", theirs.load_file(file), expected)
    return file, keys


def with_selcrypt(
    folder: Path, original: Path, program: str, options: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Protects with the command; returns the file and the grant of the top level."""
    file, keys = folder / "selcrypt.safetensors", folder / "keys"
    secret, grant = keys / "secret.key", keys / "top.grant"
    run(program, "keygen", "-o", keys)
    protect: list[str | Path] = [program, "protect", original, "-o", file, "--secret", secret]
    protect += ["--signing", keys / "signing.key", "--importance", "l2", "--budget", "0.08"]
    start = time.perf_counter()
    run(*protect, "--levels", str(LEVELS), *options)
    print(f"selcrypt protect: {time.perf_counter() - start:.2f} s\n")
    level = len(importlib.import_module("selcrypt_jax").inspect_file(file).levels)
    run(program, "grant", file, "--level", str(level), "--secret", secret, "-o", grant)
    return file, grant


def contenders(
    folder: Path, original: Path, only: list[str], options: Sequence[str] = ()
) -> tuple[dict[str, Contender], dict[str, Path]]:
    """Makes and checks the requested files; returns the table's rows and the files they read."""
    rows = {"safetensors": reader(SAFETENSORS, original, original), "python": python("pass")}
    files = {"original": original}
    if "cryptotensors" in only:
        file, keys = with_cryptotensors(folder, original)
        rows["cryptotensors"] = reader(CRYPTOTENSORS, original, file, keys)
        files["CryptoTensors"] = file
    if {"unlock", "open_model"} & set(only):
        program = shutil.which("selcrypt", path=str(Path(sys.executable).parent))
        if program is None:
            raise SystemExit("selcrypt is not installed with this Python: pip install .")
        files["selcrypt"], grant = with_selcrypt(folder, original, program, options)
        output = folder / "unlocked.safetensors"
        unlock: list[str | Path] = [program, "unlock", files["selcrypt"], "--grant", grant]
        rows["unlock"] = Contender([*unlock, "-o", output], output)
        rows["open_model"] = python(OPEN_MODEL, files["selcrypt"], grant)
        if "open_model" in only:
            opened = importlib.import_module("selcrypt_jax").open_model(files["selcrypt"], grant)
            check("open_model", opened, load_file(original))
    return {name: rows[name] for name in NAMES if name in only}, files


def compile_in(folder: Path) -> None:
    """Compiles modules for all processes, as after installation, but not beside the sources."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def timings(
    rows: dict[str, Contender], files: dict[str, Path], repeats: int
) -> dict[str, list[float]]:
    """Runs all contenders in turns; returns name → seconds."""
    for file in files.values():
        file.read_bytes()
    for contender in rows.values():
        contender.seconds()  # warm up: libraries into the page cache, modules compiled
        if contender.output and contender.output.read_bytes() != files["original"].read_bytes():
            raise SystemExit("selcrypt unlock: the output differs from the original.")
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, contender in rows.items():
            times[name].append(contender.seconds())
    return times


def compare(rows: dict[str, Contender], files: dict[str, Path], repeats: int) -> None:
    """Runs all contenders in turns and prints the tables."""
    times = timings(rows, files, repeats)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{'process':<16} {'median':>10} {'min':>10}  to CryptoTensors")
    for name, median in medians.items():
        ratio = f"{median / medians['cryptotensors']:.2f}" if "cryptotensors" in medians else "-"
        print(f"{name:<16} {1e3 * median:7.1f} ms {1e3 * min(times[name]):7.1f} ms  {ratio:>16}")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    print(f"\n{'file':<16} {'bytes':>13}  to the original")
    for name, size in sizes.items():
        print(f"{name:<16} {size:13,}  {100 * (size / sizes['original'] - 1):+13.4f} %")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise argparse.ArgumentTypeError(f"{text}: expected a .safetensors file, got {found}")
    try:
        with safe_open(path, framework="np"):
            return path.resolve()
    except (OSError, SafetensorError) as error:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a .safetensors file, got a different or damaged file ({error})"
        ) from None


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=count, default=15, metavar="N", help="timed runs per row (default: 15)"
    )
    parser.add_argument(
        "--checkpoint", type=_file, metavar="PATH", help="a .safetensors file (default: a VGG19)"
    )
    parser.add_argument("--large", action="store_true", help="a transformer instead of VGG19")
    parser.add_argument(
        "--protect",
        type=shlex.split,
        default=[],
        help="further options for selcrypt protect, as one argument",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"the rows to measure, of {', '.join(NAMES)} (default: all)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="bench_unlock") as name:
        folder = Path(name)
        original = folder / "vgg19.safetensors"
        if args.checkpoint is None:
            save_file(transformer() if args.large else vgg19(), original)
        else:
            original = args.checkpoint
        rows, files = contenders(folder, original, args.only, args.protect)
        packages = ["numpy", "safetensors", "cryptography"]
        packages += ["cryptotensors"] if "cryptotensors" in rows else []
        versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
        print(f"Python {sys.version.split()[0]}, {', '.join(versions)}")
        print(f"{os.cpu_count()} CPUs, {args.repeats} runs of each\n")
        compile_in(folder)
        compare(rows, files, args.repeats)


if __name__ == "__main__":
    main()
