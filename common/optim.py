"""Optimizers and learning-rate schedules, built alike on both sides from one spec, and clipping across both.

Parameters of the three partitions live in three optimizers on two machines. SGD and AdamW treat each element
on its own, so three equal one bitwise. Clipping by global norm is the exception; it needs no further round
trip:

    cloud  after its last backward: grad_norm_sq(middle), sent with that chunk's gradient
    edge   after its last backward: clip_scale(front + middle + back, max_norm), applied, sent with `commit`
    cloud  on `commit`: apply_scale(middle, scale), then its optimizer's step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from common.choices import OPTIMIZERS, SCHEDULES
from common.errors import UserError

__all__ = [
    "OptimSpec",
    "apply_scale",
    "build_optimizer",
    "clip_scale",
    "grad_norm_sq",
    "learning_rate_factor",
]


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """What both sides train with.

    Every value means what torch's own optimizer of that name means by it. Weight decay is applied to all
    parameters, biases and norms included, as torch does when given `model.parameters()`.

    Attributes:
        name: `sgd` or `adamw`.
        lr: peak learning rate, reached after the warm-up.
        momentum: of SGD.
        weight_decay: L2 term of SGD, decoupled decay of AdamW.
        betas: AdamW's two averaging rates.
        eps: AdamW's term for stability.
        schedule: how the rate moves after the warm-up, towards `end_lr` at `total_steps`: `constant` (does
            not move), `linear`, `cosine` (half a period) or `polynomial` (linear to the power `power`).
        warmup_steps: steps over which the rate first rises in equal parts, from lr / warmup_steps to lr.
        total_steps: the step at which `end_lr` is reached; it stays there. Needed by all but `constant`.
        power: of `polynomial`.
        end_lr: the last rate, at most lr.
        clip_norm: the largest global norm of the gradients of all three partitions, or None.

    Raises:
        UserError: for a value out of its range, naming the range.
    """

    name: str = "sgd"
    lr: float = 0.005
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    power: float = 1.0
    end_lr: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_choice("optimizer", self.name, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        least_steps = 0 if self.schedule == "constant" else self.warmup_steps + 1
        clip_norm = 1.0 if self.clip_norm is None else self.clip_norm
        for what, value, wanted, fits in (
            ("learning rate", self.lr, "above 0", self.lr > 0),
            ("momentum", self.momentum, "from 0 to below 1", 0 <= self.momentum < 1),
            ("weight decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("first beta", self.betas[0], "from 0 to below 1", 0 <= self.betas[0] < 1),
            ("second beta", self.betas[1], "from 0 to below 1", 0 <= self.betas[1] < 1),
            ("eps", self.eps, "above 0", self.eps > 0),
            ("power", self.power, "above 0", self.power > 0),
            (
                "last learning rate",
                self.end_lr,
                f"from 0 to the learning rate, {self.lr}",
                0 <= self.end_lr <= self.lr,
            ),
            ("warm-up steps", self.warmup_steps, "0 or more", self.warmup_steps >= 0),
            (
                "steps in all",
                self.total_steps,
                f"{least_steps} or more ({self.schedule} schedule, {self.warmup_steps} warm-up steps)",
                self.total_steps >= least_steps,
            ),
            ("largest gradient norm to clip to", clip_norm, "above 0", clip_norm > 0),
        ):
            if not (fits and math.isfinite(value)):
                raise UserError(f"{what} must be {wanted}, not {value}")

    def to_map(self) -> dict[str, Any]:
        """Return the spec as plain values that msgpack and JSON carry."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_map(cls, values: object) -> OptimSpec:
        """Build a spec from what a peer or a file gave, trusting nothing.

        Raises:
            UserError: for a field that is missing, unknown, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise UserError("the optimizer's settings must be a map")
        if values.keys() != _READERS.keys():
            odd = ", ".join(sorted(str(name)[:40] for name in values.keys() ^ _READERS.keys()))
            raise UserError(f"the optimizer's settings have missing or unknown fields: {odd}")
        return cls(**{name: _READERS[name](name, value) for name, value in values.items()})


def build_optimizer(
    spec: OptimSpec, params: Iterable[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Make the optimizer of one partition and its schedule.

    Args:
        spec: what to train with.
        params: the partition's parameters, in the model's order. None at all is fine.

    Returns:
        torch's own optimizer with one parameter group, and its schedule. After each step call
        `optimizer.step()`, then `scheduler.step()`.
    """
    # A group stated outright, because torch refuses an empty list of parameters and accepts an empty group.
    groups = [{"params": list(params)}]
    optimizer: torch.optim.Optimizer
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )
    return optimizer, LambdaLR(optimizer, learning_rate_factor(spec))


