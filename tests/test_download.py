"""Downloads, against a server on this machine."""

import errno
import hashlib
import http.server
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nucsam import download
from nucsam.errors import UserError

BODY = bytes(range(256)) * 40
HALF = len(BODY) // 2


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY at /whole with ranges and at /plain without; at the others something else."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        if self.path == "/slow":
            time.sleep(0.3)
        start = 0
        if self.path == "/whole" and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = {"/cut": BODY[:HALF], "/long": BODY * 2, "/changed": BODY[:-1] + b"!"}
        length = {"/short": len(BODY) - 1, "/nameless": "many", "/long": None}
        self.send_response(404 if self.path == "/missing" else 206 if start else 200)
        announced = length.get(self.path, len(BODY) - start)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body.get(self.path, BODY)[start:])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads BODY to a file from paths of the server, or whole addresses; returns the file."""
    server.requests.clear()

    def run(*paths):
        urls = [p if "://" in p else f"http://127.0.0.1:{server.server_port}{p}" for p in paths]
        file, digest = tmp_path / "cache" / "file.pt", f"sha256:{hashlib.sha256(BODY).hexdigest()}"
        download.fetch(file, urls, checksum=digest, size=len(BODY), advice=", or ask a friend")
        return file

    return run


@pytest.fixture
def silent():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/silent"


@pytest.mark.parametrize("path", ["/whole", "/plain"])
def test_a_cut_transfer_is_resumed_where_the_server_can(fetch, server, tmp_path, path):
    with pytest.raises(UserError, match="/cut"):
        fetch("/cut")
    (partial,) = (tmp_path / "cache").iterdir()
    assert partial.read_bytes() == BODY[:HALF]
    file = fetch(path)
    assert file.read_bytes() == BODY
    assert list(file.parent.iterdir()) == [file]
    assert server.requests[-1] == (path, f"bytes={HALF}-")


@pytest.mark.parametrize("path", ["/short", "/nameless", "/long", "/changed", "/missing"])
def test_a_bad_address_is_named_and_the_next_one_tried(fetch, tmp_path, path):
    with pytest.raises(UserError) as refusal:
        fetch(path)
    file = tmp_path / "cache" / "file.pt"
    assert f"{path}: " in str(refusal.value)
    assert str(refusal.value).endswith(f"{file}, or ask a friend")
    assert not file.exists()
    assert fetch(path, "/whole").read_bytes() == BODY


def test_a_full_disk_is_no_fault_of_the_addresses(fetch, monkeypatch):
    def full(url, partial, size):
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    monkeypatch.setattr(download, "_transfer", full)
    with pytest.raises(UserError, match=r"file\.pt: cannot be written .*No space.*, or ask"):
        fetch("/whole", "/plain")


def test_offline_the_message_names_each_address_and_the_file_to_put(fetch, silent, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/refused"
    with pytest.raises(UserError) as refusal:
        fetch(silent, refused)
    for fact in (f"{silent}: timed out", f"{refused}: ", "cache/file.pt"):
        assert fact in str(refusal.value)
    assert fetch(silent, "/whole").read_bytes() == BODY


def test_a_second_process_waits_for_the_first(fetch, server):
    """Locks are per opened file, so that two threads stand for two processes."""
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(fetch, ["/slow", "/slow"]))
    assert files[0].read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/slow"]


def test_a_process_that_waited_for_a_failure_tries_itself(fetch, server):
    with ThreadPoolExecutor(2) as pool:
        attempts = [pool.submit(fetch, "/missing", "/slow", "/changed") for _ in range(2)]
    assert all(attempt.result().read_bytes() == BODY for attempt in attempts)
    with ThreadPoolExecutor(2) as pool:
        attempts[0].result().unlink()
        attempts = [pool.submit(fetch, "/missing") for _ in range(2)]
    assert all(isinstance(attempt.exception(), UserError) for attempt in attempts)
