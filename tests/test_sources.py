"""Downloads of public data sets, against a server on this machine."""

import hashlib
import http.server
import io
import json
import threading
import zipfile

import pytest
import test_published

from nucsam.data import sources
from nucsam.data.folders import find_records, is_data_set
from nucsam.data.synthetic import write_dataset
from nucsam.errors import UserError


def zipped(folder) -> bytes:
    """The files of a folder in a zip file, with what macOS adds."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, f"The Set/{path.relative_to(folder)}")
        file.writestr("__MACOSX/The Set/._x.png", "x")
    return stream.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """A server of one archive: whole at /page, with a bad length at /self, half of it at /cut."""

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((path.rpartition("/")[2], self.headers["Range"]))
        body, start = server.body, 0
        if path.startswith("/api/records/"):
            body = json.dumps(server.record).encode()
        elif self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", "many" if "self" in path else str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2 if "cut" in path else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Stands for Zenodo and holds TNBC in miniature."""
    test_published.tnbc(tmp_path / "original")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.home = f"http://127.0.0.1:{running.server_port}"
        running.requests, running.body = [], zipped(tmp_path / "original")
        checksum = f"md5:{hashlib.md5(running.body).hexdigest()}"
        file = {"key": "T N.zip", "size": len(running.body), "checksum": checksum}
        running.record = {"files": [file | {"links": {"self": f"{running.home}/self"}}]}
        monkeypatch.setattr(sources, "ZENODO", running.home)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_set_is_downloaded_checked_and_unpacked(server, tmp_path):
    root = sources.download_set("tnbc", tmp_path / "new")
    assert root == tmp_path / "new"
    assert len(find_records(root)) == 4
    names = {"Slide_01", "Slide_11", "GT_01", "GT_11"}  # neither the archive nor what macOS adds
    assert {path.name for path in root.iterdir()} == names
    # the record names two addresses; the length of the first is bad
    assert [path for path, _ in server.requests] == ["1175282", "self", "T%20N.zip"]
    assert sources.download_set("tnbc", tmp_path / "new") == root
    assert len(server.requests) == 3


def test_another_set_in_the_folder_is_not_taken_for_it(server, tmp_path):
    write_dataset(tmp_path / "NuInsSeg", images=2, size=64, seed=0)
    assert sources.download_set("nuinsseg", tmp_path) == tmp_path / "NuInsSeg"
    root = sources.download_set("tnbc", tmp_path)
    assert len(find_records(root, layout="tnbc")) == 4
    assert sources.download_set("nuinsseg", tmp_path) == tmp_path / "NuInsSeg"


def test_a_cut_download_is_resumed(server, tmp_path, monkeypatch):
    whole = server.record["files"][0]["links"]["self"]
    server.record["files"][0]["links"]["self"] = f"{server.home}/cut"
    monkeypatch.setattr(sources, "quote", lambda key: "cut")
    with pytest.raises(UserError, match=rf"(?s)/cut: .*{sources.PAGES['tnbc']}"):
        sources.download_set("tnbc", tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(sources, "ZENODO", server.home)
    server.record["files"][0]["links"]["self"] = whole.replace("self", "page")
    sources.download_set("tnbc", tmp_path / "new")
    assert server.requests[-1] == ("page", f"bytes={len(server.body) // 2}-")


def test_an_archive_cut_off_while_unpacking_is_unpacked_again(server, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for name in ("nucsam.data.sources.with_bar", "pathlib.Path.unlink"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, stop)
            sources.download_set("tnbc", tmp_path / "new")
    assert len(find_records(sources.download_set("tnbc", tmp_path / "new"))) == 4
    # the record again, and not the archive
    assert [path for path, _ in server.requests] == [
        "1175282",
        "self",
        "T%20N.zip",
        *["1175282"] * 2,
    ]


@pytest.mark.parametrize("record", [[], {"files": [{}]}, {"files": []}, {"files": 3}, "text"])
def test_a_record_of_another_form_names_the_page(server, tmp_path, record):
    server.record = record
    with pytest.raises(UserError, match=rf"^tnbc: .*{sources.PAGES['tnbc']}"):
        sources.download_set("tnbc", tmp_path / "new")


@pytest.mark.parametrize("change", ["checksum", "archive"])
def test_another_archive_is_refused(server, tmp_path, change):
    if change == "archive":
        server.body = b"no archive"
        file = server.record["files"][0]
        file |= {"checksum": f"md5:{hashlib.md5(server.body).hexdigest()}", "size": 10}
    else:
        server.record["files"][0]["checksum"] = "md5:0"
    with pytest.raises(UserError, match=r"T N\.zip: "):
        sources.download_set("tnbc", tmp_path / "new")
    assert not list((tmp_path / "new").glob("[!.T]*"))


def test_a_file_of_unknown_size_is_checked_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_data_set", lambda folder, _: is_data_set(folder))
    checksum = f"sha256:{hashlib.sha256(server.body).hexdigest()}"
    for address, digest in (("page", "sha256:0"), ("cut", checksum)):
        archive = sources.MONUSEG._replace(urls=(f"{server.home}/{address}",), checksum=digest)
        monkeypatch.setattr(sources, "MONUSEG", archive)
        with pytest.raises(UserError, match="https://monuseg"):
            sources.download_set("monuseg", tmp_path / "new")
    archive = sources.MONUSEG._replace(urls=(f"{server.home}/page",), checksum=checksum)
    monkeypatch.setattr(sources, "MONUSEG", archive)
    assert len(find_records(sources.download_set("monuseg", tmp_path / "new"))) == 4


@pytest.mark.parametrize("name", ["pannuke", "consep", "lizard", "cryonuseg"])
def test_where_to_click_is_said(tmp_path, name):
    with pytest.raises(UserError, match=rf"^{name}: .* https://.*{tmp_path}"):
        sources.download_set(name, tmp_path)
    with pytest.raises(UserError, match=r"^name: found 'cells', expected one of nuinsseg"):
        sources.download_set("cells", tmp_path)
