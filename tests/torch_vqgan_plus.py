"""MaskBit's VQGAN+ once more in plain PyTorch, and the golden file that it makes.

    python tests/torch_vqgan_plus.py            # needs PyTorch; writes tests/golden/vqgan_plus.npz

Written by us from the description of the network and not by its authors: the golden shows that two
independent implementations of that description agree, not that either is MaskBit's program. The
facts were read in ``modeling/conv_vqgan.py``, ``modeling/modules/autoencoder.py``,
``modeling/quantizer/quantizer.py`` and ``configs/tokenizer/vqgan_plus_*.yaml`` of
github.com/markweberdev/maskbit:

- images are RGB in [0, 1], and so are reconstructions, but for clipping;
- every convolution pads with zeros as TensorFlow's "SAME" does: a 3x3 one of stride 2 by nothing
  before and one after, since sides are even;
- the biases are those of the encoder's last convolution, of the strided ones, of those after an
  enlargement, and of the decoder's first and last; all others have none;
- all norms are of 32 groups, with an epsilon of 1e-6;
- where a residual block changes the width, its shortcut, a 1x1 convolution, is applied to the
  block's output;
- the middle has as many blocks as a level;
- the decoder's levels are numbered in the order in which they run, the deepest first;
- codes are the nearest vectors by squared distance, the first of equally near ones; those of its
  tokenizers of bits, whose networks are the same, are 1 where a feature is above 0 and else -1, and
  the first feature is the lowest bit.

Weights follow from their names, so that the file need not hold them.
"""

import json
import pathlib
import zlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden" / "vqgan_plus.npz"
SMALL = {"channels": 32, "multipliers": (1, 1, 2), "blocks": 2, "width": 8, "codes": 64}
# Of ``configs/tokenizer/vqgan_plus_{10,12}bit.yaml``.
RELEASED = {
    "10bit": {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "blocks": 2}
    | {"width": 256, "codes": 1024},
    "12bit": {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "blocks": 2}
    | {"width": 64, "codes": 4096},
}


def weights(shapes):
    """The tensor of each name, float32: norms about 1, biases about 0, unit vectors as codes."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name, shape):
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 4:
        r = r * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 1:
        r = 0.1 * r + name.endswith("weight")
    return r.astype(np.float32)


def shapes_of(channels, multipliers, blocks, width, codes):
    """Shapes of all tensors by MaskBit's names."""
    levels = [channels * m for m in multipliers]
    deepest = levels[-1]
    found = {"quantize.embedding.weight": (codes, width)}

    def conv(name, inputs, outputs, size, bias):
        found[f"{name}.weight"] = (outputs, inputs, size, size)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def norm(name, inputs):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (inputs,)

    def stage(name, inputs, outputs):
        for i in range(blocks):
            block = f"{name}.res_blocks.{i}"
            norm(f"{block}.norm1", inputs)
            conv(f"{block}.conv1", inputs, outputs, 3, False)
            norm(f"{block}.norm2", outputs)
            conv(f"{block}.conv2", outputs, outputs, 3, False)
            if inputs != outputs:
                conv(f"{block}.nin_shortcut", outputs, outputs, 1, False)
            inputs = outputs

    conv("encoder.conv_in", 3, channels, 3, False)
    for i, (before, after) in enumerate(zip([channels, *levels], levels, strict=False)):
        stage(f"encoder.down.{i}", before, after)
        if i < len(levels) - 1:
            conv(f"encoder.down.{i}.down_conv", after, after, 3, True)
    stage("encoder.mid", deepest, deepest)
    norm("encoder.norm_out", deepest)
    conv("encoder.conv_out", deepest, width, 1, True)
    conv("decoder.conv_in", width, deepest, 3, True)
    stage("decoder.mid", deepest, deepest)
    upwards = levels[::-1]
    for i, (before, after) in enumerate(zip([deepest, *upwards], upwards, strict=False)):
        stage(f"decoder.up.{i}", before, after)
        if i < len(levels) - 1:
            conv(f"decoder.up.{i}.upsample_conv", after, after, 3, True)
    norm("decoder.norm_out", levels[0])
    conv("decoder.conv_out", levels[0], 3, 3, True)
    return found


