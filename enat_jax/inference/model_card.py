"""The README of a model directory: what it is, how to use it, where it comes from."""

import dataclasses
from typing import Any

SHOWN = 200  # words of a vocabulary

HEAD = """---
library_name: enat_jax
tags: [image-generation, {tags}, jax, flax, enat]
---

# An image generator {title}

{read} in, images of {height}x{width} pixels out: {kind} transformer (*ENAT: Rethinking
Spatial-temporal Interactions in Token-based Image Synthesis*, arXiv 2411.06959) of {parameters:.2f}
million parameters over {tokens} tokens of {codes} codes, and the VQ tokenizer that turns them into
pixels.{numbers}
"""

NUMBERS = " Class numbers are those of `class_names` in `model.json`; {classes} means no class."

USE = """
## Use

With the package `enat_jax`:

```python
from enat_jax.generator import Generator

model = Generator.load("DIRECTORY")  # or "hf://OWNER/NAME"
{lines}
```

The same weights for other programs: `transformer.safetensors`, `tokenizer/params.safetensors`.
"""

SHAPE = "  # uint8 [3, height, width, channels]"
BY_LABEL = f"images = model.sample([0, 0, 1], seed=0){SHAPE}"
BY_PROMPT = f'prompts = ["{{prompt}}"] * 3\nimages = model.sample(prompts=prompts, seed=0){SHAPE}'
BY_BOTH = BY_PROMPT.replace("prompts=", "[0, 0, 1], prompts=")

BY_TEXT = """python -m enat_jax.sample --model DIRECTORY {flag}--prompt "{prompt}" --out pictures
"""

WORDS = f"""
## Texts

It reads texts of at most {{room}} words, in any case, of this vocabulary:

> {{vocabulary}}

```bash
{BY_TEXT}```
"""

STATES = """
## Texts

It reads the states of a text encoder that was not trained with it, at most {context} of a text;
`null_text.npy` holds those of the empty text. {about}
```bash
{command}python -m enat_jax.sample --model DIRECTORY --embeddings FILE.npz --out pictures
```
"""

CLIP = """The encoder is the text tower of a CLIP: width {width},
{num_layers} layers, {num_heads} heads, activation {activation}, texts padded with {pad}. {place}
Another encoder than this is refused (its weights, SHA-256):

> `{weights}`

OpenAI's weights of CLIP are under the MIT licence, Copyright (c) 2021 OpenAI, as are those of
LAION's OpenCLIP: keep their notice with the weights.
"""

INSIDE = "It is in `text_encoder/`."
ELSEWHERE = """It is not in this directory:
`python -m enat_jax.import_torch --clip FILE --out ENCODER` makes it of published weights, and
`Generator.load("DIRECTORY", text_encoder_directory="ENCODER")` takes it."""

COMPILED = """
Without the package, on one device, with jax, flatbuffers, numpy and safetensors alone:

```python
import json
import jax, jax.export, numpy as np
from safetensors.numpy import load_file

description = json.load(open("sampler.json"))
schedule = {{k: np.float32(v) for k, v in description["schedule"].items()}}
weights = {{k: jax.device_put(load_file(v)) for k, v in description["weights"].items()}}
exported = jax.export.deserialize(bytearray(open("sampler.jaxexport", "rb").read()))
labels, image_index, seed = np.int32([0, 0, {label}]), np.int32([0, 1, 2]), np.uint32([0, 0])
{prompts}images = jax.jit(exported.call)(weights, labels, image_index, seed, schedule{arguments})
```
"""

COMPILED_WORDS = """texts, reads = ["{prompt}"] * 3, description["text"]
words = {{word: i for i, word in enumerate(reads["tokens"]["vocabulary"], 1)}}  # 0 begins a text
prompt = np.zeros((3, reads["context"]), np.int32), np.int32([1 + len(x.split()) for x in texts])
for row, text in zip(prompt[0], texts):
    row[1 : 1 + len(text.split())] = [words[word] for word in text.split()]
null_prompt = prompt[0][:1] * 0, np.int32([1])
"""

COMPILED_STATES = """stored = np.load("FILE.npz")  # of three prompts, as for --embeddings
prompt = stored["embeddings"], stored["lengths"]  # float16 [3, {context}, {width}], int32 [3]
null = np.load("null_text.npy")[None, :{context}]
null_prompt = null, np.int32([{null}])
"""


