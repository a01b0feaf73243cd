"""The trained model is written whole, or the old file stays and training says why it stopped."""

import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from common.errors import TrainingStopped
from common.weights import load_state
from edge.config import TrainConfig
from edge.result import save_state

STATE = {
    "features.0.weight": torch.arange(50_000.0),
    "classifier.bias": torch.ones(3),
    "bottleneck.cut1.encoder.0.weight": torch.full((2, 2), 0.5),
}

CUTS = ("features.0", "features.1")


def config_for(path):
    return TrainConfig(server="127.0.0.1", model="resnet18", save=path)


def test_the_model_and_its_bottleneck_are_in_one_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_state(STATE, config_for(path), 7, CUTS)
    loaded = load_state(path)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("inserted", [True, False])
def test_the_file_says_where_a_bottleneck_was(tmp_path, inserted):
    path = tmp_path / "model.safetensors"
    save_state(
        {name: STATE[name] for name in list(STATE)[: None if inserted else 2]}, config_for(path), 7, CUTS
    )
    with safe_open(path, "pt") as file:
        written = file.metadata()
    cuts = {"cuts": '["features.0", "features.1"]'} if inserted else {}
    assert written == {"model": "resnet18", "steps": "7", **cuts}


@contextmanager
def full_disk():
    """A disk with room for a few kilobytes, as the kernel refuses to write more.

    As short as can be: the limit is the whole process's, and the tests' own report may go to a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")
    return path


def test_a_disk_without_room_stops_training_and_the_old_file_stays(old_file, elsewhere):
    with full_disk(), pytest.raises(TrainingStopped) as caught:
        save_state(STATE, config_for(old_file), 7, CUTS)
    assert str(caught.value).startswith(f"the model of step 7 could not be written to {old_file}: ")
    assert "too large" in str(caught.value).lower()  # what the system says
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("so it is lost")  # for no file can be written anywhere
    assert list(elsewhere.iterdir()) == []
    assert old_file.read_bytes() == b"older"
    assert [entry.name for entry in old_file.parent.iterdir()] == [old_file.name]


def test_a_model_that_does_not_fit_its_place_goes_to_a_temporary_folder(old_file, elsewhere):
    old_file.parent.joinpath("gone").mkdir()
    config = config_for(old_file.parent / "gone" / "model.safetensors")
    config.save.parent.rmdir()
    with pytest.raises(TrainingStopped, match=r"it is in .* instead") as caught:
        save_state(STATE, config, 3, CUTS)
    (kept,) = elsewhere.glob("*/model.safetensors")
    assert str(kept) in str(caught.value)
    assert load_state(kept).keys() == STATE.keys()


def test_a_folder_that_is_gone_stops_training(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    config = config_for(folder / "model.safetensors")
    folder.rmdir()
    with pytest.raises(TrainingStopped, match=r"step 3 could not be written .*: No such file or directory"):
        save_state(STATE, config, 3, CUTS)


def test_a_folder_in_the_file_s_place_stops_training(tmp_path):
    path = tmp_path / "model.safetensors"
    config = config_for(path)
    path.mkdir()
    with pytest.raises(TrainingStopped, match="Is a directory"):
        save_state(STATE, config, 3, CUTS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_late_leaves_the_old_file(old_file, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.weights.os.fsync", fail)
    with pytest.raises(TrainingStopped, match="No space left on device"):
        save_state(STATE, config_for(old_file), 7, CUTS)
    assert old_file.read_bytes() == b"older"
    assert [entry.name for entry in old_file.parent.iterdir()] == [old_file.name]
