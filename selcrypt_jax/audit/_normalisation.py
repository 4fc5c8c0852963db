"""Which parameters belong to normalisation layers; without JAX.

Few weights and worth much: without its scales, biases and statistics a network is further from
working than without a tenth of its kernels; see docs/security.md.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

NORMALISATION = r"(?i)(^|[/._])(batch|layer|group|instance|rms)?_?(bn|ln|norms?)\d*([/._]|$)"
# Running statistics give a layer away whatever it is called, as in PyTorch's nn.Sequential.
_STATISTICS = ({"running_mean", "running_var"}, {"mean", "var"})
_SCALES = ("scale", "weight", "var", "running_var")


def normalisation_names(
    shapes: Mapping[str, Sequence[int]], pattern: str = NORMALISATION
) -> list[str]:
    """Names of scales, biases and running statistics.

    Args:
        shapes: name → shape, of all leaves; parts of a name are joined by ``/`` or ``.``.
        pattern: regular expression searched in names.

    Returns:
        Those with one axis whose name matches, or beside which there are a running mean and
        variance, in the order of ``shapes``.
    """
    siblings: dict[str, set[str]] = {}
    for name in shapes:
        parent, own = _parts(name)
        siblings.setdefault(parent, set()).add(own)
    return [
        name
        for name, shape in shapes.items()
        if len(shape) == 1
        and (re.search(pattern, name) or _has_statistics(siblings[_parts(name)[0]]))
    ]


def is_scale(name: str) -> bool:
    """Whether a normalisation leaf multiplies or divides, by the last part of its name."""
    return _parts(name)[1] in _SCALES


def _has_statistics(names: Iterable[str]) -> bool:
    return any(pair <= set(names) for pair in _STATISTICS)


def _parts(name: str) -> tuple[str, str]:
    """Of the layer, and of the leaf in it."""
    found = re.fullmatch(r"(?:(.*)[/.])?([^/.]*)", name, re.DOTALL)
    return (found[1] or "", found[2]) if found else ("", name)