def text(
    description: dict[str, Any],
    image_size: tuple[int, int],
    num_parameters: int,
    compiled: bool = False,
    with_text_encoder: bool = False,
) -> str:
    """Returns Markdown, with the head that the Hugging Face Hub reads.

    Args:
        description: values of ``model.json``.
        image_size: (height, width) in pixels.
        num_parameters: of the transformer.
        compiled: whether the directory has a compiled sampler.
        with_text_encoder: whether the directory has the encoder of the texts.
    """
    model = description["model"]
    names = description["class_names"]
    texts = _Texts.of(description)
    head = HEAD.format(
        **_heading(len(names), texts is not None),
        kind={"enat": "an ENAT", "nat": "a NAT (baseline)"}[description["kind"]],
        height=image_size[0],
        width=image_size[1],
        tokens=model["num_tokens"],
        codes=model["codebook_size"],
        parameters=num_parameters / 1e6,
    )
    lines = BY_LABEL if texts is None else BY_BOTH if names else BY_PROMPT
    given = {} if texts is None else texts.values
    depends = ["seed", "index", *(["label"] if names else []), *(["prompt"] if texts else [])]
    settings = "".join(f"| {k} | {v} |\n" for k, v in description["sampler"].items())
    return (
        head
        + USE.format(lines=lines.format(**given))
        + (texts.section(with_text_encoder) if texts else "")
        + (_compiled(texts, len(names)) if compiled else "")
        + f"\nAn image depends on {', '.join(depends[:-1])} and {depends[-1]} alone.\n"
        + f"\n## Sampler settings\n\n| setting | value |\n|---|---|\n{settings}"
        + f"\n## Provenance\n\n{_provenance(description)}"
    )


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What the card says of texts.

    Attributes:
        words: whether they are words, and not states.
        values: of the templates.
    """

    words: bool
    values: dict[str, Any]

    @classmethod
    def of(cls, description: dict[str, Any]) -> "_Texts | None":
        if "text" not in description:
            return None
        text = description["text"]
        values = {"context": text["context"], "room": text["context"] - 1}
        if "encoder" in text:
            values |= {"encoder": text["encoder"], "width": description["model"]["text_width"]}
            values["null"] = 2 if text["encoder"].get("kind") == "clip" else "null.shape[1]"
            return cls(False, values | {"prompt": "a photo of a cat"})
        words = text["tokens"]["vocabulary"]
        more = f" and {len(words) - SHOWN:,} more, see `model.json`" if len(words) > SHOWN else ""
        vocabulary = ", ".join(words[:SHOWN]) + more
        return cls(True, values | {"vocabulary": vocabulary, "prompt": words[-1]})

    def section(self, with_text_encoder: bool) -> str:
        if self.words:
            return WORDS.format(flag="", **self.values)
        encoder, about, command = self.values["encoder"], "", ""
        if encoder.get("kind") == "clip":
            place = INSIDE if with_text_encoder else ELSEWHERE
            about = CLIP.format(place=place, **encoder)
            flag = "" if with_text_encoder else "--text-encoder ENCODER "
            command = BY_TEXT.format(flag=flag, **self.values)
        return STATES.format(about=about, command=command, **self.values)


def _heading(classes: int, with_texts: bool) -> dict[str, str]:
    """Returns what the head says that depends on what the model reads."""
    numbers = NUMBERS.format(classes=classes) if classes else ""
    if not with_texts:
        of = {"tags": "class-conditional", "title": f"of {classes} classes", "read": "Class labels"}
    elif classes:
        tags, title = "class-conditional, text-to-image", f"of {classes} classes and of texts"
        of = {"tags": tags, "title": title, "read": "Class labels and texts"}
    else:
        of = {"tags": "text-to-image", "title": "that reads texts", "read": "Texts"}
    return of | {"numbers": numbers}


def _compiled(texts: _Texts | None, classes: int) -> str:
    if texts is None:
        return COMPILED.format(label=1, prompts="", arguments="")
    prompts = (COMPILED_WORDS if texts.words else COMPILED_STATES).format(**texts.values)
    label = 1 if classes else 0
    return COMPILED.format(label=label, prompts=prompts, arguments=", prompt, null_prompt")


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
