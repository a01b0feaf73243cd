"""What a server and the link to it are like, found by a few training steps that lead to nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.cost import ChunkCost, Link
from common.errors import UserError
from common.trace import Tracer
from edge.chunk_costs import ChunkCosts
from edge.compress import parse_compress
from edge.config import TrainConfig, parse_address
from edge.link import open_link
from edge.opened import RANDOM
from edge.progress import SilentProgress
from edge.security import wire_config
from edge.trainer import Trainer
from edge.tuner import MEASURED_STEPS

LIGHT = ("conv+int8", "int8")
"""What the first steps are compressed with: the first that suits what crosses."""

HEAVY = ("none", "int8")
"""What the others are compressed with, which measure the link: the first whose step does not take too long."""

MOST_S = 4.0
"""How long one step may take that measures the link."""

UNPACED = 2.0
"""How many times longer than they should messages have to take, for the link's pace not to be believed."""

_CHUNKS = 2
_EDGE, _CLOUD = ("0F", "2T", "0B"), ("1F", "1B")
_UP, _DOWN = ("0F", "2T"), ("1F", "1B")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How long work takes where it belongs, over what it takes on this machine with nothing else to do.

    Attributes:
        edge: computing on the edge.
        cloud: computing on the cloud.
        edge_codecs: encoding and decoding on the edge.
        cloud_codecs: the same on the cloud.
    """

    edge: float = 1.0
    cloud: float = 1.0
    edge_codecs: float = 1.0
    cloud_codecs: float = 1.0

    def scaled(self, cost: ChunkCost) -> ChunkCost:
        """Return the cost of a chunk that was measured with all parts on this machine."""
        return ChunkCost(
            seconds={
                kind: seconds * (self.cloud if kind in _CLOUD else self.edge)
                for kind, seconds in cost.seconds.items()
            },
            messages={
                kind: replace(
                    message,
                    encode_s=message.encode_s * (self.edge_codecs if kind in _UP else self.cloud_codecs),
                    decode_s=message.decode_s * (self.cloud_codecs if kind in _UP else self.edge_codecs),
                )
                for kind, message in cost.messages.items()
            },
        )

    @classmethod
    def between(cls, cost: ChunkCost, local: ChunkCost) -> "Speeds":
        """Compare what a chunk cost with what the same one costs on this machine alone."""
        return cls(
            edge=_share(_seconds(cost, _EDGE), _seconds(local, _EDGE)),
            cloud=_share(_seconds(cost, _CLOUD), _seconds(local, _CLOUD)),
            edge_codecs=_share(_codecs(cost, _UP, _DOWN), _codecs(local, _UP, _DOWN)),
            cloud_codecs=_share(_codecs(cost, _DOWN, _UP), _codecs(local, _DOWN, _UP)),
        )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a plan is for.

    Attributes:
        link: its rates and its delay, as measured or as assumed.
        speeds: of both sides.
        shared_cores: both sides compute on this machine.
    """

    link: Link
    speeds: Speeds
    shared_cores: bool = False


async def greet(config: TrainConfig) -> None:
    """Connect to the server and leave, so that what is wrong with it shows before anything is measured.

    Raises:
        UserError: the settings of the connection do not go together.
        WireError: the server cannot be reached, or turns this client away.
    """
    async with open_link(*parse_address(config.server), Tracer("edge", enabled=False), wire_config(config)):
        pass


