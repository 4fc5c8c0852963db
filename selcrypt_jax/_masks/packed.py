"""Quantised layouts: the tables stored beside packed weights, which are not weights."""

import re
from collections.abc import Mapping
from typing import Any

# The last step of a name, as used by bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors and others.
_TABLES = re.compile(
    r"(^|[./_])(nested_)?(quant_map|quant_state(\.[a-z0-9_]+)?|qzeros|zeros|zero_points?|g_idx|"
    r"perm|SCB|codebooks?|lookup_table|lut|weight_shape)$"
)


def code_tables(dtypes: Mapping[str, Any]) -> set[str]:
    """Names of code tables, zero points, group indices and the like.

    One wrong entry makes every weight wrong, or reads outside a table: no intermediate level
    would be of use, and some programs crash.

    Args:
        dtypes: name → `Dtype` of each tensor. A table counts only if packed codes are beside it:
            integers whose name shares its prefix. A name alone is not enough evidence.
    """
    packed = [n for n, dtype in dtypes.items() if dtype.kind == "integer" and dtype.bits <= 32]
    found = {n: match.start() for n in dtypes if (match := _TABLES.search(n))} if packed else {}
    return {
        name
        for name, stop in found.items()
        if stop and any(re.match(f"{re.escape(name[:stop])}($|[./_])", other) for other in packed)
    }
