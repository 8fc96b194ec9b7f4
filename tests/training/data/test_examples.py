"""Examples from folders and data sets, and errors that name bad data."""

import io
import json
import logging
import tarfile

import pytest
from PIL import Image

from diffusers_attn.training.data import TrainingDataError, read_dataset, read_examples, read_folder
from diffusers_attn.training.data.decode import read_image

from .media import album, cut, picture, video


def captions(examples):
    return {example.name: example.caption for example in examples}


def names(error):
    return {problem.name for problem in error.value.problems}


def test_text_files_beside_pictures_and_videos(tmp_path):
    album(tmp_path / "still", 2)
    video(tmp_path / "moving.mp4", frames=9, fps=6)
    (tmp_path / "moving.txt").write_text("\ufeffblue grows\n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"")
    examples = read_folder(tmp_path)
    assert captions(examples) == {
        "moving.mp4": "blue grows", "still/00.png": "picture 0", "still/01.png": "picture 1",
    }  # fmt: skip
    moving, still, _ = examples
    assert (moving.kind, moving.width, moving.height, moving.frames, moving.fps) == ("video", 64, 48, 9, 6.0)
    assert (still.kind, still.width, still.height, still.frames, still.fps) == ("image", 64, 48, 1, None)


@pytest.mark.parametrize("column", ["caption", "text", "prompt"])
def test_metadata_jsonl(tmp_path, column):
    for i in range(2):
        picture(tmp_path / f"{i}.jpg", seed=i)
    lines = [json.dumps({"file_name": f"{i}.jpg", column: f"number {i}"}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    assert captions(read_examples(tmp_path)) == {"0.jpg": "number 0", "1.jpg": "number 1"}


def test_a_list_of_captions(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    columns = [["a cat ", "one cat"], ["a dog", " "], []]
    lines = [json.dumps({"file_name": f"{i}.png", "caption": each}) for i, each in enumerate(columns)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(TrainingDataError) as error:
        read_examples(tmp_path)
    assert names(error) == {"metadata.jsonl line 2", "metadata.jsonl line 3"}
    (example,) = read_examples(tmp_path, on_bad_data="skip")
    assert example.captions == ("a cat", "one cat")

    datasets = pytest.importorskip("datasets")
    table = {"image": [str(tmp_path / "0.png")], "text": [["a cat", "one cat"]]}
    (row,) = read_dataset(datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()))
    assert row.captions == example.captions


def test_metadata_csv_in_a_folder_of_the_folder(tmp_path):
    picture(tmp_path / "a" / "one.png")
    (tmp_path / "a" / "metadata.csv").write_text('file_name,other,words\none.png,1,"a cat,\nasleep"\n')
    (example,) = read_examples(tmp_path, caption_column="words")
    assert (example.name, example.caption) == ("a/one.png", "a cat,\nasleep")


def bad_folder(folder):
    """One of everything that can be wrong, and one good picture."""
    album(folder, 1)
    cut(picture(folder / "headless.png"), 0.01)
    (folder / "headless.txt").write_text("a picture")
    cut(video(folder / "broken.mp4"), 0.5)  # the table of frames is at the end
    (folder / "broken.txt").write_text("a video")
    cut(video(folder / "short.mp4", frames=50, movflags="faststart"), 0.7)
    (folder / "short.txt").write_text("a video with an end that is missing")
    (folder / "text.webm").write_text("no video at all")
    (folder / "text.txt").write_text("a lie")
    picture(folder / "uncaptioned.png")
    picture(folder / "empty.png")
    (folder / "empty.txt").write_text(" \n")
    (folder / "orphan.txt").write_text("a caption of nothing")
    for suffix in ("png", "jpg"):
        picture(folder / f"twin.{suffix}")
    (folder / "twin.txt").write_text("whose?")
    for name in ("twice", "both", "wordless", "doubled"):
        picture(folder / "m" / f"{name}.png")
    (folder / "m" / "both.txt").write_text("beside")
    rows = [
        {"file_name": "twice.png", "text": "first"},
        {"file_name": "twice.png", "text": "second"},
        {"file_name": "both.png", "text": "in metadata"},
        {"file_name": "nowhere.png", "text": "a file that is not there"},
        {"text": "a line without a file"},
        {"file_name": "wordless.png"},
        {"file_name": "doubled.png", "text": "one", "caption": "two"},
        {"file_name": "../../outside.png", "text": "outside"},
    ]
    picture(folder.parent / "outside.png")
    (folder / "m" / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), "{not json", "[1]"]))
    return {
        "headless.png": "a broken image", "broken.mp4": "a broken video", "short.mp4": "it is cut off",
        "text.webm": "a broken video",
        "uncaptioned.png": "no caption", "empty.txt": "no caption for empty.png", "orphan.txt": "a caption for no file",
        "twin.txt": "several files: twin.jpg, twin.png",
        "m/twice.png": "captioned 2 times: m/metadata.jsonl line 1, m/metadata.jsonl line 2",
        "m/both.png": "captioned 2 times: m/metadata.jsonl line 3, m/both.txt",
        "m/metadata.jsonl line 4": "there is no file nowhere.png",
        "m/metadata.jsonl line 5": "no value for 'file_name'",
        "m/metadata.jsonl line 6": "no caption for wordless.png",
        "m/metadata.jsonl line 7": "doubled.png has caption and text",
        "m/metadata.jsonl line 8": "outside of the folder", "m/metadata.jsonl line 9": "not JSON",
        "m/metadata.jsonl line 10": "a JSON object is expected",
    }  # fmt: skip


def test_all_bad_data_is_refused_by_name_at_once(tmp_path):
    expected = bad_folder(tmp_path / "data")
    with pytest.raises(TrainingDataError) as error:
        read_examples(tmp_path / "data", on_bad_data="refuse")
    found = {problem.name: problem.reason for problem in error.value.problems}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], name
        assert f"{name}: " in str(error.value)
    assert "on_bad_data='skip'" in str(error.value)


