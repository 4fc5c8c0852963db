"""DnCNN: a denoiser that estimates the noise."""

import itertools

from flax import nnx
from jaxtyping import Array, Float

from ._conv import Conv3x3
from ._images import checked_images


class DnCNN(nnx.Module):
    """DnCNN: conv + ReLU, then ``depth − 2`` of conv + BatchNorm + ReLU, then conv.

    Parameters are ``convs/0/kernel`` ... ``convs/16/kernel`` and ``norms/1/scale`` ...
    ``norms/15/bias`` (running statistics: ``mean``, ``var``), for 17 layers: the norm of a
    convolution has its index, and the first and last convolution have none. Convolutions have no
    bias, except the first one with ``first_bias``; without BatchNorm all of them have one. Like
    every NNX module, it starts in training mode: ``model.eval()`` makes BatchNorm use its running
    statistics, ``model.train()`` switches back.

    Args:
        depth: number of convolutions, at least 2.
        width: channels between them.
        channels: channels of the images: 1 for grey, 3 for colour.
        batch_norm: whether BatchNorm follows the inner convolutions.
        eps: ε of BatchNorm; 1e-4 for the weights published with the selective-encryption paper.
        first_bias: whether the first convolution has a bias; true for the same published weights.
        rngs: its ``params`` stream draws the weights.

    Raises:
        ValueError: ``depth``, ``width``, ``channels`` or ``eps`` out of range.

    References:
        Zhang et al., Beyond a Gaussian denoiser: residual learning of deep CNN for image
        denoising, IEEE TIP 2017. Tian et al., Probabilistic selective encryption of
        convolutional neural networks for hierarchical services, CVPR 2021.

    Examples:
        >>> model = DnCNN(depth=3, width=16, channels=3, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> assert model(images).shape == images.shape
    """

    def __init__(
        self,
        depth: int = 17,
        width: int = 64,
        channels: int = 1,
        batch_norm: bool = True,
        eps: float = 1e-5,
        first_bias: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if depth < 2 or width < 1 or channels < 1 or not eps > 0:
            raise ValueError(
                "DnCNN: expected depth >= 2, width >= 1, channels >= 1 and eps > 0, got "
                f"depth={depth}, width={width}, channels={channels}, eps={eps}."
            )
        self.channels = channels
        sizes = [channels, *[width] * (depth - 1), channels]
        biases = [not batch_norm or (first_bias and index == 0) for index in range(depth)]
        pairs = zip(itertools.pairwise(sizes), biases, strict=True)
        self.convs = nnx.List([Conv3x3(*pair, use_bias=bias, rngs=rngs) for pair, bias in pairs])
        # Starts close to the identity: the output is the noisy image minus a little noise. With a
        # full-sized estimate, the first thousand steps would only shrink it.
        self.convs[-1].kernel[...] *= 0.1
        norms = [
            nnx.BatchNorm(width, momentum=0.9, epsilon=eps, rngs=rngs) if batch_norm else None
            for _ in range(depth - 2)
        ]
        self.norms = nnx.List([None, *norms, None])

    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Denoises images of any size: ``images − estimate_noise(images)``.

        Args:
            images: noisy, [N, H, W, C], floats in [0, 1] before noise was added, not clipped.

        Returns:
            Denoised images of the same shape, not clipped either.

        Raises:
            ValueError: the images do not have four axes, or another number of channels.
            TypeError: the images do not have the weights' dtype.
        """
        return images - self.estimate_noise(images)

    def estimate_noise(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Estimates the noise in the images, which is the output of the network.

        Args:
            images: as for `__call__`.

        Returns:
            The estimate, [N, H, W, C], on the scale of the images.

        Raises:
            ValueError: the images do not have four axes, or another number of channels.
            TypeError: the images do not have the weights' dtype.
        """
        x = checked_images(
            images, channels=self.channels, dtype=self.convs[0].kernel.dtype, model="DnCNN"
        )
        *inner, last = self.convs
        for conv, norm in zip(inner, self.norms, strict=False):
            x = conv(x)
            x = nnx.relu(x if norm is None else norm(x))
        return last(x)
