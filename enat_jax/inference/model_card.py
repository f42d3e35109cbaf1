"""The README of a model directory: what it is, how to use it, where it comes from."""

from typing import Any

HEAD = """---
library_name: enat_jax
tags: [image-generation, class-conditional, jax, flax, enat]
---

# An image generator of {classes} classes

Class labels in, images of {height}x{width} pixels out: {kind} transformer (*ENAT: Rethinking
Spatial-temporal Interactions in Token-based Image Synthesis*, arXiv 2411.06959) of {parameters:.2f}
million parameters over {tokens} tokens of {codes} codes, and the VQ tokenizer that turns them into
pixels. Class numbers are those of `class_names` in `model.json`; {classes} means no class.
"""

USE = """
## Use

With the package `enat_jax`:

```python
from enat_jax.generator import Generator

model = Generator.load("DIRECTORY")  # or "hf://OWNER/NAME"
images = model.sample([0, 0, 1], seed=0)  # uint8 [3, height, width, channels]
```

The same weights for other programs: `transformer.safetensors`, `tokenizer/params.safetensors`.
"""

COMPILED = """
Without the package, on one device, with jax, flatbuffers, numpy and safetensors alone:

```python
import json
import jax, jax.export, numpy as np
from safetensors.numpy import load_file

description = json.load(open("sampler.json"))
schedule = {k: np.float32(v) for k, v in description["schedule"].items()}
weights = {k: jax.device_put(load_file(v)) for k, v in description["weights"].items()}
exported = jax.export.deserialize(bytearray(open("sampler.jaxexport", "rb").read()))
labels, image_index, seed = np.int32([0, 0, 1]), np.int32([0, 1, 2]), np.uint32([0, 0])
images = jax.jit(exported.call)(weights, labels, image_index, seed, schedule)
```
"""


def text(
    description: dict[str, Any],
    image_size: tuple[int, int],
    num_parameters: int,
    compiled: bool = False,
) -> str:
    """Returns Markdown, with the head that the Hugging Face Hub reads.

    Args:
        description: values of ``model.json``.
        image_size: (height, width) in pixels.
        num_parameters: of the transformer.
        compiled: whether the directory has a compiled sampler.
    """
    model = description["model"]
    names = description["class_names"]
    head = HEAD.format(
        kind={"enat": "an ENAT", "nat": "a NAT (baseline)"}[description["kind"]],
        height=image_size[0],
        width=image_size[1],
        tokens=model["num_tokens"],
        codes=model["codebook_size"],
        parameters=num_parameters / 1e6,
        classes=len(names),
    )
    settings = "".join(f"| {k} | {v} |\n" for k, v in description["sampler"].items())
    return (
        head
        + USE
        + (COMPILED if compiled else "")
        + "\nAn image depends on seed, index and label alone.\n"
        + f"\n## Sampler settings\n\n| setting | value |\n|---|---|\n{settings}"
        + f"\n## Provenance\n\n{_provenance(description)}"
    )


def _provenance(description: dict[str, Any]) -> str:
    """Returns a list of the main points; the whole of it is in ``model.json``."""
    known = description["provenance"]
    rows = [f"{part} weights, SHA-256: `{x}`" for part, x in description["fingerprint"].items()]
    if "step" in known:
        rows.append(f"trained for {known['step']} steps; the config is in `model.json`")
    if "data" in known:
        rows.append(f"trained on {known['data'].get('num_records', 'unknown')} token records")
    if "versions" in known:
        rows.append("made with " + ", ".join(f"{k} {v}" for k, v in known["versions"].items()))
    return "".join(f"- {row}\n" for row in rows)
