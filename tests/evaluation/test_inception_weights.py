"""Weights of FID's Inception-v3: folded, given as a file or downloaded, and nothing else taken."""

import contextlib
import hashlib
import http.server
import threading

import inception_golden
import numpy as np
import pytest

from enat_jax.checkpoints import weight_files
from enat_jax.evaluation import inception_weights
from enat_jax.runtime import paths

CONTENT = b"weights of a network" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_normalisation_is_folded_into_the_convolution():
    tensors = {
        "a.conv.weight": np.array([[[[1.0]]], [[[10.0]]]], np.float32),
        "a.bn.weight": np.array([2.0, 1.0], np.float32),
        "a.bn.bias": np.array([1.0, 0.5], np.float32),
        "a.bn.running_mean": np.array([3.0, -1.0], np.float32),
        "a.bn.running_var": np.array([3.999, 0.249], np.float32),  # and 0.001: 2 and 1/2 squared
        "fc.bias": np.array([7.0], np.float32),
    }
    folded = inception_weights.fold(tensors)
    assert set(folded) == {"a.weight", "a.bias", "fc.bias"} and len(tensors) == 6
    np.testing.assert_allclose(folded["a.weight"].ravel(), [1.0, 20.0], rtol=1e-6)
    np.testing.assert_allclose(folded["a.bias"], [1 - 3 * 1, 0.5 + 1 * 2], rtol=1e-6)
    assert folded["a.weight"].dtype == np.float32


def without(tensors, *names):
    return {name: array for name, array in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: without(t, "Mixed_7c.branch1x1.bn.running_var"),
            "Mixed_7c.branch1x1.conv.weight has no Mixed_7c.branch1x1.bn.running_var",
        ),
        (
            lambda t: t | {"Mixed_5b.branch1x1.bn.bias": np.zeros(3, np.float32)},
            "the shapes of Mixed_5b.branch1x1.conv.weight and",
        ),
        # torchvision's own Inception-v3 has 1000 classes.
        (lambda t: t | {"fc.weight": np.zeros((1000, 2048), np.float32)}, "1 mismatches, such as"),
        (
            lambda t: {"fc.weight": t["fc.weight"]},
            "188 mismatches, such as Conv2d_1a_3x3/conv/bias",
        ),
        (
            lambda t: t | {"AuxLogits.fc.bias": np.zeros(3, np.float32)},
            "AuxLogits.fc.bias: unknown",
        ),
    ],
)
def test_other_tensors_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        inception_weights.params(change(inception_golden.state_dict()))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "not the weights of FID's Inception-v3" in str(error.value) or "bn" in message


def test_a_file_gives_the_same_parameters_and_says_that_it_is_not_the_published_one(tmp_path):
    path = tmp_path / "mine.safetensors"
    # The published file has these, too, which mean nothing for inference.
    tracked = {"Mixed_7c.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    weight_files.write_safetensors(path, inception_golden.state_dict() | tracked)
    params, origin = inception_weights.read(path)
    kernel = inception_golden.params()["Mixed_7c"]["branch3x3_2a"]["conv"]["kernel"]
    np.testing.assert_array_equal(params["Mixed_7c"]["branch3x3_2a"]["conv"]["kernel"], kernel)
    assert kernel.shape == (1, 3, 384, 384)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin == {"file": "mine.safetensors", "sha256": sha256, "published": False}


def test_files_that_are_not_these_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.pth: give the path of"):
        inception_weights.read(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(ValueError, match="text.pth"):
        inception_weights.read(tmp_path / "text.pth")
    other = tmp_path / "other.safetensors"
    weight_files.write_safetensors(other, {"conv.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"other.safetensors: .*, such as conv.weight: unknown"):
        inception_weights.read(other)


@contextlib.contextmanager
def serving(answer):
    """The address of a server whose handler calls `answer`, and a list of the paths asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/release/weights.pth", asked
        finally:
            server.shutdown()
            thread.join()


def sends(content, length=None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(length or len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def test_a_download_is_checked_kept_and_not_repeated(tmp_path):
    with serving(sends(CONTENT)) as (url, asked):
        for _ in range(2):
            path = inception_weights.download(tmp_path / "cache", url, SHA256)
    assert path == tmp_path / "cache" / "weights.pth" and path.read_bytes() == CONTENT
    assert asked == ["/release/weights.pth"]


def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path):
    (tmp_path / "weights.pth").write_bytes(CONTENT[:100])
    with serving(sends(CONTENT)) as (url, _):
        path = inception_weights.download(tmp_path, url, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            sends(CONTENT[:-1] + b"!"),
            ValueError,
            f"instead of {SHA256[:16]}...; it was not kept",
        ),
        (
            sends(CONTENT[:5000], length=len(CONTENT)),
            OSError,
            "could not be downloaded .*Incomplete",
        ),
        (lambda handler: handler.send_error(404), OSError, "could not be downloaded .*404"),
    ],
)
def test_a_failed_download_leaves_nothing(tmp_path, answer, error, message):
    with serving(answer) as (url, _), pytest.raises(error, match=message) as raised:
        inception_weights.download(tmp_path / "cache", url, SHA256)
    assert "give the path of weights.pth" in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.*"))


def test_without_a_server_it_says_what_to_do(tmp_path):
    with serving(sends(CONTENT)) as (url, _):
        pass
    with pytest.raises(OSError, match="could not be downloaded .*: try again, or download it"):
        inception_weights.download(tmp_path, url, SHA256)


def test_the_cache_is_where_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_directory() == tmp_path / "enat_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert paths.cache_directory() == tmp_path / "me" / ".cache" / "enat_jax"


def test_the_published_file_carries_its_checksum_in_its_name():
    assert inception_weights.FILE_NAME.endswith(f"-{inception_weights.SHA256[:8]}.pth")
    assert inception_weights.URL.endswith(f"/fid_weights/{inception_weights.FILE_NAME}")
