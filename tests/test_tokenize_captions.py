"""The program: captions come to the tokens of their pictures, or one line says why not."""

import json

import fake_coco
import numpy as np
import pytest

from enat_jax import tokenize_captions
from enat_jax.data import captions, scenes, text_tokens, tokens
from enat_jax.runtime import cli

NUMBERS = range(100, 140)
VOCABULARY = (
    "a the stands left right of bench. number two photos photo picture large tench "
    + " ".join(fake_coco.NOUNS)
    + " "
    + " ".join(str(number) for number in NUMBERS)
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokens of 40 pictures and their captions, in the layouts of 2014 and of 2017."""
    root = tmp_path_factory.mktemp("coco")
    (root / "words.txt").write_text("\n".join(VOCABULARY.split()), encoding="utf-8-sig")
    for year in (2014, 2017):
        keys = [f"train{year}/{fake_coco.file_name(n, year)}" for n in NUMBERS]
        fake_coco.write_tokens(root / f"tokens{year}", keys, flips=True)
        fake_coco.write_captions(root / f"captions_train{year}.json", NUMBERS, year)
    return root


def arguments(root, out, *more, year=2014, source=True, words=True):
    found = ["--tokens", root / f"tokens{year}", "--out", out, *more]
    if source:
        found += ["--captions", root / f"captions_train{year}.json"]
    if words:
        found += ["--vocabulary", root / "words.txt"]
    return [str(x) for x in found]


def run(*args, **settings):
    tokenize_captions.main(arguments(*args, **settings))


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def texts(directory):
    """Captions by key."""
    found = {}
    for line in (directory / "captions.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["file_name"], []).append(values["text"])
    return found


def expected(number):
    found = [fake_coco.caption(number, which) for which in range(2 + (number % 3 == 0))]
    return [" ".join(text.split()) for text in found]


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_in_both_layouts(root, tmp_path, capsys, year):
    run(root, tmp_path / "out", year=year)
    report = capsys.readouterr().out
    assert "93 captions of 40 pictures: 2 to 3 a picture, 2.33 on average" in report
    assert "tokens of a caption, start included: 6.4 on average, 8 at most" in report
    found = texts(tmp_path / "out")
    for n in NUMBERS:
        assert found[f"train{year}/{fake_coco.file_name(n, year)}"] == expected(n)
    made = captions.Captions.open(tmp_path / "out")
    text = made.window(np.array([made.first[1]]), 9)["text"][0]
    words = text_tokens.read_vocabulary(root / "words.txt").vocabulary
    assert " ".join(words[i - 1] for i in text if i) == expected(101)[0].lower()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run(root, tmp_path / "out", year=year)
    assert "already holds these captions" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_clip_is_the_default_and_reports_what_it_cuts_off(root, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    long = "a photo of " + "very " * 2000 + "long train"
    lines = [{"file_name": fake_coco.file_name(n, 2014), "caption": "a cat"} for n in NUMBERS]
    lines[3]["caption"] = long
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run(root, tmp_path / "out", "--captions", path, source=False, words=False)
    report = capsys.readouterr().out
    assert "1 captions are longer than 77 tokens, which cuts off their ends, such as" in report
    assert "'very very very" in report and "of 'a photo of very" in report
    made = captions.Captions.open(tmp_path / "out")
    assert isinstance(made.kind, text_tokens.Clip) and made.longest == 2007
    assert made.window([0], 77)["lengths"] == 4


def test_a_killed_run_is_made_again_byte_for_byte(root, tmp_path):
    run(root, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    names = [*captions._FILES, "metadata.json"]
    for stop in range(len(names)):
        out = tmp_path / f"killed{stop}"
        out.mkdir()
        for name in names[:stop]:
            (out / name).write_bytes(whole[name])
        (out / f".{names[stop]}.0123456789abcdef.unfinished").write_bytes(b"half")
        with pytest.raises(FileNotFoundError, match="make captions with"):
            captions.Captions.open(out)
        run(root, out)
        assert content(out) == whole


def test_a_template_says_the_class(tmp_path, capsys):
    labels = [i % 2 for i in range(5)]
    keys = [f"{i}.png" for i in range(5)]
    fake_coco.write_tokens(tmp_path / "tokens2014", keys, labels=labels, unreadable=["3.png"])
    (tmp_path / "words.txt").write_text(VOCABULARY.replace(" ", "\n"))
    more = ["--template", "a photo of a {}", "--template", "a  large {}"]
    run(tmp_path, tmp_path / "out", *more, source=False)
    found = texts(tmp_path / "out")
    assert found["1.png"] == ["a photo of a tench", "a large tench"]
    assert found["2.png"] == ["a photo of a cat", "a large cat"]
    assert "3.png" not in found
    assert "8 captions of 4 pictures: 2 to 2 a picture" in capsys.readouterr().out


def test_scenes_have_their_captions(tmp_path):
    source = scenes.Scenes("test", num=30, size=16)
    keys = [source.key(i) for i in range(30)]
    preprocessing = {"source": source.identity()}
    fake_coco.write_tokens(tmp_path / "tokens2014", keys, preprocessing=preprocessing)
    run(tmp_path, tmp_path / "out", "--captions", "scenes", source=False, words=False)
    assert texts(tmp_path / "out") == {k: list(source.captions(i)) for i, k in enumerate(keys)}
    made = captions.Captions.open(tmp_path / "out")
    assert made.kind == text_tokens.Words(scenes.WORDS) and made.longest == 7
    run(
        tmp_path,
        tmp_path / "others",
        "--captions",
        "scenes",
        "--shuffle",
        source=False,
        words=False,
    )
    both = [texts(tmp_path / name) for name in ("out", "others")]
    assert both[0] != both[1]
    assert sorted(both[0].values()) == sorted(both[1].values())


def without(path, number):
    """Captions of all pictures but one."""
    return fake_coco.write_captions(path, [n for n in NUMBERS if n != number])


def test_what_becomes_of_pictures_without_captions(root, tmp_path, capsys):
    source = without(tmp_path / "captions.json", 107)
    with pytest.raises(ValueError, match="1 of 40 pictures have no caption, such as 'train2014/"):
        run(root, tmp_path / "out", "--captions", source, source=False)
    assert not (tmp_path / "out").exists()
    for how, counts in (("skip", [0]), ("empty", [1])):
        more = ["--captions", source, "--on-missing", how]
        run(root, tmp_path / how, *more, source=False)
        made = captions.Captions.open(tmp_path / how)
        assert np.diff(made.first)[7:8].tolist() == counts
    assert "1 pictures without a caption are left out of training" in capsys.readouterr().out
    assert made.window(made.choose([7]), 5)["lengths"].tolist() == [1]


def test_pictures_that_could_not_be_read_need_no_caption(tmp_path):
    keys = [fake_coco.file_name(n, 2014) for n in NUMBERS]
    fake_coco.write_tokens(tmp_path / "tokens2014", keys, unreadable=[keys[7]])
    without(tmp_path / "captions_train2014.json", 107)
    (tmp_path / "words.txt").write_text(VOCABULARY.replace(" ", "\n"))
    run(tmp_path, tmp_path / "out")


def test_pictures_of_both_sets_are_refused(root, tmp_path, capsys):
    keys = [fake_coco.file_name(n, 2014, "val") for n in (120, 121, 500)]
    evaluation = fake_coco.write_tokens(tmp_path / "val2014", keys)
    more = ["--held-out-tokens", evaluation]
    with pytest.raises(ValueError, match="2 pictures of .*val2014 are in .*tokens2017 as well"):
        run(root, tmp_path / "out", *more, year=2017)
    apart = fake_coco.write_tokens(tmp_path / "val2017", [fake_coco.file_name(7, 2017)])
    run(root, tmp_path / "out", "--held-out-tokens", apart, year=2017)


def jsonl(tmp_path, *lines, encoding="utf-8"):
    """A line for each picture, and these behind."""
    whole = [
        json.dumps({"file_name": f"train2014/{fake_coco.file_name(n, 2014)}", "text": "a cat"})
        for n in NUMBERS
    ]
    path = tmp_path / "captions.jsonl"
    path.write_bytes("\n".join([*whole, *lines]).encode(encoding))
    return path


def line(**values):
    return json.dumps({"file_name": f"train2014/{fake_coco.file_name(100, 2014)}"} | values)


def spoilt_json(tmp_path, spoil):
    path = fake_coco.write_captions(tmp_path / "captions.json", NUMBERS)
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    return path


def spoilt(**values):
    """A change of the first annotation."""
    return lambda tmp: spoilt_json(tmp, lambda found: found["annotations"][0].update(values))


def written(name, text):
    def make(tmp_path):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


HOSTILE = {
    "no such file": (lambda tmp: tmp / "none.json", "does not exist: captions are the path"),
    "a kind that is unknown": (written("captions.xml", "<a/>"), "is none of these: captions are"),
    "a compressed tar": (written("captions.tar.gz", "x"), "is a compressed tar file: unpack it"),
    "json cut off": (
        written("c.json", '{"images": [],\n"annotations": ['),
        "c.json:2: this is not",
    ),
    "json of a list": (written("c.json", "[1]"), "no lists 'images' and 'annotations'"),
    "json nested deeply": (written("c.json", "[" * 100_000), "c.json: this is not JSON"),
    "instances instead": (
        lambda tmp: spoilt_json(tmp, lambda found: found["annotations"][0].pop("caption")),
        "annotations[0] has no 'caption', it holds no captions of COCO",
    ),
    "annotation of an unknown picture": (spoilt(image_id=7), "annotations[0] is of the picture 7"),
    "annotation of a list": (spoilt(image_id=[7]), "annotations[0] is of the picture [7]"),
    "two pictures with one id": (
        lambda tmp: spoilt_json(tmp, lambda found: found["images"].append(found["images"][0])),
        "images[40] has the id 100, as another one has",
    ),
    "a caption that is a number": (spoilt(caption=7), "annotations[0]: the caption '7' is no text"),
    "a caption that is nothing": (spoilt(caption=None), "the caption 'None' is no text"),
    "broken line": (lambda tmp: jsonl(tmp, '{"file_name":'), "captions.jsonl:41: this line is not"),
    "line of a text": (lambda tmp: jsonl(tmp, '"file_name"'), "jsonl:41: this line is no object"),
    "line without a name": (
        lambda tmp: jsonl(tmp, '{"text": "a"}'),
        "captions.jsonl:41: this line",
    ),
    "line without a caption": (
        lambda tmp: jsonl(tmp, line(label=3)),
        "captions.jsonl:41: there is none of ['text', 'caption', 'captions'], but",
    ),
    "captions of captions": (
        lambda tmp: jsonl(tmp, line(captions=[["a"]])),
        "jsonl:41: the caption",
    ),
    "zero byte": (
        lambda tmp: jsonl(tmp, line(text="a\0cat")),
        "captions.jsonl:41: a caption holds",
    ),
    "half a surrogate": (
        lambda tmp: jsonl(tmp, line(text="a \ud800")),
        "jsonl:41: a caption holds",
    ),
    "UTF-16": (lambda tmp: jsonl(tmp, encoding="utf-16"), "captions.jsonl:1 is not UTF-8"),
    "Latin-1": (
        lambda tmp: jsonl(tmp, '{"file_name": "é"}', encoding="latin-1"),
        "captions.jsonl:41 is not UTF-8",
    ),
    "two names of one picture": (
        lambda tmp: jsonl(tmp, line(file_name=fake_coco.file_name(100, 2014), text="a")),
        "jsonl:41: 'COCO_train2014_000000000100.jpg' and 'train2014/COCO_train2014_",
    ),
    "no tab": (
        written("c.tsv", "a cat a.jpg\n"),
        "c.tsv:1: this line is not CAPTION<TAB>FILE NAME",
    ),
    "names of other pictures": (
        written("c.tsv", "a cat\thttps://example.org/\u202ecat%20one.jpg?size=1\n"),
        "none of the 1 names of captions is that of a picture: captions are of '\\u202ecat one",
    ),
    "nothing in it": (written("c.jsonl", ""), "40 of 40 pictures have no caption"),
    "an unknown word": (
        lambda tmp: jsonl(tmp, line(text="A GIRAFFE")),
        "the word 'giraffe' of the text 'A GIRAFFE' is not in the vocabulary: a the stands",
    ),
    "a zip cut off": (written("c.zip", b"PK\3\4rest"), "c.zip cannot be read as a zip file"),
    "a tar of nothing": (written("c.tar", b"x" * 600), "c.tar is not a whole tar file"),
    "other scenes": (lambda tmp: "scenes", "the tokens were not made of the source 'scenes'"),
    "no data set": (lambda tmp: "tfds:nothing", "say by --split which split"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_captions_are_one_line(root, tmp_path, capsys, name):
    make, words = HOSTILE[name]
    args = arguments(root, tmp_path / "out", "--captions", make(tmp_path), source=False)
    with pytest.raises(SystemExit) as exit_:
        cli.run(tokenize_captions.main, args)
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("caption ")]
    assert exit_.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert words in lines[0], lines[0]
    assert not (tmp_path / "out").exists()


def words_of(text):
    def make(root, tmp_path):
        (tmp_path / "v.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return ["--vocabulary", tmp_path / "v.txt"]

    return make


def in_the_way(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    return []


def tokens_in_the_way(root, tmp_path):
    return ["--out", root / "tokens2017"]


def other_captions(root, tmp_path):
    run(root, tmp_path / "out")
    return ["--mirror-words", "keep"]


def damaged(root, tmp_path):
    run(root, tmp_path / "out")
    path = tmp_path / "out" / "ids.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return []


MISTAKES = {
    "no tokens": (lambda root, tmp: ["--tokens", tmp], "there is no token set in"),
    "words without a vocabulary": (
        lambda *_: ["--vocabulary", "", "--tokens-as", "words"],
        "needs",
    ),
    "a vocabulary of clip": (lambda *_: ["--tokens-as", "clip"], "--vocabulary is for"),
    "no vocabulary": (lambda root, tmp: ["--vocabulary", tmp / "none"], "No such file"),
    "an empty vocabulary": (words_of("\n"), "a vocabulary of 0 words"),
    "a word in capitals": (words_of("a\nCat\n"), "v.txt: 'Cat' is no word in lower case"),
    "two words on a line": (words_of("a cat\n"), "'a cat' is no word in lower case without blanks"),
    "a word twice": (words_of("a\nb\na\n"), "'a' is in the vocabulary twice"),
    "a vocabulary in UTF-16": (words_of("a\nb".encode("utf-16")), "v.txt is not UTF-8"),
    "too small a window": (
        lambda *_: ["--text-tokens", "1", "--vocabulary", "", "--tokens-as", "clip"],
        "--text-tokens 1 is too small: at least 2",
    ),
    "another thing in the way": (in_the_way, "holds 'thesis.tex' and no captions: choose another"),
    "tokens in the way": (tokens_in_the_way, "choose another directory"),
    "other captions": (other_captions, "mirror_words is 'swap', now it would be 'keep'"),
    "damage": (damaged, "ids.npy is not what was written): remove them and make them again"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(root, tmp_path, capsys, name):
    make, words = MISTAKES[name]
    more = [str(x) for x in make(root, tmp_path)]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(tokenize_captions.main, [*arguments(root, tmp_path / "out"), *more])
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("caption ")]
    assert exit_.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert tokens.read_metadata(root / "tokens2017")["num_images"] == 40


@pytest.mark.parametrize("template", ["a photo", "a {} of {}"])
def test_a_template_has_one_place(root, tmp_path, template):
    with pytest.raises(ValueError, match="needs one {}, where the class stands"):
        run(root, tmp_path / "out", "--template", template, source=False)


def test_blanks_and_empty_captions_are_left_out(root, tmp_path, capsys):
    name = f"train2014/{fake_coco.file_name(100, 2014)}"
    more = [line(text=" \n\t"), line(captions=["", "a\u00a0dog "])]
    run(root, tmp_path / "out", "--captions", jsonl(tmp_path, *more), source=False)
    assert "2 captions were empty and are left out" in capsys.readouterr().out
    assert texts(tmp_path / "out")[name] == ["a cat", "a dog"]
