"""The database in which Orbax keeps arrays, OCDBT: bounded before TensorStore unpacks it.

::

    manifest.ocdbt = 0x0cdb3a2a ‖ length (8 bytes) ‖ version ‖ compression ‖ content ‖ CRC-32C (4)
    a node in a file = 0x0cdb20de ‖ the same

TensorStore decompresses the content of both, whatever it grows to: 34 kB become 2 GB. Chunks of
arrays are no such danger, since it decompresses no more of them than their shape takes.

References:
    https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format"; RFC 8878, Zstandard.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .folders import read_regular
from .strict_json import show

MANIFEST = "manifest.ocdbt"

_MAX_BYTES = 100_000_000  # of all nodes together; the format's bound of one, in Orbax
# All nodes together may have so many bytes, and so many more for each byte of the folder. For each
# array Orbax writes 150 bytes of JSON and about 400 into nodes, or 1,400 if it is small and not
# compressed by itself; in the file, nodes may be a thousandth of that. Zeros are a 30,000th.
_FREE = 1 << 20
_RATIO = 16
_MAX_INNER = 1 << 16  # bytes of a node above the leaves, of which Orbax needs none
_HEAD, _TAIL = 14, 4
_ZSTD, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_BLOCK = 1 << 17


def check_ocdbt(folder: Path, files: Mapping[str, int]) -> None:
    """Refuses a database that takes far more memory than the file.

    Args:
        folder: that holds the manifest.
        files: from `regular_files`.

    Raises:
        ValueError: it does, or is damaged.
    """
    import tensorstore as ts

    budget = _Budget(folder, sum(files.values()))
    budget.spend(MANIFEST, read_regular(folder / MANIFEST, _MAX_BYTES))
    try:
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
            name, start, stop = _place(location)
            if name not in files:
                raise ValueError(f"expected a file of the folder, got {show(name)}")
            size = budget.spend(name, read_regular(folder / name, _MAX_BYTES, start, stop))
            if height:
                if size > _MAX_INNER:
                    raise ValueError(f"expected {_MAX_INNER} bytes in an inner node, got {size}")
                node: Any = ts.ocdbt.dump(base, location).result()
                todo += [(entry.get("location"), height - 1) for entry in node["entries"]]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: expected a database as Orbax writes it, got: {error}. It was "
            "damaged or altered: get it again, or save it again with Orbax."
        ) from None


def _place(location: str) -> tuple[str, int, int]:
    """File, and first and last byte of ``btreenode:BASE:PATH:OFFSET:LENGTH``."""
    kind, base, path, start, length = location.split(":")
    if kind != "btreenode":
        raise ValueError(f"expected a node, got {show(location)}")
    return unquote(base) + unquote(path), int(start), int(start) + int(length)


class _Budget:
    """How much nodes may have in memory."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._most = min(_FREE + _RATIO * size, _MAX_BYTES)
        self._spent = 0

    def spend(self, name: str, node: bytes) -> int:
        """At most how large the content of a node is in memory.

        Raises:
            ValueError: it is too large, with those before it.
        """
        if len(node) <= _HEAD + _TAIL or node[12]:
            raise ValueError(
                f"{self._folder / name}: expected version 0 of a node, got another or none. It "
                "was damaged or altered: get it again."
            )
        content = memoryview(node)[_HEAD:-_TAIL]
        size = zstd_bound(content) if node[13] else len(content)
        self._spent += size
        if self._spent > self._most:
            raise ValueError(
                f"{self._folder / name}: expected at most {self._most} bytes of arrays' names and "
                f"places in a folder of {self._size} bytes, got up to {self._spent}. It was made "
                "to fill the memory: get it again from its owner."
            )
        return size


def zstd_bound(data: bytes | memoryview) -> int:
    """At most how many bytes come out of Zstandard frames, from the headers of their blocks.

    Raises:
        ValueError: they are cut off or malformed.
    """

    def number(start: int, size: int) -> int:
        piece = data[start : start + size]
        if len(piece) != size:
            raise ValueError("Zstandard: expected whole frames, got one that is cut off")
        return int.from_bytes(piece, "little")

    position = size = 0
    while position < len(data):
        magic = number(position, 4)
        if magic & ~0xF == _SKIPPABLE:
            position += 8 + number(position + 4, 4)
            continue
        if magic != _ZSTD:
            raise ValueError(f"Zstandard: expected the start of a frame, got {magic:#x}")
        flags = number(position + 4, 1)
        single = flags >> 5 & 1
        position += 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
        length = (single, 2, 4, 8)[flags >> 6]
        # The size that it tells is only believed where the decoder holds it to it: in each block.
        told = number(position, length) + (256 if length == 2 else 0)
        block = min(told, _BLOCK) if single else _BLOCK
        position += length
        last = False
        while not last:
            head = number(position, 3)
            last, kind, count = bool(head & 1), head >> 1 & 3, head >> 3
            if kind == 3:
                raise ValueError("Zstandard: expected a block, got one of a reserved type")
            size += block if kind == 2 else count
            position += 3 + (1 if kind == 1 else count)
        position += 4 if flags >> 2 & 1 else 0
    if position > len(data):
        raise ValueError("Zstandard: expected whole frames, got one that is cut off")
    return size
