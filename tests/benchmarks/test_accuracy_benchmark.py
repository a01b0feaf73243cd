"""How the accuracy benchmark shares out images, pairs runs and does without data."""

import zipfile

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Run, compared, halve


def test_each_half_has_every_second_image_and_the_whole_test_set(tmp_path):
    names = [f"train/{label}/{number}.jpg" for label in ("cat", "dog") for number in range(4)]
    for split, members in (("train", names), ("test", ["test/cat/0.jpg"])):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for name in members:
                archive.writestr(name, name)
    (tmp_path / "halves").mkdir()
    found = []
    for half in halve(tmp_path, tmp_path / "halves"):
        with zipfile.ZipFile(half / "train.zip") as part:
            assert {name: part.read(name).decode() for name in part.namelist()} == {
                n: n for n in part.namelist()
            }
            assert sum("cat" in name for name in part.namelist()) == 2
            found += part.namelist()
        assert zipfile.ZipFile(half / "test.zip").namelist() == ["test/cat/0.jpg"]
    assert sorted(found) == names


def runs(**accuracies):
    return [
        Run(compress, seed, accuracy, 0.1, 1.0)
        for compress, each in accuracies.items()
        for seed, accuracy in enumerate(each)
    ]


def test_runs_are_compared_with_the_uncompressed_one_of_their_seed():
    (conv,) = compared(runs(none=[0.5, 0.6], conv=[0.49, 0.595]))
    assert conv.differences == pytest.approx([-1.0, -0.5])
    assert conv.points == pytest.approx(-0.75)
    assert conv.met


def test_more_than_a_point_lost_is_too_much():
    (conv,) = compared(runs(none=[0.5, 0.6], conv=[0.48, 0.595]))
    assert not conv.met


def test_without_the_data_it_says_so_and_is_content(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "prepare_process", lambda: None)
    assert accuracy.main(["--only", "cifar10", "--data", str(tmp_path)]) == 0
    assert "skipped: CIFAR-10 is not there" in capsys.readouterr().out
