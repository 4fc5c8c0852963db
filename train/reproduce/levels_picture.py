"""The README's picture: one photograph at each level of one file.

Example::

    python train/reproduce/levels_picture.py --data DATA --out docs

Encrypts the paper's colour DnCNN so that each level gives what is asked for, and denoises a
photograph with what each level opens. Writes ``levels.png``.
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
from _paper import colour_denoiser, denoiser
from _tasks import psnr
from flax import nnx

from selcrypt_jax import Secret, calibrate_levels, decrypt, importance, level_keys, new_model_id
from selcrypt_jax import encrypt as encrypt_levels

SIGMA = 50 / 255
TITLES = ["everybody", "level 1", "level 2", "level 3", "level 4, exact"]


@dataclass(frozen=True)
class Config:
    """Where the network is, and what its levels shall give."""

    data: Path
    """Folder that holds ``dncnn_color_paper``."""

    out: Path = Path("docs")
    """Folder for the picture."""

    targets: tuple[float, ...] = (12, 17, 21, 25)
    """PSNR of levels 0, 1, 2, … in dB; one more level gives the original."""

    seed: int = 0
    """Of the noise and of the search. (The key of the file is a new one each time.)"""


def main(config: Config) -> None:
    """Makes the picture; see `Config`."""
    clean = np.asarray(skimage.data.chelsea()[20:276, 60:316, ::-1], np.float32) / 255  # BGR
    noise = SIGMA * jax.random.normal(jax.random.key(config.seed), clean.shape)
    model = nnx.merge(*colour_denoiser(config.data)[:2])
    subject = denoiser(model, clean[None], (clean + noise)[None])

    scores = importance.random(subject.state, key=jax.random.key(1), select="convs/.*kernel")
    found = calibrate_levels(
        lambda state: subject.quality(state).mean(),
        subject.state,
        scores,
        config.targets,
        key=jax.random.key(config.seed),
        keys=6,
        tolerance=0.4,
        progress=lambda step: print(step, flush=True),
    )
    masks = found.masks
    keys = level_keys(Secret.generate(), new_model_id(), levels=len(masks))
    protected = encrypt_levels(subject.state, masks, keys)

    @jax.jit
    def denoise(state: Any) -> Any:
        return jnp.clip(nnx.merge(subject.graph, state)(subject.noisy)[0], 0, 1)

    images = [subject.noisy[0]]
    images += [denoise(decrypt(protected, masks[:m], keys[:m])) for m in range(len(masks) + 1)]
    figure = matplotlib.figure.Figure(figsize=(12, 2.5), layout="constrained", dpi=100)
    for axes, image, title in zip(
        figure.subplots(1, len(images)), images, ["input", *TITLES], strict=True
    ):
        axes.imshow(np.clip(np.asarray(image)[..., ::-1], 0, 1), interpolation="lanczos")
        value = float(psnr(image[None], subject.clean)[0])
        axes.set_title(f"{title}\n{value:.1f} dB", fontsize=11)
        axes.set_axis_off()
    config.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out / "levels.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
