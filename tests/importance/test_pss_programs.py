"""What learning compiles, counted."""

import logging

import jax
import jax.numpy as jnp
import optax

from selcrypt_jax import PSSConfig, pss_learner


def compiled_names(caplog, function):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return [m.split()[1] for m in caplog.messages if m.startswith("Compiling")]


def test_a_step_of_pss_is_compiled_once(caplog):
    trained = jax.random.normal(jax.random.key(0), (7, 5))
    params = {"w": trained}
    batches = jax.random.normal(jax.random.key(1), (4, 3, 7))

    def loss_fn(params, batch):
        return jnp.square(batch @ (params["w"] - trained)).mean() + 1e-3

    for config in (PSSConfig(), PSSConfig("keep", optimizer=optax.sgd(0.1, momentum=0.9))):
        learner = pss_learner(loss_fn, params, config=config)
        state = learner.init(params, batches, key=jax.random.key(2))

        def three_runs(learner=learner, state=state):
            for _ in range(3):
                state, _ = learner.run(params, batches, state, 2)

        names = compiled_names(caplog, three_runs)
        assert [name for name in names if "step" in name] == ["jit(step)"]