async def probe(
    config: TrainConfig, costs: ChunkCosts, cuts: tuple[str, str], *, link: Link | None = None
) -> Surroundings:
    """Measure a server and the link to it.

    Args:
        config: of the run that is to be planned; the server builds its model, with random weights.
        costs: of the same model on this machine.
        cuts: of the run.
        link: one to assume in place of the one there is, which is not measured then.

    Raises:
        UserError: the server is refused, or refuses, for what the settings say.
        WireError: it cannot be reached, or the link failed.
    """
    light, local = _lightest(costs, cuts)
    steps = await _steps(config, cuts, light)
    around = Surroundings(
        link=link or steps.link,
        speeds=Speeds.between(steps.cost, local),
        shared_cores=steps.shared_cores,
    )
    if link is not None:
        return around
    for heavy in HEAVY:
        more = _bytes(costs.cost(cuts, parse_compress((heavy,)))) / max(1, _bytes(steps.cost))
        if heavy != light and steps.chunks * steps.moving_s * more <= MOST_S:
            heavier = await _steps(config, cuts, heavy)
            return replace(around, link=heavier.link)
    return around


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a few steps came to, of chunks that were alone on their way.

    Attributes:
        cost: of a chunk.
        chunks: of a step.
        step_s: seconds of a step.
        paced: the link as its two ends saw it take what they sent; a kernel may have taken all of it at once.
        shared_cores: both sides compute on this machine.
    """

    cost: ChunkCost
    chunks: int
    step_s: float
    paced: Link
    shared_cores: bool

    @property
    def moving_s(self) -> float:
        """Seconds that a chunk was on its way: of its step, what is neither work nor delay."""
        work_s = (
            sum(self.cost.seconds.values()) + _codecs(self.cost, _UP, _DOWN) + _codecs(self.cost, _DOWN, _UP)
        )
        return max(0.0, self.step_s / self.chunks - work_s - len(self.cost.messages) * self.paced.delay_s)

    @property
    def link(self) -> Link:
        """The link: as it was paced, or where that cannot be, for chunks took far longer, as fast as they went."""
        carrying_s = sum(
            message.size_bytes * 8 / (self.paced.up_bit_s if kind in _UP else self.paced.down_bit_s)
            for kind, message in self.cost.messages.items()
        )
        if carrying_s * UNPACED >= self.moving_s:
            return self.paced
        return self.paced.scaled(carrying_s / self.moving_s)


def _lightest(costs: ChunkCosts, cuts: tuple[str, str]) -> tuple[str, ChunkCost]:
    *others, last = LIGHT
    for spec in others:
        try:
            return spec, costs.cost(cuts, parse_compress((spec,)))
        except UserError:
            continue  # such as a convolution for tokens
    return last, costs.cost(cuts, parse_compress((last,)))


async def _steps(config: TrainConfig, cuts: tuple[str, str], spec: str) -> Steps:
    """Train a few steps with one chunk in flight, so that nothing waits for anything else, not for a core either."""
    size = -(-config.batch_size // config.chunks)
    trainer = Trainer(
        replace(
            config,
            weights=RANDOM,  # nothing is learnt, and the server can make them
            cuts=cuts,
            compress=(spec,),
            bottleneck=None,
            batch_size=_CHUNKS * size,
            chunks=_CHUNKS,
            depth=1,
            steps=max(MEASURED_STEPS),
            eval_every=0,
            save=None,
            checkpoint=None,
            metrics=None,
            trace=None,
            give_up_after=60.0,
        ),
        SilentProgress(),
    )
    result = await trainer.run()
    model, link = trainer.tuner.measured, trainer.tuner.link
    assert model is not None
    assert link is not None
    return Steps(
        cost=model.chunks[0],
        chunks=_CHUNKS,
        step_s=result.summary.median_step_s or 0.0,
        paced=link,
        shared_cores=model.shared_cores,
    )


def _share(seconds: float, of: float) -> float:
    return seconds / of if seconds > 0 and of > 0 else 1.0


def _seconds(cost: ChunkCost, kinds: Iterable[str]) -> float:
    return sum(cost.seconds.get(kind, 0.0) for kind in kinds)


def _codecs(cost: ChunkCost, sent: Iterable[str], received: Iterable[str]) -> float:
    """Sum the seconds that one side encodes and decodes."""
    encode_s = sum(cost.messages[kind].encode_s for kind in sent)
    return encode_s + sum(cost.messages[kind].decode_s for kind in received)


def _bytes(cost: ChunkCost) -> int:
    return sum(message.size_bytes for message in cost.messages.values())
