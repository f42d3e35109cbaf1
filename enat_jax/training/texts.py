"""Texts in the training of the transformer: captions, their encoder, and dropping them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from enat_jax.data import captioned, captions, text_states, token_data
from enat_jax.data.tokens import TokenSet
from enat_jax.inference import clip_model, text_encoder
from enat_jax.models.blocks import Prompt


def join(
    data: token_data.Data, settings: dict[str, Any], tokens: TokenSet, held_out: TokenSet | None
) -> tuple[TokenSet, TokenSet | None, text_encoder.TextEncoder | None]:
    """Brings tokens together with their captions, and says how they are read.

    Args:
        data: with ``captions``; without them tokens stay as they are.
        settings: of the model. Those of texts that are left open are set.
        tokens: to train on.
        held_out: to evaluate on.

    Raises:
        FileNotFoundError: there are no captions, or no text encoder.
        ValueError: captions, tokens, model and encoder do not fit together.
    """
    if not data.captions:
        for name in ("text_width", "text_vocabulary"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"model.{name}={settings[name]} needs texts: give --config.data.captions=DIR"
                )
        return tokens, held_out, None
    if "text_tokens" not in settings:
        raise ValueError("data.captions needs a model that takes texts: model.kind must be 'enat'")
    if held_out is None:
        found, held_out_captions = captioned.open_captions(data.captions, data.tokens), None
    else:
        assert data.held_out_tokens is not None
        if not data.held_out_captions:
            raise ValueError(
                "data.held_out_captions is not set: give --config.data.held_out_captions=DIR, what "
                "tokenize_captions made for the held-out tokens, or no held-out tokens"
            )
        found, held_out_captions = captioned.open_both(
            *(data.tokens, data.captions, data.held_out_tokens, data.held_out_captions)
        )
    context = settings["text_tokens"] or found.longest
    if found.states is not None:
        encoder = _with_states(data, settings, found.states, held_out_captions)
    elif found.kind.identity()["kind"] == "words":
        if data.text_encoder:
            raise ValueError(
                f"data.text_encoder={data.text_encoder} has no use: the captions in "
                f"{data.captions} are words, which the model learns by itself"
            )
        encoder = text_encoder.TextEncoder(found.kind, context)
    else:
        encoder = _with_clip(data, context, settings["dtype"], bool(settings["text_tokens"]))
    needed = {
        "text_vocabulary": None if encoder.width else found.kind.size,
        "text_width": encoder.width,
    }
    for name, value in needed.items():
        if settings[name] not in (None, value):
            raise ValueError(
                f"model.{name}={settings[name]}, but the texts of {data.captions} have "
                f"{value or 'none'}: leave it to them (--config.model.{name}=None)"
            )
    settings |= needed | {"text_tokens": encoder.context}
    tokens = captioned.Captioned.of(tokens, found, encoder.context)
    if held_out is not None and held_out_captions is not None:
        held_out = captioned.Captioned.of(held_out, held_out_captions, encoder.context)
    return tokens, held_out, encoder


def _with_states(
    data: token_data.Data,
    settings: dict[str, Any],
    stored: text_states.States,
    held_out: captions.Captions | None,
) -> text_encoder.TextEncoder:
    if data.text_encoder:
        raise ValueError(
            f"data.text_encoder={data.text_encoder} has no use: the states of the captions in "
            f"{data.captions} are stored; leave it out (--config.data.text_encoder=)"
        )
    longest = max(stored.longest, 0 if held_out is None else held_out.longest)
    context = settings["text_tokens"] or longest
    if context < longest:
        raise ValueError(
            f"model.text_tokens={context}, but a caption in {data.captions} or "
            f"{data.held_out_captions} has {longest} states: take all by 0, or make the captions "
            f"again with --text-tokens {context}"
        )
    if settings["attend_padding"] and not (stored.padding and stored.context == context):
        raise ValueError(
            f"model.attend_padding needs {context} states of every text, padding included: make "
            f"the captions in {data.captions} again with --padding --text-tokens {context}, or "
            "give --config.model.attend_padding=False"
        )
    return text_encoder.of_states(stored, context)


def _with_clip(
    data: token_data.Data, context: int, dtype: str, fixed: bool
) -> text_encoder.TextEncoder:
    if not data.text_encoder:
        raise ValueError(
            f"the captions in {data.captions} are tokens of CLIP: give "
            f"--config.data.text_encoder=DIR ({clip_model.MADE_BY})"
        )
    clip = clip_model.ClipText.load(data.text_encoder, dtype, devices=jax.local_devices()[:1])
    if not fixed:  # of longer captions the first tokens are read
        context = min(context, clip.model.context)
    return text_encoder.of_clip(clip, context)


def prompt(
    encoder: text_encoder.TextEncoder,
    frozen: PyTree,
    text: Int[Array, "b p"] | Float[Array, "b p e"],
    lengths: Int[Array, " b"],
    key: Key[Array, ""],
    drop: float,
) -> Prompt:
    """Returns the prompts of a batch, some of which become the empty text; pure.

    Args:
        encoder: of the texts.
        frozen: its weights.
        text, lengths: of the batch; states that were stored stay as they are.
        key: decides which are dropped.
        drop: probability of each.
    """
    null, null_length = (np.asarray(x) for x in encoder.null_prompt)
    if encoder.clip is not None:
        null = encoder.null_ids[0]  # whose states are computed with the others
    dropped = jax.random.uniform(key, lengths.shape) < drop
    text = jnp.where(dropped.reshape(-1, *[1] * (text.ndim - 1)), null, text)
    tokens: Float[Array, "b p *e"] = jax.lax.stop_gradient(encoder.read(frozen, text))
    return Prompt(tokens, jnp.where(dropped, null_length, lengths))
