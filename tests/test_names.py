"""Models by name: adapters that others start from, and a local stand-in of the Hub."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import same_tensors
from safetensors.numpy import save

from nucsam import names
from nucsam.cli import run_command
from nucsam.errors import UserError
from nucsam.export.merged import export_run, model_card
from nucsam.model.bases import BASES
from nucsam.model.weights import load_base, state_sha256
from nucsam.names import STARTER_FILE, find_model
from nucsam.predict.models import load
from nucsam.run.checkpoint import open_base, read_tensors, write_tensors
from nucsam.run.directory import RunDirectory
from nucsam.train.loop import fit

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
from nucsam import UserError
from nucsam.names import find_model
try:
    path, name = find_model({name!r})
    print(path.read_bytes(), name)
except UserError as error:
    print("UserError", error)
"""


def test_a_model_comes_once_and_is_named_by_its_commit(hub):
    repositories, environment = hub
    model = save({"x": np.zeros(2)}, {"nucsam": "{}"})
    repositories["ann/nuclei"] = {"model.safetensors": model}
    repositories["bob/others"] = {"model.safetensors": save({"x": np.zeros(2)})}
    repositories["bob/garbage"] = {"model.safetensors": b"weights"}
    fetch = FETCH.format(name="hf:ann/nuclei")
    expected = f"{model} hf:ann/nuclei@{COMMIT}\n"
    assert child(fetch, environment).endswith(expected)
    assert child(fetch, environment, HF_HUB_OFFLINE="1").endswith(expected)
    assert child(FETCH.format(name=f"hf:ann/nuclei@{COMMIT}"), environment).endswith(expected)
    for other in ("hf:bob/others", "hf:bob/garbage"):  # which `find_model` does not read
        assert f"{other}@{COMMIT}" in child(FETCH.format(name=other), environment)
    listed = "from nucsam.predict.models import list_models\nprint(list_models())"
    printed = child(listed, environment)
    assert f"('hf:ann/nuclei@{COMMIT}', 'Hugging Face Hub', {len(model)}, " in printed
    assert "bob" not in printed
    (Path(environment["HF_HOME"]) / "file").touch()
    assert "'starter'" in child(listed, environment, HF_HUB_CACHE=f"{environment['HF_HOME']}/file")


def test_without_the_hubs_package_there_are_no_models_of_it(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda _: None)
    assert names.hub_models() == {}
    with pytest.raises(UserError, match=r"^hf:ann/nuclei: found no huggingface_hub"):
        load("hf:ann/nuclei")


