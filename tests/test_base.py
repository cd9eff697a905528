"""Base weights: what is accepted, what is refused and how, and the download, against a server on this machine."""

import hashlib
import http.server
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucsam import base


@pytest.fixture(scope="module")
def random_state():
    return base.random_base(3).state


def test_random_base_is_stock_and_follows_its_seed_only(random_state):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = base.load_base("none", seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert found.state.keys() == base.build_sam().state_dict().keys()
    assert found.sha256 == base.state_sha256(random_state)
    assert found.source == "none (random, seed 3)"
    assert base.random_base(4).sha256 != found.sha256
    assert sum(t.numel() for k, t in found.state.items() if "running" not in k and "num_b" not in k) > 10_130_000


def test_import_of_mobile_sam_is_silent():
    code = "import warnings; from nucsam.base import build_sam; build_sam(); warnings.warn('ours')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("Warning") == 1
    assert "ours" in run.stderr


def test_identity_counts_names_dtypes_shapes_and_values_only():
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7)}
    by_hand = hashlib.sha256(
        b'["a", "torch.int64", []]' + (7).to_bytes(8, "little")
        + b'["b", "torch.float32", [2, 3]]' + state["b"].numpy().tobytes()
    )  # fmt: skip
    assert base.state_sha256(state) == by_hand.hexdigest()
    same = {"a": state["a"], "b": torch.arange(6.0).view(2, 3).t().contiguous().t().requires_grad_()}
    assert base.state_sha256(same) == by_hand.hexdigest()
    for change in (
        {"c": state["b"]},
        {"b": state["b"].double()},
        {"b": state["b"].view(3, 2)},
        {"b": state["b"] + 1},
    ):
        assert base.state_sha256({"a": state["a"], **change}) != by_hand.hexdigest()


def test_both_formats_give_the_same_base(random_state, tmp_path):
    torch.save(random_state, tmp_path / "base.pt")
    save_file(random_state, tmp_path / "base.safetensors", metadata={"made by": "a test"})
    plain, safe = base.load_base(tmp_path / "base.pt"), base.load_base(str(tmp_path / "base.safetensors"))
    assert plain.sha256 == safe.sha256 == base.state_sha256(random_state)
    assert plain.source == str(tmp_path / "base.pt")
    assert (plain.extra, plain.metadata) == ({}, {})
    assert (safe.extra, safe.metadata) == ({}, {"made by": "a test"})
    assert all(torch.equal(safe.state[name], tensor) for name, tensor in random_state.items())


