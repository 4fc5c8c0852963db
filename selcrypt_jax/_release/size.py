"""The size of a protected file's header, which is limited to 100 MB."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._format.envelope import Envelope
from .._format.manifest import chunk_count
from .._io.errors import counted
from .._io.safetensors import MAX_HEADER, header

if TYPE_CHECKING:
    from .._masks.levels import Levels

_TENSORS = "names, shapes and digests"
_POSITIONS = "positions of encrypted weights"
_OWN = "the file's own metadata"
_REMEDIES = {
    _TENSORS: "Split the checkpoint into several files with an index, or merge small tensors.",
    _POSITIONS: "Select larger groups (--granularity filter), a smaller share or fewer tensors, or "
    "split the checkpoint.",
    _OWN: "Shorten the metadata.",
}


def header_length(
    layout: Sequence[tuple[str, str, tuple[int, ...]]], envelope: Envelope, what: str
) -> int:
    """The number of bytes before a file's data.

    Args:
        layout: layout of its tensors, see `header`.
        envelope: a blank envelope.
        what: the file, for messages.

    Raises:
        ValueError: the header is larger than the format allows.
    """
    try:
        return len(header(layout, envelope.entries()))
    except ValueError:
        own = sum(len(k.encode()) + len(v.encode()) for k, v in (envelope.own or {}).items())
        parts = {
            # The header itself also names each tensor, with about the same amount of text.
            _TENSORS: len(envelope.text.encode()) + sum(len(n.encode()) + 70 for n, *_ in layout),
            _POSITIONS: sum(map(len, envelope.boxes)),
            _OWN: own,
        }
        if sum(parts.values()) <= MAX_HEADER // 2:  # refused for another reason
            raise
        raise ValueError(_too_much(parts, len(layout), what)) from None


def check_header(
    tensors: Mapping[str, Any],
    shapes: Iterable[Sequence[int]],
    levels: "Levels | None",
    what: str,
) -> None:
    """Refuses a selection that would not fit into a file's header, before it is computed.

    Args:
        tensors: the tensors of the file, with dtype and shape.
        shapes: shapes of the scores of the selected tensors.
        levels: how many groups each level opens in every tensor; None if not known yet.
        what: the checkpoint's file, for messages.

    Raises:
        ValueError: the header would exceed the 100 MB that the format allows.
    """
    bits = 0.0
    for size in map(math.prod, shapes):
        counts = () if levels is None else levels.counts(size)
        for below, count in itertools.pairwise((0, *counts)):
            share = (count - below) / max(size, 1)
            if 0 < share < 1:
                bits -= size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    parts = {
        # Twice the name, a hexadecimal digest for each chunk, and about 130 other characters.
        _TENSORS: sum(
            2 * len(name.encode()) + 64 * chunk_count(info.dtype, tuple(info.shape)) + 130
            for name, info in tensors.items()
        ),
        _POSITIONS: int(bits / 8 * 4 / 3),  # the entropy, plus a third for base64
    }
    if sum(parts.values()) > MAX_HEADER:
        raise ValueError(_too_much(parts, len(tensors), what))


def _too_much(parts: Mapping[str, int], count: int, what: str) -> str:
    shown = ", ".join(f"{size / 1e6:,.1f} MB {part}" for part, size in parts.items() if size)
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"{what}: header: expected at most {MAX_HEADER / 1e6:,.3g} MB, got at least "
        f"{sum(parts.values()) / 1e6:,.1f} MB for its {counted(count, 'tensor')}: {shown}. "
        f"{_REMEDIES[largest]}"
    )
