"""A made-up MS-COCO of a few pictures, in the layouts of 2014 and of 2017, and tokens of it."""

import json

import numpy as np

from enat_jax.data import tokens

NOUNS = ("cat", "dog", "bus", "pizza", "clock", "zebra")


def caption(number, which):
    """With what real captions have: capitals, line breaks, blanks at the end, sides."""
    noun = NOUNS[number % len(NOUNS)]
    return (
        f"A {noun} stands left of a bench.",
        f"The {noun}\nnumber {number} ",
        f"two photos of a {noun}",
    )[which]


def file_name(number, year, part="train"):
    return f"COCO_{part}2014_{number:012d}.jpg" if year == 2014 else f"{number:012d}.jpg"


def write_captions(path, numbers, year=2014, part="train"):
    """captions_*.json; picture i has 2 captions, or 3 if i is divisible by 3."""
    images = [
        {"id": n, "file_name": file_name(n, year, part), "height": 9, "width": 9, "license": 1}
        for n in numbers
    ]
    pairs = [(n, which) for which in range(3) for n in numbers if which < 2 + (n % 3 == 0)]
    annotations = [
        {"id": 1000 + i, "image_id": n, "caption": caption(n, which)}
        for i, (n, which) in enumerate(pairs)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"info": {"year": year}, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(values))
    return path


def write_tokens(directory, keys, *, flips=False, unreadable=(), labels=None, **spec):
    """Records of pictures with these keys, whose tokens say picture, flip, picture and label.

    Pictures of ``unreadable`` keys were skipped; ``spec`` changes the plan.
    """
    n = len(keys)
    names = ("image",) if labels is None else ("cat", "tench, Tinca tinca")
    settings = {
        "num_images": n, "copies": 1, "flips": flips, "batch_size": 4, "grid": (2, 2),
        "codebook_size": max(n, 2), "class_names": names, "tokenizer": "none",
        "preprocessing": {"source": {"keys": list(keys)}}, "location": {}, "shard_items": 16,
    }  # fmt: skip
    made = tokens.TokenSetSpec(**settings | spec)
    for shard in tokens.begin(directory, made):
        items = made.items(shard)
        used = [image for image in items if keys[image] not in unreadable]
        rows = np.zeros(len(used) * made.views, made.dtype)
        rows["image"] = np.repeat(np.array(used, int), made.views)
        rows["flip"] = np.tile(np.arange(made.views), len(used))
        rows["label"] = 0 if labels is None else np.array(labels)[rows["image"]]
        fields = [rows[name] for name in ("image", "flip", "image", "label")]
        rows["tokens"] = np.stack(fields, 1)
        skipped = [{"image": i, "key": keys[i], "reason": "broken"} for i in items if i not in used]
        tokens.write_shard(directory, made, shard, rows, [keys[i] for i in items], skipped)
    assert tokens.finish(directory, made)
    return directory
