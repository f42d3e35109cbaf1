"""Which model tensors belong to, read off their names and shapes.

Shapes do not tell everything. The number of attention heads and where the encoder ends are known
for the paper's sizes and must be given for others; so must the number of groups of a tokenizer's
norms if it cannot be 32.
"""

import re
from collections.abc import Mapping

import numpy as np

from enat_jax.models import enat, vqgan

# Paper Table 7: (width, layers) -> (heads, layers of the encoder).
PAPER_SIZES = {(366, 16): (6, 15), (768, 16): (8, 15), (1024, 24): (16, 22)}
_WRAPPERS = ("module.", "model.", "_orig_mod.", "nnet.", "state_dict.")
_GROUPS = 32  # of the norms in all released tokenizers

Tensors = Mapping[str, np.ndarray]


def without_prefixes(tensors: Tensors) -> dict[str, np.ndarray]:
    """Removes what wrappers such as DistributedDataParallel put before all names."""
    names = list(tensors)
    while prefix := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = [name.removeprefix(prefix) for name in names]
        if not names:
            break
    return dict(zip(names, tensors.values(), strict=True))


def is_maskgit(tensors: Tensors) -> bool:
    """Says whether the names are those of MaskGIT's JAX tokenizer."""
    return "quantizer/codebook" in tensors


def is_maskbit(tensors: Tensors) -> bool:
    """Says whether the names are those of MaskBit's VQGAN+, or of other tokenizers by its names."""
    return any(name.startswith("encoder.down.0.res_blocks.") for name in tensors)


def enat_of(tensors: Tensors, num_heads: int | None, encoder_layers: int | None) -> enat.ENAT:
    """Returns the reference's ENAT with these tensors.

    Args:
        tensors: by the reference's names.
        num_heads, encoder_layers: None: those of the paper's model of this width and depth.

    Raises:
        ValueError: a tensor is missing or makes no sense, or the paper has no model of this size
            and the arguments do not say what shapes cannot tell.
    """
    what = "an ENAT of the reference"
    vocabulary, width = _shape(tensors, "x_embedder.word_embeddings.weight", 2, what)
    num_tokens, _ = _shape(tensors, "x_embedder.position_embeddings.weight", 2, what)
    num_labels, _ = _shape(tensors, "y_embedder.embedding_table.weight", 2, what)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, what)
    layers = _count(tensors, r"blocks\.(\d+)\..*")
    if min(vocabulary, num_labels, layers) < 2 or hidden % max(width, 1) or not hidden:
        raise ValueError(
            f"{vocabulary=}, {num_labels=}, {layers=}, {width=}, {hidden=} are no ENAT's sizes"
        )
    heads, encoder = PAPER_SIZES.get((width, layers), (None, None))
    heads, encoder = num_heads or heads, encoder_layers or encoder
    if heads is None or encoder is None:
        missing = [] if heads else ["the number of attention heads (--num-heads)"]
        missing += [] if encoder else ["how many of the layers encode (--encoder-layers)"]
        raise ValueError(
            f"a model of width {width} with {layers} layers is none of the paper's, and shapes do "
            f"not tell {' and '.join(missing)}: say so"
        )
    if width % heads:
        raise ValueError(f"a width of {width} cannot be divided among {heads} attention heads")
    if not 1 <= encoder < layers:
        raise ValueError(
            f"{encoder} encoder layers of {layers}: there must be at least one, and one be left "
            "for the decoder"
        )
    return enat.ENAT(
        num_tokens=num_tokens,
        codebook_size=vocabulary - 1,  # the last row is [MASK]
        num_classes=num_labels - 1,  # the last row is no class
        width=width,
        num_heads=heads,
        encoder_layers=encoder,
        decoder_layers=layers - encoder,
        mlp_ratio=hidden // width,
    )


