"""OCDBT, the database in which Orbax stores arrays: bounds it before TensorStore unpacks it.

::

    manifest.ocdbt = 0x0cdb3a2a ‖ length (8 bytes) ‖ version ‖ compression ‖ content ‖ CRC-32C (4)
    a node in a file = 0x0cdb20de ‖ the same

TensorStore decompresses the content of both, however large it gets: 34 kB become 2 GB. Chunks of
arrays are no such danger, since it decompresses only as much of them as their shape needs.

References:
    https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format"; RFC 8878, Zstandard.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import quoted
from .folders import read_regular
from .strict_json import DAMAGED, show

MANIFEST = "manifest.ocdbt"

_REMEDY = f"{DAMAGED[:-1]}, or save it again with Orbax."

_MAX_BYTES = 100_000_000  # of all nodes together; in Orbax, the format's bound for one
# All nodes together may have this many bytes, and this many more per byte of the folder. For each
# array Orbax writes 150 bytes of JSON and about 400 into nodes, or 1,400 if it is small and not
# compressed by itself; in the file, nodes may be a thousandth of that. Zeros are a 30,000th.
_FREE = 1 << 20
_RATIO = 16
_MAX_INNER = 1 << 16  # bytes of a node above the leaves; Orbax needs none
_MAX_LEAF = 1 << 18  # bytes of a leaf whose entries are parsed: Python takes far more for them
_HEAD, _TAIL = 14, 4
_ZSTD, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_BLOCK = 1 << 17


def check_ocdbt(folder: Path, files: Mapping[str, int]) -> None:
    """Refuses a database that would take far more memory than the file, or that lacks a piece.

    Missing or truncated pieces are found here because Orbax reads many at once and names neither
    the file nor a remedy; and the reads still running when it gives up print errors of their own.

    Args:
        folder: the folder of the manifest.
        files: from `regular_files`.

    Raises:
        ValueError: it would take too much memory, lacks a piece, or is damaged.
    """
    import tensorstore as ts

    budget = _Budget(folder, sum(files.values()))
    budget.spend(MANIFEST, read_regular(folder / MANIFEST, _MAX_BYTES))
    with _database(folder):
        base = ts.KvStore.open({"driver": "file", "path": f"{folder.absolute()}/"}).result()
        manifest: Any = ts.ocdbt.dump(base).result()
        if manifest["config"].get("manifest_kind", "single") != "single":
            raise ValueError("manifest_kind: expected 'single', as Orbax writes it")
        newest = manifest["versions"][-1]
        todo = [(newest["root"].get("location"), int(newest["root_height"]))]
    seen = {None}
    while todo:
        location, height = todo.pop()
        if location in seen:
            continue
        seen.add(location)
        with _database(folder):
            name, start, stop = _place(location, "btreenode")
        _check_piece(folder, files, name, stop)
        size = budget.spend(name, read_regular(folder / name, _MAX_BYTES, start, stop))
        if not height and size > _MAX_LEAF:
            continue
        with _database(folder):
            if height and size > _MAX_INNER:
                raise ValueError(f"{size} bytes in an inner node, more than {_MAX_INNER}")
            node: Any = ts.ocdbt.dump(base, location).result()
            if height:
                todo += [(entry.get("location"), height - 1) for entry in node["entries"]]
                continue
            found = filter(None, (entry.get("indirect_value") for entry in node["entries"]))
            pieces = [_place(piece, "value") for piece in found]
        for name, _, stop in pieces:
            _check_piece(folder, files, name, stop)


@contextmanager
def _database(folder: Path) -> Iterator[None]:
    """Adds the file to errors: on a damaged one, TensorStore may raise anything."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: expected a database as Orbax writes it, got: {quoted(error)}. "
            f"{_REMEDY}"
        ) from None


def _check_piece(folder: Path, files: Mapping[str, int], name: str, stop: int) -> None:
    """Refuses a database with a missing or truncated file."""
    if name not in files:
        raise ValueError(
            f"{folder / MANIFEST}: expected the file {show(name)} in the folder, got none. "
            "Download the whole folder again, or save it again with Orbax."
        )
    if stop > files[name]:
        raise ValueError(
            f"{folder / name}: expected at least {stop} bytes, got {files[name]}. It is truncated: "
            "download the whole folder again, or save it again with Orbax."
        )


def _place(location: str, expected: str) -> tuple[str, int, int]:
    """The file, and the first and last byte, of ``KIND:BASE:PATH:OFFSET:LENGTH``."""
    kind, base, path, start, length = location.split(":")
    if kind != expected:
        raise ValueError(f"expected a {expected}, got {show(location)}")
    return unquote(base) + unquote(path), int(start), int(start) + int(length)


class _Budget:
    """The memory that nodes may use."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._most = min(_FREE + _RATIO * size, _MAX_BYTES)
        self._spent = 0

    def spend(self, name: str, node: bytes) -> int:
        """An upper bound of the size of a node's content in memory.

        Raises:
            ValueError: the total is too large.
        """
        if len(node) <= _HEAD + _TAIL or node[12]:
            raise ValueError(
                f"{self._folder / name}: expected an OCDBT node, version 0, got something else. "
                f"{_REMEDY}"
            )
        content = memoryview(node)[_HEAD:-_TAIL]
        try:
            size = zstd_bound(content) if node[13] else len(content)
        except ValueError as error:
            raise ValueError(
                f"{self._folder / name}: expected an OCDBT node, compressed with {error}. It is "
                "truncated or damaged: download the whole folder again, or save it with Orbax."
            ) from None
        self._spent += size
        if self._spent > self._most:
            raise ValueError(
                f"{self._folder / name}: expected at most {self._most} bytes of arrays' names and "
                f"positions in a folder of {self._size} bytes, got up to {self._spent}. It was "
                "crafted to exhaust memory: download it again from its owner."
            )
        return size


def zstd_bound(data: bytes | memoryview) -> int:
    """An upper bound of the decompressed size of Zstandard frames, from their block headers.

    Raises:
        ValueError: they are truncated or malformed; the caller adds the file.
    """

    def number(start: int, size: int) -> int:
        piece = data[start : start + size]
        if len(piece) != size:
            raise ValueError("Zstandard, got a frame that is truncated")
        return int.from_bytes(piece, "little")

    position = size = 0
    while position < len(data):
        magic = number(position, 4)
        if magic & ~0xF == _SKIPPABLE:
            position += 8 + number(position + 4, 4)
            continue
        if magic != _ZSTD:
            raise ValueError(f"Zstandard, got {magic:#x} where a frame should start")
        flags = number(position + 4, 1)
        single = flags >> 5 & 1
        position += 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
        length = (single, 2, 4, 8)[flags >> 6]
        # The declared size is only trusted where the decoder enforces it: in each block.
        told = number(position, length) + (256 if length == 2 else 0)
        block = min(told, _BLOCK) if single else _BLOCK
        position += length
        last = False
        while not last:
            head = number(position, 3)
            last, kind, count = bool(head & 1), head >> 1 & 3, head >> 3
            if kind == 3:
                raise ValueError("Zstandard, got a block of a reserved type")
            size += block if kind == 2 else count
            position += 3 + (1 if kind == 1 else count)
        position += 4 if flags >> 2 & 1 else 0
    if position > len(data):
        raise ValueError("Zstandard, got a frame that is truncated")
    return size
