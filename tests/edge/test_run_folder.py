"""A run's settings are read back as they were, and what was given anew is told apart from what was there."""

import asyncio
import stat
from pathlib import Path

import pytest
import torch

from common.checkpoints import CheckpointFolder
from common.errors import UserError
from edge.config import TrainConfig
from edge.run_folder import RunFolder, SessionKey, read_settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    config = TrainConfig(
        server="127.0.0.1:1",
        cuts=("stem", "blocks"),
        compress="int8",
        bottleneck=tmp_path / "pair",
        checkpoint=folder,
    )
    RunFolder(folder, keep=2).write_settings(config, SessionKey.new())
    return folder


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "compress",
            ("int4", "grad=int8"),
            "--compress is int8 in the run in {}, and int4 grad=int8 was given",
        ),
        ("cuts", ("stem", "head"), "--cut is stem blocks in the run in {}, and stem head was given"),
        ("optimizer", "adamw", "--optimizer is left out in the run in {}, and adamw was given"),
        ("augment", False, "--augment is True in the run in {}, and False was given"),
    ],
)
def test_setting_that_differs_is_said_as_it_is_given(run: Path, name: str, value: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_settings(run, {name: value})
    assert said.format(run) in str(error.value)


def test_file_that_is_named_from_where_one_stands_is_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = read_settings(run, {"bottleneck": Path("pair"), "compress": ("int8",), "server": "there:1"})
    assert config.bottleneck == Path("pair")
    assert config.server == "there:1"


def test_checkpoint_that_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    async def check() -> None:
        folder = CheckpointFolder(tmp_path)
        for step in (4, 8):
            folder.write(step, [torch.ones(100)], {})
        newest = folder.file_of(8)
        newest.write_bytes(newest.read_bytes()[:-50] + bytes(50))
        said: list[str] = []
        run = RunFolder(tmp_path, keep=2, warn=said.append)
        await run.check()
        assert run.steps == [4]
        assert len(said) == 1
        assert f"{newest} IS DAMAGED" in said[0]
        await run.went_back(4)
        await run.prune()
        assert newest.exists()

    asyncio.run(check())


def test_what_is_given_to_one_resume_need_not_be_given_to_the_next(run: Path) -> None:
    config, key = read_settings(run, {"server": "there:2"})
    RunFolder(run, keep=2, warn=pytest.fail).update_settings(config)
    assert read_settings(run, {}) == (config, key)
    assert stat.S_IMODE((run / "run.json").stat().st_mode) == 0o600


def test_settings_that_are_as_they_were_are_not_written_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.run_folder.write_private", pytest.fail)
    RunFolder(run, keep=2, warn=pytest.fail).update_settings(read_settings(run, {})[0])


def test_run_goes_on_where_its_settings_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    said: list[str] = []
    monkeypatch.setattr("edge.run_folder.write_private", full)
    before = read_settings(run, {})
    RunFolder(run, keep=2, warn=said.append).update_settings(read_settings(run, {"server": "there:2"})[0])
    assert read_settings(run, {}) == before
    assert len(said) == 1
    assert "no space left on device" in said[0]
