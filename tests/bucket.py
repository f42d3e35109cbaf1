"""A bucket for the tests: what of Google Cloud Storage's interface its libraries use, on loopback.

Emulators that can be installed know no conditions (ifGenerationMatch), without which TensorStore
writes no checkpoint. See cloud.google.com/storage/docs/json_api.
"""

import base64
import contextlib
import http.server
import itertools
import json
import os
import re
import sys
import threading
import urllib.parse

import pytest

NAME = "bucket"
_OBJECT = re.compile(
    r"(?:/download|/upload)?/storage/v1/b/([^/]+)"
    r"(?:/o(?:/([^/]+)(?:/(moveTo|rewriteTo/b/[^/]+)/o/([^/]+))?)?)?"
)


@contextlib.contextmanager
def emulated(set_variable=os.environ.__setitem__):
    """Within, gs://bucket is empty and in this process's memory; gives its ``Bucket``.

    gcsfs and TensorStore remember where they have found it: once in a process.
    """
    bucket = Bucket()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bucket = bucket
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCE_METADATA_ROOT": "127.0.0.1:1",  # nobody is there who would give credentials
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "tests",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }.items():
        set_variable(name, value)
    pytest.importorskip("gcsfs")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Bucket:
    """Objects by name, each with its generation.

    Attributes:
        denied: whether nobody may write.
    """

    def __init__(self):
        self._objects, self._generations = {}, itertools.count(1)
        self._lock = threading.Lock()
        self.uploads = {}
        self.objects_written = 0
        self.denied = False

    def names(self, prefix=""):
        """Names of the objects that begin with ``prefix``, in order."""
        return sorted(name for name in list(self._objects) if name.startswith(prefix))

    def read(self, name):
        return self._objects[name][1]

    def about(self, name):
        generation, content = self._objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": NAME,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "etag": str(generation),
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
        }

    def generation(self, name):
        return self._objects.get(name, (0,))[0]

    def write(self, name, content, wanted=None):
        """Says whether the object had the generation that was wanted, 0: was not there."""
        with self._lock:
            if wanted is not None and int(wanted) != self.generation(name):
                return False
            self._objects[name] = (next(self._generations), bytes(content))
            self.objects_written += 1
            return True

    def remove(self, name, wanted=None):
        with self._lock:
            if wanted is not None and int(wanted) != self.generation(name):
                return False
            self._objects.pop(name)
            return True

    def newest(self, run):
        """Step of the newest complete checkpoint of a run."""
        found = re.findall(rf"{run}/checkpoints/(\d+)/commit_success.txt", "\n".join(self.names()))
        return max(map(int, found), default=0)

    def lines(self, run):
        return [json.loads(x) for x in self.read(f"{run}/metrics.jsonl").decode().splitlines()]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments):
        if not isinstance(sys.exception(), ConnectionError):  # of a process that was killed
            super().handle_error(*arguments)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def do_DELETE(self):
        self._serve("DELETE")

    def log_message(self, *arguments):
        pass

    def _serve(self, method):
        body = self._body()
        status, headers, content = self._answer(method, self.path, body)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, method, target, body):
        """Returns status, headers and content."""
        bucket, url = self.server.bucket, urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        if url.path.startswith("/batch"):
            return self._batch(body)
        found = _OBJECT.fullmatch(url.path)
        if found is None or found[1] != NAME:
            return _error(404, "no such bucket")
        if bucket.denied and method != "GET":
            return _error(403, "this user may not do that")
        if url.path.startswith("/upload"):
            return self._upload(query, body)
        if found[2] is None:
            return (200, {}, self._listed(query)) if "/o" in url.path else (200, {}, {"name": NAME})
        name = urllib.parse.unquote(found[2])
        if name not in bucket.names():
            return _error(404, f"no object {name}")
        if method == "DELETE":
            done = bucket.remove(name, query.get("ifGenerationMatch"))
            return (204, {}, b"") if done else _error(412, "another generation")
        if found[3]:
            copy = urllib.parse.unquote(found[4])
            bucket.write(copy, bucket.read(name))
            if found[3] == "moveTo":
                bucket.remove(name)
                return 200, {}, bucket.about(copy)
            return 200, {}, {"done": True, "resource": bucket.about(copy)}
        return self._content(name, query)

    def _content(self, name, query):
        bucket = self.server.bucket
        about, content = bucket.about(name), bucket.read(name)
        if query.get("ifGenerationNotMatch") == about["generation"]:
            return 304, {}, b""
        if query.get("ifGenerationMatch", about["generation"]) != about["generation"]:
            return _error(412, "another generation")
        if query.get("alt") != "media":
            return 200, {}, about
        headers = {
            "x-goog-generation": about["generation"],
            "x-goog-stored-content-length": about["size"],
            "Content-Type": "application/octet-stream",
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, headers, content
        first = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
        end = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
        if first >= end:
            return _error(416, "no such range")
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        return 206, headers, content[first:end]

    def _upload(self, query, body):
        bucket, kind = self.server.bucket, query.get("uploadType")
        if kind == "media":
            name = query["name"]
            done = bucket.write(name, body, query.get("ifGenerationMatch"))
            return (200, {}, bucket.about(name)) if done else _error(412, "another generation")
        if kind == "multipart":
            boundary = re.search(r"boundary=\W?(==\d==)", self.headers["Content-Type"])[1].encode()
            _, about, rest = body.split(b"--" + boundary, 2)
            name = json.loads(about.split(b"\n\n", 1)[1])["name"]
            bucket.write(name, rest.split(b"\n\n", 1)[1][: -len(boundary) - len("\n----")])
            return 200, {}, bucket.about(name)
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            number = str(len(bucket.uploads))
            bucket.uploads[number] = (name, bytearray())
            host = self.headers["Host"]
            path = f"/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={number}"
            return 200, {"Location": f"http://{host}{path}"}, b""
        name, content = bucket.uploads[query["upload_id"]]
        content += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
        bucket.write(name, content)
        return 200, {}, bucket.about(name)

    def _listed(self, query):
        bucket, prefix, delimiter = (
            self.server.bucket,
            query.get("prefix", ""),
            query.get("delimiter"),
        )
        items, folders = [], set()
        for name in bucket.names(prefix):
            inside = name.removeprefix(prefix)
            if delimiter and delimiter in inside:
                folders.add(prefix + inside.split(delimiter)[0] + delimiter)
            else:
                with contextlib.suppress(KeyError):  # it has just been removed
                    items.append(bucket.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def _batch(self, body):
        boundary = re.search(r'boundary="([^"]+)"', self.headers["Content-Type"])[1].encode()
        parts = []
        for part in body.split(b"--" + boundary)[1:-1]:
            line = re.search(rb"(DELETE|POST|GET) (\S+) HTTP", part)
            number = re.search(rb"Content-ID: *<?([^>\r\n]+)", part)
            status, _, content = self._answer(line[1].decode(), line[2].decode(), b"")
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            answer = [b"Content-Type: application/http"]
            answer += [b"Content-ID: <response-" + number[1] + b">"] if number else []
            answer += [b"", f"HTTP/1.1 {status} Done".encode(), b"", content]
            parts.append(b"\r\n".join(answer))
        edge = base64.b16encode(os.urandom(8))
        content = b"".join(b"--" + edge + b"\r\n" + x + b"\r\n" for x in parts)
        kind = f"multipart/mixed; boundary={edge.decode()}"
        return 200, {"Content-Type": kind}, content + b"--" + edge + b"--"


def _error(status, message):
    return status, {}, {"error": {"code": status, "message": message}}
