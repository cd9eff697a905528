"""Models by name, against a local stand-in of the Hugging Face Hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUSHED = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as nucsam uses; repository USER/NAME -> file -> bytes."""

    def __init__(self, repositories, *arguments):
        self.repositories = repositories
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        if path[0] == "api":
            self._answer(404, b"{}")
            return
        name, (_, _, file) = "/".join(path[:2]), path[2:]
        content = self.repositories.get(name, {}).get(file)
        if content is None:
            code = "EntryNotFound" if name in self.repositories else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": code})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._answer(200, content, headers)

    def do_POST(self):
        length = self.headers["Content-Length"]
        if length is not None:
            body = self.rfile.read(int(length))
        else:  # chunked
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.split("?")[0]
        if self.headers["Authorization"] != "Bearer hf_token":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif path == "/api/validate-yaml":
            self._answer(200, b'{"errors": [], "warnings": []}')
        elif path == "/api/repos/create":
            self._answer(200, json.dumps({"url": f"{self.url()}/ann/nuclei"}).encode())
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, json.dumps({"files": files}).encode())
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repositories.setdefault(name, {})[entry["value"]["path"]] = content
            answer = {"commitUrl": f"{self.url()}/{name}/commit/{PUSHED}", "commitOid": PUSHED}
            self._answer(200, json.dumps(answer).encode())
        else:
            self._answer(404, b"{}")

    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The repositories of a running stand-in, and the environment that leads a child to it."""
    repositories = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repositories))
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_token",
    }
    yield repositories, environment
    server.shutdown()
    server.server_close()


def child(code, environment, **changes):
    """What Python prints of `code`, in an environment with changes."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | changes
    )
    return run.stdout + run.stderr


FETCH = """
from nucsam import hub, UserError
try:
    path, name = hub.fetch_model({name!r})
    print(path.read_bytes(), name)
except UserError as error:
    print("UserError", error)
"""


def test_a_model_comes_once_and_is_named_by_its_commit(hub):
    repositories, environment = hub
    repositories["ann/nuclei"] = {"model.safetensors": b"weights"}
    fetch = FETCH.format(name="hf:ann/nuclei")
    expected = f"b'weights' hf:ann/nuclei@{COMMIT}\n"
    assert child(fetch, environment).endswith(expected)
    assert child(fetch, environment, HF_HUB_OFFLINE="1").endswith(expected)
    assert child(FETCH.format(name=f"hf:ann/nuclei@{COMMIT}"), environment).endswith(expected)
    listed = "from nucsam import hub\nprint(hub.cached_models())"
    assert f"hf:ann/nuclei@{COMMIT}" in child(listed, environment)


@pytest.mark.parametrize("name", ["ann/none", "ann/empty", "no name at all", "ann/nuclei"])
def test_what_the_hub_does_not_have_is_refused_by_name(hub, name):
    repositories, environment = hub
    repositories["ann/empty"] = {}
    offline = {"HF_HUB_OFFLINE": "1"} if name == "ann/nuclei" else {}
    printed = child(FETCH.format(name=f"hf:{name}"), environment, **offline)
    assert f"UserError hf:{name}: " in printed and "model.safetensors" in printed


PUSH = """
from pathlib import Path
from nucsam import hub, UserError
try:
    print(hub.push_model("ann/nuclei", Path({file!r}), "# a card"))
except UserError as error:
    print("UserError", error)
"""


def test_a_push_makes_the_repository_that_others_fetch(hub, tmp_path):
    repositories, environment = hub
    (tmp_path / "export.safetensors").write_bytes(b"weights")
    push = PUSH.format(file=str(tmp_path / "export.safetensors"))
    refused = child(push, environment, HF_TOKEN="")
    assert "UserError hf:ann/nuclei: " in refused and "hf auth login" in refused
    assert repositories == {}
    assert child(push, environment).endswith(f"hf:ann/nuclei@{PUSHED}\n")
    assert repositories["ann/nuclei"] == {"model.safetensors": b"weights", "README.md": b"# a card"}
    assert "b'weights'" in child(FETCH.format(name="hf:ann/nuclei"), environment)
