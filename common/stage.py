"""One partition at work: forward and backward of chunks, inside a step that is applied or undone as a whole.

A step on a stage is a transaction (DESIGN invariant 2)::

    begin_step ── forward(chunk) / backward(chunk) … ── commit(scale)      weights, momenta, schedule, widths move
              └──────────────────────────────────────── rollback()         everything is as before begin_step

What is outside a transaction, `snapshot` takes and `restore` brings back, in this process or a later one; a step
whose chunks have all run is taken by `pending` besides.

The graph of a chunk lives from its forward to its backward. Both may be called for different chunks in any
interleaving; each kind is called in chunk order, so that BatchNorm statistics and accumulated gradients are
those of a plain loop over the chunks.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.entry import Entry
from common.errors import UserError
from common.narrowing import count_step, narrowing_layers, penalize
from common.optim import OptimSpec, apply_scale, build_optimizer, grad_norm_sq
from common.seeding import derive_seed
from common.snapshot import detached

# torch's default generator is one per process, and a process may hold several stages (front and back on the
# edge, many sessions on the cloud): whoever seeds it keeps it until its forward is done.
_DEFAULT_GENERATOR = threading.Lock()

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with torch's default generators seeded, and put them back as they were."""
    devices = [device] if device.type == "cuda" else []
    with _DEFAULT_GENERATOR, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class Stage:
    """A partition with its optimizer, its chunks in flight and its step transaction.

    Args:
        partition: the module; takes and returns a tuple of tensors.
        part: ``front``, ``middle`` or ``back``: names the stage in seeds.
        seed: the run's seed.
        needs_grad: for each input, whether a gradient of it is wanted.
        optim: what to train with; None for a stage that only evaluates.
        device: where the partition is moved to.
        memory_format: of weights and 4-D inputs.
        amp: ``bf16`` or ``fp16`` autocast, or None.
    """

    def __init__(
        self,
        partition: nn.Module,
        part: str,
        *,
        seed: int,
        needs_grad: Sequence[bool],
        optim: OptimSpec | None = None,
        device: torch.device | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        amp: str | None = None,
    ) -> None:
        self.part = part
        self.device = device or torch.device("cpu")
        self._memory_format = memory_format
        self.partition = partition.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]
        self._seed = seed
        self._needs_grad = tuple(needs_grad)
        self._amp = AMP_DTYPES[amp] if amp else None
        self._chunks: dict[int, tuple[tuple[Entry, ...], tuple[Tensor, ...]]] = {}
        self._saved_buffers: dict[str, Tensor] | None = None
        self._buffers = dict(partition.named_buffers(remove_duplicate=False))
        self._trained = {name: p for name, p in partition.named_parameters() if p.requires_grad}
        self._parameters = list(self._trained.values())
        self._narrowing = list(narrowing_layers(partition))
        if optim is not None:
            self.optimizer, self.scheduler = build_optimizer(optim, self._parameters)

    @property
    def chunks_in_flight(self) -> int:
        """How many chunks have gone forward and not yet backward."""
        return len(self._chunks)

    @property
    def learning_rate(self) -> float:
        """The rate that the next step will use."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin_step(self) -> None:
        """Open the transaction: from here on, `rollback` brings back the present state."""
        assert not self._chunks, f"{len(self._chunks)} chunks are still in flight"
        self._saved_buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self.partition.train()

    def forward(self, step: int, chunk: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run a chunk forward and keep its graph for `backward`.

        Returns:
            The outputs, detached.
        """
        entries, outputs = self.forward_attached(step, chunk, inputs)
        self._chunks[chunk] = (entries, outputs)
        return tuple(t.detach() for t in outputs)

    def forward_attached(
        self, step: int, chunk: int, inputs: Sequence[Tensor]
    ) -> tuple[tuple[Entry, ...], tuple[Tensor, ...]]:
        """Run a chunk forward; returns (its inputs, outputs with their graph), and keeps nothing."""
        entries = tuple(
            Entry(self._place(tensor).detach(), needed)
            for tensor, needed in zip(inputs, self._needs_grad, strict=True)
        )
        with seeded(derive_seed(self._seed, step, chunk, self.part), self.device), torch.enable_grad():
            return entries, self._run(tuple(entry.enter() for entry in entries))

    def evaluate(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run inputs forward in evaluation mode; nothing of the stage changes."""
        self.partition.eval()
        with torch.inference_mode():
            return self._run(tuple(self._place(t) for t in inputs))

    def backward(self, chunk: int, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run a chunk backward; parameter gradients accumulate.

        Args:
            chunk: a chunk that went forward.
            gradients: one for each output of its forward, in order; None for those that need none.

        Returns:
            The gradient of each input, None for those that need none.
        """
        entries, outputs = self._chunks.pop(chunk)
        return self.backward_attached(entries, outputs, gradients)

    def backward_attached(
        self, entries: Sequence[Entry], outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Run outputs of `forward_attached` backward; see `backward`."""
        pairs = [
            (out, None if grad is None else grad.to(device=out.device, dtype=out.dtype))
            for out, grad in zip(outputs, gradients, strict=True)
            if out.requires_grad
        ]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return tuple(entry.gradient() for entry in entries)

    def grad_norm_sq(self) -> float:
        """The sum of squares of the gradients accumulated in this step.

        NaN where the step has made a buffer overflow, a running variance for example: such a step must not be applied
        either, and the gradients may show nothing of it.
        """
        return grad_norm_sq(self._parameters) if self._buffers_are_sound() else math.nan

    def commit(self, scale: float | None = None) -> None:
        """Apply the step: scale the gradients if asked, then move weights, schedule and widths."""
        assert not self._chunks, f"{len(self._chunks)} chunks are still in flight"
        if scale is not None:
            apply_scale(self._parameters, scale)
        # After clipping: a steady pull, whatever the gradients are, that the norm of the three parts leaves out.
        penalize(self._narrowing)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        count_step(self._narrowing, self.optimizer)
        self._saved_buffers = None

    def rollback(self) -> None:
        """Undo the step under way: buffers as they were, no gradients, no chunks. Harmless outside a step."""
        saved = self._forget_step()
        with torch.no_grad():
            for name, buffer in (saved or {}).items():
                self._buffers[name].copy_(buffer)

    def snapshot(self) -> dict[str, Any]:
        """Return all that the committed steps have made: during a step, what `rollback` would go back to.

        The tensors are the stage's own, for `common.snapshot.detached` to copy before the next commit; the stage
        has an optimizer.
        """
        partition = {name: tensor.detach() for name, tensor in self.partition.state_dict().items()}
        return {
            "partition": partition | self._buffers | (self._saved_buffers or {}),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `snapshot` returned, here or elsewhere, whatever was under way; copies it.

        Raises:
            UserError: it is of another partition or optimizer. Only another `restore` makes the stage usable then.
        """
        self._forget_step()
        try:
            given = dict(state["partition"])
            if lacking := self._buffers.keys() - given.keys():
                raise KeyError(*sorted(lacking)[:1])
            loose = self._buffers.keys() - self.partition.state_dict().keys()  # those that are not persistent
            with torch.no_grad():
                for name in loose:
                    self._buffers[name].copy_(given.pop(name))
                self.partition.load_state_dict(given, strict=True)
            # After the widths are right, which its memory has to fit. Copied, for torch would go on in these tensors.
            self.optimizer.load_state_dict(detached(state["optimizer"]))
            self.scheduler.load_state_dict(detached(state["scheduler"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _unfit(self.part, error) from error

    def pending(self) -> dict[str, Any]:
        """Return what a step has come to whose chunks have all run: what `commit` needs beside `snapshot`.

        The tensors are the stage's own, as `snapshot`'s are.
        """
        assert not self._chunks, f"{len(self._chunks)} chunks are still in flight"
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        return {"gradients": gradients, "buffers": dict(self._buffers)}

    def restore_pending(self, pending: Mapping[str, Any]) -> None:
        """Go to where `pending` was called, after `restore` of that time's `snapshot`; copies it.

        Then `commit` and `rollback` do what they would have done there.

        Raises:
            UserError: it is of another partition.
        """
        self.begin_step()
        try:
            with torch.no_grad():
                for name, buffer in pending["buffers"].items():
                    self._buffers[name].copy_(buffer)
            for name, gradient in pending["gradients"].items():
                self._trained[name].grad = gradient.to(self.device, copy=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _unfit(self.part, error) from error

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients accumulated so far, to undo a loss scale."""
        apply_scale(self._parameters, factor)

    def _buffers_are_sound(self) -> bool:
        """Whether no buffer has overflowed in this step. Some models keep infinities in theirs from the start."""
        before = self._saved_buffers or {}
        floating = [name for name in before if before[name].is_floating_point() and before[name].numel()]
        if not floating:
            return True
        finite, was_finite = (
            torch.stack(torch._foreach_norm([buffers[name] for name in floating], math.inf)).isfinite()
            for buffers in (self._buffers, before)
        )
        return bool((finite | ~was_finite).all())

    def _forget_step(self) -> dict[str, Tensor] | None:
        """Forget chunks and gradients; return the buffers that the step began with."""
        self._chunks.clear()
        for parameter in self._parameters:
            parameter.grad = None
        saved, self._saved_buffers = self._saved_buffers, None
        return saved

    def _place(self, tensor: Tensor) -> Tensor:
        # Only what enters the model is laid out anew. What crosses a cut keeps the order in which the stage before
        # made it: the unsplit model would not reorder it there, and operators round by the order they meet.
        if self.part == "front" and tensor.dim() == 4 and tensor.is_floating_point():
            return tensor.to(device=self.device, memory_format=self._memory_format)
        return tensor.to(device=self.device)

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._amp is None:
            return tuple(self.partition(*inputs))
        with torch.autocast(self.device.type, dtype=self._amp):
            outputs = self.partition(*inputs)
        # What leaves a stage is fp32, as the other side computes; codecs make it small again.
        return tuple(t.float() if t.is_floating_point() else t for t in outputs)


def _unfit(part: str, error: Exception) -> UserError:
    return UserError(f"what was kept of the {part} does not fit it: {' '.join(str(error).split())[:200]}")
