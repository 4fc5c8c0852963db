"""Selective encryption of neural network weights with nested permission levels.

The way of the data, in pure functions over any parameter pytree::

    scores    = pss(loss_fn, params, batches, key=key)     # or importance.l2(params), ...
    masks     = nested_masks(scores, fractions)            # M nested boolean pytrees
    keys      = level_keys(secret, new_model_id(), levels=M)
    protected = encrypt(params, masks, keys)               # anybody may have this
    level_m   = decrypt(protected, masks[:m], keys[:m])    # with the key of level m

References:
    Tian, Zhou, Duan, Probabilistic selective encryption of convolutional neural networks for
    hierarchical services, CVPR 2021, arXiv:2105.12344.
"""

from . import importance as importance
from ._chacha import chacha20_impl as chacha20_impl
from ._chacha import chacha20_key as chacha20_key
from ._dprm import Cipher as Cipher
from ._dprm import decrypt as decrypt
from ._dprm import encrypt as encrypt
from ._gates import hard_concrete as hard_concrete
from ._gates import probability_open as probability_open
from ._gaussian import GaussianCipher as GaussianCipher
from ._gaussian import GaussianStats as GaussianStats
from ._keys import LevelKey as LevelKey
from ._keys import Secret as Secret
from ._keys import level_key as level_key
from ._keys import level_keys as level_keys
from ._keys import new_model_id as new_model_id
from ._keys import ring_keys as ring_keys
from ._lossless import LosslessCipher as LosslessCipher
from ._masks import LeafCount as LeafCount
from ._masks import Levels as Levels
from ._masks import PaperLevels as PaperLevels
from ._masks import Ring as Ring
from ._masks import mask_counts as mask_counts
from ._masks import nested_masks as nested_masks
from ._pss import PSSConfig as PSSConfig
from ._pss import PSSLearner as PSSLearner
from ._pss import PSSMetrics as PSSMetrics
from ._pss import PSSState as PSSState
from ._pss import pss as pss
from ._pss import pss_learner as pss_learner

__version__ = "0.1.0"
