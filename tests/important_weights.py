"""A network whose important weights are known."""

import jax.numpy as jnp
import numpy as np

IMPORTANT = {"a": [(0, 3), (5, 1)], "b": [(2, 2)]}


def known_network() -> dict:
    """Two leaves of tiny weights with three that matter."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(0, 0.01, (8, 6)).astype(np.float32),
        "b": rng.normal(0, 0.01, (8, 4)).astype(np.float32),
        "act": jnp.tanh,
        "name": "known",
    }
    for leaf, places in IMPORTANT.items():
        for place in places:
            params[leaf][place] = 1.0
    return params


def loss_fn(params, x):
    true = known_network()
    a = params["act"](x @ params["a"]) - params["act"](x @ true["a"])
    b = params["act"](x @ params["b"]) - params["act"](x @ true["b"])
    # Like a trained network's loss: small, not zero.
    return 1e-3 + jnp.mean(jnp.sum(a**2, -1) + jnp.sum(b**2, -1))


BATCHES = np.random.default_rng(1).standard_normal((4, 64, 8)).astype(np.float32)
