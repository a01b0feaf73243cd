"""The command ``edge-client calibrate``: fits a bottleneck to what crosses the cuts, on this machine alone.

    images → front ─ recorded ─▶ fit the pair of cut 1 ─ what comes back ─▶ middle ─ recorded ─▶ fit that of cut 2

A pretrained middle then meets nearly what it was trained on, from the first step on.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import TrainingStopped, UserError
from common.fitting import Fit, copy_to_record, fit_pair, without_padding
from common.linear_bottleneck import described
from common.narrowing import LAST
from common.partition import Partition
from common.runtime import set_threads
from common.seeding import derive_seed
from common.stage import seeded
from common.weights import BOTTLENECK_PREFIX
from edge.bottleneck_file import Purpose, save_bottleneck
from edge.compress import parse_compress
from edge.config import CalibrateConfig
from edge.data.draws import epoch_order
from edge.fit_progress import FitProgress, open_fit_progress
from edge.job import Job, prepare
from edge.recording import Recording

Crossing: TypeAlias = tuple[Tensor, ...]
"""What crosses a cut of one batch, or what the front takes."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """One pair that was fitted.

    Attributes:
        name: of the pair, such as ``cut1``.
        shape: of a sample that crosses without it.
        narrow: of what crosses with it; in the end, where it narrows while training.
        fit: what it came to.
        narrows: whether it does.
    """

    name: str
    shape: tuple[int, ...]
    narrow: tuple[int, ...]
    fit: Fit
    narrows: bool

    def __str__(self) -> str:
        """Say it in a line."""
        width = f"{described(self.shape)} as {described(self.narrow)}{' in the end' * self.narrows}"
        fit = self.fit
        how = f"after {fit.steps} steps" if fit.steps else "on principal axes"
        outcome = f"no better {how}, so it stays as it was" if fit.undone else f"{how} {fit.after:.4f}"
        return f"{self.name}: {width}; relative error at first {fit.before:.4f}, {outcome}"


def calibrate(config: CalibrateConfig, progress: FitProgress) -> list[Fitted]:
    """Fit every pair of a bottleneck, and write it where `config.save` says.

    Raises:
        UserError: something in the settings does not exist or does not fit, or no bottleneck is asked for.
        TrainingStopped: the file cannot be written.
    """
    compression = parse_compress(config.training().compress)
    if not any(compression.bottlenecks):
        raise UserError(
            f"--compress {' '.join(config.compress)} inserts nothing to calibrate; use conv, linear or decay"
        )
    job = prepare(config.training(), fresh_bottleneck=True)
    with Recording() as recording:
        fitted = list(_fit_all(job, config, recording, progress))
    spec = job.spec
    purpose = Purpose.of(job.parts, model=config.model, cuts=spec.cuts, bottlenecks=spec.bottlenecks)
    try:
        save_bottleneck(config.save, job.parts, purpose)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingStopped(f"the bottleneck could not be written to {config.save}: {reason}") from error
    return fitted


def calibrate_command(config: CalibrateConfig) -> None:
    """Calibrate and say how it went."""
    set_threads(config.threads)
    with open_fit_progress(sys.stdout) as progress:
        for fitted in calibrate(config, progress):
            progress.note(str(fitted))
        progress.note(f"the bottleneck is in {config.save}; train with --bottleneck {config.save}")


def _fit_all(
    job: Job, config: CalibrateConfig, recording: Recording, progress: FitProgress
) -> Iterator[Fitted]:
    parts = job.parts
    order = epoch_order(job.samples.train_size, job.spec.seed, 0)[: config.samples]
    # Of sizes that differ by one at most: a single image left over might not be one that can be normalised.
    ids = np.array_split(order, -(-len(order) // config.batch_size))
    inputs: Iterator[Crossing] = (job.samples.plain(batch) for batch in ids)
    is_text = any(info.token_dims for info in parts.inputs)
    texts: list[Crossing] = [job.samples.plain(batch) if is_text else () for batch in ids]
    for cut, before, after in ((1, parts.front, parts.middle), (2, parts.middle, parts.back)):
        if not (before.encoders or parts.middle.encoders):
            return  # nothing here, and nothing behind
        recorded = []
        for crossing in _run(before, inputs, job.spec.seed):
            recorded.append(tuple(recording.keep(tensor) for tensor in crossing))
            progress.at(f"recording cut {cut}, batch", len(recorded), len(ids))
        for position in before.encoders:
            encoder, _ = _pair(before, after, position)
            batches = [
                without_padding(crossing[position], encoder, text)
                for crossing, text in zip(recorded, texts, strict=True)
            ]
            yield _fit(job, config, cut, position, batches, progress)
        inputs = _coded(recorded, before, after)


def _run(partition: Partition, inputs: Iterator[Crossing], seed: int) -> Iterator[Crossing]:
    """Yield what a partition without its encoders gives; it stays as it is."""
    running = copy_to_record(partition)
    for number, batch in enumerate(inputs):
        batch_seed = derive_seed(seed, "calibrate", number)
        with torch.no_grad(), seeded(batch_seed, torch.device("cpu")):
            yield running.run_bare(*batch)


def _coded(recorded: Sequence[Crossing], before: Partition, after: Partition) -> Iterator[Crossing]:
    """Yield what comes back behind a cut, of as much as the next partition takes."""
    for crossing in recorded:
        with torch.no_grad():
            yield tuple(
                _round_trip(before, after, position, tensor) if position in before.encoders else tensor
                for position, tensor in enumerate(crossing[: len(after.input_names)])
            )


def _round_trip(before: Partition, after: Partition, position: int, tensor: Tensor) -> Tensor:
    encoder, decoder = _pair(before, after, position)
    coded = decoder(encoder(tensor))
    assert isinstance(coded, Tensor)
    return coded


def _pair(before: Partition, after: Partition, position: int) -> tuple[nn.Module, nn.Module]:
    return before.get_submodule(before.encoders[position]), after.get_submodule(after.decoders[position])


def _fit(
    job: Job,
    config: CalibrateConfig,
    cut: int,
    position: int,
    batches: Sequence[Tensor],
    progress: FitProgress,
) -> Fitted:
    parts = job.parts
    before, after = (parts.front, parts.middle) if cut == 1 else (parts.middle, parts.back)
    encoder, decoder = _pair(before, after, position)
    name = before.encoders[position].removeprefix(BOTTLENECK_PREFIX).removesuffix(".encoder")

    def show(step: int, steps: int, error: float) -> None:
        progress.at(f"fitting {name}, step", step, steps, f"relative error {error:.4f}")

    fit = fit_pair(
        encoder,
        decoder,
        batches,
        steps=config.steps or config.epochs * len(batches),
        lr=config.lr,
        seed=derive_seed(job.spec.seed, "calibrate", name),
        on_step=show,
    )
    return Fitted(
        name=name,
        shape=(parts.dense1 if cut == 1 else parts.dense2)[position].shape,
        narrow=parts.crossing(cut, LAST)[position].shape,
        fit=fit,
        narrows=(cut, position) in parts.shapes,
    )
