"""Section "file": opening a protected VGG19, as whole processes; `bench_unlock` has the details."""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_unlock
import numpy as np
from _rows import Options, Row
from bench_unlock import Contender
from safetensors.numpy import load_file, save_file

NOTES = {
    "file": (
        "Whole processes, from start to end, that open an 80 MB VGG19 with 8 % of its kernels "
        "encrypted; ratios are relative to CryptoTensors. unlock writes a file, the others read "
        "arrays into memory. tensorizer needs PyTorch, and importing it takes most of its time: "
        "see the row for the imports alone. Peaks are for the whole process."
    )
}
BASELINE = "cryptotensors"
TENSORIZER = "tensorizer"
IMPORTS = "import tensorizer"
# It reads an .npz file: the interpreter with tensorizer may lack safetensors.
WRITE = """\
import sys
from pathlib import Path
import numpy as np, torch
from tensorizer import EncryptionParams, TensorSerializer
key = EncryptionParams.random()
Path(sys.argv[3]).write_bytes(key.key)
serializer = TensorSerializer(sys.argv[2], encryption=key)
tensors = np.load(sys.argv[1])
serializer.write_state_dict({name: torch.from_numpy(tensors[name]) for name in tensors})
serializer.close()
"""
READ = """\
import sys
from pathlib import Path
from tensorizer import DecryptionParams, TensorDeserializer
key = DecryptionParams.from_key(Path(sys.argv[2]).read_bytes())
tensors = dict(TensorDeserializer(sys.argv[1], device="cpu", encryption=key))
"""
SAVE = """\
import numpy as np
np.savez(sys.argv[3], **{name: tensor.detach().numpy() for name, tensor in tensors.items()})
"""
# A process started by a large one counts the parent's memory as its own for a moment: this small
# one stands between them.
LAUNCHER = """\
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mb(contender: Contender) -> float:
    """The peak memory of the process."""
    if contender.output is not None:
        contender.output.unlink(missing_ok=True)
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, contender.command)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6


def with_tensorizer(
    folder: Path, original: Path, interpreter: str
) -> tuple[dict[str, Contender], dict[str, Path]]:
    """Encrypts with tensorizer, in an interpreter that has it, and checks the result."""
    plain, back = folder / "plain.npz", folder / "back.npz"
    file, key = folder / "vgg19.tensors", folder / "tensorizer.key"
    expected = load_file(original)
    np.savez(plain, **expected)  # pyright: ignore[reportArgumentType]
    for program, *paths in ((WRITE, plain, file, key), (READ + SAVE, file, key, back)):
        bench_unlock.run(
            *bench_unlock.python(str(program), *paths, interpreter=interpreter).command
        )
    with np.load(back) as found:
        bench_unlock.check("tensorizer", dict(found), expected)
    if any(leaf.tobytes() in file.read_bytes() for leaf in expected.values() if leaf.size > 64):
        raise RuntimeError("tensorizer: a tensor is not encrypted.")
    rows = {
        TENSORIZER: bench_unlock.python(READ, file, key, interpreter=interpreter),
        IMPORTS: bench_unlock.python("import tensorizer", interpreter=interpreter),
    }
    return rows, {TENSORIZER: file}


def missing_peers(options: Options) -> dict[str, str]:
    """Name → why it cannot run."""
    missing = {}
    if importlib.util.find_spec("cryptotensors") is None:
        missing[BASELINE] = "not installed: pip install cryptotensors"
    try:
        bench_unlock.run(options.tensorizer_python, "-P", "-c", "import tensorizer")
    except (OSError, subprocess.CalledProcessError):
        missing[TENSORIZER] = "cannot be imported: --tensorizer-python"
    return missing


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    case = "VGG19, 8%"
    missing = missing_peers(options)
    found = [Row("file", case, name, note=why) for name, why in missing.items()]
    with tempfile.TemporaryDirectory(prefix="compare_file") as name:
        folder = Path(name)
        original = folder / "vgg19.safetensors"
        save_file(bench_unlock.vgg19(), original)
        bench_unlock.compile_in(folder)
        only = [name for name in bench_unlock.NAMES if name not in missing]
        contenders, files = bench_unlock.contenders(folder, original, only)
        if TENSORIZER not in missing:
            try:
                more, theirs = with_tensorizer(folder, original, options.tensorizer_python)
            except subprocess.CalledProcessError:
                found.append(Row("file", case, TENSORIZER, note="failed, see standard error"))
            else:
                contenders |= more
                files |= theirs
        times = bench_unlock.timings(contenders, files, options.repeats)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        size = original.stat().st_size
        for name, median in medians.items():
            reads = name not in ("python", IMPORTS)
            found.append(
                Row(
                    "file",
                    case,
                    name,
                    median_ms=1e3 * median,
                    minimum_ms=1e3 * min(times[name]),
                    ratio=median / medians[BASELINE] if BASELINE in medians else None,
                    gb_per_s=1e-9 * size / median if reads else None,
                    peak_mb=peak_mb(contenders[name]),
                    runs=options.repeats,
                )
            )
    return found
