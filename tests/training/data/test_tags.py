"""Captions that a run changes: orders of tags, trigger words and prefixes."""

from diffusers_attn.training.data import read_folder
from diffusers_attn.training.data.tags import changed_captions, tag_orders, with_trigger

from .media import album, picture


def test_orders_of_tags():
    tags = "girl, hat, sky, tree"
    orders = tag_orders(tags, 5, keep=1)
    assert orders[0] == tags and len(set(orders)) == 5
    assert all(sorted(each.split(", ")) == sorted(tags.split(", ")) for each in orders)
    assert all(each.startswith("girl, ") for each in orders)
    assert len(tag_orders(tags, 1000, keep=1)) == 6  # all that there are
    assert len(set(tag_orders(", ".join("abcdefghij"), 50))) == 50
    assert orders == tag_orders(tags, 5, keep=1) != tag_orders(tags, 5, keep=1, seed=1)
    assert tag_orders("no tags", 5) == ["no tags"]
    assert tag_orders(tags, 1) == [tags]


def test_trigger_words():
    assert with_trigger("a photo of [trigger], smiling", "sks") == "a photo of sks, smiling"
    assert with_trigger("a photo of a person", "sks") == "sks, a photo of a person"
    assert with_trigger("a photo of sks", "sks") == "a photo of sks"


def test_the_order_of_changes(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("hat, sky")
    [example] = changed_captions(read_folder(tmp_path), prefix="photo of ", trigger_word="sks", shuffle_tags=9)
    assert example.captions == ("photo of sks, hat, sky", "photo of sks, sky, hat")
    assert changed_captions(read_folder(tmp_path)) == read_folder(tmp_path)


def test_lines_of_a_caption_file(tmp_path):
    album(tmp_path, 1)
    (tmp_path / "00.txt").write_text("a cat\n\n  the cat \n")
    assert [each.captions for each in read_folder(tmp_path, caption_lines=True)] == [("a cat", "the cat")]
    assert [each.captions for each in read_folder(tmp_path)] == [("a cat\n\n  the cat",)]