def test_a_home_that_is_not_known_is_named(monkeypatch):
    monkeypatch.setenv("NUCSAM_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="NUCSAM_CACHE: found ~no-such-user/cache"):
        names.default_cache()


@pytest.mark.parametrize("name", ["ann/none", "ann/empty", "no name at all", "ann/nuclei"])
def test_what_the_hub_does_not_have_is_refused_by_name(hub, name):
    repositories, environment = hub
    repositories["ann/empty"] = {}
    offline = {"HF_HUB_OFFLINE": "1"} if name == "ann/nuclei" else {}
    printed = child(FETCH.format(name=f"hf:{name}"), environment, **offline)
    assert f"UserError hf:{name}: " in printed and "model.safetensors" in printed


PUSH = """
from pathlib import Path
from nucsam import UserError
from nucsam.names import push_model
try:
    print(*push_model("ann/nuclei", Path({file!r}), "# a card"))
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
    assert child(push, environment).endswith(f"hf:ann/nuclei@{PUSHED} False\n")
    assert repositories["ann/nuclei"] == {"model.safetensors": b"weights", "README.md": b"# a card"}
    repositories["ann/nuclei"] = {"README.md": b"# a card with a licence"}
    assert child(push, environment).endswith(f"hf:ann/nuclei@{PUSHED} True\n")
    files = {"model.safetensors": b"weights", "README.md": b"# a card with a licence"}
    assert repositories["ann/nuclei"] == files
    assert "b'weights'" in child(FETCH.format(name="hf:ann/nuclei"), environment)


# ---- adapters that others start from ----


@pytest.fixture(scope="module")
def run(published, tiny, tmp_path_factory) -> Path:
    """A run from a published base."""
    out = tmp_path_factory.mktemp("made") / "run"
    fit(tiny("model.weights=auto", "train.epochs=1"), out)
    return out


@pytest.fixture(scope="module")
def adapter(run) -> Path:
    """What the run trained, in half precision."""
    out = run.parent / "adapter.safetensors"
    export_run(run, out, format="adapter", half=True)
    return out


def test_an_adapter_in_half_precision_predicts_as_its_run(run, adapter):
    assert adapter.stat().st_size < 0.6 * RunDirectory(run).adapter_file.stat().st_size
    images = 255 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole, half = (load(path).model(images, (64, 64)) for path in (run, adapter))
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0.02)
    assert not torch.equal(half, whole)


def test_an_adapter_on_a_base_without_a_name_says_how_to_merge_it(adapter, tmp_path):
    weights, metadata = read_tensors(adapter)
    metadata["base"] = {"sha256": "7" * 64, "source": "my_base.safetensors"}
    write_tensors(tmp_path / "a.safetensors", weights, metadata)
    merges = "a.safetensors --base FILE --out merged.safetensors merges it with its base$"
    with pytest.raises(UserError, match=f"7777.*my_base.*found the base.*nucsam export .*{merges}"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"found the base \w{12} \([^()]*\)$"):
        export_run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", base="auto")


def test_a_base_of_an_adapter_is_what_its_export_merges(adapter, base, tmp_path):
    export_run(adapter, tmp_path / "merged.safetensors")
    merged, own = load_base(tmp_path / "merged.safetensors"), open_base(str(adapter))
    assert own.extra and same_tensors(own.extra, merged.extra)
    assert same_tensors(own.state, merged.state) and not same_tensors(own.state, base.state)
    weights, _ = read_tensors(adapter, "adapter")
    assert own.sha256 == state_sha256(base.state | weights)  # of what was read, not of the products


def test_a_training_continues_an_adapter_from_the_hub_at_its_commit(
    adapter, tiny, tmp_path, monkeypatch
):
    pinned, asked = f"hf:ann/nuclei@{COMMIT}", []

    def fetch(name):
        asked.append(name)
        return adapter, pinned

    monkeypatch.setattr(names, "_fetch", fetch)
    config, out = tiny("model.weights=hf:ann/nuclei", "train.epochs=1"), tmp_path / "run"
    fit(config, out)
    run = RunDirectory(out)
    assert run.read_metrics()[0]["epoch"] == 0  # scored before the first step
    assert asked == ["hf:ann/nuclei"]
    fit(tiny("model.weights=hf:ann/nuclei", "train.epochs=2"), out, resume=True)
    export_run(out, tmp_path / "own.safetensors", format="adapter")
    export_run(tmp_path / "own.safetensors", tmp_path / "merged.safetensors")
    assert {*asked[1:]} == {pinned}
    sha256 = open_base(str(adapter)).sha256
    for file in (run.adapter_file, tmp_path / "own.safetensors", tmp_path / "merged.safetensors"):
        _, metadata = read_tensors(file)
        assert metadata["base"] == {"sha256": sha256, "source": pinned}
        assert metadata["config"]["model"]["weights"] == "hf:ann/nuclei"


def test_a_run_finds_the_base_beside_which_it_began(adapter, tiny, tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    shutil.copy(adapter, there / "own.safetensors")
    monkeypatch.chdir(there)
    config = tiny("model.weights=own.safetensors", "train.epochs=1")
    fit(config, "run")
    monkeypatch.chdir(here)
    assert load(there / "run").scale == 1.0
    fit(replace(config, train=replace(config.train, epochs=2)), there / "run", resume=True)
    assert load(there / "run").scale == 1.0  # what resumes elsewhere began there all the same


def test_a_name_is_no_file_and_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("starter").mkdir()
    assert find_model("starter") == (STARTER_FILE, "starter")
    assert find_model("./starter") == (Path("starter"), "./starter")
    assert find_model(Path("starter"))[0] == Path("starter")
    assert names.is_permanent("starter") and names.is_permanent(f"hf:ann/nuclei@{COMMIT}")
    assert not names.is_permanent("./starter") and not names.is_permanent("hf:ann/nuclei@main")


def test_a_card_says_what_the_file_says(run, monkeypatch, capsys):
    pushed = {}

    def push(name, model, card):
        pushed.update(name=name, metadata=read_tensors(model)[1], card=card)
        return f"hf:{name}@{PUSHED}", True

    monkeypatch.setattr("nucsam.export.merged.push_model", push)
    assert run_command(["export", str(run), "--push", "ann/nuclei", "--half"]) == 0
    printed = capsys.readouterr().out
    assert f"hf:ann/nuclei@{PUSHED}" in printed and "README.md stays" in printed
    metadata, card = pushed["metadata"], pushed["card"]
    assert pushed["name"] == "ann/nuclei"
    assert "nucsam predict hf:ann/nuclei IMAGES" in card
    assert metadata["base"]["sha256"] in card and "`mobile_sam.pt`" in card
    assert f"AJI {100 * metadata['scores']['aji']:.1f} %" in card
    # what a training must set to take these weights
    assert "model.weights=hf:ann/nuclei model.width=32 data.scale=1.0  #" in card
    metadata["config"]["model"]["finest"] = 1
    assert "model.width=32 model.finest=1 data.scale=1.0  #" in model_card("ann/n", metadata)
    assert metadata["kind"] == "merged"
    assert run_command(["export", str(run), "--push", "ann/nuclei", "--format", "adapter"]) == 0
    assert pushed["metadata"]["kind"] == "adapter"


def test_the_caches_are_listed(published, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr("nucsam.predict.models.hub_models", lambda: {"hf:a/b@c": published})
    assert run_command(["models"]) == 0
    printed = capsys.readouterr().out
    size = f"{published.stat().st_size / 2**20:.1f}"
    for name in ("mobile_sam", "hf:a/b@c"):
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert size in line and str(published) in line
    damaged = replace(BASES["mobile_sam"], size=published.stat().st_size + 1)
    monkeypatch.setitem(BASES, "mobile_sam", damaged)
    assert run_command(["models"]) == 0
    assert "mobile_sam" not in {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()}
