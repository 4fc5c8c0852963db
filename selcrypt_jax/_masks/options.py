"""What is selected for encryption, as one object."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .._ciphers.lossless import LosslessCipher
from .._io.errors import check_type
from .._tree.groups import Granularity, Layout, Selector
from .ranks import Scope

Strategy = Literal["l2", "random", "ascend", "descend", "mean"]
"""The ways to judge importance that need no data."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Select:
    """What is encrypted. The same options, under the same names, as of ``selcrypt protect``.

    In Python `importance` (scores) and `base` may also be pytrees, and `select` a function
    ``(name, tensor) -> bool``; None is the default of an option, and as the first of `Targets`
    what ``any`` is there.

    Attributes:
        importance: How groups are ranked. A strategy that needs no data: l2 (the default), random,
            ascend, descend or mean. Or scores, learned (pss) or measured, under the names of the
            tensors that take part: a .safetensors file. l2 and descend take the largest weights,
            which stay large: an attacker can guess where they are, though not what they were.
            random tells nothing.
        budget: Share of the groups that is encrypted, in every tensor that takes part; 0.08 by
            default. With targets it is the most that may be encrypted, 1 by default.
        granularity: What is selected: kernels (the default; in a dense layer, single weights),
            whole filters, or weights. Positions of single weights take about a bit a weight. Not
            with scores, whose shapes say it.
        layout: Order of the axes of a kernel: OIHW as in PyTorch, HWIO as in JAX. By default it is
            told from the shapes.
        select: Which tensors take part: a regular expression, searched in their names. By default
            all floats with two axes or more, or all that have scores; a pattern replaces that:
            "^(?!fc)" takes all that do not begin with fc, biases and integers too, and
            "^conv.*weight$" kernels only.
        scope: Whether budget and levels hold in every tensor (leaf), or over all of them (model).
        small: Share of all weights. The smallest tensors that together have no more are not graded,
            and level 1 opens them: normalisation, biases, often the first and the last layer. In a
            sealed file they are sealed with everything else; with a plain rest they are encrypted
            whole, beside the budget. By default 0.02, unless every tensor that takes part is so
            small: those stay in levels. With targets 0, unless the first is "any", since small
            tensors make level 0 hard to steer.
        base: A network that this one was fine-tuned from and that an attacker may have: a
            .safetensors file, or the index or folder of several. Groups are then ranked by how they
            changed. What did not change is no secret.

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
        """The file of the scores, if they come from one."""
        is_path = isinstance(self.importance, str | os.PathLike)
        return Path(self.importance) if is_path and self.importance not in STRATEGIES else None


def check_options(selection: object, cipher: object) -> None:
    """Refuses objects of another type.

    Raises:
        TypeError: a strategy in place of `Select`, or a cipher that files do not know.
    """
    remedy = 'Pass Select("l2"), or Select(importance=scores).'
    check_type(selection, Select, "selection: expected a Select", remedy)
    remedy = "Files have no other cipher; encrypt takes any."
    check_type(cipher, LosslessCipher | None, "cipher: expected a LosslessCipher", remedy)
