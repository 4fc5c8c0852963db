"""PyTorch checkpoints of the two networks, and their outputs, in NumPy alone.

Channels first, in float64, tap by tap: independent of the library.
"""

import numpy as np


def torch_checkpoint(layers):
    """Random tensors under PyTorch's names; a layer is (name, kind, inputs, outputs)."""
    tensors = {}
    for seed, (name, kind, inputs, outputs) in enumerate(layers):
        rng = np.random.default_rng(seed)
        kind_shape = {"conv": (outputs, inputs, 3, 3), "dense": (outputs, inputs)}
        shape = kind_shape.get(kind, (outputs,))
        fan = np.prod(shape[1:], dtype=int)
        tensors[f"{name}.weight"] = rng.normal(0, fan**-0.5, shape)
        tensors[f"{name}.bias"] = rng.normal(0, 0.3, outputs)
        if kind == "norm":
            tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, outputs)
            tensors[f"{name}.running_mean"] = rng.normal(0, 0.3, outputs)
            tensors[f"{name}.running_var"] = rng.uniform(0.5, 1.5, outputs)
            tensors[f"{name}.num_batches_tracked"] = np.array(7)
    return {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in tensors.items()}


def vgg_layers(widths, hidden, batch_norm):
    # torchvision's vgg19 and vgg19_bn, with the paper's head.
    plan = "AA-BB-CCCC-DDDD-DDDD-"
    width = dict(zip("ABCD", widths, strict=True))
    layers, place, inputs = [], 0, 3
    for letter in plan:
        if letter == "-":
            place += 1
            continue
        layers.append((f"features.{place}", "conv", inputs, width[letter]))
        if batch_norm:
            layers.append((f"features.{place + 1}", "norm", None, width[letter]))
        place += 3 if batch_norm else 2
        inputs = width[letter]
    sizes = (inputs, hidden, hidden, 10)
    return layers + [
        (f"classifier.{place}", "dense", sizes[index], sizes[index + 1])
        for index, place in enumerate((1, 4, 6))
    ]


def numpy_conv(x, weight, bias=0.0):
    """A convolution: channels first, float64, tap by tap."""
    _, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = sum(
        np.einsum("nihw,oi->nohw", padded[:, :, a : a + h, b : b + w], weight[:, :, a, b])
        for a in range(3)
        for b in range(3)
    )
    return y + np.reshape(bias, (1, -1, 1, 1))


def numpy_norm(x, tensors, name, eps):
    column = {
        key: tensors[f"{name}.{key}"].reshape(1, -1, 1, 1)
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    scaled = (x - column["running_mean"]) / np.sqrt(column["running_var"] + eps)
    return scaled * column["weight"] + column["bias"]


def numpy_vgg(tensors, x, batch_norm):
    place = 0
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            name = f"features.{place}"
            x = numpy_conv(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            if batch_norm:
                place += 1
                x = numpy_norm(x, tensors, f"features.{place}", 1e-5)
            x = np.maximum(x, 0)
            place += 2
        x = np.maximum(x[:, :, ::2], x[:, :, 1::2])
        x = np.maximum(x[..., ::2], x[..., 1::2])
        place += 1
    x = x.reshape(len(x), -1)
    for place in (1, 4, 6):
        x = x @ tensors[f"classifier.{place}.weight"].T + tensors[f"classifier.{place}.bias"]
        x = np.maximum(x, 0) if place < 6 else x
    return x


def dncnn_checkpoint(depth, width, channels, biases=(), batch_norm=True):
    """``biases``: the convolutions that have one; without BatchNorm all of them."""
    layers, bare = [], set()
    biases = biases if batch_norm else range(depth)
    for index in range(depth):
        place = max(3 * index - 1, 0) if batch_norm else 2 * index
        inputs, outputs = (width, width) if index else (channels, width)
        if index == depth - 1:
            outputs = channels
        layers.append((f"dncnn.{place}", "conv", inputs, outputs))
        if batch_norm and 0 < index < depth - 1:
            layers.append((f"dncnn.{place + 1}", "norm", None, width))
        if index not in biases:
            bare.add(f"dncnn.{place}.bias")
    tensors = torch_checkpoint(layers)
    return {name: tensor for name, tensor in tensors.items() if name not in bare}


def numpy_dncnn(tensors, x, eps):
    y, last = x, max(int(name.split(".")[1]) for name in tensors)
    for place in range(last + 1):
        name = f"dncnn.{place}"
        if f"{name}.running_mean" in tensors:
            y = numpy_norm(y, tensors, name, eps)
        elif f"{name}.weight" in tensors:
            y = numpy_conv(y, tensors[f"{name}.weight"], tensors.get(f"{name}.bias", 0.0))
        else:
            y = np.maximum(y, 0)
    return x - y


def in_float64(tensors):
    return {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}


def without_counters(tensors):
    return {name: tensor for name, tensor in tensors.items() if "num_batches" not in name}


def stand_ins(shapes):
    """Tensors with these names and shapes, without allocating them."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
