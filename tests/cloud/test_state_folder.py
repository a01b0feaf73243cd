"""What is kept on disk is counted, and goes in one piece."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud.state_folder import StateFolder

ONE, TWO = bytes(16), bytes(15) + b"\1"


def kept(path: Path, key: bytes, *sizes: int, used_s: float = 1e9) -> None:
    folder = path / key.hex()
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(bytes(size))
    os.utime(folder, (used_s, used_s))


def test_sessions_are_found_with_what_they_take_the_oldest_first(tmp_path: Path) -> None:
    kept(tmp_path, ONE, 100, 20, used_s=2e9)
    kept(tmp_path, TWO, used_s=1e9)
    for foreign in ("lock", "notes", "00", f"{ONE.hex()}.gone", f"{'AB' * 16}"):
        (tmp_path / foreign).mkdir()
    found = StateFolder(tmp_path).look()
    assert [(each.key, each.used_s, each.nbytes) for each in found] == [(TWO, 1e9, 0), (ONE, 2e9, 120)]


def test_session_that_is_set_aside_is_found_no_more_and_removed_later(tmp_path: Path) -> None:
    kept(tmp_path, ONE, 100)
    kept(tmp_path, TWO, 100)
    folder = StateFolder(tmp_path)
    folder.set_aside(ONE)
    assert [each.key for each in folder.look()] == [TWO]
    (tmp_path / "notes.gone").mkdir()
    StateFolder(tmp_path).clear()  # by another process, where this one was killed
    assert sorted(os.listdir(tmp_path)) == sorted([TWO.hex(), "notes.gone"])
    with pytest.raises(FileNotFoundError):
        folder.set_aside(ONE)


def test_half_of_the_space_is_the_limit_however_much_of_it_is_used_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1000 - sum(each.nbytes for each in StateFolder(path, 0).look()))

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert StateFolder(tmp_path).most_bytes == 500
    kept(tmp_path, ONE, 300)
    assert StateFolder(tmp_path).most_bytes == 500
    assert StateFolder(tmp_path, 7).most_bytes == 7
    kept(tmp_path, TWO, 500)  # or something else has filled the disk
    assert StateFolder(tmp_path).most_bytes == 800
