"""The selection of what is encrypted, as one object."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .._ciphers.lossless import LosslessCipher
from .._io.errors import check_type
from .._tree.groups import Granularity, Layout, Selector
from .ranks import Scope

Strategy = Literal["l2", "random", "ascend", "descend", "mean"]
"""The strategies that need no data."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Select:
    """Which weights are encrypted. `selcrypt protect` has the same options under the same names.

    In Python, `importance` (scores) and `base` may also be pytrees, and `select` a function
    ``(name, tensor) -> bool``. None stands for an option's default, and as the first of `Targets`
    for the command's ``any``.

    Attributes:
        importance: How groups are ranked. A strategy that needs no data: l2 (the default), random,
            ascend, descend or mean. Or scores, learned (pss) or measured, stored under the tensors'
            names in a .safetensors file. l2 and descend take the largest weights, which stay large
            after encryption: an attacker can guess their positions, though not their values. random
            reveals nothing.
        budget: Share of the groups that is encrypted, in every selected tensor; 0.08 by default.
            With targets it is the most that may be encrypted, 1 by default.
        granularity: The unit of selection: kernels (the default; in a dense layer, single weights),
            whole filters, or weights. Positions of single weights take about a bit per weight. Not
            allowed with scores, whose shapes imply it.
        layout: Order of the axes of a kernel: OIHW as in PyTorch, HWIO as in JAX. By default it is
            inferred from the shapes.
        select: Which tensors are selected: a regular expression, searched in their names. By
            default all floats with two axes or more, or all that have scores; a pattern replaces
            that: "^(?!fc)" takes all that do not begin with fc, biases and integers too, and
            "^conv.*weight$" kernels only.
        scope: Whether budget and levels hold in every tensor (leaf), or over all of them (model).
        small: Share of all weights. The smallest tensors that together have at most this share are
            not graded, and level 1 opens them: normalisation, biases, often the first and the last
            layer. In a sealed file they are sealed with everything else; with a plain rest they are
            encrypted whole, on top of the budget. By default 0.02, unless all selected tensors are
            that small: those stay in levels. With targets 0, unless the first is "any", since small
            tensors make level 0 hard to steer.
        base: A network that this one was fine-tuned from and that an attacker may have: a
            .safetensors file, or the index or folder of several. Groups are then ranked by how much
            they changed; weights that did not change are not secret.

    Examples:
        >>> protected = protect(params, secret=secret, selection=Select("random", budget=0.3))
    """

    importance: Any = "l2"
    budget: float | None = None
    granularity: Granularity | None = None
    layout: Layout | None = None
    select: Selector = None
    scope: Scope = "leaf"
    small: float | None = None
    base: Any = None

    @property
    def scores_file(self) -> Path | None:
        """The scores' file, if they come from one."""
        is_path = isinstance(self.importance, str | os.PathLike)
        return Path(self.importance) if is_path and self.importance not in STRATEGIES else None


def check_options(selection: object, cipher: object) -> None:
    """Refuses objects of another type.

    Raises:
        TypeError: a strategy instead of `Select`, or a cipher that files do not support.
    """
    remedy = 'Pass Select("l2"), or Select(importance=scores).'
    check_type(selection, Select, "selection: expected a Select", remedy)
    remedy = "Files support no other cipher; encrypt takes any."
    check_type(cipher, LosslessCipher | None, "cipher: expected a LosslessCipher", remedy)
