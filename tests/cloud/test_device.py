"""Where the middle computes: plain calls on a CPU, three ordered streams on a GPU."""

import numpy as np
import pytest
import torch

from cloud import device as device_module
from cloud.device import Device, LaneStreams, Placed, first_gpu
from cloud.streams import Streams
from common.errors import UserError
from common.spec import STREAMS
from wire.streams import StreamDecoder, StreamEncoder, chunk_message

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")


@pytest.fixture
def gpus(monkeypatch):
    """Set how many GPUs torch says there are."""

    def there_are(count):
        monkeypatch.setattr(device_module.torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(device_module.torch.cuda, "device_count", lambda: count)

    return there_are


def test_the_cpu_is_always_there():
    cpu = Device(None)
    assert (cpu.torch_device, cpu.is_cuda, cpu.name) == (torch.device("cpu"), False, "cpu")


@pytest.mark.parametrize(
    ("gpu", "count", "found"),
    [
        (0, 0, "torch sees no GPU on this machine"),
        (2, 2, "it sees GPUs 0 to 1"),
        (-1, 2, "it sees GPUs 0 to 1"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(gpu, count, found, gpus):
    gpus(count)
    with pytest.raises(UserError, match=f"^there is no GPU {gpu}: {found}; choose another --gpu, or --cpu$"):
        Device(gpu)


def test_a_gpu_that_is_there_is_taken(gpus):
    gpus(2)
    second = Device(1)
    assert (second.torch_device, second.is_cuda) == (torch.device("cuda", 1), True)


@pytest.mark.parametrize(("count", "first"), [(0, None), (1, 0), (4, 0)])
def test_the_first_gpu_is_the_default_where_there_is_one(count, first, gpus):
    gpus(count)
    assert first_gpu() == first


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_a_receive_buffer_on_the_cpu_has_its_size_in_bytes(size):
    buffer = Device(None).allocate(size)
    assert (buffer.dtype, buffer.shape) == (np.uint8, (size,))
    buffer[:] = 7
    memoryview(buffer)[:1] = b"\x01"[:size]


# ---- lanes on a CPU ----


def test_lanes_on_a_cpu_are_plain_calls():
    lanes = LaneStreams(Device(None))
    x = torch.arange(3.0)
    placed = lanes.decode(lambda: (x,))
    assert placed == Placed((x,), None)
    assert placed.tensors[0] is x
    doubled = lanes.compute(lambda tensors: [t * 2 for t in tensors], placed)
    assert doubled.ready is None
    assert lanes.encode(lambda tensors: tensors[0].tolist(), doubled) == [0, 2, 4]


def test_results_that_are_none_are_dropped_and_their_order_kept():
    lanes = LaneStreams(Device(None))
    a, b = torch.zeros(1), torch.ones(1)
    placed = lanes.compute(lambda: (None, a, None, b))
    assert [t is wanted for t, wanted in zip(placed.tensors, (a, b), strict=True)] == [True, True]


def test_every_input_of_a_computation_is_passed_on():
    lanes = LaneStreams(Device(None))
    one, two = Placed((torch.ones(1), torch.ones(1) * 2)), Placed((torch.ones(1) * 4,))
    placed = lanes.compute(lambda first, second: (sum(first) + sum(second),), one, two)
    assert placed.tensors[0].item() == 7


@pytest.mark.parametrize("lane", ["compute", "decode"])
def test_an_error_on_a_lane_is_raised_to_the_caller(lane):
    def fail():
        raise ArithmeticError("on a lane")

    with pytest.raises(ArithmeticError, match="on a lane"):
        getattr(LaneStreams(Device(None)), lane)(fail)


def round_trip(device, chain):
    """Decode what an edge sent, compute with it, encode the result, and decode that as the edge does."""
    lanes = LaneStreams(device)
    streams = Streams.make(dict.fromkeys(STREAMS, chain), 1 << 20)
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    sent = StreamEncoder(chain, gradient=False).encode({"x": x}, seed=1)
    descs, buffers = sent
    payload = np.frombuffer(b"".join(buffers), np.uint8)
    received = device.allocate(len(payload))
    received[:] = payload
    message = chunk_message((descs, memoryview(received)), ["x"], 1, 0, backward=False)

    def decode():
        return tuple(streams.decoders[1].decode(message, ["x"], device=device.torch_device).values())

    placed = lanes.decode(decode)
    if device.is_cuda:
        received[:] = 0  # what was copied to the GPU needs it no more
    doubled = lanes.compute(lambda tensors: [t * 2 for t in tensors], placed)
    again = lanes.compute(lambda tensors: [t + 1 for t in tensors], doubled)
    descs, buffers = lanes.encode(
        lambda tensors: streams.encoders[2].encode({"y": tensors[0]}, seed=2), again
    )
    answer = chunk_message((descs, memoryview(b"".join(buffers))), ["y"], 1, 0, backward=False)
    decoder = StreamDecoder(chain, gradient=False, max_bytes=1 << 20)
    return x, placed, decoder.decode(answer, ["y"])["y"]


@pytest.mark.parametrize("chain", ["none", "fp16", "int8", "int8+lz4"])
def test_a_tensor_goes_through_all_three_lanes_of_a_cpu(chain):
    x, _, y = round_trip(Device(None), chain)
    assert torch.allclose(y, x * 2 + 1, atol=0 if chain == "none" else 0.1)


@needs_gpu
@pytest.mark.parametrize("chain", ["none", "fp16", "int8", "int8+lz4"])
def test_a_tensor_goes_through_all_three_streams_of_a_gpu(chain):
    x, placed, y = round_trip(Device(0), chain)
    assert placed.ready is not None
    assert placed.tensors[0].is_cuda
    assert not y.is_cuda
    assert torch.allclose(y, x * 2 + 1, atol=0 if chain == "none" else 0.1)


@needs_gpu
def test_a_gpu_has_a_name_and_buffers_that_copies_can_leave_in_the_background():
    gpu = Device(0)
    assert gpu.name.startswith("cuda:0 ")
    assert torch.from_numpy(gpu.allocate(4096)).is_pinned()


@needs_gpu
def test_each_lane_of_a_gpu_works_on_a_stream_of_its_own_and_leaves_the_current_one():
    lanes, seen = LaneStreams(Device(0)), []
    before = torch.cuda.current_stream()

    def look(*_inputs):
        seen.append(torch.cuda.current_stream())
        return (torch.ones(1, device="cuda"),)

    placed = lanes.decode(look)
    lanes.encode(look, lanes.compute(look, placed))
    with lanes.computing():
        look()
    assert len({stream.cuda_stream for stream in (*seen, before)}) == 4
    assert seen[3] == seen[1]
    assert torch.cuda.current_stream() == before


@needs_gpu
def test_a_lane_of_a_gpu_waits_for_what_it_needs():
    lanes = LaneStreams(Device(0))
    large = torch.ones(2048, 2048, device="cuda")
    torch.cuda.synchronize()

    def busy():
        x = large
        for _ in range(50):
            x = x @ large / 2048
        return (x,)

    # Encoded at once: without the event it would be read long before it is there.
    total = lanes.encode(lambda tensors: tensors[0].sum().cpu(), lanes.compute(busy))
    assert total.item() == pytest.approx(2048 * 2048, rel=1e-3)
