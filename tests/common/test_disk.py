"""One process at a time has a folder, and what goes wrong while it has it is not taken for another one."""

import os
from pathlib import Path

import pytest

from cloud.server import claimed
from common.disk import Disk, sole_user
from common.errors import UserError
from edge.run_folder import RunFolder

LOCKED = "another cloud-server uses|another edge-client goes on"


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def test_second_user_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    first, second = sole_user(opened(tmp_path), "first"), sole_user(opened(tmp_path), "second")
    with first, pytest.raises(UserError, match="second"), second:
        pytest.fail("there are two")
    with sole_user(opened(tmp_path), "third"):
        pass


def test_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(37, "no locks available")

    monkeypatch.setattr(Disk, "lock", fail)
    with sole_user(opened(tmp_path), "first"), sole_user(opened(tmp_path), "second"):
        pass


@pytest.mark.parametrize("claim", [claimed, lambda path: RunFolder(path, keep=2).claimed()])
def test_what_would_block_inside_is_not_called_another_user(tmp_path: Path, claim: object) -> None:
    # A server whose socket had no room was said to share its folder, once.
    with pytest.raises(BlockingIOError), claim(tmp_path):  # type: ignore[operator]
        raise BlockingIOError(11, "try again")
    with claim(tmp_path), pytest.raises(UserError, match=LOCKED), claim(tmp_path):  # type: ignore[operator]
        pass
