"""Texts to the tokens of CLIP: byte pairs, as OpenAI's own tokenizer makes them.

Hugging Face's fast tokenizer of CLIP cleans texts otherwise: entities, curly quotes, ligatures and
wide characters become other tokens there. The package ``tokenizers`` does the byte pairs, ``ftfy``
repairs what a wrong decoding has left; the extra ``text`` brings both.
"""

import functools
import gzip
import html
import pathlib
from collections.abc import Sequence
from typing import Any

START, END = 49406, 49407
CONTEXT = 77  # tokens of a text, its start, its end and its padding among them
_MERGES = pathlib.Path(__file__).with_name("clip_merges.txt.gz")
# Names of special tokens, contractions, words, single digits, and what is none of these.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def clean(text: str) -> str:
    """Returns a text as it is tokenized: repaired, without entities, blanks single, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def encode(texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of texts, without start and end.

    The names of special tokens are plain text: a prompt cannot end itself.

    Raises:
        ImportError: ``tokenizers`` or ``ftfy`` is not installed.
    """
    found = _byte_pairs().encode_batch([clean(text) for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in found]


def rest(text: str, kept: int) -> str:
    """Returns what of a text stands behind its first ``kept`` tokens, from a whole word on.

    Args:
        text: any; what is returned is cleaned.
        kept: fewer tokens than it has.
    """
    text = clean(text)
    encoding = _byte_pairs().encode(text, add_special_tokens=False)
    start = encoding.offsets[kept][0]
    return text[text.rfind(" ", 0, start + 1) + 1 :]


@functools.cache
def _byte_pairs() -> Any:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    merges = gzip.decompress(_MERGES.read_bytes()).decode().split("\n")[:-1]
    symbols = _byte_symbols()
    words = [*symbols, *(f"{s}</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    byte_pairs = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            pairs,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token="<|endoftext|>",  # never needed: every byte is a symbol
        )
    )
    pieces = pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    return byte_pairs


def _byte_symbols() -> list[str]:
    """Returns a character for every byte in the order of ids, those that print first."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len(set(range(256)) - set(printing))
    return [chr(byte) for byte in [*printing, *range(256, 256 + others)]]
