import dataclasses
import functools
import hashlib
import io
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
from datasets import config

from twins_hf.data import load_segmentation_data
from twins_hf.data.ade20k import ADE20K_CLASSES, Archive, download_ade20k


def archive_of_two_images():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("training", "validation"):
            for kind, suffix, shape in (("images", "jpg", (20, 30, 3)), ("annotations", "png", (20, 30))):
                picture = io.BytesIO()
                PIL.Image.fromarray(np.full(shape, 7, np.uint8)).save(picture, "JPEG" if suffix == "jpg" else "PNG")
                archive.writestr(f"ADEChallengeData2016/{kind}/{split}/ADE_{split}_1.{suffix}", picture.getvalue())
        rows = [f"{index}\t0.1\t1\t1\t{name} " for index, name in enumerate(ADE20K_CLASSES, start=1)]
        archive.writestr("ADEChallengeData2016/objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows))
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.server.content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Serves `content` under every address; the library may ask it, offline or not."""
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests = archive_of_two_images(), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def archive(server, monkeypatch):
    """What `--dataset_name ade20k` downloads: the small archive of that server."""
    url = f"http://127.0.0.1:{server.server_port}/ADEChallengeData2016.zip"
    digest = hashlib.sha256(server.content).hexdigest()
    archive = Archive(url, len(server.content), digest, "ADEChallengeData2016")
    monkeypatch.setattr("twins_hf.data.loading.download_ade20k", functools.partial(download_ade20k, archive))
    return archive


def test_the_benchmark_is_downloaded_once_and_loads_as_its_folder_does(server, archive, monkeypatch):
    for _ in range(2):
        data = load_segmentation_data("ade20k")
        assert data.name == "ade20k" and data.do_reduce_labels
        assert list(data.id2label.values()) == list(ADE20K_CLASSES)
        assert [len(data.splits[split]) for split in ("train", "validation")] == [1, 1]
        assert data.splits["train"][0]["image"].size == (30, 20)
        assert len([path for path in server.requests if path.endswith(".zip")]) == 2  # its size, then its bytes
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("content", ["an error page", "a cut file", "other bytes"])
def test_what_is_not_the_archive_is_named_removed_and_downloaded_again(server, archive, content):
    whole = server.content
    other = whole[:-100] + bytes(100)
    server.content = {"an error page": b"<html>Busy</html>", "a cut file": whole[:-9], "other bytes": other}[content]
    if content == "other bytes":
        message = f"should have the SHA-256 {archive.sha256} but has {hashlib.sha256(other).hexdigest()}"
    else:
        message = f"should have {len(whole):,} bytes but has {len(server.content):,} bytes"
    with pytest.raises(ValueError, match=f"^{archive.url}: the download /.* {message}. It has been removed"):
        load_segmentation_data("ade20k")
    server.content = whole
    assert len(load_segmentation_data("ade20k").splits["validation"]) == 1


def test_a_folder_that_was_only_half_unpacked_is_not_used(archive, monkeypatch):
    def stop_after_two(self, path, members):
        for member in list(members)[:2]:
            self.extract(member, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            download_ade20k(archive)
    folder = download_ade20k(archive)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 5
    shutil.rmtree(folder)
    assert download_ade20k(archive) == folder and folder.is_dir()


def test_an_unreachable_server_ends_in_one_sentence_that_says_what_to_do(archive, monkeypatch):
    gone = dataclasses.replace(archive, url="http://127.0.0.1:9/ADEChallengeData2016.zip")
    message = (
        "^http://127.0.0.1:9/ADEChallengeData2016.zip cannot be downloaded .*pass the folder ADEChallengeData2016"
    )
    with pytest.raises(ConnectionError, match=message):
        download_ade20k(gone)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot be downloaded .*Offline mode is enabled.*pass the folder"):
        download_ade20k(archive)