def vqgan_of(tensors: Tensors, num_groups: int | None) -> vqgan.VQGAN:
    """Returns the reference's VQGAN with these tensors, MaskGIT's, or MaskBit's.

    Args:
        tensors: by the names of one of them.
        num_groups: of its norms; None: 32, as in all released ones.

    Raises:
        ValueError: a tensor is missing or makes no sense, or the norms cannot have so many groups.
    """
    if is_maskgit(tensors):
        return _maskgit_vqgan_of(tensors, num_groups)
    what, block, quantizer = "a VQGAN of the reference", "block", "vq"
    if is_maskbit(tensors):
        what, block = "MaskBit's VQGAN+", "res_blocks"
        quantizer = "lfq" if "quantize.bits_to_indices" in tensors else "vq"
    if quantizer == "lfq":
        embed_dim, *_ = _shape(tensors, "encoder.conv_out.weight", 4, what)
        codes = 2**embed_dim
        if not np.array_equal(tensors["quantize.bits_to_indices"], 2 ** np.arange(embed_dim)):
            raise ValueError(f"not {what}: its {embed_dim} bits do not count 1, 2, 4 and so on")
    else:
        codes, embed_dim = _shape(tensors, "quantize.embedding.weight", 2, what)
    channels, image_channels, _, _ = _shape(tensors, "encoder.conv_in.weight", 4, what)
    levels = _count(tensors, r"encoder\.down\.(\d+)\..*")
    blocks = _count(tensors, rf"encoder\.down\.0\.{block}\.(\d+)\..*")
    first = [f"encoder.down.{level}.{block}.0.conv2.weight" for level in range(levels)]
    widths = [_shape(tensors, name, 4, what)[0] for name in first]
    model = _vqgan(codes, embed_dim, channels, image_channels, widths, blocks, num_groups)
    strided = "encoder.down.0.down_conv.weight" in tensors
    return model.clone(conv_downsampling=strided, quantizer=quantizer)


def _maskgit_vqgan_of(tensors: Tensors, num_groups: int | None) -> vqgan.VQGAN:
    what = "MaskGIT's tokenizer"
    codes, embed_dim = _shape(tensors, "quantizer/codebook", 2, what)
    _, _, image_channels, channels = _shape(tensors, "encoder/Conv_0/kernel", 4, what)
    # The decoder's convolutions: the first, one at each enlargement, the last. The encoder's
    # blocks: those of all levels, then two in the middle.
    levels = _count(tensors, r"decoder/Conv_(\d+)/.*") - 1
    of_levels = _count(tensors, r"encoder/ResBlock_(\d+)/.*") - 2
    if levels < 1 or of_levels < 1 or of_levels % levels:
        raise ValueError(f"{of_levels} residual blocks on {levels} levels are not {what}")
    blocks = of_levels // levels
    first = [f"encoder/ResBlock_{level * blocks}/Conv_1/kernel" for level in range(levels)]
    widths = [_shape(tensors, name, 4, what)[-1] for name in first]
    return _vqgan(codes, embed_dim, channels, image_channels, widths, blocks, num_groups)


def _vqgan(
    codes: int,
    embed_dim: int,
    channels: int,
    image_channels: int,
    widths: list[int],
    blocks: int,
    num_groups: int | None,
) -> vqgan.VQGAN:
    if not widths or not blocks or any(not channels or width % channels for width in widths):
        raise ValueError(
            f"levels of {widths} channels with {blocks} blocks after {channels} channels are no "
            "VQGAN of the reference"
        )
    groups = num_groups or _GROUPS
    if any(width % groups for width in widths):
        asked = "" if num_groups else ", as in all released models: say how many (--num-groups)"
        raise ValueError(f"levels of {widths} channels cannot have {groups} groups each{asked}")
    return vqgan.VQGAN(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=blocks,
        embed_dim=embed_dim,
        codebook_size=codes,
        num_groups=groups,
        image_channels=image_channels,
        dtype="float32",
    )


def _shape(tensors: Tensors, name: str, ndim: int, what: str) -> tuple[int, ...]:
    if name not in tensors:
        some = ", ".join(repr(found[:60]) for found in list(tensors)[:3])
        raise ValueError(
            f"not {what}: it has no {name!r}, but {len(tensors)} others, such as {some}"
        )
    shape = np.shape(tensors[name])
    if len(shape) != ndim:
        raise ValueError(f"not {what}: {name!r} has the shape {shape}")
    return shape


def _count(tensors: Tensors, pattern: str) -> int:
    """Returns one more than the highest number in names that match; at most the number of names."""
    numbers = [
        int(m[1]) for name in tensors if (m := re.fullmatch(pattern, name)) and len(m[1]) < 6
    ]
    return min(max(numbers, default=-1) + 1, len(tensors))
