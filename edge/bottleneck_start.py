"""What a run's bottleneck starts from: a file of ``calibrate``, the trained model, or some of the samples."""

from pathlib import Path

from torch import Tensor

from common.bottleneck_start import start_from_samples, starts_from_samples
from common.errors import UserError
from common.inputs import padding_mask
from common.partition import Split
from edge.bottleneck_file import Purpose, load_bottleneck, read_trained, take_trained
from edge.config import TrainConfig
from edge.data.draws import epoch_order
from edge.data.samples import Samples

START_SAMPLES, START_TOKENS = 32, 8192
"""How many samples bottlenecks are started from: of images so many, of texts those that hold so many tokens or a few
more. With fewer tokens than a layer has features, most of its axes would be chance."""


def start_bottleneck(
    config: TrainConfig, parts: Split, purpose: Purpose, samples: Samples, *, trained: Path | None
) -> str:
    """Give a split model's bottleneck its first weights.

    Args:
        config: names the file of ``calibrate``, if any.
        parts: with a bottleneck or without.
        purpose: of the bottleneck.
        samples: what to start it from otherwise.
        trained: the file of the model's weights, which may hold the bottleneck that they were trained with.

    Returns:
        Where the weights are from, in a few words; empty where that is the usual place.

    Raises:
        UserError: a file that is none, or holds another bottleneck; for an evaluation, none that was trained.
    """
    wanted = any(purpose.bottlenecks)
    if config.bottleneck is not None:
        load_bottleneck(config.bottleneck, parts, purpose)
        return f"its bottleneck from {config.bottleneck}"
    saved = None if trained is None else read_trained(trained)
    if saved is not None and wanted and take_trained(parts, saved, purpose):
        return f"its bottleneck from {trained}"
    if config.only_evaluates and saved is not None:
        raise UserError(
            f"{trained} was trained with a bottleneck, and not that of --compress {' '.join(config.compress)}"
            f"{saved.at_other_cuts(purpose)}: give the --compress and --cut that it was trained with"
        )
    if config.only_evaluates and wanted:
        inserted = " and ".join(dict.fromkeys(filter(None, purpose.bottlenecks)))
        raise UserError(
            f"{trained or config.model} comes without a bottleneck: leave {inserted} out of --compress, or give its "
            "--bottleneck"
        )
    if any(map(starts_from_samples, purpose.bottlenecks)):
        start_from_samples(parts, purpose.bottlenecks, _some_samples(samples, config.seed), seed=config.seed)
    return "" if saved is None else f"without the bottleneck in {trained}"


def _some_samples(samples: Samples, seed: int) -> tuple[Tensor, ...]:
    """Return the training samples that bottlenecks are started from."""
    order = epoch_order(samples.train_size, seed, 0)
    some = samples.plain(order[:START_SAMPLES])
    mask = padding_mask(some)
    if mask is None:
        return some
    tokens = max(int(mask.sum()), 1)
    return samples.plain(order[: max(START_SAMPLES, -(-len(mask) * START_TOKENS // tokens))])
