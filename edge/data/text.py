"""Sentences with labels, and their way to token ids."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.propagate import TensorInfo
from common.text_models import tokenizer_of
from edge.data.draws import FIXED_SEED, balanced_subset

Sentence: TypeAlias = str | tuple[str, str]
"""One text, or two that belong together, such as a question and its answer."""

COLA_CLASSES = ("unacceptable", "acceptable")
_COLA_TRAIN = ("in_domain_train.tsv",)
_COLA_TEST = ("in_domain_dev.tsv", "out_of_domain_dev.tsv")

_ROUNDED_TO = 8


class TextSource:
    """Sentences that fit in memory.

    Args:
        sentences: one for each sample.
        labels: ``[n]``.
    """

    def __init__(self, sentences: Sequence[Sentence], labels: Iterable[int]) -> None:
        self.sentences = list(sentences)
        self.labels: NDArray[np.int64] = np.fromiter(labels, np.int64)
        if len(self.sentences) != len(self.labels):
            raise ValueError(f"{len(self.sentences)} sentences but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def limited(self, limit: int | None, seed: int) -> "TextSource":
        """Keep so many samples, of all classes alike."""
        if limit is None or limit >= len(self):
            return self
        kept = balanced_subset(self.labels, limit, seed)
        return TextSource([self.sentences[i] for i in kept], self.labels[kept])


@dataclass(frozen=True, kw_only=True)
class TextDataset:
    """A text classification data set.

    Attributes:
        name: as it was asked for.
        classes: names of the classes, numbered by their order.
        train: the training samples.
        test: the test samples.
    """

    name: str
    classes: tuple[str, ...]
    train: TextSource
    test: TextSource


def is_text_data(name: str) -> bool:
    """Tell a text data set's name from an image set's."""
    return name.startswith(("cola:", "hf:"))


def open_text(name: str, *, seed: int, train_limit: int | None, test_limit: int | None) -> TextDataset:
    """Open a text data set.

    Args:
        name: ``cola:PATH``, a folder with the corpus's own tab-separated files, or ``hf:NAME`` or
            ``hf:NAME:CONFIG``, a Hugging Face data set by name or folder.
        seed: chooses which training samples `train_limit` keeps.
        train_limit: keep so many training samples, of all classes alike.
        test_limit: keep so many test samples; the same ones for every seed.

    Raises:
        UserError: there is no such set, or it is damaged.
    """
    if name.startswith("cola:"):
        dataset = _open_cola(name)
    else:
        from edge.data.hub import open_hub  # needs a library that not everybody has

        dataset = open_hub(name)
    return TextDataset(
        name=name,
        classes=dataset.classes,
        train=dataset.train.limited(train_limit, seed),
        test=dataset.test.limited(test_limit, FIXED_SEED),
    )


def _open_cola(name: str) -> TextDataset:
    folder = Path(name.removeprefix("cola:")).expanduser()
    train, test = (
        [row for file in files for row in _rows(folder / file)] for files in (_COLA_TRAIN, _COLA_TEST)
    )
    return TextDataset(name=name, classes=COLA_CLASSES, train=_source(train), test=_source(test))


def _source(rows: Sequence[tuple[str, int]]) -> TextSource:
    return TextSource([text for text, _ in rows], (label for _, label in rows))


def _rows(path: Path) -> Iterable[tuple[str, int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if len(row) != 4 or row[1] not in ("0", "1"):
                    raise UserError(
                        f"{path}, line {number}: expected source, 0 or 1, mark and sentence with tabs between"
                    )
                yield row[3], int(row[1])
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {path}; cola:PATH is a folder with {', '.join((*_COLA_TRAIN, *_COLA_TEST))}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


class Tokens:
    """Turns sentences into what a model takes; see `common.partition.text_input`.

    Args:
        model: the text model's name, whose tokenizer is used.
        inputs: what the model takes; says how many tokens at most.
        longest: `trim` cuts to the longest sentence, else all have the most tokens.

    Raises:
        UserError: the model comes without a tokenizer.

    Attributes:
        most: the most tokens; longer sentences are cut short.
    """

    def __init__(self, model: str, inputs: Sequence[TensorInfo], *, longest: bool) -> None:
        self._tokenizer: Any = tokenizer_of(model)
        self._inputs = tuple(inputs)
        self.most = inputs[0].shape[0]
        self._longest = longest

    def read(self, source: TextSource, ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the model's inputs for some samples, each ``[b, S]``."""
        sentences = [source.sentences[i] for i in ids]
        encoded = self._tokenizer(
            sentences,
            padding="max_length",
            truncation=True,
            max_length=self.most,
            return_tensors="np",
        )
        tensors = []
        for info in self._inputs:
            given = encoded.get(info.name)
            values = np.zeros((len(sentences), self.most), np.int64) if given is None else given
            tensors.append(torch.from_numpy(np.ascontiguousarray(values)).to(info.dtype))
        return tuple(tensors)

    def trim(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Drop what is padding in every sample, in eights: few lengths let torch use memory again."""
        if not self._longest:
            return inputs
        kept = inputs[1].any(dim=0).nonzero()
        length = int(kept[-1]) + 1 if len(kept) else 1
        return tuple(tensor[:, : -(-length // _ROUNDED_TO) * _ROUNDED_TO] for tensor in inputs)