def learning_rate_factor(spec: OptimSpec) -> Callable[[int], float]:
    """Return the function from the number of steps done to the next step's rate over `spec.lr`."""
    end = spec.end_lr / spec.lr
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda left: 1.0,
        "linear": lambda left: end + (1 - end) * left,
        "cosine": lambda left: end + (1 - end) * (1 - math.cos(math.pi * left)) / 2,
        "polynomial": lambda left: end + (1 - end) * left**spec.power,
    }
    shape = shapes[spec.schedule]

    def factor(steps_done: int) -> float:
        if steps_done < spec.warmup_steps:
            return (steps_done + 1) / spec.warmup_steps
        span = max(1, spec.total_steps - spec.warmup_steps)
        return shape(max(0.0, 1 - (steps_done - spec.warmup_steps) / span))

    return factor


def grad_norm_sq(params: Iterable[Tensor]) -> float:
    """Sum the squares of all gradients, in double precision and in the order of the parameters.

    Double precision makes the sum over three partitions differ from the sum over the whole by rounding of the
    order 1e-16, so that where a model is cut does not show in training. Parameters without a gradient count
    nothing; infinities and NaN come out as such.
    """
    total = 0.0
    for param in params:
        if param.grad is not None:
            total += float(torch.linalg.vector_norm(param.grad, dtype=torch.float64).square())
    return total


def clip_scale(total_norm_sq: float, max_norm: float | None) -> float | None:
    """Return the factor that brings gradients of this squared norm down to `max_norm`, None if it is less.

    The factor is that of `torch.nn.utils.clip_grad_norm_`: max_norm / (norm + 1e-6). A norm that is not
    finite gives NaN or 0 there; here it gives NaN always, so that the step is seen to have failed.
    """
    if max_norm is None:
        return None
    norm = math.sqrt(total_norm_sq) if total_norm_sq >= 0 else math.nan
    if not math.isfinite(norm):
        return math.nan
    scale = max_norm / (norm + 1e-6)
    return scale if scale < 1 else None


def apply_scale(params: Iterable[Tensor], scale: float | None) -> None:
    """Multiply every gradient by `clip_scale`'s factor, in place; None leaves them as they are."""
    grads = [param.grad for param in params if param.grad is not None]
    if scale is not None and grads:
        torch._foreach_mul_(grads, scale)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"there is no {what} {value!r}: use {', '.join(choices)}")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    return value


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST_STEPS:
        raise _wrong(name, f"a whole number up to {_MOST_STEPS}", value)
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, float):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST_STEPS:
        raise _wrong(name, "a number", value)
    return float(value)


def _number_or_none(name: str, value: object) -> float | None:
    return None if value is None else _number(name, value)


def _two_numbers(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(name, "two numbers", value)
    return _number(name, value[0]), _number(name, value[1])


def _wrong(name: str, wanted: str, value: object) -> UserError:
    return UserError(f"the optimizer's {name} must be {wanted}, not {str(value)[:40]!r}")


_MOST_STEPS: Final = (
    1 << 53
)  # the whole numbers that a float, and so the schedule's arithmetic, holds exactly
_READERS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "name": _text,
    "lr": _number,
    "momentum": _number,
    "weight_decay": _number,
    "betas": _two_numbers,
    "eps": _number,
    "schedule": _text,
    "warmup_steps": _whole,
    "total_steps": _whole,
    "power": _number,
    "end_lr": _number,
    "clip_norm": _number_or_none,
}
