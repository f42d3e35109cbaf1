"""The pictures of a training run: which can be read, and whether they are those it began with.

A run keeps in a directory of its own

    scanned.json.gz     the pictures that were decoded, with their sizes
    unreadable.txt      those that cannot be read, for people
    reported.jsonl      those that were ever found so, also in the middle of training
    listing-*.json.gz   the pictures that it was trained on, a file for each such set of data
"""

import contextlib
import gzip
import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from enat_jax.data import decoding, images, scan
from enat_jax.runtime import agreement, files

POLICIES = ("refuse", "skip")

_SAVE_S = 60.0  # between two notes of how far a scan is
_NAMED = 3  # pictures of each kind that a message names
# What an identity says of the pictures, and not of what is done to them.
_COUNTED = ("num_images", "listing", "num_examples", "kept")

Good = dict[str, int]  # bytes of pictures that can be read, by key


class RunPictures:
    """What a run finds out about its pictures, and keeps.

    Every process of the run must call each method.

    Args:
        directory: for the notes.
        unreadable: what to do about pictures that cannot be read: "refuse" or "skip".
        scanned: whether all pictures are decoded once; otherwise those that were reported are.
        say: shows a line.
    """

    def __init__(
        self, directory: pathlib.Path, unreadable: str, scanned: bool, say: Callable[[str], None]
    ) -> None:
        self._directory, self._say = directory, say
        self._unreadable, self._scanned = unreadable, scanned
        self._reported: set[str] = set()
        self._trained_on: images.Source | None = None
        self._same: dict[str, bool] = {}  # whether an identity is that of the same pictures

    def choose(self, *sources: images.Source) -> list[images.Source]:
        """Returns sources without the pictures that cannot be read, if these are to be skipped.

        Args:
            sources: that the run reads. On the first one it is trained.

        Raises:
            ValueError: there are such pictures, and they are not to be skipped; or a class has no
                others.
            OSError: notes cannot be written, or pictures cannot be read for other reasons.
        """
        open_to_doubt = [source for source in sources if isinstance(source, scan.Scannable)]
        if open_to_doubt:
            bad, total = self._look(open_to_doubt)
            listed = self._directory / "unreadable.txt"
            if bad and self._unreadable == "refuse":
                raise ValueError(
                    f"{scan.describe(bad, total)}; all are in {listed}. Mend them, replace them by "
                    "good copies or remove them, or leave them out by "
                    "--config.data.unreadable=skip, and start again"
                )
            if bad:
                self._say(f"left out: {scan.describe(bad, total)}; all are in {listed}")
                sources = tuple(
                    source.without(bad) if isinstance(source, scan.Scannable) else source
                    for source in sources
                )
        self._trained_on = sources[0]
        agreement.broadcast_from_first(self._keep_listing)
        return list(sources)

    def recognise(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the identity of this run's data as it would be with the pictures of now.

        That is ``identity`` itself, unless the pictures differ by those alone that were reported
        not to be readable and now are missing, replaced or left out.

        Args:
            identity: of the data of a checkpoint.

        Raises:
            ValueError: other pictures are missing, new or changed, which are named.
        """
        source, before = self._trained_on, dict(identity)
        now = files.as_json(source.identity()) if source else before
        if before == now or not isinstance(source, scan.Scannable) or _rest(before) != _rest(now):
            return before
        name = _name(before)
        if name not in self._same:
            changes = agreement.broadcast_from_first(lambda: self._changes(before, source))
            if changes and changes["others"]:
                raise ValueError(
                    f"the run in {self._directory.parent} was trained on other pictures; now there "
                    f"are {changes['words']}: bring back those of before, or use another directory"
                )
            self._same[name] = changes is not None
            if changes:
                self._say(f"goes on although pictures have changed: {changes['words']}")
        counted = {k: now[k] for k in _COUNTED if k in now}
        return _rest(before) | counted if self._same[name] else before

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Within, notes which picture an error is about, and says how the run goes on.

        Raises:
            ValueError: in the place of such an error.
        """
        try:
            yield
        except Exception as error:
            found = _unreadable_image(error)
            if found is None:
                raise
            with contextlib.suppress(OSError):  # a full disk, say, is the smaller trouble
                self._report({found.place: found.reason})
            advice = "or just start the same command again, which leaves it out"
            if self._unreadable == "refuse":
                advice = (
                    "start the same command again then, or leave it out by "
                    "--config.data.unreadable=skip"
                )
            raise ValueError(f"{error}; {advice}") from error

    # --- what can be read ------------------------------------------------------------------------

    def _look(self, sources: Sequence[scan.Scannable]) -> tuple[dict[str, str], int]:
        """Returns why pictures cannot be read, by key, and the number of all pictures."""
        listed = {
            key: (source, index, size)
            for source in sources
            for index, (key, size, _) in enumerate(source.listing())
        }
        self._reported = set(agreement.broadcast_from_first(self._read_reported))
        about = _rest(files.as_json(sources[0].identity())) | {
            "formats": list(decoding.FORMATS),
            "max_pixels": decoding.MAX_PIXELS,
        }
        about.pop("split", None)
        good = {
            key: size
            for key, size in self._read_scanned(about).items()
            if key in listed and listed[key][2] == size and key not in self._reported
        }
        doubtful = listed.keys() - good.keys() if self._scanned else listed.keys() & self._reported
        todo = {key: listed[key] for key in listed if key in doubtful}
        if todo:
            self._say(f"decoding {len(todo):,} pictures to see that all can be read")
        begun = time.monotonic()
        found = agreement.gather(lambda: self._scan(todo, good, about))
        bad = {key: reason for part in found for key, reason in part.items()}
        if todo:
            rate = len(todo) / max(time.monotonic() - begun, 1e-9)
            self._say(f"{len(todo) - len(bad):,} of {len(todo):,} can, {rate:,.0f} a second")
            good |= {key: size for key, (*_, size) in todo.items() if key not in bad}
        agreement.broadcast_from_first(lambda: self._conclude(good if todo else None, about, bad))
        return bad, len(listed)

    def _scan(
        self,
        todo: Mapping[str, tuple[scan.Scannable, int, int]],
        good: Good,
        about: Mapping[str, Any],
    ) -> dict[str, str]:
        """Decodes this process's part of the pictures; keeps what is done if it is interrupted."""
        own = list(todo)[jax.process_index() :: jax.process_count()]
        bad: dict[str, str] = {}
        done, saved = dict(good), time.monotonic()
        try:
            for part in scan.scan([todo[key][:2] for key in own]):
                bad |= {key: reason for key, reason in part.items() if reason is not None}
                done |= {key: todo[key][2] for key, reason in part.items() if reason is None}
                if time.monotonic() - saved > _SAVE_S:
                    self._note(done, about)
                    saved = time.monotonic()
        except BaseException:
            self._note(done, about)
            raise
        return bad

    # --- notes -----------------------------------------------------------------------------------

    def _note(self, good: Good, about: Mapping[str, Any]) -> None:
        if self._scanned and jax.process_index() == 0:
            self._write("scanned", {"about": about, "good": good})

    def _conclude(
        self, good: Good | None, about: Mapping[str, Any], bad: Mapping[str, str]
    ) -> None:
        if good is not None:
            self._note(good, about)
        path = self._directory / "unreadable.txt"
        if bad or path.exists():
            lines = [f"{images.UnreadableImage(*item)}\n" for item in bad.items()]
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, "".join(lines).encode())
        self._report(bad)

    def _read_scanned(self, about: Mapping[str, Any]) -> Good:
        """Returns what an earlier scan found to be good, if it was one of the same kind."""
        found = self._read("scanned")
        if not isinstance(found, dict) or found.get("about") != about:
            return {}
        return found["good"]

    def _report(self, bad: Mapping[str, str]) -> None:
        """Adds to the pictures that were ever found not to be readable."""
        new = [{"key": k, "reason": v} for k, v in bad.items() if k not in self._reported]
        if new:
            self._directory.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps(entry)}\n" for entry in new)
            files.append(self._directory / "reported.jsonl", lines.encode())
            self._reported |= {entry["key"] for entry in new}

    def _read_reported(self) -> list[str]:
        path, found = self._directory / "reported.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line of a full disk
                found.append(str(json.loads(line)["key"]))
        return found

    def _keep_listing(self) -> None:
        if isinstance(self._trained_on, scan.Scannable):
            name = _name(self._trained_on.identity())
            if not self._path(name).exists():
                self._write(name, self._trained_on.listing())

    def _changes(
        self, identity: Mapping[str, Any], source: scan.Scannable
    ) -> dict[str, Any] | None:
        """Returns in words what has changed, and whether that is more than what was reported.

        None if nobody knows what was there before.
        """
        listed = self._read(_name(identity))
        if listed is None:
            return _new_kinds(identity, source)
        before = {key: tuple(rest) for key, *rest in listed}
        now = {key: tuple(rest) for key, *rest in source.listing()}
        changes = {
            "missing": [key for key in before if key not in now],
            "new": [key for key in now if key not in before],
            "of another size": [k for k, v in now.items() if k in before and before[k][0] != v[0]],
            "of another class": [k for k, v in now.items() if k in before and before[k][1] != v[1]],
        }
        words = [_named(what, keys) for what, keys in changes.items() if keys]
        others = any(not self._reported.issuperset(keys) for keys in changes.values())
        return {"words": ", ".join(words), "others": others}

    def _path(self, name: str) -> pathlib.Path:
        return self._directory / f"{name}.json.gz"

    def _write(self, name: str, content: Any) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        data = gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0)
        files.write_atomically(self._path(name), data)

    def _read(self, name: str) -> Any:
        """Returns None if it is not there or damaged: nothing is lost but time and words."""
        try:
            return json.loads(gzip.decompress(self._path(name).read_bytes()))
        except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error, ValueError):
            return None


def _rest(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in _COUNTED}


def _new_kinds(identity: Mapping[str, Any], source: scan.Scannable) -> dict[str, Any] | None:
    """Says whether the difference is that of pictures which earlier versions did not know."""
    new = [key for key, *_ in source.listing() if key.lower().endswith(decoding.NEW_EXTENSIONS)]
    with contextlib.suppress(ValueError):
        if new and files.as_json(source.without(new).identity()) == identity:
            words = f"{_named('new', new)}, files that earlier versions did not take for pictures"
            return {"words": words, "others": True}
    return None


def _named(what: str, keys: Sequence[str]) -> str:
    return f"{len(keys):,} {what} ({', '.join(keys[:_NAMED])}{', ...' * (len(keys) > _NAMED)})"


def _name(identity: Mapping[str, Any]) -> str:
    return f"listing-{hashlib.sha256(files.json_bytes(files.as_json(identity))).hexdigest()[:16]}"


def _unreadable_image(error: BaseException | None) -> images.UnreadableImage | None:
    """Returns the error about a picture that another one was caused by, the first of them."""
    found = None
    while error is not None:
        found = error if isinstance(error, images.UnreadableImage) else found
        error = error.__cause__ or error.__context__
    return found
