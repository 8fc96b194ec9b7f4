"""Latents and text embeddings, computed once: by several processes, through kills, with damaged files."""

import json
import logging
import os
import resource
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_attn.training.data import (
    Buckets,
    LatentCache,
    OtherRankError,
    TextCache,
    TrainingDataError,
    read_examples,
    read_folder,
)
from diffusers_attn.training.data.digests import content_digests
from diffusers_attn.training.data.store import read_tensors

from ...launching import TIMEOUT, as_child, forkserver
from .media import album, cut, encode, encode_text, picture, video

BUCKETS = Buckets.of(32 * 32, frames=(1, 5), frame_rule=(4, 1))
SETTINGS = {"model": "tiny", "vae": {"scale": 8}, "dtype": "float32"}


class Counting:
    """An encoder that counts its inputs."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, given):
        self.calls.append(len(given))
        return self.function(given)


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, shared=None):
        self.rank, self.size = rank, size
        self.meeting, self.flags = shared

    @staticmethod
    def of(size):
        shared = (threading.Barrier(size, timeout=TIMEOUT), [False] * size)
        return [ThreadRanks(rank, size, shared) for rank in range(size)]

    def barrier(self):
        self.meeting.wait()

    def any(self, flag):
        self.flags[self.rank] = flag
        self.meeting.wait()
        answer = any(self.flags)
        self.meeting.wait()
        return answer


def on_threads(size, work):
    """What `work(ranks)` gives on each, or the exception that it raises."""
    answers = [None] * size

    def run(ranks):
        try:
            answers[ranks.rank] = work(ranks)
        except Exception as error:
            answers[ranks.rank] = error

    threads = [threading.Thread(target=run, args=(ranks,)) for ranks in ThreadRanks.of(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def cache(folder, **options):
    return LatentCache(folder, SETTINGS, BUCKETS, **options)


def contents(folder):
    """The bytes of all finished files below `folder`, by their path."""
    files = [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def data(tmp_path, pictures=3):
    album(tmp_path / "data", pictures)
    video(tmp_path / "data" / "moving.mp4", frames=12)
    (tmp_path / "data" / "moving.txt").write_text("blue grows")
    return read_folder(tmp_path / "data")


def test_latents_of_pictures_and_videos(tmp_path):
    examples = data(tmp_path)
    filled = cache(tmp_path / "cache").fill(examples, encode)
    assert [each.example for each in filled] == examples
    assert {each.bucket.frames for each in filled if each.example.kind == "video"} == {5}
    for each in filled:
        tensors = load_file(each.path)
        assert tensors.keys() == {"latents_mean", "latents_logvar"}
        assert tensors["latents_mean"].shape == (
            3, each.bucket.frames, each.bucket.height // 8, each.bucket.width // 8,
        )  # fmt: skip
    # Blue of the middle five of twelve frames, 3 to 7: 20 times the number.
    blue = load_file(filled[-1].path)["latents_mean"][2, :, -1, -1]
    assert ((blue + 1) * 127.5).tolist() == pytest.approx([60, 80, 100, 120, 140], abs=8)
    with safe_open(filled[0].path, framework="pt") as file:
        assert json.loads(file.metadata()["diffusers_attn"])["made_from"]["settings"] == SETTINGS


def test_nothing_is_encoded_twice(tmp_path):
    examples = data(tmp_path)
    first = cache(tmp_path / "cache").fill(examples, encode)
    again = Counting(encode)
    assert cache(tmp_path / "cache").fill(examples, again) == first
    assert not again.calls
    # The same content under another name, and one that is new.
    shutil.copy(tmp_path / "data" / "00.png", tmp_path / "data" / "copy.png")
    (tmp_path / "data" / "copy.txt").write_text("the same")
    picture(tmp_path / "data" / "01.png", seed=77)
    filled = cache(tmp_path / "cache").fill(read_folder(tmp_path / "data"), again)
    assert again.calls == [1]
    paths = {each.example.name: each.path for each in filled}
    assert paths["copy.png"] == paths["00.png"] == first[0].path
    assert paths["01.png"] != first[1].path


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: LatentCache(folder, {**SETTINGS, "model": "other"}, BUCKETS),
        lambda folder: LatentCache(folder, {**SETTINGS, "vae": {"scale": 9}}, BUCKETS),
        lambda folder: LatentCache(folder, SETTINGS, Buckets.of(48 * 48, frames=(1, 5))),
        lambda folder: LatentCache(folder, SETTINGS, BUCKETS, crop="random"),
        lambda folder: LatentCache(folder, SETTINGS, BUCKETS, crop="random", seed=1),
    ],
)
def test_other_settings_are_other_files(tmp_path, change):
    examples = data(tmp_path, 1)
    first = {each.path for each in cache(tmp_path / "cache").fill(examples, encode)}
    again = Counting(encode)
    assert not first & {each.path for each in change(tmp_path / "cache").fill(examples, again)}
    assert sum(again.calls) == 2
    cache(tmp_path / "cache").fill(examples, again)
    assert sum(again.calls) == 2


def test_settings_that_json_cannot_say(tmp_path):
    for settings in ({"dtype": torch.float32}, {"shift": float("nan")}):
        with pytest.raises(TrainingDataError, match="JSON"):
            LatentCache(tmp_path, settings, BUCKETS)
        with pytest.raises(TrainingDataError, match="JSON"):
            TextCache(tmp_path, settings)


def test_truncated_and_foreign_files_are_made_again(tmp_path):
    examples = data(tmp_path, 5)
    filled = cache(tmp_path / "cache").fill(examples, encode)
    good = contents(tmp_path / "cache")
    cut(filled[0].path, 0.9)
    cut(filled[1].path, 0.02)
    filled[2].path.write_bytes(b"")
    shutil.copy(filled[4].path, filled[3].path)  # a good file, of something else
    again = Counting(encode)
    cache(tmp_path / "cache").fill(examples, again)
    assert sum(again.calls) == 4
    assert contents(tmp_path / "cache") == good
    for path in (tmp_path / "cache" / "digests").iterdir():
        path.write_text("{")
    cache(tmp_path / "cache").fill(examples, again)
    assert sum(again.calls) == 4


def test_batches_are_of_one_bucket(tmp_path):
    examples = data(tmp_path, 5)
    one, many = Counting(encode), Counting(encode)
    cache(tmp_path / "one").fill(examples, one)
    cache(tmp_path / "many").fill(examples, many, batch_size=2)
    assert (sorted(one.calls), sorted(many.calls)) == ([1] * 6, [1, 1, 2, 2])
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    with pytest.raises(TrainingDataError, match="batch_size=0"):
        cache(tmp_path / "one").fill(examples, one, batch_size=0)


def bad(tmp_path):
    """A folder where one is found out by decoding only, and one is too small."""
    folder = album(tmp_path / "data", 2, width=256, height=256)
    cut(picture(folder / "half.jpg", 256, 256), 0.7)
    (folder / "half.txt").write_text("half")
    picture(folder / "tiny.png", 8, 8)
    (folder / "tiny.txt").write_text("tiny")
    return folder


def test_bad_data_is_skipped_by_name(tmp_path, caplog):
    examples = read_examples(bad(tmp_path), on_bad_data="skip")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        filled = cache(tmp_path / "cache").fill(examples, encode, on_bad_data="skip")
    assert [each.example.name for each in filled] == ["00.png", "01.png"]
    (record,) = caplog.records
    for message in ("half.jpg: a broken image", "tiny.png: 8x8 pixels would have to be"):
        assert message in record.message
    # Once it is mended, it is used.
    picture(tmp_path / "data" / "half.jpg", 256, 256)
    examples = read_examples(tmp_path / "data", on_bad_data="skip")
    filled = cache(tmp_path / "cache").fill(examples, encode, on_bad_data="skip")
    assert [each.example.name for each in filled] == ["00.png", "01.png", "half.jpg"]


@pytest.mark.parametrize("size", [1, 2])
def test_all_bad_data_is_refused_at_once_on_all_ranks(tmp_path, size):
    examples = read_examples(bad(tmp_path), on_bad_data="skip")
    counting = Counting(encode)
    for error in on_threads(size, lambda ranks: cache(tmp_path / "cache").fill(examples, counting, ranks=ranks)):
        assert isinstance(error, TrainingDataError)
        assert {problem.name for problem in error.problems} == {"half.jpg", "tiny.png"}
    assert not counting.calls


def test_a_passing_failure_is_not_remembered(tmp_path, monkeypatch):
    examples = data(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_attn.training.data.decode.read_image", _broken)
        filled = cache(tmp_path / "cache").fill(examples, encode, on_bad_data="skip")
    assert [each.example.kind for each in filled] == ["video"]
    picture(tmp_path / "data" / "tiny.png", 8, 8)
    (tmp_path / "data" / "tiny.txt").write_text("tiny")
    with pytest.raises(TrainingDataError) as error:
        cache(tmp_path / "cache").fill(read_folder(tmp_path / "data"), encode)
    assert [problem.name for problem in error.value.problems] == ["tiny.png"]
    assert len(cache(tmp_path / "cache").fill(examples, encode)) == 4


def _broken(source):
    raise TrainingDataError("a broken image: for now")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_divide_the_work(tmp_path, size):
    examples = data(tmp_path, 7)
    cache(tmp_path / "alone").fill(examples, encode)
    counts = [Counting(encode) for _ in range(size)]
    filled = on_threads(size, lambda ranks: cache(tmp_path / "shared").fill(examples, counts[ranks.rank], ranks=ranks))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert all(each == filled[0] and len(each) == 8 for each in filled)
    numbers = [sum(each.calls) for each in counts]
    assert sum(numbers) == 8 and max(numbers) - min(numbers) <= 1


def test_an_error_on_one_rank_reaches_all(tmp_path):
    examples = data(tmp_path, 7)

    def work(ranks):
        def failing(pixels):
            if ranks.rank == 1:
                raise torch.OutOfMemoryError("no memory left")
            return encode(pixels)

        return cache(tmp_path / "cache").fill(examples, failing, ranks=ranks)

    first, second, third = on_threads(3, work)
    assert isinstance(second, torch.OutOfMemoryError)
    for error in (first, third):
        assert isinstance(error, OtherRankError) and "encoding images and videos" in str(error)
    texts = on_threads(
        2, lambda ranks: TextCache(tmp_path, {}).fill("ab", (encode_text, _fail)[ranks.rank], ranks=ranks)
    )
    assert isinstance(texts[0], OtherRankError) and "on purpose" in str(texts[1])


def _fail(captions):
    raise RuntimeError("on purpose")


def test_folders_that_are_not_shared_are_noticed(tmp_path):
    examples = data(tmp_path)
    errors = on_threads(2, lambda ranks: cache(tmp_path / f"{ranks.rank}").fill(examples, encode, ranks=ranks))
    assert all(isinstance(error, TrainingDataError) and "that all processes" in str(error) for error in errors)
    errors = on_threads(
        2, lambda ranks: TextCache(tmp_path / f"{ranks.rank}", {}).fill("abc", encode_text, ranks=ranks)
    )
    assert all(isinstance(error, TrainingDataError) and "all processes" in str(error) for error in errors)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda pixels: {"latents_mean": pixels * float("nan")}, "NaN or infinity for 0.*png.*float32"),
        (lambda pixels: {"latents_mean": pixels[0]}, "the first dimension must be 2"),
        (lambda pixels: {}, "returned no tensors"),
    ],
)
def test_encoders_that_give_something_else(tmp_path, wrong, message):
    with pytest.raises(TrainingDataError, match=message):
        album(tmp_path / "data", 2)
        cache(tmp_path / "cache").fill(read_folder(tmp_path / "data"), wrong, batch_size=2)
    assert not contents(tmp_path / "cache")


def test_captions_are_encoded_once_and_the_empty_one_always(tmp_path):
    text = TextCache(tmp_path, SETTINGS)
    counting = Counting(encode_text)
    paths = text.fill(["a cat", "a dog", "a cat"], counting)
    assert paths.keys() == {"", "a cat", "a dog"} and counting.calls == [1, 1, 1]
    assert load_file(paths["a cat"])["prompt_embeds"].shape == (5, 2)
    assert text.fill(["a cat"], counting) == {caption: paths[caption] for caption in ("", "a cat")}
    assert text.path("a dog") == paths["a dog"] and len(counting.calls) == 3
    cut(paths[""], 0.9)
    text.fill([], counting)
    assert len(counting.calls) == 4
    assert not TextCache(tmp_path, {}).path("a cat").exists()


def test_digests_follow_the_content(tmp_path):
    path = picture(tmp_path / "a.png", seed=1)
    (tmp_path / "a.txt").write_text("a")
    digest = lambda: content_digests([read_folder(tmp_path)[0].source], tmp_path / "d", ThreadRanks.of(1)[0])  # noqa: E731
    first, times = digest(), path.stat()
    assert digest() == first
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as tools do that keep times
    assert digest() != first


def _fill(folder, moment):
    """Fills the cache, killed at `moment`: within the n-th encoding, or before or after the n-th file is renamed."""
    what, number = moment
    count = 0

    def maybe_kill(when):
        nonlocal count
        if when == what:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def killing_encode(pixels):
        maybe_kill("encode")
        return encode(pixels)

    real = os.replace

    def killing_replace(*paths):
        maybe_kill("before")
        real(*paths)
        maybe_kill("after")

    def half_written(tensors, path, metadata):
        maybe_kill_half(path)
        save(tensors, path, metadata)

    def maybe_kill_half(path):
        if what == "half" and count + 1 == number:
            path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
        maybe_kill("half")

    import safetensors.torch

    save = safetensors.torch.save_file
    safetensors.torch.save_file = half_written
    os.replace = killing_replace
    cache(folder / "cache").fill(read_folder(folder / "data"), killing_encode)
    os._exit(0)


@pytest.mark.parametrize(
    "moment", [("encode", 1), ("encode", 4), ("half", 3), ("before", 1), ("before", 3), ("after", 3), ("after", 6)]
)
def test_killed_at_any_moment(tmp_path, moment):
    examples = data(tmp_path, 5)
    cache(tmp_path / "whole").fill(examples, encode)
    process = forkserver().Process(target=as_child, args=(_fill, tmp_path, moment))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL
    good, left = contents(tmp_path / "whole"), contents(tmp_path / "cache")
    assert left.items() <= good.items()  # whole or not there
    again = Counting(encode)
    cache(tmp_path / "cache").fill(examples, again)
    assert sum(again.calls) == 6 - len(left)
    assert contents(tmp_path / "cache") == good
    assert not list((tmp_path / "cache" / "latents").rglob(".*"))


def test_a_cached_file_that_is_damaged_is_named_when_it_is_read(tmp_path):
    """Not only its header: zeros in the middle, one bit, NaN, or nothing there."""
    examples = data(tmp_path, 3)
    filled = cache(tmp_path / "cache").fill(examples, encode)
    texts = TextCache(tmp_path / "cache", SETTINGS).fill(["a cat"], encode_text)
    paths = [each.path for each in filled]
    assert all(read_tensors(path) for path in [*paths, *texts.values()])

    def change(path, start, values):
        content = bytearray(path.read_bytes())
        start += len(content)
        content[start : start + len(values)] = values
        path.write_bytes(content)

    change(paths[0], -40, bytes(40))
    change(paths[1], -5, bytes([paths[1].read_bytes()[-5] ^ 1]))
    change(paths[2], -4, np.float32("nan").tobytes())
    change(texts["a cat"], -8, bytes([1]))
    paths[3].unlink()
    for path, message in (
        (paths[0], "the checksum of its tensors has changed"),
        (paths[1], "the checksum of its tensors has changed"),
        (paths[2], "NaN or infinity in latents_mean"),
        (texts["a cat"], "the checksum of its tensors has changed"),
        (paths[3], "is missing"),
    ):
        with pytest.raises(TrainingDataError, match=message) as error:
            read_tensors(path)
        assert str(path) in str(error.value) and "Start again" in str(error.value).replace("start again", "Start again")
        path.unlink(missing_ok=True)
    again = Counting(encode)  # as the message advises
    assert cache(tmp_path / "cache").fill(examples, again) == filled
    assert sum(again.calls) == 4 and all(read_tensors(path) for path in paths)


def test_a_disk_that_is_full_while_latents_are_written(tmp_path):
    examples = data(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written to .*cache.* are free there"):
            cache(tmp_path / "cache").fill(examples, encode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(cache(tmp_path / "cache").fill(examples, encode)) == 4


def test_what_fails_in_an_encoder_names_the_file(tmp_path):
    def failing(pixels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) as error:
        cache(tmp_path / "cache").fill(data(tmp_path, 1), failing)
    assert error.value.__notes__[0].startswith("while encoding: ")