def test_loading_leaves_the_random_state_alone(random_state, tmp_path):
    torch.save(random_state, tmp_path / "base.pt")
    before = torch.get_rng_state()
    base.load_base(tmp_path / "base.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_export_brings_its_head_and_keeps_its_identity(random_state, tmp_path):
    head = {"head.out.weight": torch.ones(2, 2), "head.out.bias": torch.zeros(2)}
    save_file(random_state | head, tmp_path / "export.safetensors", metadata={"nucsam": "{}"})
    export = base.load_base(tmp_path / "export.safetensors")
    assert export.state.keys() == random_state.keys()
    assert export.sha256 == base.state_sha256(random_state)
    assert list(export.extra) == ["head.out.bias", "head.out.weight"]
    assert export.metadata == {"nucsam": "{}"}

    save_file(random_state | head, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"2 keys unexpected: head\.out\.bias"):
        base.load_base(tmp_path / "other.safetensors")


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(random_state, tmp_path):
    state = dict(random_state)
    gone = [name for name in state if name.startswith("mask_decoder.")]
    for name in gone:
        del state[name]
    state["module.extra"] = torch.zeros(1)
    state["image_encoder.neck.0.weight"] = torch.zeros(256, 320, 3, 3)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError) as refusal:
        base.load_base(tmp_path / "other.pt")
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'other.pt'} does not fit MobileSAM")
    assert f"{len(gone)} keys missing: " in message
    assert f"and {len(gone) - 5} more" in message
    assert "1 keys unexpected: module.extra" in message
    assert "1 keys of another shape: image_encoder.neck.0.weight (256, 320, 3, 3), expected (256, 320, 1, 1)" in message
    assert len(message) < 700


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_file_with_code_is_not_run(tmp_path, writer):
    file, mark = tmp_path / "code.pt", tmp_path / "ran"
    writer({"weight": Malicious(mark)}, file)
    with pytest.raises(ValueError, match=r"code\.pt is not a whole checkpoint of tensors alone"):
        base.load_base(file)
    assert not mark.exists()
    if writer is torch.save:
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert mark.exists()  # the file would have run it


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"weight": torch.zeros(9999)}, whole)
    contents = {
        "empty.pt": b"",
        "page.pt": b"<!DOCTYPE html>",
        "text.pt": b"hello world\n" * 9,
        "half.pt": whole.read_bytes()[:20_000],
        "empty.safetensors": b"",
        "page.safetensors": b"<!DOCTYPE html>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        says = ": not a readable safetensors file" if name.endswith("safetensors") else " is not a whole checkpoint"
        with pytest.raises(ValueError, match=name + says):
            base.load_base(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list, expected a dict of tensors"):
        base.load_base(tmp_path / "list.pt")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match=r"nested\.pt holds a dict under 'model'"):
        base.load_base(tmp_path / "nested.pt")
    for missing in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            base.load_base(missing)


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("NUCSAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base.default_cache() == tmp_path / ".cache" / "nucsam"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base.default_cache() == tmp_path / "xdg" / "nucsam"
    monkeypatch.setenv("NUCSAM_CACHE", str(tmp_path / "own"))
    assert base.default_cache() == tmp_path / "own"


@pytest.fixture
def server(tmp_path):
    """Serves the files of a folder; `/short/NAME` announces ten bytes more than it sends."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def do_GET(self):
            if not self.path.startswith("/short/"):
                return super().do_GET()
            body = (tmp_path / "www" / self.path.removeprefix("/short/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 10))
            self.end_headers()
            return self.wfile.write(body)

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Pretends that `content` is the published file, at `urls`; returns the cache folder."""

    def pretend(content: bytes, *urls: str) -> Path:
        monkeypatch.setattr(base, "FILE_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(base, "URLS", urls)
        return tmp_path / "cache"

    return pretend


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_auto_downloads_once_and_then_needs_no_network(server, published, tmp_path, random_state, monkeypatch):
    file = tmp_path / "www" / "mobile_sam.pt"
    torch.save(random_state, file)
    cache = published(file.read_bytes(), f"{server}/not-there.pt", f"{server}/mobile_sam.pt")
    found = base.load_base("auto", cache=cache)
    assert found.sha256 == base.state_sha256(random_state)
    assert found.source == str(cache / "mobile_sam.pt")
    assert [file.name for file in cache.iterdir()] == ["mobile_sam.pt"]
    monkeypatch.setattr(base, "URLS", ())
    monkeypatch.setenv("NUCSAM_CACHE", str(cache))
    assert base.load_base("auto").sha256 == found.sha256


@pytest.mark.parametrize(
    ("path", "reason"),
    [("changed.pt", "SHA-256 [0-9a-f]{64}, expected"), ("short/right.pt", ""), ("none.pt", "404")],
)
def test_a_bad_download_leaves_nothing(server, published, tmp_path, path, reason):
    right = bytes(range(256)) * 20
    (tmp_path / "www" / "changed.pt").write_bytes(right[:-1] + b"!")
    (tmp_path / "www" / "right.pt").write_bytes(right[:-10] if path.startswith("short") else right)
    cache = published(right, f"{server}/{path}")
    with pytest.raises(ValueError, match=f"could not be downloaded.*\n.*{path}: .*{reason}"):
        base.load_base("auto", cache=cache)
    assert not list(cache.iterdir())


def test_without_network_it_says_where_the_file_belongs(published):
    cache = published(b"", f"http://127.0.0.1:{closed_port()}/mobile_sam.pt")
    with pytest.raises(ValueError) as refusal:
        base.load_base("auto", cache=cache)
    message = str(refusal.value)
    assert "refused" in message
    assert f"Put mobile_sam.pt there yourself: {cache / 'mobile_sam.pt'}" in message
    assert "'none' for random weights" in message
    assert not list(cache.iterdir())


def test_another_file_in_the_cache_is_not_taken_for_the_published_one(published):
    cache = published(b"right")
    cache.mkdir()
    (cache / "mobile_sam.pt").write_bytes(b"wrong")
    with pytest.raises(ValueError, match=r"is not MobileSAM's published mobile_sam\.pt: its SHA-256 is"):
        base.load_base("auto", cache=cache)
    assert (cache / "mobile_sam.pt").read_bytes() == b"wrong"
