"""Strict settings for every test: eight fake devices, strict promotion, warnings are errors."""

import os
import random

# Both before JAX starts: the fake devices for the sharding tests, and the runtime type
# checks of jaxtyping, which are for testing only.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which takes as long as it takes.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("default")


@pytest.fixture
def same_draws(monkeypatch):
    """Ids, secrets and nonces that are the same in each run.

    For what holds for all keys but a few: one weight in a million stays as it is by chance.
    """
    monkeypatch.setattr(os, "urandom", random.Random(0).randbytes)


@pytest.fixture(scope="session", autouse=True)
def programs_of_other_processes(tmp_path_factory):
    """Programs started by the tests compile the same functions repeatedly: once per run is enough.

    JAX reads these variables when it starts, so the tests themselves, which count compilations, use
    no cache.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
