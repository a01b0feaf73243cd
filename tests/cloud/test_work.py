"""What the server's lanes do: which shapes they take, and in what order a GPU sees what they compute."""

from contextlib import contextmanager

import pytest
import torch

import token_model  # noqa: F401  (registers its model)
from cloud.device import Device, LaneStreams
from cloud.middle import Middle
from cloud.passing import Passing
from cloud.streams import Streams
from cloud.work import Work
from common.model_spec import ModelSpec
from common.optim import OptimSpec
from common.spec import STREAMS, JobSpec
from wire.errors import CorruptPayload
from wire.streams import StreamEncoder, chunk_message

SPEC = JobSpec(
    model=ModelSpec(name="token_net", num_classes=10, image_size=16),
    cuts=("embed", "blocks"),
    bottlenecks=("decay:rate=0.5,steps=1,iterations=2",) * 2,
    optim=OptimSpec(lr=0.1),
    chunks=1,
    chunk_size=4,
)


def forward(middle, width):
    """A chunk of one width at cut 1."""
    (info,) = middle.crossing(1, gradients=False)
    tensors = {info.name: torch.ones(4, 16, width)}
    descs, buffers = StreamEncoder("none", gradient=False).encode(tensors, seed=0)
    received = bytearray(b"".join(buffers))  # in one piece, as it comes off the socket
    return chunk_message((descs, received), [info.name], 1, 0, backward=False)


def passing(middle, committed, evaluate):
    codecs = Streams.make(dict.fromkeys(STREAMS, "none"), middle.max_bytes())
    return Passing(
        step=1, evaluate=evaluate, committed=committed, chunks=1, most_in_flight=1, codecs=codecs, driver=None
    )


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_chunk_that_overtakes_the_commit_before_it_has_the_width_after_that_commit(evaluate):
    """Decoding has a lane of its own: the commit, which narrows the weights, may still wait to be computed."""
    middle = Middle(SPEC, Device(None))
    work = Work(middle, LaneStreams(Device(None)), seed=0)
    for committed, width in enumerate((24, 12, 6, 6)):
        this = passing(middle, committed, evaluate)
        (tensor,) = work.decode(this, forward(middle, width), 1).tensors
        assert tensor.shape == (4, 16, width)
        with pytest.raises(CorruptPayload):
            work.decode(this, forward(middle, width + 1), 1)
    assert middle.committed == 0
    with pytest.raises(CorruptPayload):
        work.decode(passing(middle, 0, evaluate), forward(middle, 12), 1)


class Recorded:
    """Streams that know whether the compute stream is the current one."""

    is_computing = False

    @contextmanager
    def computing(self):
        self.is_computing = True
        yield
        self.is_computing = False


def test_what_lies_between_chunks_runs_on_their_stream():
    streams = Recorded()
    work = Work(None, streams, seed=0)
    assert work.between(lambda scale: (streams.is_computing, scale), 0.5) == (True, 0.5)
    assert not streams.is_computing
