"""Prompts in files: which lines are prompts, and which line is broken."""

import io
import sys

import pytest

from enat_jax.data import prompt_files


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", ["p.txt", "prompts", "P.TXT"])
def test_a_text_has_a_prompt_on_each_line(tmp_path, name):
    content = "\ufeff  a cat \r\n\n \t\n{a dog}\n\u202ea b\n"
    path = written(tmp_path, name, content)
    assert prompt_files.read(path) == ["a cat", "{a dog}", "\u202ea b"]


def test_json_lines_have_one_of_three_fields(tmp_path):
    lines = [
        '{"text": " a\\u0000 cat\\n", "caption": "no"}',
        "",
        '{"prompt": ""}',
        '{"file_name": "1.png", "caption": "é"}',
    ]
    path = written(tmp_path, "p.jsonl", "\n".join(lines))
    assert prompt_files.read(path) == [" a\0 cat\n", "", "é"]


def test_stdin_is_a_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a cat\n\né".encode())))
    assert prompt_files.read("-") == ["a cat", "é"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\n\xff".encode("latin-1"), r"p.txt:2 is not UTF-8 \("),
        ("p.txt", "a cat".encode("utf-16"), "p.txt:1 is not UTF-8"),
        ("p.txt", "a cat".encode("utf-16-le"), "p.txt:1: this line holds a zero byte"),
        ("p.txt", " \n\n", "p.txt holds no prompt"),
        ("p.jsonl", "", "p.jsonl holds no prompt"),
        ("p.jsonl", '{"text": "a"}\n{"text": ', "p.jsonl:2: this line is not JSON"),
        ("p.jsonl", "[" * 10**5, "p.jsonl:1: this line is not JSON"),
        ("p.jsonl", '["a cat"]', 'p.jsonl:1: this line is no object such as {"text": "a cat"}'),
        ("p.jsonl", "a cat", "p.jsonl:1: this line is not JSON"),
        ("p.jsonl", '\n{"label": 3, "b": 1}', r"p.jsonl:2: there is none of .* but \['b', 'label'"),
        ("p.jsonl", '{"text": ["a"]}', r"""p.jsonl:1: the prompt '\["a"\]' is no text"""),
        ("p.jsonl", '{"text": null, "prompt": "a"}', "p.jsonl:1: the prompt 'null' is no text"),
        ("p.json", '{"text": "a"}', "p.json is neither .txt, a prompt on each line, nor .jsonl"),
    ],
)
def test_what_is_broken_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        prompt_files.read(written(tmp_path, name, content))
