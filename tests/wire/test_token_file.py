"""The file that holds the token."""

import logging
import os
from pathlib import Path

import pytest

from wire.token_file import read_token


def written(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_white_space_around_a_token_is_no_part_of_it(tmp_path: Path) -> None:
    assert read_token(written(tmp_path, b" \n0123456789abcdef\r\n\n")) == b"0123456789abcdef"
    assert read_token(written(tmp_path, b"0123456789 abcdef")) == b"0123456789 abcdef"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes and needs 16 at least; write one: openssl rand -hex 32 >"),
        (b"0123456789abcde\n", "has 15 bytes"),
        (b"x" * 5000, "too long for a token"),
    ],
)
def test_token_of_a_wrong_length_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_token(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_file_that_is_missing_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no token file .*none; write one: openssl"):
        read_token(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_token(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    path = written(tmp_path, b"0123456789abcdef", mode)
    with caplog.at_level(logging.WARNING):
        read_token(path)
    assert (f"others can read the token in {path}; chmod 600 {path}" in caplog.text) == warns
    assert "0123456789abcdef" not in caplog.text
