"""The multiply-adds that the paper prints (Tables 1, 2, 5 and 6) beside ours."""

from collections.abc import Sequence
from typing import Any

from enat_jax.models import vqgan
from enat_jax.runtime.markdown import table as markdown_table
from enat_jax.schedules import costs

IMAGE_DECODER = costs.image_decoder_cost(vqgan.VQGAN(), 16, 16)
# Model, the paper's tables, sizes, steps, the paper's figure in billions, its last digit in
# billions, whether the image decoder is in it. All of 256x256 pixels, ImageNet but for the last:
# MS-COCO, whose 77 states of CLIP ViT-L/14 the paper must have encoded at every step.
ENAT_TEXT = costs.Dims(
    *(768, 15, 1), labels=False, text_tokens=77, text_width=768, text_encoding="every_step"
)
PAPER = (
    ("NAT, 8 layers", "1, 6", costs.Dims(288, mixed_layers=8, reuse=False), 8, 39.6, 0.1, False),
    ("disentangled, 8 + 8", "1", costs.Dims(288, 8, 8, reuse=False), 8, 40.2, 0.1, False),
    ("disentangled, 12 + 4", "1", costs.Dims(318, 12, 4, reuse=False), 8, 38.2, 0.1, False),
    ("disentangled, 15 + 1", "1, 6", costs.Dims(366, 15, 1, reuse=False), 8, 39.8, 0.1, False),
    ("ENAT-S", "6", costs.Dims(366, 15, 1), 8, 22.6, 0.1, False),
    ("ENAT-B", "2", costs.Dims(768, 15, 1), 4, 100, 100, True),
    ("ENAT-B", "2", costs.Dims(768, 15, 1), 8, 200, 100, True),
    ("ENAT-L", "2", costs.Dims(1024, 22, 2), 4, 200, 100, True),
    ("ENAT-L", "2", costs.Dims(1024, 22, 2), 8, 300, 100, True),
    ("ENAT-B, text", "5", ENAT_TEXT, 8, 300, 100, True),
)


def rows() -> list[dict[str, Any]]:
    """Returns the paper's figures and ours, in multiply-adds an image.

    Returns:
        Rows of model, tables, num_steps; image_decoder: whether its cost is in the figures;
        paper: as printed; last_digit: worth of one in its last digit; recount: by the paper's
        convention (``costs.paper_cost``); difference: of the recount from the paper's figure,
        relative; same_digits: whether the recount rounds to that figure; exact: what this
        implementation computes for one image, nothing twice and nothing in vain
        (``costs.exact_sampling_cost``).
    """
    found = []
    for model, tables, dims, num_steps, printed, digit, with_decoder in PAPER:
        decoder = IMAGE_DECODER if with_decoder else 0
        recount = costs.paper_cost(dims, num_steps) + decoder
        found.append(
            {
                "model": model,
                "tables": tables,
                "num_steps": num_steps,
                "image_decoder": with_decoder,
                "paper": printed * 1e9,
                "last_digit": digit * 1e9,
                "recount": recount,
                "difference": recount / (printed * 1e9) - 1,
                "same_digits": abs(recount / 1e9 - printed) <= digit / 2,
                "exact": costs.exact_sampling_cost(dims, num_steps) + decoder,
            }
        )
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Returns the table of ``rows`` as Markdown."""
    titles = "model", "table", "steps", "paper", "recount", "difference", "same digits"
    cells = [
        (
            row["model"],
            row["tables"],
            row["num_steps"],
            f"{row['paper'] / 1e12:.1f} T"
            if row["image_decoder"]
            else f"{row['paper'] / 1e9:.4g} G",
            f"{row['recount'] / 1e9:.2f} G",
            f"{row['difference']:+.1%}",
            "yes" if row["same_digits"] else "no",
            f"{row['exact'] / 1e9:.2f} G",
        )
        for row in found
    ]
    return (
        f"{markdown_table([*titles, 'exact, here'], cells, align='llrrrrlr')}\n\n"
        "Multiply-adds of one image of 256x256, both guidance branches; those in T with the image "
        f"decoder, {IMAGE_DECODER / 1e9:.1f} G. Recount: by the paper's convention, which has the "
        "unconditional branch at the first step too, where its weight is 0, the modulation at "
        "every step and the head on all tokens; exact does without. Figures in T are printed to "
        "one digit: their difference is mostly rounding.\n"
    )
