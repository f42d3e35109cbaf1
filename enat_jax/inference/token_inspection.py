"""What a finished token set shows about its tokenizer: codes in use, reconstruction errors."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from enat_jax.data import images, records, tokens
from enat_jax.inference import tokenizer
from enat_jax.models import vqgan
from enat_jax.runtime import buckets, files, png

CHUNK = 65_536  # records in memory at a time
MEASURED = 256  # images whose reconstruction error is measured
SHOWN = 32  # of them, in the picture
COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class CodeUse:
    """How the tokens of a set spread over the codebook."""

    used: int  # codes that occur
    size: int  # of the codebook
    perplexity: float  # exp of the entropy (nats) of a token; `size` if all codes were as frequent


def code_use(token_set: tokens.TokenSet) -> CodeUse:
    """Counts the codes of all tokens of a set."""
    counts = np.zeros(token_set.codebook_size, np.int64)
    for start in range(0, len(token_set), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(token_set)))
        codes = token_set.rows[indices]["tokens"]
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    _, perplexity = vqgan.code_statistics(counts)
    return CodeUse(int((counts > 0).sum()), len(counts), float(perplexity))


def summary(directory: str | os.PathLike) -> str:
    """Returns a few lines about what is in a token set; raises as ``tokens.TokenSet.open``."""
    return _summary(tokens.read_metadata(directory), code_use(tokens.TokenSet.open(directory)))


def _summary(metadata: dict[str, Any], use: CodeUse) -> str:
    rows, columns = metadata["grid"]
    counts, names = np.array(metadata["class_counts"]), metadata["class_names"]
    low, high = counts.argmin(), counts.argmax()
    skipped = metadata["skipped"]
    balance = f"from {counts[low]} records ({names[low]}) to {counts[high]} ({names[high]})"
    if counts[low] == counts[high]:
        balance = f"{counts[low]} records each"
    copies = f", {metadata['copies']} copies each" if metadata["copies"] > 1 else ""
    mirrored = ", with mirror images" if metadata["flips"] else ""
    lines = [
        f"{metadata['num_records']} records of {rows}x{columns} tokens ({metadata['token_dtype']}) "
        f"from {metadata['num_images']} images{copies}{mirrored}",
        f"{len(names)} classes, {balance}",
        f"{use.used} of {use.size} codes in use, perplexity {use.perplexity:.1f}",
    ]
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        lines.append(f"classes without a record: {', '.join(map(repr, empty[:5]))}{more}")
    if unused := images.describe_unused(metadata["preprocessing"].get("ignored_files", {})):
        lines.append(unused)
    if skipped:
        lines.append(f"{len(skipped)} images skipped, all in metadata.json:")
        lines += [f"  {entry['key']}: {entry['reason']}" for entry in skipped[:5]]
    return "\n".join(lines)


def inspect(
    directory: str | os.PathLike, model: tokenizer.Tokenizer, out: str | os.PathLike
) -> str:
    """Compares images decoded from their tokens with the originals.

    Writes ``reconstructions.png``, rows of originals above rows of what their tokens decode to, and
    ``inspection.json`` into ``out``. The images are a fixed even selection, not mirrored.

    Args:
        directory: of the token set.
        model: the tokenizer that made it.
        out: directory to write.

    Returns:
        A text for people.

    Raises:
        ValueError: a byte of the set is damaged, or it is of another tokenizer.
    """
    directory, out = buckets.fetched(directory), pathlib.Path(out)
    files.require_writable(out)
    metadata = tokens.read_metadata(directory)
    token_set = tokens.TokenSet.open(directory)
    if token_set.tokenizer != model.fingerprint:
        raise ValueError(f"the tokens in {directory} were made by another tokenizer than this one")
    assert isinstance(token_set.rows, records.Files)  # the set is a directory
    for npy in token_set.rows.paths:
        tokens.read_shard(npy.with_suffix(".json"), metadata)
    use = code_use(token_set)
    lines = [_summary(metadata, use)]
    rows = _even_selection(token_set, metadata)
    decoded = model.decode(rows["tokens"].astype(np.int32))
    values: dict[str, Any] = {"codes_used": use.used, "perplexity": use.perplexity}
    try:
        originals = _originals(metadata, rows["image"])
    except (OSError, ValueError) as error:
        lines.append(f"the original images cannot be shown: {error}")
        pictures = decoded[:SHOWN]
    else:
        errors = np.square((decoded.astype(float) - originals) / 255).mean((1, 2, 3))
        psnr = -10 * np.log10(np.maximum(errors, 1e-12))
        values |= {
            "num_measured": len(rows),
            "squared_error": float(errors.mean()),
            "absolute_error": float(np.abs(decoded.astype(float) - originals).mean() / 255),
            "psnr": float(-10 * np.log10(max(errors.mean(), 1e-12))),
            "psnr_worst": float(psnr.min()),
            "psnr_best": float(psnr.max()),
        }
        lines.append(
            f"reconstruction of {len(rows)} images: PSNR {values['psnr']:.2f} dB (worst "
            f"{psnr.min():.2f}, best {psnr.max():.2f}), mean absolute error "
            f"{values['absolute_error']:.4f} of 1"
        )
        pictures = _interleaved(originals[:SHOWN], decoded[:SHOWN])
    png.write_png(out / "reconstructions.png", png.grid(pictures, min(COLUMNS, len(rows))))
    files.write_json(out / "inspection.json", values)
    return "\n".join([*lines, f"pictures in {out / 'reconstructions.png'}"])


def _even_selection(token_set: tokens.TokenSet, metadata: dict[str, Any]) -> np.ndarray:
    """Returns records of unchanged images, evenly over the set and so over its classes."""
    step = metadata["copies"] * (1 + metadata["flips"])  # the plain record comes first
    plain = np.arange(0, len(token_set), step)
    chosen = plain[records.evenly(len(plain), MEASURED)]
    # In a fixed random order, so that the first few are of all classes, too.
    return token_set.rows[np.random.default_rng(0).permutation(chosen)]


def _originals(metadata: dict[str, Any], indices: np.ndarray) -> np.ndarray:
    source = images.open_again(metadata["location"], metadata["preprocessing"]["source"])
    return source.gather(indices.astype(np.int64))["images"]


def _interleaved(originals: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Returns rows of originals, each followed by the row of their reconstructions."""
    columns = min(COLUMNS, len(originals))
    whole = len(originals) // columns * columns  # no half rows
    pairs = [x[:whole].reshape(-1, columns, *x.shape[1:]) for x in (originals, decoded)]
    return np.stack(pairs, 1).reshape(-1, *originals.shape[1:])
