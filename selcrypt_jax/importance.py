"""Closed-form importance of groups of weights: ``importance.l2(params)`` and others.

For learned importance see `selcrypt_jax.pss`.
"""

from ._importance.closed import ascend as ascend
from ._importance.closed import descend as descend
from ._importance.closed import fisher as fisher
from ._importance.closed import l2 as l2
from ._importance.closed import mean as mean
from ._importance.closed import random as random
from ._importance.closed import taylor as taylor
