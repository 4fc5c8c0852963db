"""Strict settings for every test: eight fake devices, strict promotion, warnings are errors."""

import os

# Both before JAX starts: the fake devices for the sharding tests, and the runtime type
# checks of jaxtyping, which are for testing only.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which takes as long as it takes.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("default")
