"""Samples: files of prompts, what they draw, and the page that shows them."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.data.decode import probe_video, read_video
from diffusers_attn.training.data.source import FileSource
from diffusers_attn.training.loop.gallery import describe, write_gallery
from diffusers_attn.training.loop.video import write_lossless, write_video
from diffusers_attn.training.settings.previews import Preview, previews_of

from ... import launching
from ..pipelines import make
from ..worlds import forget_accelerate

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def test_files_of_prompts(tmp_path):
    assert previews_of(["a cat", "a dog"], []) == [Preview("a cat"), Preview("a dog")]
    assert previews_of(["a cat"], ["cat.png"]) == [Preview("a cat", image=["cat.png"])]
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n\n  a dog: large\n")
    assert previews_of([str(lines)], []) == [Preview("a cat"), Preview("a dog: large")]
    expected = [
        Preview("a cat", "blurry", seed=3, size=[64, 48], frames=9, image=["a.png"], steps=4, guidance=2.0),
        Preview("a dog"),
    ]
    tables = tmp_path / "prompts.yaml"
    tables.write_text(
        "- prompt: a cat\n  negative_prompt: blurry\n  seed: 3\n  size: [64, 48]\n  frames: 9\n  image: a.png\n"
        "  steps: 4\n  guidance: 2\n- {prompt: a dog}\n"
    )
    assert previews_of([str(tables)], []) == expected
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a dog"}]))
    assert previews_of([str(tmp_path / "prompts.json")], []) == expected[1:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {prompt: a, sed: 1}", "entry 1: 'sed' is not one of .* Did you mean 'seed'"),
        ("- {seed: 1}", "entry 1: `prompt` is missing"),
        ("- {prompt: a}\n- {prompt: b, size: [64]}", r"entry 2: --size 64: 2 whole numbers"),
        ("- {prompt: a, steps: 0}", "entry 1: --steps 0: whole numbers from 1"),
        ("prompt: a", "prompts.yaml: a list is accepted"),
        ("- [a", "is not valid YAML"),
        ("", "the file has no prompts"),
    ],
)
def test_files_that_are_not_accepted(tmp_path, text, message):
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(TrainingError, match=message):
        TrainConfig(model="m", data="d", validation_prompts=[str(tmp_path / "prompts.yaml")])


def test_images_that_belong_to_no_prompt(tmp_path):
    with pytest.raises(TrainingError, match="has 3 files for the 2 prompts"):
        previews_of(["a cat", "a dog"], ["a.png", "b.png", "c.png"])
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(TrainingError, match="which has an `image` for each"):
        previews_of([str(tmp_path / "prompts.txt")], ["a.png"])
    with pytest.raises(TrainingError, match=r"none\.txt, a file of prompts, cannot be read"):
        previews_of([str(tmp_path / "none.txt")], [])


def test_samples_before_the_first_step_are_the_pipelines_own(settings_of, tmp_path):
    """Of the prompt, negative prompt, seed, size, guidance and number of steps that the file gives."""
    given = {
        "prompt": "a <cat>", "negative_prompt": "blurry", "seed": 5, "size": [48, 32], "guidance": 3.0, "steps": 2,
    }  # fmt: skip
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([given, {"prompt": "a dog", "steps": 1}]))
    settings = settings_of("cogview4", steps=2, validation_prompts=[str(file)], validation_every=1)
    Trainer(TrainConfig(**settings)).run()
    samples = Path(settings["output_dir"], "samples")
    assert sorted(each.name for each in samples.iterdir()) == ["index.html", "last", "step-00000000", "step-00000001"]
    pipeline = make("cogview4")
    pipeline.transformer.to(torch.float32)
    expected = pipeline(
        "a <cat>", "blurry", height=48, width=32, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).images[0]  # fmt: skip
    drawn = np.asarray(Image.open(samples / "step-00000000" / "00-a-cat.png")).astype(float)
    assert np.abs(drawn - (expected * 255).round()).max() <= 1
    trained = np.asarray(Image.open(samples / "last" / "00-a-cat.png")).astype(float)
    assert np.abs(drawn - trained).max() > 0

    about = json.loads((samples / "last" / "samples.json").read_text())
    assert about["step"] == 2 and about["samples"][0]["negative prompt"] == "blurry"
    page = (samples / "index.html").read_text()
    assert page.count("<img") == 6 and "a &lt;cat&gt;" in page and "seed 5, negative prompt: blurry" in page


def test_no_samples_before_the_first_step(settings_of):
    settings = settings_of("cogview4", steps=1, validation_prompts=["a"], validation_at_start=False, validation_steps=1)
    Trainer(TrainConfig(**settings)).run()
    assert sorted(each.name for each in Path(settings["output_dir"], "samples").iterdir()) == ["index.html", "last"]


@pytest.mark.parametrize(
    ("family", "preview", "message"),
    [
        ("cogview4", {"size": [40, 48]}, r"'a': size \[40, 48\]: height and width must be multiples of 16"),
        ("cogview4", {"frames": 5}, "'a': --frames 5: CogView4Pipeline generates images"),
        (
            "cogview4",
            {"negative_prompt": "b", "guidance": 1.0},
            "negative_prompt 'b': .* uses none with a guidance of 1",
        ),
        ("flux", {"negative_prompt": "b"}, "negative_prompt 'b': FluxPipeline has no negative prompt"),
        ("wan", {"image": "a.png"}, r"image a\.png: WanPipeline takes no image"),
    ],
)
def test_samples_that_a_model_cannot_draw(settings_of, tmp_path, family, preview, message):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt": "a", **preview}]))
    with pytest.raises(TrainingError, match=message):
        Trainer(TrainConfig(**settings_of(family, steps=1, validation_prompts=[str(file)]))).run()


def test_videos_without_loss(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 34, 46, 3), dtype=np.uint8)
    write_lossless(frames, tmp_path / "a.mkv", 24.0)
    source = FileSource(tmp_path / "a.mkv")
    assert probe_video(source)[:4] == (46, 34, 5, 24.0)
    read = torch.stack(list(read_video(source, range(5))))
    assert torch.equal(read, torch.from_numpy(frames).permute(0, 3, 1, 2))


def gallery(folder):
    """Two prompts at two steps: an image and a video, of which one is missing at the first step."""
    rng = np.random.default_rng(0)
    for step, name in ((0, "step-00000000"), (2, "last")):
        (folder / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name / "00-a.png")
        samples = [{"number": 0, "prompt": 'a "cat" & <b>', "file": "00-a.png", "seed": step}]
        if step:
            write_video(rng.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8), folder / name / "01-b.mp4", 8.0)
            samples.append({"number": 1, "prompt": "a dog", "file": "01-b.mp4"})
        describe(folder / name, step, samples)
    return write_gallery(folder, "Samples of lora")


_MEASURE = """<script>
addEventListener("load", () => {
  const found = Array.from(document.querySelectorAll("td img, td video"), each => {
    const box = each.getBoundingClientRect();
    return [each.naturalWidth || each.videoWidth || 0, Math.round(box.left), Math.round(box.top)];
  });
  const heads = Array.from(document.querySelectorAll("tbody th"), each => each.firstChild.textContent);
  document.title = JSON.stringify({found, heads});
});
</script>"""


def test_the_page_in_a_browser(tmp_path):
    """Chromium loads every image and lays samples out by step and prompt. (Its package has no decoder for H.264 on all
    systems, so the video's size is not asked for.)"""
    browser = next((each for each in map(shutil.which, BROWSERS) if each), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    page = gallery(tmp_path / "samples")
    page.write_text(page.read_text().replace("</body>", f"{_MEASURE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1600,1200"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = launching.run(command, check=True).stdout
    title = dom[dom.index("<title>") + 7 : dom.index("</title>")]
    measured = json.loads(html.unescape(title))
    assert measured["heads"] == ['a "cat" & <b>', "a dog"]
    (first_width, left, top), (last_width, right, same_top), (_, video_left, below) = measured["found"]
    assert (first_width, last_width) == (60, 60)
    assert left < right and top == same_top and video_left == right and below > top
