"""Starts the bottlenecks of a split model from what crosses its cuts for some samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.bottleneck import KINDS, Kind, parse_bottleneck
from common.errors import UserError
from common.fitting import copy_to_record, without_padding
from common.partition import Split
from common.stage import seeded


def starts_from_samples(text: str) -> bool:
    """Say whether a bottleneck starts from what crosses its cut; False for an empty specification."""
    return _starting(text) is not None


def _starting(text: str) -> Kind | None:
    """The kind of a bottleneck that starts from what crosses its cut; None for any other."""
    if not text:
        return None
    spec = parse_bottleneck(text)
    kind = KINDS[spec.kind]
    return kind if kind.from_samples(spec) else None


@torch.no_grad()
def start_from_samples(split: Split, specs: Sequence[str], inputs: Sequence[Tensor], *, seed: int) -> None:
    """Start the bottlenecks of a split model from what crosses the cuts for some samples.

    Args:
        split: as `with_bottleneck` returned it; nothing but its encoders and decoders changes.
        specs: as given to `with_bottleneck`.
        inputs: some of the training samples, as the front takes them.
        seed: of dropout on the way, in models that normalize by the batch.
    """
    tensors: tuple[Tensor, ...] = tuple(inputs)
    kinds = [_starting(text) for text in specs]
    with seeded(seed, torch.device("cpu")):
        for number, before, after, infos in zip(
            (0, 1),
            (split.front, split.middle),
            (split.middle, split.back),
            (split.cut1, split.cut2),
            strict=True,
        ):
            if not any(kinds[number:]):
                return  # nothing here, and nothing behind
            kind = kinds[number]
            outputs = copy_to_record(before).run_bare(*tensors)
            crossed = list(outputs[: len(infos)])
            for position, path in before.encoders.items():
                if not outputs[position].isfinite().all():
                    raise UserError(
                        f"what crosses cut {number + 1} is not finite for the first training samples: the weights that "
                        "this run starts from are damaged or far too large"
                    )
                encoder, decoder = before.get_submodule(path), after.get_submodule(after.decoders[position])
                if kind is not None:
                    kind.start(encoder, decoder, without_padding(outputs[position], encoder, inputs))
                crossed[position] = decoder(encoder(outputs[position]))
            tensors = tuple(crossed)
