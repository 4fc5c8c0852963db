"""The safetensors format, read strictly and tensor by tensor; without JAX and NumPy.

::

    file   = length of the header (8 bytes, little-endian) ‖ header ‖ data
    header = {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets"}, ...} (JSON)

The tensors cover the data without holes and overlaps. Files that could be interpreted in two ways
(a repeated key, unknown fields, bytes outside all tensors) are refused here even if the stock
reader accepts them: two readers of one signed file must not see two models.

References:
    https://github.com/huggingface/safetensors, README, "Format".
"""

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from .._tree.dtypes import SAFETENSORS
from .buffers import new_buffer
from .errors import quoted
from .foreign import OtherFormatError, format_of
from .strict_json import json_object, show

MAX_HEADER = 100_000_000
"""Bytes; the format's own bound."""

_METADATA = "__metadata__"
PROTECTED = "selcrypt"  # the metadata entry of a protected file
_DAMAGED = "The header is damaged: download the file again, or save it again."
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):
    """A tensor and its place in the file.

    Attributes:
        name: as in the header, code point by code point.
        dtype: code of the format, such as ``"F32"``; a key of `SAFETENSORS`.
        shape: in elements, also if two of them share a byte.
        start: its first byte, from the beginning of the file.
        stop: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile(AbstractContextManager[Any]):
    """A safetensors file whose header has been checked; a context manager.

    The data are read on demand, from one descriptor: replacing the file under its name in the
    meantime changes nothing, and a file that shrinks is noticed. Several threads may use it.

    Args:
        path: the path of a regular file.

    Attributes:
        path: as given.
        tensors: by name, in the order of the header.
        metadata: ``__metadata__`` of the file, possibly empty; None if there is no such entry.
        size: bytes of the file.

    Raises:
        ValueError: not a safetensors file, or a damaged or ambiguous one. (Every file that the
            stock reader refuses is refused here; `ask_stock_reader` asks it all the same.)
        OSError: the file can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mode = self.path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(
                f"{self.path}: expected a safetensors file, got a folder. Name a file in it."
            )
        # Before opening it, since opening a pipe blocks.
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"{self.path}: expected a regular file, got a pipe or device. Save it to a file."
            )
        self._lock = threading.Lock()
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            start = self._data_start()
            raw = self._read(8, start)
            self.tensors, self.metadata = _parse_header(raw, start, self.size)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError) and not isinstance(error, OtherFormatError):
                raise ValueError(f"{self.path}: {error}") from None
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; data that have been read stay valid."""
        self._file.close()

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, little-endian and in C order; the caller may change them.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        data = new_buffer(info.stop - info.start)
        self._fill(data, info.start)
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills a buffer with bytes of a tensor, from byte ``start`` on.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        assert info.start + start + len(buffer) <= info.stop
        self._fill(buffer, info.start + start)

    def _fill(self, buffer: memoryview, start: int) -> None:
        stop = start + len(buffer)
        while buffer:
            count = self._read_at(buffer, start)
            if not count:
                raise ValueError(
                    f"{self.path}: expected {self.size} bytes as when it was opened, got "
                    f"{stop - len(buffer)}. Another program changed it in the meantime: try again "
                    "when no program writes to it."
                )
            buffer, start = buffer[count:], start + count

    def _read_at(self, buffer: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start)
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(buffer)

    def _read(self, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        self._fill(memoryview(data), start)
        return data

    def _data_start(self) -> int:
        """Offset of the data, from the header's length; checked before the header uses memory."""
        first = bytes(self._read(0, min(self.size, 64)))
        length = int.from_bytes(first[:8], "little")
        hint = "It is truncated, or not a safetensors file: download it again, or convert it first."
        certain = length > MAX_HEADER
        if certain or 8 + length > self.size or not first.startswith(b"{", 8):
            kind = format_of(first, self.path.name, certain=certain)
            if kind is not None:
                raise OtherFormatError.of(self.path, kind)
        if len(first) < 8:
            hint = hint if first else "It is empty; download it again."
            raise ValueError(f"expected at least 8 bytes, got {len(first)}. {hint}")
        if length > MAX_HEADER:
            raise ValueError(f"header: expected at most {MAX_HEADER} bytes, got {length}. {hint}")
        if 8 + length > self.size:
            raise ValueError(
                f"header: expected {length} bytes, its own length, got {self.size - 8}. {hint}"
            )
        if not length or not first.startswith(b"{", 8):
            raise ValueError(f"header: expected '{{' first, got {first[8:9]!r}. {hint}")
        return 8 + length

    def ask_stock_reader(self) -> None:
        """Asks the reference library too: a file that we accept must open elsewhere.

        Raises:
            ValueError: the safetensors library refuses the file.
        """
        try:
            with safetensors.safe_open(self.path, framework="numpy"):
                pass
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{self.path}: the safetensors library refuses it: {quoted(error)}. Download "
                "the file again, or save it again."
            ) from None
        except MemoryError:
            # It maps the whole file, which a limit on address space forbids; then it has no answer.
            # The checks above already refuse whatever it refuses (a test compares them).
            pass


