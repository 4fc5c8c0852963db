"""The whole comparison of speed and memory: ``python benchmarks/compare.py --out DIR``.

Writes ``DIR/performance.json`` and ``DIR/performance.md``, after every section, and prints the
latter. The sections:

- transform: encrypting and decrypting a tree in memory, beside AES-256-GCM and others;
- file: opening a protected file, as whole processes, beside CryptoTensors and tensorizer;
- random: random bits, beside JAX's generators;
- pss: a step of learning importance, beside one of training;
- forward: networks that decrypt inside of the program, beside the same in the clear;
- scaling: how time, work and memory grow with weights, share and devices, and what compiles.

Each is a process of its own. Contenders run in turns, so that other load meets all of them, and
the tables show medians; first calls and peaks of memory are those of a process for each
contender. ``--quick`` shows on tiny sizes that all works, in some minutes, with such a process for
the first contender of each case alone; ``--large`` adds a billion weights, in need of 20 GB and
hours.

The peers: ``pip install -e '.[bench]'``, and for tensorizer, which needs PyTorch, any interpreter
that has it (``--tensorizer-python``). One that is missing is a row that says so.
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
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def tensorizer_version(interpreter: str) -> str:
    """Of the package in another interpreter."""
    program = "import importlib.metadata as m; print(m.version('tensorizer'))"
    try:
        result = subprocess.run(
            [interpreter, "-P", "-c", program], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return result.stdout.strip()


def cpu_model() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(options: Options) -> dict[str, str]:
    """On what is measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": f"{cpu_model()}, {cores} cores",
        "Python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }
    found["tensorizer"] = tensorizer_version(options.tensorizer_python)
    found["runs"] = f"{options.repeats} of each contender, in turns"
    if options.quick:
        found["sizes"] = "tiny ones (--quick): these times say nothing"
    return found


def measured(section: str, options: Options) -> tuple[list[Row], dict[str, str]]:
    """The rows of a section, and how to read them; runs in a process of its own."""
    module = importlib.import_module(MODULES[section])
    return module.rows(options), module.NOTES


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--sections", default=",".join(MODULES), help="some of them, with commas between"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--large", action="store_true", help="also a billion weights")
    parser.add_argument("--repeats", type=count, help="runs; default: 7, with --quick 3")
    parser.add_argument(
        "--tensorizer-python",
        default=sys.executable,
        metavar="PATH",
        help="a Python that has tensorizer (default: this one)",
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
