"""Selective encryption of neural network weights with nested permission levels.

A model is encrypted by pure functions over any parameter pytree::

    scores    = pss(loss_fn, params, batches, key=key)     # or importance.l2(params), ...
    masks     = nested_masks(scores, [0.02, 0.08])         # M nested boolean pytrees
    keys      = ring_keys(level_key(secret, new_model_id(), levels=M))
    protected = encrypt(params, masks, keys)               # anyone may have this
    level_m   = decrypt(protected, masks[:m], keys[:m])    # with the key of level m

References:
    Tian, Zhou, Duan, Probabilistic selective encryption of convolutional neural networks for
    hierarchical services, CVPR 2021, arXiv:2105.12344.
"""

import lazy_loader

# The names are listed in __init__.pyi and imported on first use: opening a protected file does not
# need JAX, which takes longer to start than the whole operation.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