def test_bad_data_is_skipped_with_one_summary_of_the_main_process(tmp_path, caplog):
    expected = bad_folder(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        assert captions(read_examples(tmp_path / "data", on_bad_data="skip")) == {"00.png": "picture 0"}
    (record,) = caplog.records
    assert all(f"{name}: " in record.message for name in expected)
    caplog.clear()
    read_examples(tmp_path / "data", on_bad_data="skip", main_process=False)
    assert not caplog.records


@pytest.mark.parametrize("on_bad_data", ["skip", "refuse"])
def test_nothing_left_is_an_error(tmp_path, on_bad_data):
    with pytest.raises(TrainingDataError, match="no usable example"):
        read_examples(tmp_path, on_bad_data=on_bad_data)
    picture(tmp_path / "uncaptioned.png")
    with pytest.raises(TrainingDataError, match="no usable example") as error:
        read_examples(tmp_path, on_bad_data=on_bad_data)
    assert names(error) == {"uncaptioned.png"}


def test_csv_with_a_caption_in_too_many_columns(tmp_path):
    album(tmp_path, 1)
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\n")
    with pytest.raises(TrainingDataError, match="more values than columns"):
        read_examples(tmp_path)


def test_what_is_no_folder(tmp_path):
    with pytest.raises(TrainingDataError, match="there is no folder"):
        read_examples(tmp_path / "typo")
    with pytest.raises(TrainingDataError, match="is a file"):
        read_examples(picture(tmp_path / "a.png"))
    with pytest.raises(TrainingDataError, match="on_bad_data='ignore': accepted are 'skip', 'refuse'"):
        read_examples(tmp_path, on_bad_data="ignore")


def test_sideways_picture_has_the_size_that_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", 64, 48, exif=exif)
    (tmp_path / "a.txt").write_text("upright")
    (example,) = read_folder(tmp_path)
    assert (example.width, example.height) == (48, 64)


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(picture(tmp_path / "files" / f"{i}.png", seed=i)) for i in range(3)]
    table = {"image": files, "text": ["zero", None, "two"]}
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    with pytest.raises(TrainingDataError) as error:
        read_dataset(dataset)
    assert names(error) == {"row 1"}
    assert captions(read_dataset(dataset, on_bad_data="skip")) == {"row 0": "zero", "row 2": "two"}

    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "tables").mkdir()
    dataset.to_parquet(tmp_path / "tables" / "train.parquet")
    for path in ("saved", "tables"):
        examples = read_examples(tmp_path / path, on_bad_data="skip")
        assert [(each.name, each.width, each.kind) for each in examples] == [
            ("row 0", 64, "image"),
            ("row 2", 64, "image"),
        ]
        with examples[1].source.open() as file:  # of any dataset: the bytes of the file
            assert file.read() == (tmp_path / "files" / "2.png").read_bytes()

    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "test only")
    with pytest.raises(TrainingDataError, match="no split 'train'; it has 'test'. Save one .*`save_to_disk`"):
        read_examples(tmp_path / "test only")
    with pytest.raises(TrainingDataError, match="must have one column of images or videos, but has 0.*`save_to_disk`"):
        read_dataset(dataset.remove_columns("image"))
    with pytest.raises(TrainingDataError, match="caption_column"):
        read_dataset(dataset.add_column("prompt", ["a", "b", "c"]))


