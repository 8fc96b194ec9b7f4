"""Folders of data, caches and checkpoints that somebody made to do harm: refused by name, and nothing else is read."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_attn.training.checkpoints import tensors_and_values
from diffusers_attn.training.checkpoints.checkpoint import Checkpoints
from diffusers_attn.training.data import Buckets, LatentCache, TrainingDataError, read_folder
from diffusers_attn.training.data.store import TensorStore, hash_of, read_tensors
from diffusers_attn.training.errors import TrainingError

from .media import album, encode, picture


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lying_png(path: Path, width: int, height: int) -> None:
    """Its header states a size that its pixels do not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def metadata(folder: Path, *rows: dict[str, Any] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def outside(folder: Path) -> None:
    picture(folder.parent / "outside.png")
    metadata(folder, {"file_name": "../outside.png", "text": "outside"})


def absolute(folder: Path) -> None:
    metadata(folder, {"file_name": str(picture(folder.parent / "outside.png")), "text": "outside"})


def loop(folder: Path) -> None:
    (folder / "again").symlink_to(folder)


def nothing(folder: Path) -> None:
    (folder / "a.png").symlink_to(folder.parent / "nothing.png")


def long_caption(folder: Path) -> None:
    picture(folder / "a.png")
    with (folder / "a.txt").open("w") as file:
        file.truncate(2**31)  # no bytes on the disk


def deep(folder: Path) -> None:
    metadata(folder, "[" * 100_000)


def bomb(folder: Path) -> None:
    lying_png(folder / "a.png", 60_000, 60_000)
    (folder / "a.txt").write_text("large")


FOLDERS = {
    outside: "outside of the folder",
    absolute: "outside of the folder",
    loop: "a link to a folder that was read already",
    nothing: "a link to nothing",
    long_caption: "2147483648 bytes; a caption has at most 1048576",
    deep: "not JSON: it is nested too deeply",
    bomb: "exceeds limit",
}


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_a_folder_of_data(tmp_path: Path, make: Any) -> None:
    folder = album(tmp_path / "data", 1)
    make(folder)
    with pytest.raises(TrainingDataError, match=FOLDERS[make]):
        read_folder(folder)


@pytest.mark.parametrize("size", [(64, 4000), (4000, 64)])
def test_a_picture_with_fewer_pixels_than_its_header_states(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = album(tmp_path / "data", 1)
    lying_png(folder / "00.png", *size)
    cache = LatentCache(tmp_path / "cache", {}, Buckets.of(32 * 32))
    with pytest.raises(TrainingDataError, match="00.png"):
        cache.fill(read_folder(folder), encode)


def file_of(store: TensorStore, header: bytes | None = None, data: bytes = b"", length: int | None = None) -> Path:
    """A file of the store with a header of its own, as safetensors has it."""
    path = store.path(hash_of({}))
    store.write(hash_of({}), {"latents": torch.ones(2)}, {})
    if header is not None:
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def described(shape: list[int], end: int, **more: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}, **more}).encode()


FILES = {
    "length": (b"{}", b"", 2**62),
    "much data, of which nothing is there": (described([2**40], 2**42), b"", None),
    "a shape that its data do not have": (described([4096], 8), b"\0" * 8, None),
    "no metadata": (described([2], 8), b"\0" * 8, None),
    "deep metadata": (described([2], 8, __metadata__={"diffusers_attn": "[" * 100_000}), b"\0" * 8, None),
    "metadata that are a list": (described([2], 8, __metadata__={"diffusers_attn": "[]"}), b"\0" * 8, None),
    "deep header": (b'{"a":' * 50_000, b"", None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_cache(tmp_path: Path, name: str) -> None:
    store = TensorStore(tmp_path)
    path = file_of(store, *FILES[name])
    assert not store.has(hash_of({}))
    with pytest.raises(TrainingDataError, match="is damaged") as error:
        read_tensors(path)
    assert str(path) in str(error.value)


def test_a_file_of_a_cache_that_links_to_another(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "cache")
    path = file_of(store)
    (tmp_path / "secret").write_text("secret")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(TrainingDataError, match="is damaged") as error:
        read_tensors(path)
    assert "secret" not in str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": 1}', '{"a": "../../x"}', "[]", "\xff"])
def test_digests_of_others(tmp_path: Path, content: str) -> None:
    examples = read_folder(album(tmp_path / "data", 1))
    stamp = examples[0].source.stamp()
    folder = tmp_path / "cache" / "digests"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(content.replace('"a"', json.dumps(stamp)), encoding="latin-1")
    [cached] = LatentCache(tmp_path / "cache", {}, Buckets.of(32 * 32)).fill(examples, encode)
    assert read_tensors(cached.path)["latents_mean"].isfinite().all()


@pytest.mark.parametrize("kind", ["deep", "outside"])
def test_a_checkpoint(tmp_path: Path, kind: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, lambda folder: (folder / "state.json").write_text(""))
    path = checkpoints.path(1) / "checksums.json"
    entries = {"../x": {"bytes": 1, "crc32": "0"}, **json.loads(path.read_text())}
    path.write_text("[" * 100_000 if kind == "deep" else json.dumps(entries))
    with pytest.raises(TrainingError, match="nested too deeply|no file of this folder") as error:
        checkpoints.find("latest")
    assert str(path) in str(error.value)


def test_the_state_of_an_optimizer_comes_back_and_runs_nothing(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    state = {0: {"step": torch.tensor(2.0), "b": [shared, shared]}, 1: {}}
    value = {"state": state, "groups": [{"betas": (0.9, 1), "a": None}]}
    tensors_and_values.write(value, tmp_path / "optimizer")
    found = tensors_and_values.read(tmp_path / "optimizer")
    assert repr(found) == repr(value)
    assert sorted(os.listdir(tmp_path)) == ["optimizer.json", "optimizer.safetensors"]
    (tmp_path / "optimizer.json").write_text('{"class": ["os", "system"], "fields": ["true"]}')
    with pytest.raises(ValueError, match="no plain value"):
        tensors_and_values.read(tmp_path / "optimizer")
