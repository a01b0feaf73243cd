"""What the server keeps of one pass of chunks, a training step's or an evaluation's, while it is under way."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cloud.device import Placed
from cloud.middle import Sizes
from cloud.streams import Streams
from common.driver import Driver
from common.schedule import Action
from wire.codecs.base import Facts
from wire.errors import RemoteProtocolError
from wire.messages import Backward, Forward


@dataclass(kw_only=True)
class Passing:
    """One pass.

    Attributes:
        step: its number, which every message of it carries.
        evaluate: whether it is an evaluation.
        committed: steps committed before it.
        chunks: how many chunks it has.
        most_in_flight: chunks that may be under way at once.
        codecs: the ends of its streams.
        driver: orders its computing.
        driving: runs the driver to the end.
        placed: what has come and waits to be computed; empty while it is decoded.
        sizes: of each chunk that came forward.
        facts: of each chunk that is in flight, for the codecs.
        encoded: answers that are ready to leave.
        in_flight: chunks that came forward and whose last answer has not left yet.
        began_s: when it began, by `time.monotonic`.
        busy_before_s: seconds that each lane had been busy when it began.
    """

    step: int
    evaluate: bool
    committed: int
    chunks: int
    most_in_flight: int
    codecs: Streams
    driver: Driver
    driving: asyncio.Task[None] = field(init=False)
    placed: dict[Action, Placed] = field(default_factory=dict)
    sizes: dict[int, Sizes] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)
    encoded: int = 0
    in_flight: int = 0
    began_s: float = field(default_factory=time.monotonic)
    busy_before_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """A training step that only lacks the client's word: all its answers have been made."""
        return not self.evaluate and self.encoded == 2 * self.chunks

    def accept(self, message: Forward | Backward) -> tuple[Action, int]:
        """Take note of tensors that came; return the action that they make possible and their cut.

        Raises:
            RemoteProtocolError: they belong to another step, come twice, or are more than may be under way.
        """
        is_forward = isinstance(message, Forward)
        action = Action(1, "F" if is_forward else "B", message.chunk)
        if message.step != self.step:
            raise RemoteProtocolError(f"{action} of step {message.step} came outside that step")
        if isinstance(message, Forward) and message.evaluate is not self.evaluate:
            under_way = "an evaluation" if self.evaluate else "training"
            raise RemoteProtocolError(f"{action} came with evaluate={message.evaluate} during {under_way}")
        if action in self.placed:
            raise RemoteProtocolError(f"{action} came twice")
        if is_forward:
            if self.in_flight == self.most_in_flight:
                raise RemoteProtocolError(f"more than {self.most_in_flight} chunks in flight")
            self.in_flight += 1
        self.placed[action] = Placed(())
        return action, 1 if is_forward else 2

    def answered(self, action: Action) -> None:
        """The answer to an action has left.

        Only now is a chunk no more in flight: a peer that does not read its answers cannot have more of them
        made.
        """
        if action.backward or self.evaluate:
            self.in_flight -= 1
            self.facts.pop(action.chunk, None)
        if self.evaluate:
            self.sizes.pop(action.chunk, None)
