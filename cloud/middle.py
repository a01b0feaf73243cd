"""The middle of one job: built, checked, trained. Every method runs on the session's compute lane."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cloud.device import Device
from cloud.loss_scale import LossScale
from common.bottleneck import with_bottleneck
from common.errors import UserError
from common.memory import model_bytes, training_bytes
from common.memory_format import SAMPLES, choose_memory_format
from common.models import build_model, is_registered, model_inputs
from common.narrowing import committed_steps, narrow_to, narrowing_layers
from common.partition import Split, split
from common.propagate import TensorInfo
from common.spec import JobSpec
from common.stage import AMP_DTYPES, Stage, seeded
from common.text_models import is_folder
from common.weights import partition_state, state_digest
from wire.config import DEFAULT_LIMITS
from wire.errors import CorruptPayload


@dataclass(frozen=True)
class Sizes:
    """What is known of a chunk.

    Attributes:
        samples: how many it has; None before a tensor with a batch dimension has come.
        tokens: how many each of them is padded to; None where none are counted.
    """

    samples: int | None = None
    tokens: int | None = None


UNKNOWN = Sizes()

Reserve: TypeAlias = Callable[[int], None]


class Middle:
    """The middle partition with its optimizer.

    Args:
        spec: the job.
        device: where it computes.
        max_payload: the most bytes that a message carries.
        reserve: is told how many bytes of memory the job takes, before it takes them, and may refuse.

    Raises:
        UserError: the model, a cut or a bottleneck is unknown or does not fit, or a chunk fits no message.

    Attributes:
        needs_weights: whether the client's initial weights differ from what this side can build.
        memory_format: ``contiguous`` or ``channels_last``, as asked for or measured.
        stage: the partition at work.
    """

    def __init__(
        self,
        spec: JobSpec,
        device: Device,
        max_payload: int = DEFAULT_LIMITS.max_payload,
        *,
        reserve: Reserve = lambda nbytes: None,
    ) -> None:
        reserve(model_bytes(spec.model) or 0)  # of the whole model, which is built before it is cut
        parts = _build(spec)
        parts.front.free()
        parts.back.free()
        self._parts = parts
        self._chunk_size, self._committed = spec.chunk_size, spec.committed
        self._check_size(max_payload)
        reserve(_training_bytes(spec, parts, device))
        narrow_to(spec.committed, parts.middle)
        self._scale = LossScale(enabled=spec.amp == "fp16")
        self.needs_weights = state_digest(partition_state(parts.middle)) != spec.digest
        middle = parts.middle.to(device.torch_device)
        amp = None if spec.amp == "none" else spec.amp
        with seeded(spec.seed, device.torch_device):
            chunk = [
                torch.rand(info.batched(min(spec.chunk_size, SAMPLES)), device=device.torch_device).to(
                    info.dtype
                )
                for info in parts.crossing(1, spec.committed)
            ]
            choice = choose_memory_format(
                middle, chunk, option=spec.memory_format, autocast=AMP_DTYPES[amp] if amp else None
            )
        self.memory_format = choice.name
        self.stage = Stage(
            middle,
            "middle",
            seed=spec.seed,
            needs_grad=[info.requires_grad for info in parts.cut1],
            optim=spec.optim,
            device=device.torch_device,
            memory_format=choice.format,
            amp=amp,
        )

    def _check_size(self, max_payload: int) -> None:
        for cut, infos in ((1, self._parts.cut1), (2, self._parts.cut2)):
            chunk_bytes = sum(info.dense_bytes(self._chunk_size) for info in infos)
            if chunk_bytes > max_payload:
                raise UserError(
                    f"a chunk of {self._chunk_size} samples has {chunk_bytes} bytes at cut {cut}, and a message "
                    f"carries {max_payload}; use more chunks or a smaller batch"
                )

    @property
    def committed(self) -> int:
        """The steps that its narrowing layers have seen; 0 where it has none."""
        return committed_steps(self.stage.partition)

    def crossing(self, cut: int, *, gradients: bool, committed: int = 0) -> list[TensorInfo]:
        """Describe what crosses a cut, in order: all of it forward, what needs a gradient backward.

        Args:
            cut: 1 or 2.
            gradients: which of the two.
            committed: steps before; names and gradients are the same for any.
        """
        infos = self._parts.crossing(cut, committed)
        return [info for info in infos if info.requires_grad or not gradients]

    def unmasked(self, cut: int) -> frozenset[str]:
        """See `Split.unmasked`."""
        return self._parts.unmasked(cut)

    def check(self, info: TensorInfo, tensor: Tensor, known: Sizes = UNKNOWN) -> Sizes:
        """Check that a tensor that came is what crosses there, for at most one chunk of samples.

        Args:
            info: what crosses.
            tensor: what came.
            known: what the tensors before it have told of the chunk.

        Returns:
            What is known now.

        Raises:
            CorruptPayload: it is not.
        """
        rows = tensor.shape[0] if tensor.dim() else 0
        samples = rows // info.rows if info.rows else known.samples
        tokens = info.tokens(tensor.shape) if info.token_dims else known.tokens
        most = self._chunk_size if known.samples is None else known.samples
        longest = info.tokens(info.batched(most)) if known.tokens is None else known.tokens
        fits = (
            (known.samples is None or samples == known.samples)
            and (known.tokens is None or tokens == known.tokens)
            and (samples is None or 1 <= samples <= most)
            and (tokens is None or longest is None or 1 <= tokens <= longest)
            and tuple(tensor.shape) == info.batched(samples or 0, tokens)
        )
        if not fits or tensor.dtype != info.dtype:
            wanted = "a full chunk" if known.samples is None else "this chunk"
            raise CorruptPayload(
                f"{info.name} came as {tensor.dtype} {list(tensor.shape)}; {wanted} of it is {info.dtype} "
                f"{list(info.batched(most, known.tokens))}"
            )
        return Sizes(samples, tokens)

    def max_bytes(self) -> int:
        """Return the bytes of the largest tensor that one chunk brings."""
        return max(info.dense_bytes(self._chunk_size) for info in (*self._parts.cut1, *self._parts.cut2))

    def state(self) -> dict[str, Tensor]:
        """Return parameters and buffers, by name, in host memory."""
        return {name: tensor.cpu() for name, tensor in partition_state(self.stage.partition).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the client's initial weights.

        Raises:
            CorruptPayload: they do not fit together.
        """
        try:
            self.stage.partition.load_state_dict(dict(state), strict=True)
        except RuntimeError as error:
            raise CorruptPayload(f"the weights do not fit: {' '.join(str(error).split())}") from error
        for layer in narrowing_layers(self.stage.partition):
            if layer.committed != self._committed:
                raise CorruptPayload(
                    f"the weights are those after {layer.committed} steps, and the job begins after {self._committed}"
                )
        self.needs_weights = False

    def backward(self, chunk: int, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Run a chunk backward.

        Args:
            chunk: its number.
            gradients: of those outputs that need one, in order.

        Returns:
            The gradients of the inputs, None for those that need none.
        """
        scale = self._scale.value
        given = iter(gradients if scale == 1.0 else [g * scale for g in gradients])
        wanted = [next(given) if info.requires_grad else None for info in self._parts.cut2]
        results = self.stage.backward(chunk, wanted)
        if scale == 1.0:
            return results
        return tuple(None if g is None else g / scale for g in results)

    def finish_gradients(self) -> float:
        """After the last chunk's backward: undo the loss scale; return the sum of squares of the gradients."""
        if self._scale.value != 1.0:
            self.stage.scale_gradients(1 / self._scale.value)
        return self.stage.grad_norm_sq()

    def commit(self, scale: float | None) -> None:
        """Apply the step."""
        self.stage.commit(scale)
        self._scale.stepped()

    def drop(self) -> None:
        """Undo the step, whose gradients were not finite."""
        self.stage.rollback()
        self._scale.overflowed()

    def snapshot(self) -> dict[str, Any]:
        """Return everything that training changes; later steps change it too, so copy it."""
        return {"stage": self.stage.snapshot(), "scale": self._scale.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        self.stage.restore(state["stage"])
        self._scale.load_state_dict(state["scale"])
        self.needs_weights = False


def _training_bytes(spec: JobSpec, parts: Split, device: Device) -> int:
    return training_bytes(
        parts.middle,
        parts.cut1,
        chunk_size=spec.chunk_size,
        in_flight=min(spec.in_flight, spec.chunks),
        optim=spec.optim,
        tokens=spec.model.tokens,
        device=device.torch_device,
        amp=None if spec.amp == "none" else AMP_DTYPES[spec.amp],
    ).total


def _build(spec: JobSpec) -> Split:
    if is_registered(spec.model.name) or is_folder(spec.model.name):
        # Its weights could only be files, and files here are not the client's to name.
        spec = replace(spec, model=replace(spec.model, weights=None))
    try:
        model = build_model(spec.model, offline=True)
    except UserError:
        # Weights that this machine does not have and cannot fetch: the digest will differ, and the client sends
        # its own.
        if spec.model.weights is None:
            raise
        model = build_model(replace(spec.model, weights=None))
    return with_bottleneck(
        split(model, spec.cuts, model_inputs(spec.model)), spec.bottlenecks, seed=spec.seed
    )
