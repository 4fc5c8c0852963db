"""Closed-form importance of groups of weights: ``importance.l2(params)`` and the like.

For learned importance see `selcrypt_jax.pss`.
"""

from ._importance import ascend as ascend
from ._importance import descend as descend
from ._importance import fisher as fisher
from ._importance import l2 as l2
from ._importance import mean as mean
from ._importance import random as random
from ._importance import taylor as taylor
