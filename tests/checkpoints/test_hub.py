"""Models on the Hugging Face Hub: its real client, against a small stand-in for the server."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny

from enat_jax.checkpoints import hub
from enat_jax.inference.generator import Generator

pytest.importorskip("huggingface_hub")

TOKEN = "hf_of_the_owner"

# The client reads its environment when it is imported, so it lives in a process of its own.
CALL = """
import json, sys
from enat_jax.checkpoints import hub
function, *arguments = sys.argv[1:]
try:
    print(json.dumps({"result": str(getattr(hub, function)(*arguments))}))
except (OSError, ValueError) as error:
    print(json.dumps({"kind": type(error).__name__, "error": str(error)}))
"""


class Server(http.server.ThreadingHTTPServer):
    """As much of the Hub as the client asks for: one user, one branch, no large-file storage."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}  # "owner/name": {path: content}, changed by commits

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._read()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), *parts[4:])
        else:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_HEAD = do_GET

    def do_POST(self):
        body = self._read()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self._send(401, {"error": message}, {"X-Error-Message": message})
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4])
        if parts[1:3] == ["repos", "create"]:
            values = json.loads(body)
            name = f"{values.get('organization') or 'owner'}/{values['name']}"
            if not name.startswith("owner/"):
                return self._send(403, {"error": f"you have no rights in {name}"}, {})
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self._send(409 if exists else 200, {"url": f"{self.server.address}/{name}"}, {})
        if parts[-2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files}, {})
        if parts[-2] == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            commit = self._commit(name)
            url = f"{self.server.address}/{name}/commit/{commit}"
            return self._send(200, {"commitUrl": url, "commitOid": commit}, {})
        return self._send(200, {}, {})  # its check of the README's head

    def _read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _commit(self, name):
        files = sorted(self.server.repositories[name].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def _describe(self, name, what="revision", revision="main", *_):
        files = self.server.repositories.get(name)
        if files is None:
            return self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        commit = self._commit(name)
        if revision not in ("main", commit):
            return self._send(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            return self._send(
                200,
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(x),
                        "oid": hashlib.sha1(x).hexdigest(),
                    }
                    for path, x in files.items()
                ],
                {},
            )
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, {"id": name, "sha": commit, "siblings": siblings}, {})

    def _file(self, name, revision, path):
        content = self.server.repositories.get(name, {}).get(path)
        if content is None:
            return self._send(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, {"ETag": etag, "X-Repo-Commit": self._commit(name)})

    def _send(self, status, body, headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def server():
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def pushed(server, model, tmp_path_factory):
    """The address of a pushed model, and what the push said."""
    directory = tmp_path_factory.mktemp("pushed")
    model.save(directory)
    said = call(server.address, directory, "push", directory, "hf://owner/digits")
    return "hf://owner/digits", said


def call(endpoint, home, *arguments, token=TOKEN):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(pathlib.Path(home) / ".hub"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", CALL, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pushed_model_comes_back(server, model, pushed, tmp_path, monkeypatch):
    address, said = pushed
    assert said["result"].startswith(f"{server.address}/owner/digits/commit/")
    assert "transformer/_METADATA" in server.repositories["owner/digits"]
    fetched = pathlib.Path(call(server.address, tmp_path, "download", address)["result"])
    found = {str(path.relative_to(fetched)) for path in fetched.rglob("*") if path.is_file()}
    assert found == {  # the same weights are not fetched twice
        *("README.md", "model.json", "transformer.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/params.safetensors"),
    }
    asked = []
    monkeypatch.setattr(hub, "download", lambda address: asked.append(address) or fetched)
    loaded = Generator.load(address, devices=jax.devices()[:1])
    assert asked == [address]
    assert loaded.settings == model.settings
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_weights_for_jax_alone_are_fetched_where_there_are_no_others(server, pushed, tmp_path):
    files = server.repositories["owner/digits"]
    for_jax = {k: v for k, v in files.items() if not k.endswith(".safetensors")}
    server.repositories["owner/old"] = for_jax
    fetched = pathlib.Path(call(server.address, tmp_path, "download", "hf://owner/old")["result"])
    assert (fetched / "transformer" / "_METADATA").is_file()


@pytest.mark.slow
def test_a_text_encoder_is_fetched_once_in_either_format(server, tmp_path):
    """One that has weights for JAX alone, beside a model with others, is fetched whole."""
    pytest.importorskip("tokenizers")
    tiny.make_clip_generator().save(tmp_path / "model", with_text_encoder=True)
    files = {
        str(path.relative_to(tmp_path / "model")): path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    server.repositories["owner/reader"] = files
    for_jax = {k: v for k, v in files.items() if k != "text_encoder/text.safetensors"}
    server.repositories["owner/mixed"] = for_jax
    for name, count in (("reader", 9), ("mixed", len(for_jax))):
        fetched = call(server.address, tmp_path, "download", f"hf://owner/{name}")["result"]
        found = [path for path in pathlib.Path(fetched).rglob("*") if path.is_file()]
        assert len(found) == count, sorted(found)
        assert (pathlib.Path(fetched) / "null_text.npy").is_file()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/nothing", "ValueError: .*no such repository, or it is private"),
        ("hf://owner/digits@never", "ValueError: .*the repository has no such revision"),
        ("hf://digits", "ValueError: .*no address such as hf://owner/name"),
    ],
)
def test_what_is_not_there(server, pushed, tmp_path, address, message):
    said = call(server.address, tmp_path, "download", address)
    one_line(said, message, address)


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        ("hf://owner/digits", "hf_wrong", "OSError: .*the Hub does not know this user"),
        ("hf://somebody/else", TOKEN, "OSError: .*does not let them do this: check the name"),
        ("hf://owner/digits@main", TOKEN, "ValueError: .*push to the repository itself"),
    ],
)
def test_where_one_may_not_write(server, pushed, tmp_path, address, token, message):
    (tmp_path / "model.json").write_text("{}")
    before = dict(server.repositories["owner/digits"])
    said = call(server.address, tmp_path, "push", tmp_path, address, token=token)
    one_line(said, message, address)
    assert server.repositories["owner/digits"] == before


def test_no_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said = call(endpoint, tmp_path, "download", "hf://owner/digits")
    one_line(
        said, "OSError: .*not in the cache, and the Hub cannot be reached", "hf://owner/digits"
    )


def one_line(said, message, address):
    text = f"{said['kind']}: {said['error']}"
    assert re.match(message, text), text
    assert address in text and "\n" not in text


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'enat_jax\[hub\]'"):
        Generator.load("hf://owner/digits")


def test_addresses():
    assert hub.parse("hf://owner/name") == ("owner/name", None)
    assert hub.parse("hf://owner/name@v1.0") == ("owner/name", "v1.0")
    as_path = pathlib.Path("hf://owner/name")  # hf:/owner/name
    assert hub.is_address(as_path) and hub.parse(as_path) == ("owner/name", None)
    assert not hub.is_address("runs/digits/enat/model")