class Network:
    """The network on tensors by MaskBit's names; images and features are [b, c, h, w]."""

    def __init__(self, tensors, levels, blocks):
        self.tensors, self.levels, self.blocks = tensors, levels, blocks

    def conv(self, name, x, stride=1):
        import torch.nn.functional as F

        kernel = self.tensors[f"{name}.weight"]
        bias = self.tensors.get(f"{name}.bias")
        if stride == 2:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel, bias, stride=2)
        return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)

    def norm(self, name, x):
        import torch.nn.functional as F

        scale, bias = (self.tensors[f"{name}.{end}"] for end in ("weight", "bias"))
        return F.silu(F.group_norm(x, 32, scale, bias, eps=1e-6))

    def stage(self, name, x):
        for i in range(self.blocks):
            block = f"{name}.res_blocks.{i}"
            h = self.conv(f"{block}.conv1", self.norm(f"{block}.norm1", x))
            h = self.conv(f"{block}.conv2", self.norm(f"{block}.norm2", h))
            narrow = f"{block}.nin_shortcut.weight" not in self.tensors
            x = h + (x if narrow else self.conv(f"{block}.nin_shortcut", h))
        return x

    def encode(self, images):
        x = self.conv("encoder.conv_in", images)
        for i in range(self.levels):
            x = self.stage(f"encoder.down.{i}", x)
            if i < self.levels - 1:
                x = self.conv(f"encoder.down.{i}.down_conv", x, stride=2)
        x = self.norm("encoder.norm_out", self.stage("encoder.mid", x))
        return self.conv("encoder.conv_out", x)

    def distances(self, z):
        """Squared distances of every place to every code, [b, h, w, v]."""
        codes = self.tensors["quantize.embedding.weight"]
        return (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1)

    def decode(self, vectors):
        """Images of code vectors [b, h, w, d]."""
        import torch.nn.functional as F

        x = self.conv("decoder.conv_in", vectors.permute(0, 3, 1, 2))
        x = self.stage("decoder.mid", x)
        for i in range(self.levels):
            x = self.stage(f"decoder.up.{i}", x)
            if i < self.levels - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{i}.upsample_conv", x)
        return self.conv("decoder.conv_out", self.norm("decoder.norm_out", x))


def golden():
    """The arrays of the golden file, computed in float64."""
    import torch

    drawn = weights(shapes_of(**SMALL))
    tensors = {name: torch.from_numpy(array).double() for name, array in drawn.items()}
    network = Network(tensors, len(SMALL["multipliers"]), SMALL["blocks"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 24, 16, 3), dtype=np.uint8)
    codes = rng.integers(0, SMALL["codes"], (1, 6, 4))
    given = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255
    z = network.encode(given)
    nearest = network.distances(z).topk(2, largest=False)
    margin = (nearest.values[..., 1] - nearest.values[..., 0]).min().item()
    assert margin > 1e-3, margin  # or float32 might choose another code
    ids = nearest.indices[..., 0]
    table = tensors["quantize.embedding.weight"]
    above = z.permute(0, 2, 3, 1) > 0
    assert z.abs().min() > 1e-4, z.abs().min()

    def nhwc(x):
        return x.permute(0, 2, 3, 1).numpy()

    return {
        "config": np.array(json.dumps({**SMALL, "torch": torch.__version__})),
        "images": images,
        "features": nhwc(z),
        "ids": ids.numpy(),
        "reconstructions": nhwc(network.decode(table[ids])),
        "codes": codes,
        "decoded": nhwc(network.decode(table[torch.from_numpy(codes)])),
        "bit_ids": (above * 2 ** torch.arange(SMALL["width"])).sum(-1).numpy(),
        "bit_reconstructions": nhwc(network.decode(2.0 * above.double() - 1)),
    }


if __name__ == "__main__":
    arrays = golden()
    np.savez_compressed(FILE, **arrays)
    print(FILE, FILE.stat().st_size, {k: (v.dtype, v.shape) for k, v in arrays.items()})
