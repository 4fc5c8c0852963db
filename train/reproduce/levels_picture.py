"""The README's picture: one photograph at each level of one file.

Example::

    python train/reproduce/levels_picture.py --data DATA --out docs

Encrypts the paper's colour DnCNN so that each level meets its target, and denoises a photograph
with the network at each level. Writes ``levels.jpg``. With some keys no release meets the targets:
run it again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import skimage
import tyro
from _paper import Experiment, colour_denoiser, denoiser
from flax import nnx

from selcrypt_jax import Secret, Select, Targets, importance, level_key, protect, unlock
from selcrypt_jax.models._network import psnr

SIGMA = 50 / 255
TITLES = ["everybody", "level 1", "level 2", "level 3", "level 4, exact"]


@dataclass(frozen=True)
class Config(Experiment):
    """The location of the network, and the targets of its levels."""

    out: Path = Path("docs")
    """Folder for the picture."""

    targets: tuple[float, float, float, float] = (12, 17, 21, 25)
    """PSNR of levels 0, 1, 2, … in dB; one further level gives the original."""

    seed: int = 0
    """Seed for the noise. (The file gets a new key each time.)"""


def main(config: Config) -> None:
    """Makes the picture; see `Config`."""
    clean = np.asarray(skimage.data.chelsea()[20:276, 60:316, ::-1], np.float32) / 255  # BGR
    noise = SIGMA * jax.random.normal(jax.random.key(config.seed), clean.shape)
    model = nnx.merge(*colour_denoiser(config.data)[:2])
    subject = denoiser(model, clean[None], (clean + noise)[None])

    # Single weights of the inner layers: the outer layers have few, which break everything at once.
    scores = importance.random(
        subject.state,
        key=jax.random.key(1),
        select=r"convs/([1-9]|1[0-8])/kernel",
        granularity="weight",
    )
    secret = Secret.generate()
    released = protect(
        subject.state,
        secret=secret,
        levels=Targets(
            config.targets,
            lambda state: subject.quality(state).mean(),
            tolerance=0.5,
            evaluations=120,
            progress=lambda step: print(step, flush=True),
        ),
        selection=Select(importance=scores, small=0),
    )
    grants = [level_key(secret, released.model_id, level=m, levels=4) for m in range(1, 5)]
    states = [released.params, *(unlock(released, grant) for grant in grants)]

    @jax.jit
    def denoise(state: Any) -> Any:
        return jnp.clip(nnx.merge(subject.graph, state)(subject.noisy)[0], 0, 1)

    images = [subject.noisy[0], *(denoise(state) for state in states)]
    assert len(images) % 2 == 0, "on a phone, the site shows the two halves below each other"
    figure = matplotlib.figure.Figure(figsize=(12, 2.5), layout="constrained", dpi=100)
    for axes, image, title in zip(
        figure.subplots(1, len(images)), images, ["input", *TITLES], strict=True
    ):
        axes.imshow(np.clip(np.asarray(image)[..., ::-1], 0, 1), interpolation="lanczos")
        value = float(psnr(image[None], subject.clean)[0])
        axes.set_title(f"{title}\n{value:.1f} dB", fontsize=11)
        axes.set_axis_off()
    config.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out / "levels.jpg", pil_kwargs={"quality": 88, "optimize": True})


if __name__ == "__main__":
    main(tyro.cli(Config))
