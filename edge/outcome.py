"""How chunks are scored, and how a step ended."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Score:
    """Losses and hits, added up chunk by chunk.

    Attributes:
        loss_sum: sum of the losses of the samples.
        predicted: the classes of the largest logits, chunk by chunk.
        labels: the right classes, chunk by chunk.
    """

    loss_sum: float = 0.0
    predicted: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many there were."""
        return sum(map(len, self.labels))

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return self.loss_sum / self.samples

    @property
    def accuracy(self) -> float:
        """The share of samples that were right."""
        hits = sum(int((p == y).sum()) for p, y in zip(self.predicted, self.labels, strict=True))
        return hits / self.samples

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient, -1 to 1; 0 where all predictions are the same."""
        from sklearn.metrics import matthews_corrcoef  # slow to import, and needed for text only

        return float(matthews_corrcoef(torch.cat(self.labels).numpy(), torch.cat(self.predicted).numpy()))

    def extend(self, other: "Score") -> None:
        """Count all that another one counts."""
        self.loss_sum += other.loss_sum
        self.predicted += other.predicted
        self.labels += other.labels

    def add(self, mean_loss: float, logits: Tensor, labels: Tensor) -> None:
        """Count one chunk."""
        self.loss_sum += mean_loss * len(labels)
        self.predicted.append(logits.argmax(dim=1))
        self.labels.append(labels)


@dataclass(frozen=True)
class Outcome:
    """How the last step ended.

    Attributes:
        step: its number.
        applied: it was applied, and not dropped.
        scale: what gradients were multiplied by, where they were.
        score: losses and hits; None of a step that an earlier process made.
        reason: why training cannot go on after it; empty where it can.
    """

    step: int = 0
    applied: bool = True
    scale: float | None = None
    score: Score | None = None
    reason: str = ""
