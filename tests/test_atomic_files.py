"""A file that is written atomically is complete or not there, and what killed processes left is removed."""

from __future__ import annotations

import os

import pytest

from diffusers_attn.atomic_files import remove_unfinished, write_atomically


def test_a_failure_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_atomically(path, lambda unfinished: unfinished.write_text("first"))

    def fail(unfinished):
        unfinished.write_text("half")
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_atomically(path, fail)
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file.json"]


def test_the_temporary_file_is_beside_it_with_its_suffix(tmp_path):
    """Libraries choose the format by the suffix."""
    names = []
    write_atomically(tmp_path / "a.png", lambda unfinished: (names.append(unfinished), unfinished.write_bytes(b"1")))
    assert names[0].parent == tmp_path and names[0].suffix == ".png" and names[0].name.startswith(".")


def test_files_of_killed_processes_are_removed(tmp_path):
    left = []

    def write(unfinished):
        dead = unfinished.with_name(unfinished.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above any process id
        dead.write_text("half")
        left.append((dead, unfinished))
        unfinished.write_text("")
        remove_unfinished(tmp_path)
        assert unfinished.exists()

    write_atomically(tmp_path / "a.png", write)
    write_atomically(tmp_path / "b", write)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b"]
