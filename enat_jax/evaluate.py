"""Measure a model, a tokenizer or pictures, and make statistics to measure them against.

    python -m enat_jax.evaluate --model DIR --reference STATS_OR_SOURCE --out DIR
    python -m enat_jax.evaluate --tokenizer DIR --source SOURCE --out DIR
    python -m enat_jax.evaluate --images SOURCE --reference STATS_OR_SOURCE --size 256 --out DIR
    python -m enat_jax.evaluate --model DIR --reference SOURCE --fill-centres TOKENS --out DIR
    python -m enat_jax.evaluate --model DIR --prompts TEXTS --clip CLIP --reference ... --out DIR
    python -m enat_jax.evaluate --make-reference FILE.npz --reference SOURCE --size 256
    python -m enat_jax.evaluate --compare DIR DIR

STATS is an .npz file: one made by this program, ADM's, or pytorch-fid's. SOURCE is digits, a
folder, a .zip, a .tar or tfds:NAME, for --images and --reference also an .npz file of images as
ADM's programs write it. Of what `sample` wrote the samples count. Of a tokenizer the pictures that
are held out are measured, if there are any, or those of --split. The images of a model stay pixels
in memory; image i is of class i mod the number of classes and depends on the seed and i alone. DIR
receives `card.md` and `card.json`. Start the same command again to go on with an interrupted one.

A model of texts draws an image of each of TEXTS: a .txt or .jsonl file of prompts, of which image i
has prompt i mod their number, or captions of pictures, in a directory of `tokenize_captions` or in
any form that it reads. Of these --num pictures (30,000, as FID-30K, or all) are drawn without
replacement, always the same ones, and one caption of each. DIR receives the list, `prompts.jsonl`.
--clip DIR, made by `import_torch --clip`, scores images by their texts: CLIP score and R-precision,
beside those of other texts and, where --reference has the pictures of the captions, of these. With
--images, TEXTS may be the folder that `sample` wrote, which knows its prompts without --prompts.

With --fill-centres the middle of held-out pictures of --reference is hidden and filled; the table,
`filled.md`, has the loss of hidden tokens and the distance of the filled pictures, beside those of
two controls. TOKENS is the token set that the model was trained on.

Several hosts that share DIR take a part each: give them `--num-hosts N` and `--host-index` 0 to
N-1.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from enat_jax.data import tokens
from enat_jax.evaluation import (
    accumulate,
    arguments,
    cards,
    caveats,
    features,
    filled_centres,
    image_sets,
    image_texts,
    measures,
    passes,
    perceptual_distance,
    pictures,
    statistics,
)
from enat_jax.inference import (
    generator,
    near_tokens,
    sampler_settings,
    tokenization,
    tokenizer,
)
from enat_jax.runtime import cli, files, versions

# --- the uses ------------------------------------------------------------------------------------


def evaluate_model(flags: argparse.Namespace, hosts: passes.Hosts) -> None:
    """Writes the card of a model."""
    image_sets.refuse_models(flags.reference)
    network = features.open_features(flags.features, weights=flags.inception)
    model = _model(flags)
    texts = image_texts.of_model(model, flags.prompts, flags.clip, flags.num, **_location(flags))
    prompts = None if texts is None else texts.prompts
    num = flags.num or arguments.NUM if prompts is None else len(prompts)
    classes = len(model.class_names) if prompts is None else 0
    if num < max(2, classes):
        of_classes = f"a model of {classes} classes" if classes else "a distance"
        raise ValueError(
            f"--num {num} is too few: {of_classes} needs at least {max(2, classes)} images, and "
            "many more for numbers that mean anything"
        )
    subject = image_sets.of_generator(model, num, flags.seed, flags.batch_size, network, prompts)
    opener = _opener(flags, network)
    reference = image_sets.open_reference(
        flags.reference,
        lambda: opener.reference(flags.reference, model.tokenizer),
        subject.shape,
    )
    sections = {
        "kind": "model",
        "model": {
            "path": str(flags.model),
            "fingerprint": image_sets.fingerprints(model),
            "dtype": flags.dtype or model.model.dtype,
            "provenance": model.provenance,
        },
        "sampler": model.settings.described(),
    }
    _evaluate(flags, hosts, opener, subject, reference, sections, texts)


def _model(flags: argparse.Namespace) -> generator.Generator:
    model = generator.Generator.load(
        flags.model, flags.dtype, text_encoder_directory=flags.text_encoder
    )
    given = arguments.given_settings(flags)
    settings = sampler_settings.changed(model.settings, flags.settings, given)
    return dataclasses.replace(model, settings=settings)


def evaluate_filled(flags: argparse.Namespace, hosts: passes.Hosts) -> None:
    """Writes the table of held-out pictures whose hidden centres a model fills."""
    if hosts.number > 1:
        raise ValueError("--fill-centres is the work of one process: leave out --num-hosts")
    image_sets.refuse_models(flags.reference)
    model = _model(flags)
    if not model.class_names:
        raise ValueError("this model draws texts: --fill-centres needs a model of classes")
    token_set = tokens.TokenSet.open(flags.fill_centres)
    image_sets.require_tokenizer(model, token_set, flags.fill_centres)
    if image_sets.is_npz(flags.reference):
        raise ValueError(
            f"--reference {flags.reference}: --fill-centres needs pictures with labels, not .npz"
        )
    network = features.open_features(flags.features, weights=flags.inception)
    opener = _opener(flags, network)
    source = opener.held_out(flags.reference, model.tokenizer)
    if source.class_names != model.class_names:
        raise ValueError(
            f"the classes of --reference {flags.reference} are {', '.join(source.class_names)}, "
            f"those of the model {', '.join(model.class_names)}: give pictures of its classes"
        )
    if flags.scan:
        opener.refuse_unreadable()
    settings = {
        "kind": "filled",
        "model": image_sets.fingerprints(model),
        "sampler": model.settings.described(),
        "pictures": source.identity(),
        "features": network.description,
        "seed": flags.seed,
    }
    passes.claim(flags.out, settings)
    batch = source.gather(np.arange(len(source)))
    pictures_, labels = batch["images"], batch["labels"]
    judge = filled_centres.Distance(network, pictures_)
    rows = filled_centres.evaluate(model, judge, (pictures_, labels), token_set, seed=flags.seed)
    files.write_json(flags.out / "filled.json", [dataclasses.asdict(row) for row in rows])
    table = filled_centres.markdown(rows, judge, f"{len(labels):,} held-out pictures")
    files.write_atomically(flags.out / "filled.md", f"{table}\n".encode())
    print(table)


def evaluate_tokenizer(flags: argparse.Namespace, hosts: passes.Hosts) -> None:
    """Writes the card of a tokenizer: reconstructions against their originals, or statistics."""
    network = features.open_features(flags.features, weights=flags.inception)
    codec = tokenizer.Tokenizer.load(flags.tokenizer)
    needed = (*codec.image_size, codec.model.image_channels)
    opener = _opener(flags, network)
    source = opener.held_out(flags.source, codec)
    if source.image_shape != needed:
        raise ValueError(
            f"pictures of --source {flags.source} are {image_sets.size_of(source.image_shape)}, "
            f"the tokenizer takes {image_sets.size_of(needed)}: "
            f"{tokenization.advice(flags.source, source.image_shape, needed)}"
        )
    distance = None
    if flags.lpips is not None:
        distance = perceptual_distance.open_distance(flags.lpips, codec.model.image_channels)
    exchange = None
    if flags.near_codes is not None:
        exchange = near_tokens.NearTokens.of(codec, flags.near_codes)
    subject = image_sets.of_tokenizer(codec, source, network, distance, exchange)

    def originals() -> image_sets.ImageSet:
        if flags.reference in (None, flags.source):
            return image_sets.of_source(source, flags.keep, network)
        if image_sets.is_npz(flags.reference):
            return opener.reference(flags.reference)
        others = opener.held_out(flags.reference, codec)
        return image_sets.of_source(others, flags.keep, network)

    reference = image_sets.open_reference(flags.reference or flags.source, originals, needed)
    sections = {
        "kind": "tokenizer",
        "model": {
            "path": str(flags.tokenizer),
            "fingerprint": {"tokenizer": codec.fingerprint},
            "dtype": codec.model.dtype,
            "provenance": codec.provenance,
        },
        "sampler": {},
        **({} if distance is None else {cards.LPIPS: distance.description}),
        **({} if exchange is None else {cards.NEAR_CODES: exchange.description}),
    }
    _evaluate(flags, hosts, opener, subject, reference, sections)


def evaluate_images(flags: argparse.Namespace, hosts: passes.Hosts) -> None:
    """Writes the card of pictures that came from elsewhere."""
    image_sets.refuse_models(flags.reference)
    network = features.open_features(flags.features, weights=flags.inception)
    opener = _opener(flags, network)
    subject = opener.to_measure(flags.images)
    made_from = {"source": None}  # whoever made them learned from unknown images
    subject = dataclasses.replace(subject, description=subject.description | made_from)
    texts = image_texts.of_images(
        subject, flags.images, flags.prompts, flags.clip, **_location(flags)
    )
    reference = image_sets.open_reference(
        flags.reference,
        lambda: opener.reference(flags.reference, shape=subject.shape),
        subject.shape,
    )
    identity = subject.spec.identity["images"]
    sections = {
        "kind": "images",
        "model": {"path": flags.images, "dtype": None, "identity": identity},
        "sampler": {},
    }
    _evaluate(flags, hosts, opener, subject, reference, sections, texts)


def _evaluate(
    flags: argparse.Namespace,
    hosts: passes.Hosts,
    opener: pictures.Opener,
    subject: image_sets.ImageSet,
    reference: image_sets.Reference,
    sections: dict[str, Any],
    texts: image_texts.Texts | None = None,
) -> None:
    network = opener.network
    _try_features(network, subject, reference)
    if texts is not None:
        subject = texts.joined(subject)
    settings = {
        "format": cards.FORMAT,
        "kind": sections["kind"],
        "images": subject.spec.identity["images"],
        "num_images": subject.spec.num_images,
        "dtype": sections["model"]["dtype"],
        "features": network.description,
        "reference": reference.identity,
        "replicates": flags.replicates,
        "num_hosts": hosts.number,
        **({} if texts is None else texts.identity),
    }
    if flags.scan and not (flags.out / passes.PLAN).exists():  # or they have been read before
        opener.refuse_unreadable()
    passes.claim(flags.out, settings)
    if texts is not None:
        texts.prompts.write(flags.out)
    if reason := measures.why_no_overlap(subject.spec.kept, reference.kept):
        print(f"without precision, recall, density and coverage: {reason}", file=sys.stderr)
    if (flags.out / "card.json").exists():
        path = flags.out / "card.json"
        _show(cards.read(path, f"remove {path}, and it is made again"), flags.out)
        return
    compared = passes.statistics_of_reference(reference, network, flags.out, hosts)
    found = passes.run_and_collect(subject, network, flags.out / "images", hosts, "images")
    real = None if texts is None else texts.real(reference, flags.out / "real", hosts)
    if found is None or compared is None or (real is None and texts is not None):
        print(f"this host's part is finished; {flags.out} is complete when the others' are")
        return
    card = _card(flags, hosts, opener, subject, found, reference, compared) | sections
    if texts is not None and real is not None:
        texts.add_to(card, found, real)
    cards.write(flags.out, card)
    _show(card, flags.out)


def _show(card: cards.Card, out: pathlib.Path) -> None:
    print(f"{cards.summary(card)}\nall settings in {out / 'card.md'} and {out / 'card.json'}")


def _card(
    flags: argparse.Namespace,
    hosts: passes.Hosts,
    opener: pictures.Opener,
    subject: image_sets.ImageSet,
    found: accumulate.Collected,
    reference: image_sets.Reference,
    compared: statistics.Statistics,
) -> cards.Card:
    """Returns all of a card but what it says of the model."""
    own, network = subject.statistics(found), opener.network
    own.save(flags.out / "images.npz")
    begun = time.perf_counter()
    metrics, unmeasured = measures.evaluate_set(
        own,
        compared,
        found.rows,
        network,
        reconstructed=flags.tokenizer is not None,
        replicates=flags.replicates,
    )
    counts = found.totals.class_counts
    return {
        "format": cards.FORMAT,
        "headline": next(iter(metrics)),
        "metrics": metrics,
        "caveats": [
            *caveats.of_reference(own.description, compared.description),
            *caveats.of_features(network, subject.shape),
            *caveats.of_channels(subject.shape, reference.shape),
            *(caveats.of_split(subject.split) if flags.tokenizer else []),
            *opener.left_out,
            *unmeasured,
        ],
        "features": {**network.description, "origin": network.origin},
        "reference": {
            "path": reference.path,
            "about": reference.about,
            "sha256": reference.sha256,
            "description": compared.description,
        },
        "images": {
            "num": subject.spec.num_images,
            "per_class": [int(counts.min()), int(counts.max())],
            "classes": len(counts),
            "size": list(subject.shape),
            **({"split": subject.split} if subject.split else {}),
            "seed": flags.seed if flags.model else None,
        },
        "intervals": measures.about_intervals(flags.replicates),
        "versions": versions.library_versions(),
        "hardware": {**cards.hardware(), "num_hosts": hosts.number},
        "seconds": {**found.totals.seconds, "metrics": time.perf_counter() - begun},
        "date": cards.today(),
    }


def _try_features(
    network: features.Features, subject: image_sets.ImageSet, reference: image_sets.Reference
) -> None:
    """Raises ValueError, before anything is drawn, unless features suit images and statistics."""
    found = network(np.zeros((1, *subject.shape), np.uint8))
    if isinstance(reference.content, statistics.Statistics):
        sizes = {name: rows.shape[1] for name, rows in found.items()}
        reference.content.check_features(network.description, f"--reference {reference.path}")
        reference.content.check_dimensions(sizes, f"--reference {reference.path}")
    elif reference.shape != subject.shape:
        network(np.zeros((1, *reference.content.shape), np.uint8))


def make_reference(flags: argparse.Namespace, hosts: passes.Hosts) -> None:
    """Writes the statistics of a source."""
    path = flags.make_reference
    if path.suffix != ".npz":
        raise ValueError(f"--make-reference {path}: the name of a statistics file ends in .npz")
    network = features.open_features(flags.features, weights=flags.inception)
    opener = _opener(flags, network)
    subject = opener.reference(flags.reference)
    number = subject.spec.num_images
    if path.exists():
        loaded = statistics.load_own(path, f"remove {path}, or name another file")
        before = loaded.description | {"kept": 0 if loaded.pool is None else len(loaded.pool)}
        now = {k: v for k, v in subject.description.items() if k != "versions"}
        now |= {"kept": subject.spec.kept, "numerics": now.get("numerics")}
        # In the order of what is wanted, which has what matters most first.
        if found := files.differences(now, {k: before.get(k) for k in now}):
            name, wanted, was = found[0]
            raise ValueError(
                f"{path} holds other statistics: {name} is {was}, now it would be {wanted}: name "
                "another file"
            )
        print(f"{path} already holds these statistics")
        return
    work = path.with_name(f"{path.name}.unfinished")
    if flags.scan and not (work / passes.PLAN).exists():
        opener.refuse_unreadable()
    passes.claim(
        work,
        {**subject.spec.identity, "keep": flags.keep, "num_hosts": hosts.number},
        f"remove {work}, or name another file",
    )
    collected = passes.run_and_collect(subject, network, work, hosts, "reference")
    if collected is None:
        print(f"this host's part is finished; {path} is written when the others' are")
        return
    subject.statistics(collected).save(path)
    if hosts.number == 1:  # another host may be reading
        shutil.rmtree(work)
    print(f"statistics of {number:,} images of {image_sets.size_of(subject.shape)} in {path}")


def compare(paths: list[str]) -> None:
    """Prints what two cards say of each other."""
    first, second = (cards.read(path) for path in paths)
    print(cards.compare(first, second, (paths[0], paths[1])))


def _location(flags: argparse.Namespace) -> dict[str, str | None]:
    """Returns where TFDS has captions."""
    return {"split": flags.split, "data_dir": dict(flags.set).get("data_dir")}


def _opener(flags: argparse.Namespace, network: features.Features) -> pictures.Opener:
    skip = flags.on_error == "skip"
    if skip and not flags.scan:
        raise ValueError("--on-error skip has to read all pictures first: leave out --no-scan")
    settings = dict(flags.set) | ({} if flags.crop is None else {"crop": flags.crop})
    return pictures.Opener(network, flags.split, flags.size, settings, flags.keep, skip)


def main(argv: Sequence[str]) -> None:
    """Runs the use that the command line names."""
    parser = arguments.parser(__doc__ or "")
    flags = parser.parse_args(argv)
    use = next(name for name in arguments.NEEDED if getattr(flags, name) is not None)
    for name in arguments.NEEDED[use]:
        if getattr(flags, name) is None:
            raise ValueError(f"{arguments.option(use)} needs --{name}; see --help")
    arguments.refuse_without_effect(parser, flags, use)
    arguments.refuse_unknown_settings(flags)
    if use == "compare":
        compare(flags.compare)
        return
    if not flags.save_every >= 0:  # so written, it finds NaN, too
        raise ValueError(f"--save-every {flags.save_every} must be at least 0")
    if flags.replicates < 0 or flags.replicates == 1:
        raise ValueError(f"--replicates {flags.replicates} must be 0 or at least 2")
    hosts = passes.Hosts(
        jax.process_index() if flags.host_index is None else flags.host_index,
        flags.num_hosts or jax.process_count(),
        flags.save_every,
    )
    if not 0 <= hosts.index < hosts.number:
        raise ValueError(f"--host-index {hosts.index} is not in [0, {hosts.number})")
    uses = {
        "fill_centres": evaluate_filled,
        "model": evaluate_model,
        "tokenizer": evaluate_tokenizer,
        "images": evaluate_images,
        "make_reference": make_reference,
    }
    uses[use](flags, hosts)


if __name__ == "__main__":
    cli.run(main)
