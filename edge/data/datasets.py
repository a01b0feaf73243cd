"""Image data sets by name."""

import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from edge.data.augment import IMAGENET, Augment, Normalise, measure_normalise
from edge.data.draws import FIXED_SEED, balanced_subset, draw
from edge.data.folder import match_classes, open_folder
from edge.data.source import ImageSource, MemorySource, Subset

DEFAULT_ROOT = Path("~/.cache/isthmus")
"""Where downloaded sets are kept."""

_DIGITS = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A classification data set.

    Attributes:
        name: as it was asked for.
        classes: names of the classes, numbered by their order.
        train: the training samples.
        test: the test samples.
        normalise: the set's own statistics, or ImageNet's for a folder of images.
        augment: variations of training images that do not change their class.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    normalise: Normalise = IMAGENET
    augment: Augment = field(default_factory=Augment)


def dataset_names() -> list[str]:
    """List what `open_dataset` knows, beside ``folder:PATH``."""
    return ["digits", *_TORCHVISION]


def open_dataset(
    name: str,
    *,
    seed: int,
    root: Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    download: bool = False,
) -> Dataset:
    """Open a data set.

    Args:
        name: one of `dataset_names`, ``folder:PATH``, or the path of an existing folder. The folder holds
            ``train/<class>/`` and ``test/<class>/`` with images, or the same as train.zip and test.zip.
        seed: chooses which training samples `train_limit` keeps.
        root: where downloaded sets are; `DEFAULT_ROOT` when not given.
        train_limit: keep so many training samples, of all classes alike.
        test_limit: keep so many test samples; the same ones for every seed, so that runs compare.
        download: fetch a set that is not there.

    Raises:
        UserError: there is no such set, it is not there and was not to be downloaded, or it is damaged.
    """
    root = (root or DEFAULT_ROOT).expanduser()
    for limit in (train_limit, test_limit):
        if limit is not None and limit < 1:
            raise UserError(f"a data set cannot be limited to {limit} samples; keep at least 1")
    if name == "digits":
        dataset = _open_digits()
    elif name in _TORCHVISION:
        dataset = _open_torchvision(name, root, download)
    elif name.startswith("folder:"):
        dataset = _open_folder(name, Path(name.removeprefix("folder:")))
    elif Path(name).is_dir():
        dataset = _open_folder(name, Path(name))
    else:
        raise UserError(
            f"there is no data set {name!r}; choose one of {', '.join(dataset_names())}, or folder:PATH "
            "for a folder that holds train/ and test/"
        )
    return Dataset(
        name=name,
        classes=dataset.classes,
        train=_limit(dataset.train, train_limit, seed),
        test=_limit(dataset.test, test_limit, FIXED_SEED),
        normalise=dataset.normalise,
        augment=dataset.augment,
    )


def _limit(source: ImageSource, limit: int | None, seed: int) -> ImageSource:
    if limit is None or limit >= len(source):
        return source
    return Subset(source, balanced_subset(source.labels, limit, seed))


def _open_digits() -> Dataset:
    from sklearn.datasets import load_digits  # slow to import, and needed for this set only

    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)
    labels = loaded.target.astype(np.int64)
    order = np.argsort(draw(np.arange(len(labels)), FIXED_SEED, "digits"), kind="stable")
    train, test = np.split(order, [len(order) * 4 // 5])
    return _in_memory(
        "digits",
        _DIGITS,
        MemorySource(images[train], labels[train]),
        MemorySource(images[test], labels[test]),
        False,
    )


def _open_folder(name: str, path: Path) -> Dataset:
    train, test = open_folder(path.expanduser(), "train"), open_folder(path.expanduser(), "test")
    return Dataset(name=name, classes=match_classes(train, test), train=train, test=test)


@dataclass(frozen=True, kw_only=True)
class _Torchvision:
    """How a set of torchvision's is opened: its class's name, its argument for the split, whether to flip."""

    kind: str
    train: dict[str, Any] = field(default_factory=lambda: {"train": True})
    test: dict[str, Any] = field(default_factory=lambda: {"train": False})
    flip: bool = True


_TRAIN, _TEST = {"split": "train"}, {"split": "test"}
_TORCHVISION = {
    "cifar10": _Torchvision(kind="CIFAR10"),
    "cifar100": _Torchvision(kind="CIFAR100"),
    "mnist": _Torchvision(kind="MNIST", flip=False),
    "fashionmnist": _Torchvision(kind="FashionMNIST"),
    "kmnist": _Torchvision(kind="KMNIST", flip=False),
    "svhn": _Torchvision(kind="SVHN", train=_TRAIN, test=_TEST, flip=False),
    "stl10": _Torchvision(kind="STL10", train=_TRAIN, test=_TEST),
    "usps": _Torchvision(kind="USPS", flip=False),
}


def _open_torchvision(name: str, root: Path, download: bool) -> Dataset:
    from common.vision import datasets  # slow to import, and needed for these sets only

    known = _TORCHVISION[name]
    build: Callable[..., Any] = getattr(datasets, known.kind)
    try:
        train, test = (
            build(root=str(root), download=download, **split) for split in (known.train, known.test)
        )
    except urllib.error.URLError as error:
        raise UserError(
            f"cannot download {name} ({error.reason}); copy it into {root} or use digits"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if download:
            raise UserError(f"cannot download {name} into {root} ({_line(error)})") from error
        raise UserError(
            f"{name} is not in {root} or is damaged; allow its download, or use digits"
        ) from error
    classes = tuple(map(str, getattr(train, "classes", _DIGITS)))
    return _in_memory(name, classes, _to_memory(train), _to_memory(test), known.flip)


def _to_memory(loaded: Any) -> MemorySource:
    images, labels = np.asarray(loaded.data), getattr(loaded, "targets", getattr(loaded, "labels", None))
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10 keep channels first
        images = images.transpose(0, 2, 3, 1)
    return MemorySource(images, np.asarray(labels, np.int64))


def _in_memory(
    name: str, classes: tuple[str, ...], train: MemorySource, test: MemorySource, flip: bool
) -> Dataset:
    sample = np.linspace(0, len(train) - 1, min(len(train), 2048)).astype(np.int64)
    return Dataset(
        name=name,
        classes=classes,
        train=train,
        test=test,
        normalise=measure_normalise(train.fetch(sample, 0)),
        augment=Augment(flip=flip),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
