import os

import pytest

from saelab import FormatError
from saelab.base import files, manifests


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with files.whole_folder(tmp_path / "a", manifest={"n": content}) as folder:
            (folder / "x.txt").write_text(content)
            assert content == "one" or (tmp_path / "a" / "x.txt").read_text() == "one"
        assert (tmp_path / "a" / "x.txt").read_text() == content
        assert manifests.read_manifest(tmp_path / "a", {}, ["x.txt"])["n"] == content
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "x.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace", "rename", "write"])
def test_an_error_at_any_step_leaves_what_was_there(tmp_path, monkeypatch, step):
    with files.whole_file(tmp_path / "f") as temporary:
        temporary.write_text("old")
    with files.whole_folder(tmp_path / "d", manifest={}) as folder:
        (folder / "x").write_text("old")

    def fail(*arguments):
        raise RuntimeError("power cut")

    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(RuntimeError), files.whole_folder(tmp_path / "d", manifest={}) as folder:
        (folder / "x").write_text("new")
        if step in ("write", "replace"):
            fail()
    if step != "rename":
        with pytest.raises(RuntimeError), files.whole_file(tmp_path / "f") as temporary:
            temporary.write_text("new")
            if step == "write":
                fail()
    assert (tmp_path / "d" / "x").read_text() == "old" and (tmp_path / "f").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f"]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["manifest.json", "x"]


@pytest.mark.parametrize("damage", ["cut", "change", "remove", "manifest"])
def test_a_damaged_folder_is_named(tmp_path, damage):
    with files.whole_folder(tmp_path / "a", manifest={}) as folder:
        (folder / "x.bin").write_bytes(b"12345")
    target = tmp_path / "a" / ("manifest.json" if damage == "manifest" else "x.bin")
    if damage == "remove":
        target.unlink()
    else:
        target.write_bytes({"cut": b"123", "change": b"12346", "manifest": b"{"}[damage])
    with pytest.raises(FormatError, match="manifest.json" if damage == "manifest" else "x.bin"):
        manifests.read_manifest(tmp_path / "a", {}, ["x.bin"])
