"""The samples of a run: read in batches as the model's front takes them, images and sentences alike."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge.data.augment import to_tensor
from edge.data.datasets import Dataset
from edge.data.loader import Batch, Batches, Plan, batch_of, eval_batches, in_order, shuffled, train_batches
from edge.data.text import TextDataset, TextSource, Tokens

__all__ = ["ImageSamples", "Samples", "TextSamples"]


class Samples(Protocol):
    """What training and evaluation read.

    Attributes:
        name: of the data set.
        classes: names of the classes, numbered by their order.
        train_size: training samples.
        test_size: test samples.
        what: what they are, in a few words.
        judged_by_mcc: evaluations report Matthews' correlation coefficient.
    """

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    what: str
    judged_by_mcc: bool

    def train(
        self, *, batch_size: int, epochs: int, channels_last: bool, start: tuple[int, int] = (0, 0)
    ) -> Batches:
        """Read shuffled training batches of `epochs` epochs, from the epoch and the batch in it that `start` names."""
        ...

    def test(self, *, batch_size: int, channels_last: bool, start_batch: int = 0) -> Batches:
        """Read every test sample once, in order, from one of the batches on."""
        ...

    def plain(self, ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the inputs of some training samples as they are, without variation."""
        ...

    def filler(self) -> tuple[Tensor, ...]:
        """Return the inputs of one sample that is none."""
        ...

    def trim(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Drop what pads all the samples of a chunk."""
        ...


class ImageSamples:
    """Images; see `Samples`.

    Args:
        dataset: where they come from.
        image_size: side in pixels that the model wants.
        seed: the run's.
        augment: vary training images.
    """

    judged_by_mcc = False

    def __init__(self, dataset: Dataset, image_size: int, *, seed: int, augment: bool) -> None:
        self.name, self.classes = dataset.name, dataset.classes
        self.train_size, self.test_size = len(dataset.train), len(dataset.test)
        self.what = f"images of {image_size} px"
        self._dataset = dataset
        self._image_size = image_size
        self._seed = seed
        self._augment = dataset.augment if augment else None

    def train(
        self, *, batch_size: int, epochs: int, channels_last: bool, start: tuple[int, int] = (0, 0)
    ) -> Batches:
        """See `Samples`."""
        epoch, number = start
        return train_batches(
            self._dataset.train,
            batch_size=batch_size,
            seed=self._seed,
            epoch=epoch,
            epochs=epochs - epoch,
            start_batch=number,
            image_size=self._image_size,
            normalise=self._dataset.normalise,
            augment=self._augment,
            channels_last=channels_last,
        )

    def test(self, *, batch_size: int, channels_last: bool, start_batch: int = 0) -> Batches:
        """See `Samples`."""
        return eval_batches(
            self._dataset.test,
            batch_size=batch_size,
            image_size=self._image_size,
            normalise=self._dataset.normalise,
            channels_last=channels_last,
            start_batch=start_batch,
            ahead=4,
        )

    def plain(self, ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """See `Samples`."""
        images = self._dataset.train.fetch(ids, self._image_size)
        return (to_tensor(images, self._image_size, self._dataset.normalise),)

    def filler(self) -> tuple[Tensor, ...]:
        """See `Samples`."""
        return (torch.zeros(1, 3, self._image_size, self._image_size),)

    def trim(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Samples`."""
        return inputs


class TextSamples:
    """Sentences; see `Samples`.

    Args:
        dataset: where they come from.
        tokens: makes token ids of them.
        seed: the run's.
    """

    judged_by_mcc = True

    def __init__(self, dataset: TextDataset, tokens: Tokens, *, seed: int) -> None:
        self.name, self.classes = dataset.name, dataset.classes
        self.train_size, self.test_size = len(dataset.train), len(dataset.test)
        self.what = f"sentences of at most {tokens.most} tokens"
        self._dataset = dataset
        self._tokens = tokens
        self._seed = seed

    def train(
        self, *, batch_size: int, epochs: int, channels_last: bool, start: tuple[int, int] = (0, 0)
    ) -> Batches:
        """See `Samples`."""
        epoch, number = start
        plans = shuffled(
            self.train_size,
            batch_size=batch_size,
            seed=self._seed,
            epoch=epoch,
            epochs=epochs - epoch,
            start_batch=number,
        )
        return Batches(plans, self._reader(self._dataset.train))

    def test(self, *, batch_size: int, channels_last: bool, start_batch: int = 0) -> Batches:
        """See `Samples`."""
        plans = in_order(self.test_size, batch_size, start_batch)
        return Batches(plans, self._reader(self._dataset.test), ahead=4)

    def plain(self, ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """See `Samples`."""
        return self.trim(self._tokens.read(self._dataset.train, ids))

    def filler(self) -> tuple[Tensor, ...]:
        """See `Samples`."""
        return self._tokens.read(self._dataset.test, np.zeros(1, np.int64))

    def trim(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Samples`."""
        return self._tokens.trim(inputs)

    def _reader(self, source: TextSource) -> Callable[[Plan], Batch]:
        def read(plan: Plan) -> Batch:
            return batch_of(source.labels, plan, self._tokens.read(source, plan.ids))

        return read
