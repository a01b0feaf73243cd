"""Loading a state dict into a model that it is of, but for a last layer of another number of classes."""

import logging
from collections.abc import Mapping, Set

from torch import Tensor, nn

from common.errors import UserError
from common.model_spec import ModelSpec
from common.weights import BOTTLENECK_PREFIX

_log = logging.getLogger(__name__)

AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Heads that exist only to train these two, and make their outputs tuples."""


def load_matching(
    model: nn.Module, state: Mapping[str, Tensor], spec: ModelSpec, source: str, *, whole: bool = False
) -> None:
    """Load a state dict into a model, all of it, but for a last layer that has another number of classes.

    Args:
        model: as built for ``spec``.
        state: by parameter and buffer name. Auxiliary heads and a bottleneck's weights are passed over.
        spec: what the model was built from.
        source: the weights' name or path, for messages.
        whole: the last layer is to fit as well.

    Raises:
        UserError: names that differ, or shapes other than that of the last layer.
    """
    skipped = (*AUXILIARY.get(spec.name, ()), BOTTLENECK_PREFIX)
    given = {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}
    own = model.state_dict()
    differing = [
        f"{what} {_some(names)}"
        for what, names in (
            ("it lacks", own.keys() - given.keys()),
            ("it has besides", given.keys() - own.keys()),
        )
        if names
    ]
    if differing:
        raise UserError(f"{source} is not a state dict of {spec.name}: {'; '.join(differing)}")
    misshapen = [name for name in own if own[name].shape != given[name].shape]
    layers = {name.rpartition(".")[0] for name in misshapen}
    is_classifier = len(layers) == 1 and all(
        own[name].shape[1:] == given[name].shape[1:] and own[name].shape[0] == spec.num_classes
        for name in misshapen
    )
    if misshapen and not is_classifier:
        name = misshapen[0]
        raise UserError(
            f"{source} does not fit {spec.name}: {name} is {tuple(given[name].shape)} there and "
            f"{tuple(own[name].shape)} here ({len(misshapen)} tensors differ)"
        )
    if misshapen and whole:
        raise UserError(
            f"{source} tells {given[misshapen[0]].shape[0]} classes apart, and this run has {spec.num_classes}: give "
            "other --data, or train first"
        )
    if misshapen:
        _log.info("%s has another number of classes: %s starts anew", source, layers.pop())
    model.load_state_dict({**given, **{name: own[name] for name in misshapen}}, strict=True)


def _some(names: Set[str]) -> str:
    shown = sorted(names)[:3]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
