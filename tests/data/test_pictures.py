"""Pictures of samples: from files, addresses and functions; fetched once; and what cannot be had says so."""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from hooked_vlm.data import Sample, SampleError, Samples
from hooked_vlm.data.pictures import check_pictures, fetched, is_address, load_picture, resolve
from hooked_vlm.processing import ImageError

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


class Server(ThreadingHTTPServer):
    """Gives one picture, and counts how often it is asked for anything."""

    asked: list[str]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """On this machine alone; with an empty cache, and offline mode off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            buffer = io.BytesIO()
            Image.fromarray(PIXELS).save(buffer, "PNG")
            body = {"/ok.png": buffer.getvalue(), "/half.png": buffer.getvalue()[:-30], "/page": b"<html>"}
            self.send_response(200 if self.path in body else 404)
            self.send_header("Content-Type", "image/png" if self.path.endswith("png") else "text/html")
            self.end_headers()
            self.wfile.write(body.get(self.path, b"gone"))

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def at(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def test_from_a_path_a_file_address_a_function_and_an_array(png: Path) -> None:
    for source in (str(png), png, png.as_uri(), lambda: png, lambda: PIXELS, PIXELS, Image.fromarray(PIXELS)):
        assert (np.asarray(load_picture(source)) == PIXELS).all()


def test_what_the_web_gives_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(3):
        assert (np.asarray(load_picture(at(server, "ok.png"))) == PIXELS).all()
    assert server.asked == ["/ok.png"]
    kept = list((tmp_path / "hub" / "hooked-vlm" / "pictures").iterdir())
    assert len(kept) == 1
    assert kept[0].suffix == ".png"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.png", "404.*download the pictures and give their folder"),
        ("page", "no picture that can be read, but text/html"),
        ("half.png", "no picture that can be read, but image/png"),
    ],
)
def test_what_is_no_picture_is_not_kept(name: str, said: str, server: Server, tmp_path: Path) -> None:
    for times in (1, 2):
        with pytest.raises(ImageError, match=f"(?s)image of s1.*{name}.*{said}"):
            load_picture(at(server, name), what="image of s1")
        assert server.asked == [f"/{name}"] * times
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


def test_a_lost_connection_names_the_address(server: Server) -> None:
    address = at(server, "ok.png")
    server.shutdown()
    server.server_close()
    with pytest.raises(ImageError, match=f"cannot be fetched from {address}.*network"):
        load_picture(address)


def test_offline_says_what_to_unset(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ImageError, match="unset HF_HUB_OFFLINE"):
        load_picture(at(server, "ok.png"))
    assert server.asked == []


@pytest.mark.parametrize(
    ("kind", "revision", "ref"), [("", "", "main"), ("datasets/", "@v1", "v1"), ("spaces/", "@refs/pr/3", "refs/pr/3")]
)
def test_from_the_cache_of_the_hub(
    kind: str, revision: str, ref: str, png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's own layout: refs name commits, and snapshots hold their files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / f"{kind.rstrip('/') or 'models'}--an-owner--a.name"
    (repo / "snapshots" / "c0ffee" / "in").mkdir(parents=True)
    (repo / "refs" / ref).parent.mkdir(parents=True)
    (repo / "refs" / ref).write_text("c0ffee")
    png.rename(repo / "snapshots" / "c0ffee" / "in" / "x.png")
    assert (np.asarray(load_picture(f"hf://{kind}an-owner/a.name{revision}/in/x.png")) == PIXELS).all()


def test_what_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ImageError, match="hf://datasets/a/b/c.png.*unset HF_HUB_OFFLINE, or download"):
        load_picture("hf://datasets/a/b/c.png")
    with pytest.raises(ImageError, match=r"hf://c.png, which is not hf://\[datasets/\]OWNER/NAME"):
        load_picture("hf://c.png")


def test_addresses_of_another_kind() -> None:
    with pytest.raises(
        ImageError, match="image is at s3://bucket/x.png; addresses begin with http://, https://, hf://"
    ):
        fetched("s3://bucket/x.png")


def test_missing_files_say_so(tmp_path: Path) -> None:
    for source in (tmp_path / "none.png", (tmp_path / "none.png").as_uri()):
        with pytest.raises(ImageError, match=r"image of s1 .*none.png does not exist"):
            load_picture(source, what="image of s1")


@pytest.mark.parametrize(
    ("source", "root", "resolved"),
    [
        ("a/b.png", None, "a/b.png"),
        ("a/b.png", Path("data"), str(Path("data/a/b.png"))),
        ("./a/b.png", "http://host/x/", "http://host/x/a/b.png"),
        ("b.png", "hf://datasets/o/n", "hf://datasets/o/n/b.png"),
        ("https://host/b.png", "data", "https://host/b.png"),
        (str(Path("/b.png").absolute()), "data", str(Path("/b.png").absolute())),
    ],
)
def test_relative_paths_are_meant_from_a_root(source: str, root: str | Path | None, resolved: str) -> None:
    assert resolve(source, root) == resolved


def test_addresses_are_told_from_paths() -> None:
    assert is_address("http://a/b")
    assert not any(is_address(source) for source in ("c:/a/b", "a/b://c", Path("a"), None))


def test_checking_pictures_drops_those_that_cannot_be_read(png: Path, tmp_path: Path) -> None:
    samples = Samples(
        [
            Sample("good", png, "?", image_cf=PIXELS),
            Sample("text alone", None, "?"),
            Sample("no picture", tmp_path / "none.png", "?"),
            Sample("no counterfactual", png, "?", image_cf=str(tmp_path / "none.png")),
        ]
    )
    checked = check_pictures(samples)
    assert [sample.id for sample in checked] == ["good", "text alone"]
    assert [one.id for one in checked.dropped] == ["no picture", "no counterfactual"]
    assert checked.report() == "2 dropped (a picture that cannot be read: 2)"
    with pytest.raises(SampleError, match="no counterfactual picture"):
        samples[1].picture_cf()


def test_a_function_that_finds_no_file_is_an_unreadable_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="picture of a cannot be had: FileNotFoundError"):
        load_picture(lambda: Image.open(tmp_path / "gone.png"), what="picture of a")
