"""Hugging Face data sets, by name or from a folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from edge.data.text import Sentence, TextDataset, TextSource

__all__ = ["open_hub"]

# Columns of the well-known sets, the first that fits.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
    ("content",),
)
_LABEL_COLUMNS = ("label", "labels", "target")
_TEST_SPLITS = ("validation", "validation_matched", "dev", "test")


def open_hub(name: str) -> TextDataset:
    """Open ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:FOLDER``, with a column of text or two and one of labels.

    The test set is its validation split, or its test split where it has no other: the labels of the test splits
    of several well-known sets are secret.

    Raises:
        UserError: there is no such set, or it has no such columns or splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} needs Hugging Face's datasets, which is not installed: pip install 'isthmus[text]'"
        ) from error
    where, _, config = name.removeprefix("hf:").partition(":")
    path = Path(where).expanduser()
    datasets.disable_progress_bars()
    try:
        if (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else where, config or None)
    except Exception as error:
        # Half a dozen libraries' own errors.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot open the data set {name}: {reason}") from error
    test = next((split for split in _TEST_SPLITS if split in loaded), None)
    if "train" not in loaded or test is None:
        raise UserError(
            f"{name} has the splits {', '.join(loaded)}; it needs train, and one of {', '.join(_TEST_SPLITS)}"
        )
    texts, label = _columns(name, loaded["train"].column_names)
    feature = loaded["train"].features[label]
    classes = _classes(feature, loaded["train"][label])
    train, tested = (
        TextSource(_sentences(loaded[split], texts), _labels(name, loaded[split][label], feature, classes))
        for split in ("train", test)
    )
    return TextDataset(name=name, classes=classes, train=train, test=tested)


def _columns(name: str, columns: Sequence[str]) -> tuple[tuple[str, ...], str]:
    texts = next((texts for texts in _TEXT_COLUMNS if set(texts) <= set(columns)), None)
    label = next((label for label in _LABEL_COLUMNS if label in columns), None)
    if texts is None or label is None:
        raise UserError(
            f"{name} has the columns {', '.join(columns)}; it needs text, sentence or a pair of them, and label"
        )
    return texts, label


def _classes(feature: Any, labels: Iterable[Any]) -> tuple[str, ...]:
    named = getattr(feature, "names", None)
    return tuple(named) if named else tuple(map(str, sorted(set(labels))))


def _sentences(split: Any, columns: tuple[str, ...]) -> list[Sentence]:
    texts = [[str(text) for text in split[column]] for column in columns]
    return list(zip(*texts, strict=True)) if len(texts) == 2 else list(texts[0])


def _labels(name: str, labels: Iterable[Any], feature: Any, classes: tuple[str, ...]) -> Iterable[int]:
    """Number labels; those of a set that names its classes are numbers already, whatever the names are."""
    is_numbered = bool(getattr(feature, "names", None))
    numbers = {text: number for number, text in enumerate(classes)}
    for label in labels:
        number = label if is_numbered else numbers.get(str(label))
        if not isinstance(number, int | np.integer) or not 0 <= number < len(classes):
            raise UserError(f"{name} has a label {label!r} that is none of {', '.join(classes)}")
        yield int(number)