def test_rows_that_name_files_follow_the_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = picture(tmp_path / "a.png", seed=1)
    table = {"image": [str(path)], "text": ["a"]}
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    (example,) = read_dataset(dataset)
    first = example.source.stamp()
    assert read_dataset(dataset)[0].source.stamp() == first
    picture(path, seed=2)
    assert example.source.stamp() != first
    with example.source.open() as file:
        assert file.read() == path.read_bytes()


def test_linked_folders_are_read_once(tmp_path):
    album(tmp_path / "elsewhere" / "more", 2)
    album(tmp_path / "data" / "own", 1)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list(captions(read_folder(tmp_path / "data"))) == ["linked/more/00.png", "linked/more/01.png", "own/00.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "own")
    (tmp_path / "data" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(TrainingDataError) as error:
        read_folder(tmp_path / "data")
    found = {problem.name: problem.reason for problem in error.value.problems}
    assert found.keys() == {"linked/back", "again", "lost.png"}
    assert found["again"] == "a link to a folder that was read already: own"
    assert found["lost.png"].startswith("a link to nothing")


def test_what_a_run_wrote_is_no_data(tmp_path):
    album(tmp_path, 1)
    picture(tmp_path / "run" / "samples" / "00-a-cat.png")
    with pytest.raises(TrainingDataError, match="no caption"):
        read_examples(tmp_path)
    assert list(captions(read_examples(tmp_path, excluded=[tmp_path / "run"]))) == ["00.png"]
    (tmp_path / "run" / ".diffusers_attn-run.json").write_text("{}")  # another run's
    assert list(captions(read_examples(tmp_path))) == ["00.png"]
    with pytest.raises(TrainingDataError, match="holds the data, and the run would write to it"):
        read_examples(tmp_path, excluded=[tmp_path])


def shard(path, kind, first, **texts):
    """A shard of WebDataset with two images or videos, and texts for each: `txt="a {}"` makes `0000.txt` and so on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + 2):
            media = path.with_name(f"{i:04}.{kind}")
            (picture if kind == "png" else video)(media)
            tar.add(media, media.name)
            media.unlink()
            for suffix, text in texts.items():
                data = text.replace("{}", str(i)).encode()
                info = tarfile.TarInfo(f"{i:04}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_shards_of_webdataset(tmp_path):
    pytest.importorskip("datasets")
    shard(tmp_path / "a" / "00.tar", "png", 0, txt="picture {}")
    shard(tmp_path / "a" / "01.tar", "png", 2, txt="picture {}")
    found = read_examples(tmp_path / "a")
    assert [(each.name, each.caption, each.kind, each.width) for each in found] == [
        (f"row {i} (000{i})", f"picture {i}", "image", 64) for i in range(4)
    ]
    assert read_image(found[3].source).shape == (3, 48, 64)
    shard(tmp_path / "b" / "00.tar", "mp4", 0, txt="video {}", json='{"caption": "a video, {}", "width": 64}')
    with pytest.raises(TrainingDataError, match=r"json\.caption.*exactly one of the columns .*txt"):
        read_examples(tmp_path / "b")
    found = read_examples(tmp_path / "b", caption_column="json.caption")
    assert [(each.caption, each.kind, each.frames) for each in found] == [
        ("a video, 0", "video", 12), ("a video, 1", "video", 12),
    ]  # fmt: skip


def test_metadata_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png", seed=i)
    names = ["0.png", "1.png", "2.png", "3.png"]
    table = pyarrow.table({"file_name": names, "size": [1, 2, 3, 4], "text": ["zero", "one", None, "three"]})
    parquet.write_table(table, tmp_path / "a" / "metadata.parquet")
    with pytest.raises(TrainingDataError) as error:
        read_examples(tmp_path)
    found = {problem.name: problem.reason for problem in error.value.problems}
    assert "no caption for 2.png" in found["a/metadata.parquet row 3"]
    assert "no file 3.png" in found["a/metadata.parquet row 4"]
    assert captions(read_examples(tmp_path, on_bad_data="skip")) == {"a/0.png": "zero", "a/1.png": "one"}
    parquet.write_table(table.drop_columns("text"), tmp_path / "a" / "metadata.parquet")
    with pytest.raises(TrainingDataError, match="it has the columns file_name, size, but needs file_name and one of"):
        read_examples(tmp_path)
    cut(tmp_path / "a" / "metadata.parquet", 0.5)
    with pytest.raises(TrainingDataError, match=r"metadata\.parquet: it cannot be read as Parquet"):
        read_examples(tmp_path)


def test_of_many_problems_the_first_are_named_and_the_rest_counted(tmp_path, caplog):
    album(tmp_path, 1)
    lines = ["{not json", json.dumps({"file_name": "nowhere.png"}), "x" * 5000] * 1000
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(TrainingDataError) as error:
        read_examples(tmp_path)
    assert len(error.value.problems) == 3000
    lines = str(error.value).splitlines()
    assert "metadata.jsonl line 20: " in lines[20] and lines[21] == "  and 2,980 more" and len(lines) == 22
    assert len(str(error.value)) < 10_000
    with caplog.at_level(logging.WARNING):
        read_examples(tmp_path, on_bad_data="skip")
    assert caplog.records[0].message.endswith("and 2,980 more")
    # One picture, named again and again.
    (tmp_path / "metadata.jsonl").write_text("\n".join([json.dumps({"file_name": "00.png", "text": "a"})] * 3000))
    with pytest.raises(TrainingDataError, match="captioned 3001 times: .*line 5, \\.\\.\\.$"):
        read_examples(tmp_path)


def test_gif_is_a_picture_or_a_video(tmp_path):
    frames = [Image.new("RGB", (16, 16), (i * 60, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "still.gif")
    for name in ("moves", "still"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [(each.name, each.kind, each.frames) for each in read_folder(tmp_path)] == [
        ("moves.gif", "video", 4), ("still.gif", "image", 1),
    ]  # fmt: skip


def test_pictures_of_other_formats_are_named(tmp_path):
    album(tmp_path, 1)
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(TrainingDataError, match=r"a\.heic: \.heic files cannot be read"):
        read_folder(tmp_path)
