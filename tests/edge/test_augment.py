import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from edge.data.augment import IMAGENET, Augment, Normalise, measure_normalise, to_tensor, vary

AS_IS = Normalise(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # leaves 0..255


def some_images(count, side=8, channels=3):
    return np.random.default_rng(0).integers(1, 256, (count, side, side, channels), np.uint8)


@given(
    ids=st.lists(st.integers(0, 10_000), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    flip=st.booleans(),
)
def test_variation_of_a_sample_does_not_depend_on_its_batch(ids, seed, epoch, flip):
    images, augment = some_images(len(ids)), Augment(flip=flip)
    together = vary(images, np.array(ids), augment, seed, epoch)
    for i in range(len(ids)):
        alone = vary(images[i : i + 1], np.array(ids[i : i + 1]), augment, seed, epoch)
        np.testing.assert_array_equal(alone[0], together[i])


def test_variation_changes_from_epoch_to_epoch():
    images, ids = some_images(16), np.arange(16)
    assert (vary(images, ids, Augment(), 0, 0) != vary(images, ids, Augment(), 0, 1)).any()


def test_shift_moves_by_at_most_its_reach_and_brings_in_black():
    images, ids = some_images(300, side=16, channels=1), np.arange(300)
    seen = set()
    for image, varied in zip(images, vary(images, ids, Augment(flip=False), 0, 0), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        places = [(y, x) for y in range(5) for x in range(5)]
        moves = [at for at in places if (padded[at[0] : at[0] + 16, at[1] : at[1] + 16] == varied).all()]
        assert len(moves) == 1
        seen.update(moves)
    assert len(seen) == 25


def test_flip_mirrors_about_half_of_the_images():
    images, ids = some_images(400), np.arange(400)
    varied = vary(images, ids, Augment(shift=0.0), 0, 0)
    mirrored = sum((v == i[:, ::-1]).all() for v, i in zip(varied, images, strict=True))
    assert 160 < mirrored < 240
    for v, i in zip(varied, images, strict=True):
        assert (v == i).all() or (v == i[:, ::-1]).all()


def test_variation_without_flip_or_shift_changes_nothing():
    images = some_images(5)
    np.testing.assert_array_equal(vary(images, np.arange(5), Augment(flip=False, shift=0.0), 0, 0), images)


def test_variation_leaves_the_source_alone():
    images = some_images(5)
    before = images.copy()
    vary(images, np.arange(5), Augment(), 0, 0)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("size", [8, 20, 5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensor_is_what_normalising_after_resizing_gives(size, channels_last):
    images = some_images(4)
    batch = to_tensor(images, size, IMAGENET, channels_last=channels_last)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(batch, (resized - mean) / std, atol=1e-4, rtol=0, check_stride=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 24, 6])
def test_pixels_do_not_depend_on_the_batch_or_the_layout(size, channels):
    images = some_images(9, channels=channels)
    together = to_tensor(images, size, IMAGENET)
    assert torch.equal(together, to_tensor(images, size, IMAGENET, channels_last=True))
    for i in range(9):
        assert torch.equal(to_tensor(images[i : i + 1], size, IMAGENET)[0], together[i])


def test_images_of_many_sizes_make_one_batch():
    images = [some_images(1, side)[0] for side in (4, 8, 4, 16)]
    batch = to_tensor(images, 8, IMAGENET, channels_last=True)
    assert batch.shape == (4, 3, 8, 8)
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(to_tensor(image[None], 8, IMAGENET)[0], pixels)


def test_grey_becomes_three_equal_channels():
    images = some_images(2, channels=1)
    batch = to_tensor(images, 8, AS_IS)
    torch.testing.assert_close(batch, torch.from_numpy(images).permute(0, 3, 1, 2).float().expand(2, 3, 8, 8))


def test_measured_statistics_normalise_to_mean_nought_and_deviation_one():
    images = some_images(50)
    batch = to_tensor(images, 8, measure_normalise(images))
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_statistics_of_blank_images_do_not_divide_by_nought():
    blank = np.zeros((3, 8, 8, 1), np.uint8)
    assert to_tensor(blank, 8, measure_normalise(blank)).isfinite().all()
