"""The whole comparison of speed and memory: ``python benchmarks/compare.py --out DIR``.

Writes ``DIR/performance.json`` and ``DIR/performance.md``, after every section, and prints the
latter. The sections:

- transform: encrypting and decrypting a tree in memory, against AES-256-GCM and others;
- file: opening a protected file, as whole processes, against CryptoTensors and tensorizer;
- random: random bits, against JAX's generators;
- pss: a step of learning importance, against a training step;
- forward: networks that decrypt inside the program, against the same in the clear;
- scaling: how time, work and memory grow with weights, share and devices, and compile times.

Each section runs in its own process. Contenders run in turns, so other load affects all of them,
and the tables show medians. First calls and peak memory are measured in a separate process for each
contender. ``--quick`` checks in a few minutes, on tiny sizes, that everything works, with a
separate process only for the first contender of each case. ``--large`` adds a billion weights,
which takes 20 GB and hours.

To install the peers: ``pip install -e '.[bench]'``; for tensorizer, which needs PyTorch, name any
interpreter that has it (``--tensorizer-python``). A missing peer gets a row that says so.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from _measure import in_process
from _options import count
from _rows import Options, Row, write

MODULES = {
    "transform": "_transform",
    "file": "_file",
    "random": "_generators",
    "pss": "_learning",
    "forward": "_forward",
    "scaling": "_scaling",
}
PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "cryptography",
    "flax",
    "optax",
    "safetensors",
    "cryptotensors",
    "jax-chacha-prng",
)


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def tensorizer_version(interpreter: str) -> str:
    """The version of tensorizer in another interpreter."""
    program = "import importlib.metadata as m; print(m.version('tensorizer'))"
    try:
        result = subprocess.run(
            [interpreter, "-P", "-c", program], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return result.stdout.strip()


def cpu_model() -> str:
    """The processor's name according to the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(options: Options) -> dict[str, str]:
    """The machine, the versions and the settings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": f"{cpu_model()}, {cores} cores",
        "Python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }
    found["tensorizer"] = tensorizer_version(options.tensorizer_python)
    found["runs"] = f"{options.repeats} of each contender, in turns"
    if options.quick:
        found["sizes"] = "tiny (--quick): the times are meaningless"
    return found


def measured(section: str, options: Options) -> tuple[list[Row], dict[str, str]]:
    """The rows of a section, and how to read them; runs in its own process."""
    module = importlib.import_module(MODULES[section])
    return module.rows(options), module.NOTES


def main() -> None:
    """Measures the requested sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--sections", default=",".join(MODULES), help="a comma-separated list of sections"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--large", action="store_true", help="also a billion weights")
    parser.add_argument("--repeats", type=count, help="runs; default: 7, with --quick 3")
    parser.add_argument(
        "--tensorizer-python",
        default=sys.executable,
        metavar="PATH",
        help="a Python interpreter that has tensorizer (default: this one)",
    )
    args = parser.parse_args()
    sections = args.sections.split(",")
    unknown = [section for section in sections if section not in MODULES]
    if unknown:
        parser.error(f"--sections: expected some of {', '.join(MODULES)}, got {unknown[0]!r}")
    options = Options(
        repeats=args.repeats or (3 if args.quick else 7),
        quick=args.quick,
        large=args.large,
        tensorizer_python=args.tensorizer_python,
    )
    rows: list[Row] = []
    notes: dict[str, str] = {}
    text = ""
    for section in sections:
        print(f"{section} …", file=sys.stderr, flush=True)
        found, said = in_process(measured, section, options)
        rows += found
        notes |= said
        text = write(args.out, environment(options), rows, notes)
    print(text, end="")


if __name__ == "__main__":
    main()
