"""Random shifts and flips of small images, and the way from stored pixels to the tensor a model reads."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edge.data.draws import below, draw
from edge.data.source import Image, Images


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images are varied.

    Attributes:
        flip: mirror half of the images left to right. Wrong for digits and letters.
        shift: an image moves by up to this share of its side, each way on each axis; black comes in. This is
            the usual "pad by 4 and crop 32" for 1/8.
    """

    flip: bool = True
    shift: float = 0.125


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Channel means and standard deviations of pixels in [0, 1]; three each."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def measure_normalise(images: Images) -> Normalise:
    """Take the statistics of some images, each as grey or as colour."""
    pixels = np.concatenate([np.broadcast_to(i, (*i.shape[:2], 3)).reshape(-1, 3) for i in images]) / 255
    mean, std = pixels.mean(axis=0), np.maximum(pixels.std(axis=0), 1 / 255)
    return Normalise(
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
    )


def vary(images: Images, ids: NDArray[np.int64], augment: Augment, seed: int, epoch: int) -> Images:
    """Shift and flip images, each by amounts that depend on (seed, epoch, its id) alone.

    Args:
        images: ``b`` images.
        ids: their sample ids, ``[b]``.
        augment: what to do.
        seed: the run's seed.
        epoch: number of the epoch.

    Returns:
        New images of the same sizes, in an array where they came in one.
    """
    flips = draw(ids, seed, "flip", epoch) >> np.uint64(63)
    downs, rights = draw(ids, seed, "down", epoch), draw(ids, seed, "right", epoch)
    varied = np.zeros_like(images) if isinstance(images, np.ndarray) else [np.zeros_like(i) for i in images]
    reaches = [round(augment.shift * len(image)) for image in images]
    for i, (image, reach) in enumerate(zip(images, reaches, strict=True)):
        down = int(below(downs[i : i + 1], 2 * reach + 1)[0]) - reach
        right = int(below(rights[i : i + 1], 2 * reach + 1)[0]) - reach
        if augment.flip and flips[i]:
            image = image[:, ::-1]
        side = len(image)
        varied[i][max(down, 0) : side + min(down, 0), max(right, 0) : side + min(right, 0)] = image[
            max(-down, 0) : side - max(down, 0), max(-right, 0) : side - max(right, 0)
        ]
    return varied


def to_tensor(images: Images, size: int, normalise: Normalise, *, channels_last: bool = False) -> Tensor:
    """Normalise images and bring them to the model's size, bilinearly, many at once.

    An image's pixels do not depend on its neighbours in the batch, nor on the memory format.

    Args:
        images: ``b`` images of any sides.
        size: side of the result.
        normalise: statistics to subtract and divide by.
        channels_last: lay the result out channels-last.

    Returns:
        float32 ``[b, 3, size, size]``.
    """
    if isinstance(images, np.ndarray):
        batch = _enlarge(images, size, normalise)
    else:
        batch = _enlarge_all(images, size, normalise)
    return batch if channels_last else batch.contiguous()


def _enlarge_all(images: list[Image], size: int, normalise: Normalise) -> Tensor:
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    if len(by_shape) == 1:
        return _enlarge(np.stack(images), size, normalise)
    batch = torch.empty(len(images), 3, size, size, memory_format=torch.channels_last)
    for places in by_shape.values():
        batch[places] = _enlarge(np.stack([images[i] for i in places]), size, normalise)
    return batch


def _enlarge(images: NDArray[np.uint8], size: int, normalise: Normalise) -> Tensor:
    # Normalised before it is enlarged: the same result, since the weights of a bilinear sample add up to
    # 1, at a small share of the memory traffic. Channels-last is the faster layout for three channels.
    mean, std = torch.tensor(normalise.mean) * 255, torch.tensor(normalise.std) * 255
    x_BCHW = (torch.from_numpy(images) - mean).div_(std).permute(0, 3, 1, 2)
    side = x_BCHW.shape[2]
    if side == size:
        return x_BCHW
    return F.interpolate(x_BCHW, size=(size, size), mode="bilinear", antialias=side > size)
