"""What a run's bottleneck starts from: a file of ``calibrate``, the trained model, or some of the samples."""

from pathlib import Path

from torch import Tensor

from common.bottleneck_start import start_from_samples, starts_from_samples
from common.errors import UserError
from common.inputs import padding_mask
from common.models import is_path
from common.partition import Split
from edge.bottleneck_file import Purpose, load_bottleneck, take_trained, trained_bottleneck
from edge.config import TrainConfig
from edge.data.draws import epoch_order
from edge.data.samples import Samples

START_SAMPLES, START_TOKENS = 32, 8192
"""How many samples bottlenecks are started from: of images so many, of texts those that hold so many tokens or a few
more. With fewer tokens than a layer has features, most of its axes would be chance."""


def start_bottleneck(config: TrainConfig, parts: Split, purpose: Purpose, samples: Samples) -> str:
    """Give a split model's bottleneck its first weights.

    Args:
        config: names the file of ``calibrate`` or the trained model, if any.
        parts: with a bottleneck or without.
        purpose: of the bottleneck.
        samples: what to start it from otherwise.

    Returns:
        Where the weights are from, in a few words; empty where that is the usual place.

    Raises:
        UserError: a file that is none, or holds another bottleneck; for an evaluation, none that was trained.
    """
    wanted = any(purpose.bottlenecks)
    if config.bottleneck is not None:
        load_bottleneck(config.bottleneck, parts, purpose)
        return f"its bottleneck from {config.bottleneck}"
    path = config.weights if config.weights is not None and is_path(config.weights) else None
    trained = {} if path is None else trained_bottleneck(Path(path))
    words = ""
    if trained and wanted and take_trained(parts, trained):
        return f"its bottleneck from {path}"
    if trained:
        words = f"without the bottleneck in {path}"
        if config.only_evaluates:
            raise UserError(
                f"{path} was trained with a bottleneck, and not that of --compress {' '.join(config.compress)}: give "
                "the --compress that it was trained with"
            )
    elif wanted and config.only_evaluates:
        inserted = " and ".join(dict.fromkeys(filter(None, purpose.bottlenecks)))
        raise UserError(
            f"{path or config.model} comes without a bottleneck: leave {inserted} out of --compress, or give its "
            "--bottleneck"
        )
    if any(map(starts_from_samples, purpose.bottlenecks)):
        start_from_samples(parts, purpose.bottlenecks, _some_samples(samples, config.seed), seed=config.seed)
    return words


def _some_samples(samples: Samples, seed: int) -> tuple[Tensor, ...]:
    """Return the training samples that bottlenecks are started from."""
    order = epoch_order(samples.train_size, seed, 0)
    some = samples.plain(order[:START_SAMPLES])
    mask = padding_mask(some)
    if mask is None:
        return some
    tokens = max(int(mask.sum()), 1)
    return samples.plain(order[: max(START_SAMPLES, -(-len(mask) * START_TOKENS // tokens))])
