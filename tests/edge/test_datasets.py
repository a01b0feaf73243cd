import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from edge.data.augment import IMAGENET, Augment
from edge.data.datasets import dataset_names, open_dataset
from edge.data.loader import train_batches

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write_images(root, split, classes=("cat", "dog"), count=3):
    for c, label in enumerate(classes):
        for i in range(count):
            file = root / split / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 10), (c, i, 0)).save(file)


def write_mnist(root, images=30):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = np.arange(images * 28 * 28) % 256
        header = struct.pack(">IIII", 0x00000803, images, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.astype(np.uint8).tobytes())
        labels = (np.arange(images) % 10).astype(np.uint8)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x00000801, images) + labels.tobytes()
        )


def all_images(source):
    return source.fetch(np.arange(len(source)), 8)


def test_digits_split_into_the_same_four_fifths_for_every_seed():
    one, other = open_dataset("digits", seed=0), open_dataset("digits", seed=1)
    assert (len(one.train), len(one.test)) == (1437, 360)
    assert one.classes == tuple("0123456789")
    np.testing.assert_array_equal(all_images(one.train), all_images(other.train))
    np.testing.assert_array_equal(all_images(one.test), all_images(other.test))


def test_digits_are_eight_by_eight_grey_over_the_whole_range_and_not_flipped():
    digits = open_dataset("digits", seed=0)
    images = all_images(digits.train)
    assert images.shape == (1437, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    assert digits.augment == Augment(flip=False)


def test_digits_become_normalised_three_channel_batches():
    digits = open_dataset("digits", seed=0)
    how = {"image_size": 16, "normalise": digits.normalise, "augment": digits.augment}
    with train_batches(digits.train, batch_size=1437, seed=0, epoch=0, **how) as batches:
        batch = batches.get()
    assert batch.inputs[0].shape == (1437, 3, 16, 16)
    assert torch.equal(batch.inputs[0][:, 0], batch.inputs[0][:, 2])
    assert abs(batch.inputs[0].mean()) < 0.2
    assert torch.bincount(batch.labels).min() > 100


def test_limits_keep_classes_even_and_test_images_alike_for_every_seed():
    one, other = (open_dataset("digits", seed=seed, train_limit=50, test_limit=20) for seed in (0, 1))
    assert np.bincount(one.train.labels).tolist() == [5] * 10
    assert np.bincount(one.test.labels).tolist() == [2] * 10
    assert (all_images(one.train) != all_images(other.train)).any()
    np.testing.assert_array_equal(all_images(one.test), all_images(other.test))


def test_limit_beyond_the_set_keeps_all_of_it():
    assert len(open_dataset("digits", seed=0, train_limit=10_000).train) == 1437


def test_limit_of_nothing_is_refused():
    with pytest.raises(UserError, match="cannot be limited to 0 samples"):
        open_dataset("digits", seed=0, test_limit=0)


def test_unknown_set_says_which_exist():
    with pytest.raises(
        UserError, match=r"there is no data set 'cifar11'; choose one of digits, cifar10, .*folder:PATH"
    ):
        open_dataset("cifar11", seed=0)
    assert "cifar10" in dataset_names()


@pytest.mark.parametrize("prefix", ["folder:", ""])
def test_folder_opens_by_its_path(tmp_path, prefix):
    write_images(tmp_path, "train")
    write_images(tmp_path, "test", count=2)
    dataset = open_dataset(f"{prefix}{tmp_path}", seed=0, train_limit=4)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (4, 4)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.normalise == IMAGENET


def test_folder_without_a_test_set_is_refused(tmp_path):
    write_images(tmp_path, "train")
    with pytest.raises(UserError, match="has no test/"):
        open_dataset(f"folder:{tmp_path}", seed=0)


def test_folder_with_other_classes_for_testing_is_refused(tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "test", classes=("cat", "cow"))
    with pytest.raises(UserError, match="classes of the training and the test set differ"):
        open_dataset(f"folder:{tmp_path}", seed=0)


def test_set_of_torchvision_opens_where_it_lies(tmp_path):
    write_mnist(tmp_path)
    mnist = open_dataset("mnist", seed=0, root=tmp_path)
    assert (len(mnist.train), len(mnist.test), len(mnist.classes)) == (30, 30, 10)
    assert mnist.train.fetch(np.array([1, 2]), 28).shape == (2, 28, 28, 1)
    assert mnist.train.labels[:3].tolist() == [0, 1, 2]
    assert not mnist.augment.flip


def test_channels_first_sets_are_turned_round(tmp_path, monkeypatch):
    from common.vision import datasets

    class ChannelsFirst:
        def __init__(self, root, split, download):
            self.data = np.zeros((6, 3, 32, 32), np.uint8)
            self.data[:, 1] = 7
            self.labels = np.arange(6)

    monkeypatch.setattr(datasets, "SVHN", ChannelsFirst)
    svhn = open_dataset("svhn", seed=0, root=tmp_path)
    image = svhn.train.fetch(np.array([0]), 32)[0]
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == [0, 7, 0]
    assert svhn.classes == tuple("0123456789")


def test_set_that_is_not_there_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(UserError, match=r"cifar10 is not in .* or is damaged; allow its download"):
        open_dataset("cifar10", seed=0, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_network_is_one_clear_line(tmp_path, monkeypatch):
    from common.vision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="cannot download cifar10") as caught:
        open_dataset("cifar10", seed=0, root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_package_imports_without_torch():
    code = "import sys, edge.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    not (SHARED / "cifar10" / "train.zip").exists(), reason="CIFAR-10 is not in ../shared/data"
)
def test_cifar10_is_read_straight_from_its_zip_files():
    cifar = open_dataset(f"folder:{SHARED / 'cifar10'}", seed=0)
    assert (len(cifar.train), len(cifar.test), len(cifar.classes)) == (50_000, 10_000, 10)
    assert cifar.classes[0] == "airplane"
    assert {image.shape for image in cifar.train.fetch(np.array([0, 25_000, 49_999]), 224)} == {(32, 32, 3)}
