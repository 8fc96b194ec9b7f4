"""Masks of the loss: found, resized and cropped with their images, and averaged over each latent."""

import shutil

import pytest
import torch
from PIL import Image

from diffusers_attn.training.data import (
    Buckets,
    LatentCache,
    LatentLoader,
    Share,
    TextCache,
    TrainingDataError,
    read_dataset,
    read_folder,
)
from diffusers_attn.training.data.store import read_tensors

from .media import album, encode, encode_text, picture, video

BUCKETS = Buckets.of(32 * 32, aspects=(1.0,), frames=(1, 5))


def mask(path, size, *boxes, values=(255,)):
    """A black image with white boxes (left, top, right, bottom)."""
    image = Image.new("L", size)
    for box, value in zip(boxes, values * len(boxes)):
        image.paste(value, box)
    image.save(path)


def filled(folder, cache, **options):
    examples = read_folder(folder, **options)
    return {
        each.example.name: read_tensors(each.path) for each in LatentCache(cache, {}, BUCKETS).fill(examples, encode)
    }


def test_masks_of_files(tmp_path):
    folder = album(tmp_path / "data", 2, width=64, height=64)
    video(folder / "v.mp4", frames=5, width=64, height=64)
    (folder / "v.txt").write_text("blue grows")
    # Of 64 pixels each latent has 16: the box covers three columns of latents, and a quarter of the last.
    mask(folder / "00_mask.png", (64, 64), (0, 32, 52, 64))
    mask(folder / "v_mask.jpg", (64, 64), (0, 0, 64, 64))
    found = filled(folder, tmp_path / "cache", loss_mask="files")
    assert sorted(found) == ["00.png", "01.png", "v.mp4"]
    assert "loss_mask" not in found["01.png"]
    expected = torch.tensor([[0.0] * 4] * 2 + [[1.0, 1.0, 1.0, 0.25]] * 2)
    torch.testing.assert_close(found["00.png"]["loss_mask"], expected[None, None], atol=0.07, rtol=0)
    assert found["v.mp4"]["latents_mean"].shape[1] == 5 and found["v.mp4"]["loss_mask"].shape == (1, 1, 4, 4)
    # Latents are those without a mask, whose files stay as they were.
    plain = filled_without_masks(folder, tmp_path)
    for name, tensors in plain.items():
        assert torch.equal(tensors["latents_mean"], found[name]["latents_mean"])


def filled_without_masks(folder, tmp_path):
    plain = shutil.copytree(folder, tmp_path / "plain")
    for file in plain.glob("*_mask.*"):
        file.unlink()
    return filled(plain, tmp_path / "cache")


def test_masks_are_cropped_with_their_images(tmp_path):
    """The mask is a copy of a picture in black and white, so at each place the two have the same value."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 9, generator=generator).repeat_interleave(16, 0).repeat_interleave(16, 1).mul(255).byte()
    (tmp_path / "data").mkdir()
    for name in ("a.png", "a_mask.png"):
        Image.fromarray(pixels.numpy()).convert("RGB").save(tmp_path / "data" / name)
    (tmp_path / "data" / "a.txt").write_text("grey")
    [example] = read_folder(tmp_path / "data", loss_mask="files")
    for crop in ("centre", "random"):
        cache = LatentCache(tmp_path / crop, {}, Buckets.of(32 * 32, aspects=(1.0,)), crop=crop, seed=3)
        [each] = cache.fill([example], encode)
        tensors = read_tensors(each.path)
        torch.testing.assert_close(
            tensors["loss_mask"][0], (tensors["latents_mean"][0] + 1) / 2, atol=1e-2, rtol=0, msg=crop
        )


def test_masks_in_a_dataset(tmp_path):
    """A column `mask`; a row without one counts entirely."""
    datasets = pytest.importorskip("datasets")
    folder = album(tmp_path / "data", 2, width=64, height=64)
    mask(folder / "00_mask.png", (64, 64), (0, 0, 32, 64))
    columns = {
        "image": [str(folder / "00.png"), str(folder / "01.png")],
        "mask": [str(folder / "00_mask.png"), None],
        "text": ["a", "b"],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
    )
    dataset = datasets.Dataset.from_dict(columns, features)
    examples = read_dataset(dataset, loss_mask="files")
    found = [read_tensors(each.path) for each in LatentCache(tmp_path, {}, BUCKETS).fill(examples, encode)]
    assert found[0]["loss_mask"].mean().item() == pytest.approx(0.5, abs=0.02) and "loss_mask" not in found[1]
    with pytest.raises(TrainingDataError, match=r"has 2 \(image, mask\).*loss_mask='files'"):
        read_dataset(dataset)


def test_transparency_as_a_mask(tmp_path):
    image = Image.new("RGBA", (64, 64), (10, 200, 30, 0))
    image.paste((10, 200, 30, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    picture(tmp_path / "b.png", width=64, height=64)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = filled(tmp_path, tmp_path / ".cache", loss_mask="alpha")
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 4, 4)
    torch.testing.assert_close(found["a.png"]["loss_mask"], expected, atol=0.03, rtol=0)
    assert bool((found["b.png"]["loss_mask"] == 1).all())
    assert all("loss_mask" not in each for each in filled(tmp_path, tmp_path / ".cache").values())


def test_a_batch_of_examples_with_and_without_a_mask(tmp_path):
    folder = album(tmp_path / "data", 2, width=64, height=64)
    mask(folder / "00_mask.png", (64, 64), (0, 0, 32, 64))
    latents = LatentCache(tmp_path, {}, BUCKETS).fill(read_folder(folder, loss_mask="files"), encode)
    text = TextCache(tmp_path, {}).fill([each.example.caption for each in latents], encode_text)
    sampler = LatentLoader.sampler_for(latents, global_batch_size=2)
    batch = next(iter(LatentLoader(latents, text, sampler, Share(micro_batch_size=2))))
    assert batch["loss_weight"].tolist() == [1.0, 1.0]
    means = dict(zip(batch["names"], batch["loss_mask"].mean((1, 2, 3, 4)).tolist()))
    assert means["00.png"] == pytest.approx(0.5, abs=0.02) and means["01.png"] == 1.0


def test_masks_with_problems(tmp_path):
    folder = album(tmp_path / "data", 3, width=64, height=64)
    mask(folder / "00_mask.png", (32, 64), (0, 0, 32, 64))
    mask(folder / "01_mask.png", (64, 64))
    mask(folder / "02_mask.png", (64, 64), (0, 0, 9, 9))
    mask(folder / "02_mask.jpg", (64, 64), (0, 0, 9, 9))
    mask(folder / "lonely_mask.png", (64, 64), (0, 0, 9, 9))
    with pytest.raises(TrainingDataError) as refused:
        read_folder(folder, loss_mask="files")
    problems = {each.name: each.reason for each in refused.value.problems}
    assert problems.keys() == {"00.png", "02_mask.png", "lonely_mask.png"}
    assert "its mask has 32x64 pixels, but it has 64x64" in problems["00.png"]
    examples = read_folder(folder, loss_mask="files", on_bad_data="skip")
    with pytest.raises(TrainingDataError, match="01.png: its mask leaves out everything"):
        LatentCache(tmp_path, {}, BUCKETS).fill(examples, encode)
    with pytest.raises(TrainingDataError, match="00_mask.png: no caption: .*loss_mask='files' uses it as a mask"):
        read_folder(folder)
    with pytest.raises(TrainingDataError, match="accepted are 'none', 'files', 'alpha'"):
        read_folder(folder, loss_mask="png")