def header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    *,
    size: int = 0,
) -> bytes:
    """The part before the data, byte for byte as the stock library writes it.

    Args:
        tensors: name, dtype code and shape (in elements) of each, in the order of their data.
        metadata: None for no ``__metadata__`` entry, which differs from an empty one.
        size: pad it with spaces up to this many bytes.

    Returns:
        The length (8 bytes), compact JSON, and spaces up to a multiple of 8 bytes.

    Raises:
        ValueError: a repeated or reserved name, an unknown dtype, a shape that doesn't fit it,
            text that isn't Unicode, or a header above the format's bound of 100,000,000 bytes.
    """
    entries: dict[str, Any] = {}
    if metadata is not None:
        entries[_METADATA] = _check_metadata(dict(metadata), "Pass text for both.")
    stop = 0
    for name, dtype, shape in tensors:
        if name == _METADATA:
            raise ValueError(f"a tensor can't be called {_METADATA!r}: the format reserves it.")
        if name in entries:
            raise ValueError(f"tensor {show(name)}: expected each name once, got it twice.")
        _check_text(name, "Rename it.")
        try:
            start, stop = stop, stop + _byte_count(dtype, shape)
        except ValueError as error:
            raise ValueError(f"tensor {show(name)}: {error}") from None
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
    # Escapes are those of serde_json, for every code point (a test compares them).
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, size - 8 - len(text))
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"header: expected at most {MAX_HEADER} bytes, got {len(text)}. No program could read "
            "it; store less in the metadata, or the tensors in several files."
        )
    return len(text).to_bytes(8, "little") + text


def _parse_header(
    raw: bytes | bytearray, start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str] | None]:
    entries = json_object(raw, "header", _DAMAGED)
    metadata = None
    if _METADATA in entries:
        metadata = _check_metadata(entries.pop(_METADATA), _DAMAGED)
    tensors = {}
    for name, entry in entries.items():
        try:
            begin, end = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"tensor {show(name)}: {error} {_DAMAGED}") from None
        if end > size - start:
            raise ValueError(
                f"tensor {show(name)}: data_offsets: expected at most the {size - start} bytes of "
                f"data that the file has, got {show([begin, end])}. It is truncated; download it "
                "again."
            )
        shape = tuple(entry["shape"])
        tensors[name] = TensorInfo(name, entry["dtype"], shape, start + begin, start + end)
    position = start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != position:
            what = "a hole before it" if info.start > position else "an overlap with another tensor"
            raise ValueError(
                f"tensor {show(info.name)}: expected its data to start at byte "
                f"{position - start}, got {info.start - start}: {what}. {_DAMAGED}"
            )
        position = info.stop
    if position != size:
        raise ValueError(
            f"expected {position} bytes, got {size}: {size - position} bytes after the last tensor "
            "belong to no tensor. The file is damaged: download it again, or save it again."
        )
    return tensors, metadata


def _parse_entry(entry: Any) -> tuple[int, int]:
    """The data offsets of one tensor, checked except against the end of the data."""
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise ValueError(f"expected an object of dtype, shape and data_offsets, got {show(entry)}.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list):
        raise ValueError(f"shape: expected a list, got {show(shape)}.")
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"data_offsets: expected two whole numbers, got {show(offsets)}.")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets: expected 0 <= start <= stop, got {show(offsets)}.")
    expected = _byte_count(entry["dtype"], shape)
    if end - begin != expected:
        raise ValueError(
            f"data_offsets: expected {expected} bytes for {entry['dtype']}{show(shape)}, "
            f"got {end - begin}."
        )
    return begin, end


def _byte_count(dtype: Any, shape: Iterable[Any]) -> int:
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        raise ValueError(f"dtype: expected one of {', '.join(SAFETENSORS)}, got {show(dtype)}.")
    shape = list(shape)
    count = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise ValueError(f"shape: expected non-negative integers, got {show(shape)}.")
        count *= length
        # The reference multiplies in this order too: it refuses [2^40, 2^40, 0].
        if max(length, count) >= 2**63:
            raise ValueError(f"shape: expected less than 2^63 elements, got {show(shape)}.")
    bits = count * SAFETENSORS[dtype].bits
    if bits % 8:
        raise ValueError(f"shape: expected whole bytes of {dtype}, got {bits} bits.")
    return bits // 8


def _check_metadata(metadata: Any, remedy: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{_METADATA}: expected an object, or no entry, got {show(metadata)}. {remedy}"
        )
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"{_METADATA}: expected text, got {show(value)} for {show(key)}. {remedy}"
            )
        _check_text(key, remedy)
        _check_text(value, remedy)
    return metadata


def _check_text(text: str, remedy: str) -> None:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"expected Unicode, got a lone surrogate in {show(text)}. {remedy}"
        ) from None
