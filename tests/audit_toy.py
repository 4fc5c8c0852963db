"""A network small enough to be attacked in a test: it learns what a teacher of its kind says."""

import jax
import jax.numpy as jnp
import numpy as np

from selcrypt_jax.audit import Subject

INPUTS, HIDDEN, OUTPUTS = 24, 64, 8


def _parameters(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "first": {"kernel": normal(INPUTS, HIDDEN)},
        "norm": {
            "scale": rng.uniform(0.5, 2, HIDDEN).astype(np.float32),
            "bias": rng.uniform(-1, 1, HIDDEN).astype(np.float32),
            "mean": np.zeros(HIDDEN, np.float32),
            "var": np.ones(HIDDEN, np.float32),
        },
        "last": {"kernel": normal(HIDDEN, OUTPUTS)},
    }


def _fresh(key):
    params = _parameters(int(jax.random.randint(key, (), 0, 2**30)))
    norm = params["norm"]
    params["norm"] = norm | {"scale": np.ones_like(norm["scale"]), "bias": 0 * norm["bias"]}
    return params


def _forward(params, x, batch_statistics):
    norm = params["norm"]
    hidden = x @ params["first"]["kernel"]
    mean, var = norm["mean"], norm["var"]
    if batch_statistics:
        mean, var = hidden.mean(0), hidden.var(0)
        norm = norm | {
            "mean": 0.9 * norm["mean"] + 0.1 * mean,
            "var": 0.9 * norm["var"] + 0.1 * var,
        }
    hidden = (hidden - mean[None]) / jnp.sqrt(var[None] + 1e-5)
    hidden = jax.nn.relu(hidden * norm["scale"][None] + norm["bias"][None])
    return hidden @ params["last"]["kernel"], params | {"norm": norm}


def toy_subject(examples: int = 512, seed: int = 0) -> Subject:
    rng = np.random.default_rng(seed)
    params = _parameters(seed)
    x = rng.standard_normal((examples + 256, INPUTS)).astype(np.float32)
    hidden = x @ params["first"]["kernel"]
    params["norm"] |= {"mean": hidden.mean(0), "var": hidden.var(0)}
    y = np.asarray(_forward(params, x, batch_statistics=False)[0])

    def loss_fn(params, batch):
        x, y = batch
        return jnp.square(_forward(params, x, batch_statistics=False)[0] - y).mean()

    def training_loss_fn(params, batch):
        x, y = batch
        found, params = _forward(params, x, batch_statistics=True)
        return jnp.square(found - y).mean(), params

    loss_on_tests = jax.jit(lambda params: loss_fn(params, (x[examples:], y[examples:])))

    def batch(which, rng):
        chosen = rng.choice(which, 32)
        return x[chosen], y[chosen]

    return Subject(
        title="a teacher of 2,304 weights",
        params=params,
        loss_fn=loss_fn,
        metric=lambda params: -10 * float(jnp.log10(loss_on_tests(params) + 1e-3)),
        unit="dB",
        worthless=-10 * float(np.log10(np.square(y[examples:]).mean())),
        examples=examples,
        batch=batch,
        fresh=_fresh,
        training_loss_fn=training_loss_fn,
    )
