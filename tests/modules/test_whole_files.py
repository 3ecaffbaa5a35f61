"""What is written is whole or absent, and damage is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest

from laconic.modules.checkpoints.whole_files import DamagedFile, check_hashes, compare, hashes_of, whole_folder, write_file, write_hashes


def _fails(file: BinaryIO) -> None:
    file.write(b"half of it")
    raise OSError("No space left on device")


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "file", "old: ä")
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a" / "file", _fails)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    assert (tmp_path / "a" / "file").read_text("utf-8") == "old: ä"


def test_a_folder_takes_its_place_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as partial:
        (partial / "weights").write_bytes(b"1")
        assert not folder.exists()
    with pytest.raises(OSError, match="No space"), whole_folder(folder) as partial:
        write_file(partial / "weights", _fails)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_bytes() == b"1"
    # Left behind by a process that was killed.
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "stale").touch()
    with whole_folder(folder) as partial:
        (partial / "weights").write_bytes(b"3")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"weights": b"3"}


def test_a_kill_while_an_older_folder_is_deleted_leaves_the_new_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as partial:
        (partial / "weights").write_bytes(b"1")
    delete = shutil.rmtree

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists() and any(path.iterdir()):
            raise KeyboardInterrupt
        delete(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        (partial / "weights").write_bytes(b"2")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"weights": b"2"}


def _written(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    for name, content in (("weights", b"0123456789"), ("inner/config", b"{}"), ("README.md", b"card")):
        (folder / name).write_bytes(content)
    write_hashes(folder)
    return folder


@pytest.mark.parametrize("place", range(10))
def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path, place: int) -> None:
    folder = _written(tmp_path / "model")
    check_hashes(folder)
    content = bytearray((folder / "weights").read_bytes())
    content[place] ^= 1 << (place % 8)
    (folder / "weights").write_bytes(content)
    with pytest.raises(
        DamagedFile, match=r"model/weights is damaged: its SHA-256 .*get the folder again.*delete its entry in .*hashes.json"
    ):
        check_hashes(folder)


def test_missing_truncated_and_edited_files_are_named_and_notes_may_be_edited(tmp_path: Path) -> None:
    folder = _written(tmp_path / "model")
    (folder / "README.md").write_text("another card")
    check_hashes(folder)
    (folder / "weights").write_bytes(b"0123")
    with pytest.raises(DamagedFile, match="weights is damaged: it has 4 bytes of 10"):
        check_hashes(folder)
    (folder / "weights").unlink()
    with pytest.raises(DamagedFile, match="weights is missing"):
        check_hashes(folder)
    (folder / "hashes.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"hashes.json is damaged"):
        check_hashes(folder)
    (folder / "hashes.json").unlink()
    check_hashes(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_record_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="is not of a file in the folder"):
        compare(tmp_path / "model", {name: {"bytes": 1, "sha256": ""}}, "hashes.json")
    assert json.loads(json.dumps(hashes_of(tmp_path)))["outside"]["bytes"] == 1
