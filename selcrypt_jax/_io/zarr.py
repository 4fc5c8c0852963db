"""Zarr 2 and 3, Orbax's format for an array: no chunk may take more memory than the array."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import quoted
from .folders import read_regular
from .ocdbt import MANIFEST, check_ocdbt
from .strict_json import DAMAGED, json_object, show

_REMEDY = f"{DAMAGED[:-1]}, or save it again with Orbax."
_ZARR2, _ZARR3 = ".zarray", "zarr.json"
# Deep nesting in larger ones crashes the process: TensorStore's JSON parser is recursive.
_MAX_BYTES = 10_000
_CACHE = 100_000_000  # bytes, as in Orbax
# These are decompressed only up to the size of a chunk's shape, unlike Blosc.
_COMPRESSORS = {"zstd", "gzip", "zlib", "bz2"}
_CODECS = {"bytes", "transpose", "crc32c"} | _COMPRESSORS
# Types that contain their own size, such as |V1000000.
_SIZED = re.compile(r"[<>|=]?[VSUO]|r[0-9]")


def stored_shapes(folder: Path, files: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The arrays stored in a folder, after checking that none can grow beyond its shape.

    Args:
        folder: an Orbax checkpoint.
        files: from `regular_files`.

    Returns:
        Orbax's name → shape.

    Raises:
        ValueError: chunks that are larger than their array, unbounded compression, or
            malformed metadata.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, raw in _described(folder, files):
        what = f"{folder / name}"
        fields = json_object(raw, what, _REMEDY)
        try:
            shape = (_zarr3 if name.endswith(_ZARR3) else _zarr2)(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{what}: expected the metadata of an array as Orbax writes it, got: "
                f"{quoted(error)}. {_REMEDY}"
            ) from None
        array = name.rpartition("/")[0]
        if found.setdefault(array, shape) != shape:
            raise ValueError(
                f"{what}: expected shape {show(found[array])}, as in another file, got "
                f"{show(shape)}. {_REMEDY}"
            )
    return found


def _described(folder: Path, files: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """The metadata of all arrays, from files or a database, by name."""
    for name in files:
        if name.rpartition("/")[2] in (_ZARR2, _ZARR3):
            yield name, read_regular(folder / name, _MAX_BYTES)
    if MANIFEST not in files:
        return
    check_ocdbt(folder, files)
    import tensorstore as ts

    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    try:
        # Without a cache, each array reads the database once more.
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
        for key in store.list().result():
            name = key.decode()
            if name.rpartition("/")[2] in (_ZARR2, _ZARR3):
                raw = store.read(key).result().value
                if len(raw) > _MAX_BYTES:
                    raise ValueError(
                        f"{name} of {len(raw)} bytes, expected at most {_MAX_BYTES} bytes"
                    )
                yield name, raw
    except ValueError as error:
        raise ValueError(
            f"{folder / MANIFEST}: expected a database of arrays, got: {quoted(error)}. {_REMEDY}"
        ) from None


def _zarr2(fields: Mapping[str, Any]) -> tuple[int, ...]:
    compressor = fields["compressor"]
    if compressor is not None and (name := compressor["id"]) not in _COMPRESSORS:
        raise ValueError(f"compressor: expected one of {sorted(_COMPRESSORS)}, got {show(name)}")
    return _shape(fields["shape"], fields["chunks"], fields["dtype"])


def _zarr3(fields: Mapping[str, Any]) -> tuple[int, ...]:
    _check_codecs(fields["codecs"])
    chunks = fields["chunk_grid"]["configuration"]["chunk_shape"]
    return _shape(fields["shape"], chunks, fields["data_type"])


def _check_codecs(codecs: list[Any]) -> None:
    for codec in codecs:
        name = codec["name"]
        if name == "sharding_indexed":
            # Its inner chunks divide the chunk, otherwise it is refused.
            for inner in ("codecs", "index_codecs"):
                _check_codecs(codec["configuration"][inner])
        elif name not in _CODECS:
            raise ValueError(f"codecs: expected one of {sorted(_CODECS)}, got {show(name)}")


def _shape(shape: Any, chunks: Any, dtype: Any) -> tuple[int, ...]:
    if not isinstance(dtype, str) or _SIZED.match(dtype):
        raise ValueError(f"dtype: expected a numeric dtype, got {show(dtype)}")
    for lengths in (shape, chunks):
        if not isinstance(lengths, list) or any(type(n) is not int or n < 0 for n in lengths):
            raise ValueError(f"shape: expected non-negative integers, got {show(lengths)}")
    larger = [m > max(n, 1) for n, m in zip(shape, chunks, strict=True)]
    if any(larger):
        raise ValueError(f"chunks: expected at most the shape {show(shape)}, got {show(chunks)}")
    return tuple(shape)
