"""Chunks forward through the split model in evaluation mode."""

from collections.abc import Awaitable, Callable

from torch import Tensor
from torch.nn.functional import cross_entropy

from common.schedule import Action
from edge.context import Context
from edge.passes import Pass
from wire.errors import RemoteProtocolError
from wire.messages import Backward, Forward

FetchChunk = Callable[[int], Awaitable[tuple[tuple[Tensor, ...], Tensor]]]
"""Gives chunk i of an evaluation: what the front takes of n samples, and labels ``[n]``."""


class EvaluationPass(Pass):
    """Chunks forward in evaluation mode; nothing of the model or of training's codecs changes.

    Args:
        context: what to work with.
        step: the number of the last training step.
        fetch: gives the chunks.
    """

    evaluate = True

    def __init__(self, context: Context, step: int, fetch: FetchChunk) -> None:
        super().__init__(context, step)
        self.encoders = {1: context.encoder("cut1.act")}
        self.decoders = {2: context.decoder("cut2.act")}
        self._fetch = fetch
        self._labels: dict[int, Tensor] = {}
        self._tokens: dict[int, int | None] = {}

    def samples(self, chunk: int) -> int:
        """See `Pass.samples`."""
        return len(self._labels[chunk])

    def tokens(self, chunk: int) -> int | None:
        """See `Pass.tokens`."""
        return self._tokens[chunk]

    def incoming(self, message: Forward | Backward) -> tuple[Action, int]:
        """See `Pass.incoming`."""
        if not isinstance(message, Forward) or message.chunk not in self._labels:
            raise RemoteProtocolError(
                f"{message.kind} of chunk {message.chunk} came, which nothing asked for"
            )
        return Action(2, "F", message.chunk), 2

    async def _perform(self, action: Action) -> None:
        if action.stage == 0:
            inputs, self._labels[action.chunk] = await self._fetch(action.chunk)
            self.send(action, 1, await self.compute(action, self._front, action.chunk, inputs))
        else:
            await self.compute(action, self._back, action.chunk, self.arrived.pop(action))

    def _front(self, chunk: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = self.context.trim(inputs)
        self._tokens[chunk] = self.context.tokens(inputs)
        outputs = self.context.front.evaluate(inputs)
        self.held[chunk] = outputs if self.context.parts.kept else ()
        return outputs[: len(self.context.parts.cut1)]

    def _back(self, chunk: int, arrived: tuple[Tensor, ...]) -> None:
        labels = self._labels.pop(chunk)
        self._tokens.pop(chunk)
        logits = self.context.back.evaluate(self.context.back_inputs(arrived, self.held.pop(chunk)))[0]
        self.score.add(cross_entropy(logits, labels).item(), logits, labels)
