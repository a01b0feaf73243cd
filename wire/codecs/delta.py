"""delta: the change of an activation since its sample was last seen.

Activations of the same sample resemble each other from one epoch to the next, the more so the smaller the
learning rate has become. What is quantized is therefore their difference, whose range, and so whose error,
is small:

    first visit    send a                    m = a
    after that     send Q(a - m)             m = m + Q(a - m)

Both ends keep m: the encoder decodes what it sends.

Source: AQ-SGD, Wang and others 2022, https://arxiv.org/abs/2206.01299. As there, gradients are not differences:
they pass as they are, to the rest of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.base import Call, Codec, Facts, NonFiniteTensor, Packed, Part, PartType, Role, no_meta
from wire.codecs.layout import TensorType, flat, padded
from wire.codecs.options import ArgumentError, parse_size, split_options
from wire.codecs.registry import register
from wire.codecs.store import STORED, SampleStore
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TAKES = (torch.float32, torch.float16, torch.bfloat16)
_DEFAULT_LIMIT = 4 << 30
_FIRST = ("fp16", "full", "rest")


@dataclass(frozen=True, slots=True)
class _Samples:
    """How a tensor's memory falls into samples.

    Attributes:
        sizes: how many elements each has.
        axis: the dimension along which they follow each other.
        stride: elements of memory for each step along it.
        seen: which of them are kept on both ends already.
    """

    sizes: tuple[int, ...]
    axis: int
    stride: int
    seen: tuple[bool, ...]

    @property
    def new(self) -> tuple[bool, ...]:
        """The others."""
        return tuple(not seen for seen in self.seen)

    def chosen(self, whole: TensorType, which: Sequence[bool], dtype: torch.dtype) -> TensorType:
        """The type of some of the samples alone."""
        shape = list(whole.shape)
        shape[self.axis : self.axis + 1] = [sum(compress(self.sizes, which)) // self.stride] if shape else []
        return TensorType(dtype, tuple(shape), whole.order)


@register
class Delta(Codec):
    """Sends what has changed of each sample since it was last sent, and a new sample itself.

    Args:
        args: ``limit=4G``, the most bytes on disk for each tensor that crosses, on either end; samples that do not
            fit are new every time. ``first=fp16`` for how new ones are sent: ``full``, in their own dtype, or
            ``rest``, through the rest of the chain.
        role: what the stream carries.
    """

    name = "delta"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    mirrored = True
    everywhere = True
    examples: ClassVar[tuple[str, ...]] = ("", "limit=1M", "first=full,limit=8G", "first=rest")

    def __init__(self, args: str, role: Role) -> None:
        super().__init__("", role)
        limit, self._first = _DEFAULT_LIMIT, _FIRST[0]
        for option, position in split_options(args):
            name, _, value = option.partition("=")
            if name == "first" and value in _FIRST:
                self._first = value
            elif name == "limit" and (size := parse_size(value)):
                limit = size
            else:
                raise ArgumentError(
                    f"{option!r} is no argument of {self.name}; it takes limit=SIZE, such as limit=4G,"
                    f" and first=HOW, of {', '.join(_FIRST)}",
                    position,
                )
        self.uses_ids = role is Role.ACTIVATION
        self.disk_bytes = limit if self.uses_ids else 0
        self._store = SampleStore(limit)

    @classmethod
    def misplaced(cls, before: Sequence[type[Codec]], after: Sequence[type[Codec]]) -> str | None:
        """It knows samples only as they were; and both ends must decode the same bits."""
        if any(codec.name != "ragged" for codec in before):
            return "only ragged comes before it, as in ragged+delta+int4"
        inexact = next((codec.name for codec in after if not codec.exact), None)
        if inexact is not None:
            return f"{inexact}, behind it, is rounded otherwise on another machine, and both ends must agree to the bit"
        return None

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """Up to two parts, the changes of the samples that were seen before and the new samples."""
        whole = TensorType.of(x)
        samples = self._samples(whole, call.facts)
        if samples is None:
            return None
        types = self._types(whole, samples)
        if sum(padded(part.type.nbytes) for part in types) > padded(whole.nbytes):
            return None
        line = flat(x)
        if not bool(line.isfinite().all()):
            raise NonFiniteTensor(self.name)
        values = []
        if any(samples.seen):
            change = _pick(line, samples.sizes, samples.seen).float() - self._kept(
                samples, call.facts, x.device
            )
            values.append(_cast(change, x.dtype))
        if not all(samples.seen):
            values.append(_cast(_pick(line, samples.sizes, samples.new), self._first_dtype(whole)))
        return Packed(
            tuple(Part(part.type.shaped(v), part.follow) for part, v in zip(types, values, strict=True))
        )

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """The shape of the whole, of the samples seen before in its dtype, and of the new ones as told."""
        no_meta(self.name, meta)
        samples = self._samples(whole, facts)
        if samples is None:
            raise CorruptPayload(
                f"{self.name} never takes {self.role.value}s of {whole.dtype}, {list(whole.shape)}, in such a chunk"
            )
        return self._types(whole, samples)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """What was kept and the change, and the new samples; all are kept then, for the next time."""
        samples = self._samples(whole, facts)
        assert samples is not None
        given = iter(parts)
        line = torch.empty(whole.numel, dtype=whole.dtype, device=parts[0].device)
        pieces = line.split(samples.sizes)
        if any(samples.seen):
            change = flat(next(given))
            values = _cast(self._kept(samples, facts, change.device) + change.float(), whole.dtype)
            _put(values, compress(pieces, samples.seen))
        if not all(samples.seen):
            _put(flat(next(given)), compress(pieces, samples.new))
        if facts.ids is not None:
            kept = _cast(line.float(), STORED).cpu()
            for sample, values in zip(facts.ids, kept.split(samples.sizes), strict=True):
                self._store.write(sample, values, whole.order)
        return whole.shaped(line)

    def error_bound(self, x: Tensor) -> Tensor:
        """Of a sample that is new: half a unit in float16's last place, and beyond its range the distance to it."""
        if self._first != "fp16" or x.dtype != torch.float32 or not x.numel():
            return torch.zeros((), dtype=torch.float64)
        info, size = torch.finfo(STORED), x.double().abs()
        return size.clamp(min=info.tiny) * (info.eps / 2) + (size - info.max).clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, copied into memory."""
        return self._store.state_dict() if len(self._store) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state that `state_dict` returned."""
        if state and state.keys() != {"used", "places", "values"}:
            raise ValueError(f"{self.name} keeps samples, and {sorted(state)} was given")
        self._store.load_state_dict(state or SampleStore(self.disk_bytes).state_dict())

    def commit(self) -> None:
        """What the step has changed stays."""
        self._store.commit()

    def rollback(self) -> None:
        """What the step has changed is undone; nothing else is touched."""
        self._store.rollback()

    def close(self) -> None:
        """Gives the disk space back."""
        self._store.close()

    def _samples(self, whole: TensorType, facts: Facts) -> _Samples | None:
        """The samples of a tensor; of one whose samples are not known, a single new one. None if it is not taken."""
        shape, ids = whole.shape, facts.ids
        if self.role is not Role.ACTIVATION or whole.dtype not in _TAKES or whole.numel == 0:
            return None
        if ids is None:
            return _Samples((whole.numel,), 0, whole.numel // shape[0] if shape else 1, (False,))
        if shape and ids and shape[0] % len(ids) == 0:
            sizes, axis = (whole.numel // len(ids),) * len(ids), 0
        elif (
            facts.kept is not None and len(facts.lengths) == len(ids) and shape[:2] == (1, sum(facts.lengths))
        ):
            sizes, axis = tuple(length * (whole.numel // shape[1]) for length in facts.lengths), 1
        else:
            return None
        seen = tuple(
            self._store.holds(sample, size, whole.order) for sample, size in zip(ids, sizes, strict=True)
        )
        return _Samples(sizes, axis, whole.numel // shape[axis], seen)

    def _types(self, whole: TensorType, samples: _Samples) -> tuple[PartType, ...]:
        seen = samples.chosen(whole, samples.seen, whole.dtype)
        new = samples.chosen(whole, samples.new, self._first_dtype(whole))
        parts = []
        if any(samples.seen):
            parts.append(PartType(seen, follow=True))
        if not all(samples.seen):
            parts.append(PartType(new, follow=self._first == "rest"))
        return tuple(parts)

    def _first_dtype(self, whole: TensorType) -> torch.dtype:
        return torch.float16 if self._first == "fp16" and whole.dtype.itemsize > 2 else whole.dtype

    def _kept(self, samples: _Samples, facts: Facts, device: torch.device) -> Tensor:
        """What is kept of the samples that were seen before, float32."""
        assert facts.ids is not None
        return self._store.read(list(compress(facts.ids, samples.seen))).to(device).float()


def _pick(line: Tensor, sizes: tuple[int, ...], which: Sequence[bool]) -> Tensor:
    """Some pieces of a line, as one."""
    return line if all(which) else torch.cat(list(compress(line.split(sizes), which)))


def _put(values: Tensor, pieces: Any) -> None:
    """The inverse of `_pick`."""
    at = 0
    for piece in pieces:
        piece.copy_(values[at : at + piece.numel()])
        at += piece.numel()


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, clamped to its range."""
    if dtype == torch.float16 and values.dtype != dtype:
        top = torch.finfo(dtype).max
        values = values.clamp(-top, top)
    return values.to(dtype)
