import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from edge.data.augment import IMAGENET, Augment
from edge.data.draws import epoch_order
from edge.data.loader import Batch, Batches, Plan, batch_count, eval_batches, train_batches
from edge.data.source import MemorySource, Subset

PLAIN = {"image_size": 8, "normalise": IMAGENET}


def some_source(n, side=8):
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    return MemorySource(images, np.arange(n) % 10)


class WatchedSource(MemorySource):
    """Says when each fetch begins, and lets it go on only when told."""

    def __init__(self, n):
        super().__init__(np.zeros((n, 8, 8, 3), np.uint8), np.arange(n))
        self.begun = [threading.Event() for _ in range(n)]
        self.go_on = [threading.Event() for _ in range(n)]
        self.threads = set()

    def fetch(self, indices, size):
        self.threads.add(threading.current_thread())
        self.begun[indices[0]].set()
        self.go_on[indices[0]].wait()
        return super().fetch(indices, size)


class DamagedSource(MemorySource):
    """Cannot read one sample."""

    def fetch(self, indices, size):
        if 5 in indices:
            raise UserError("cannot read the image 5")
        return super().fetch(indices, size)


def drain(batches):
    with batches:
        return list(batches)


def test_epoch_holds_every_sample_once_in_its_order():
    batches = drain(train_batches(some_source(21), batch_size=8, seed=3, epoch=2, **PLAIN))
    assert [len(b) for b in batches] == [8, 8, 5]
    assert [b.number for b in batches] == [0, 1, 2]
    assert torch.cat([b.sample_ids for b in batches]).tolist() == epoch_order(21, 3, 2).tolist()
    for batch in batches:
        assert batch.inputs[0].shape == (len(batch), 3, 8, 8)
        assert batch.inputs[0].dtype == torch.float32
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == (batch.sample_ids % 10).tolist()


def test_smaller_last_batch_can_be_left_out():
    batches = drain(train_batches(some_source(21), batch_size=8, seed=0, epoch=0, drop_last=True, **PLAIN))
    assert [len(b) for b in batches] == [8, 8]


@pytest.mark.parametrize(
    ("n", "drop_last", "count"), [(16, False, 2), (17, False, 3), (17, True, 2), (0, False, 0)]
)
def test_batch_count_says_how_many_come(n, drop_last, count):
    assert batch_count(n, 8, drop_last=drop_last) == count
    batches = train_batches(some_source(n), batch_size=8, seed=0, epoch=0, drop_last=drop_last, **PLAIN)
    assert len(drain(batches)) == count


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    other_size=st.integers(1, 12),
    ahead=st.integers(1, 4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**63),
)
def test_sample_looks_alike_for_any_batch_size_and_any_threads(
    n, batch_size, other_size, ahead, threads, seed
):
    def look(batch_size, **how):
        batches = train_batches(
            some_source(n), batch_size=batch_size, seed=seed, epoch=1, augment=Augment(), **how, **PLAIN
        )
        return torch.cat([b.inputs[0] for b in drain(batches)])

    assert torch.equal(look(batch_size, ahead=ahead, threads=threads), look(other_size))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), n=st.integers(1, 30), batch_size=st.integers(1, 8), epoch=st.integers(0, 5))
def test_resumed_epoch_is_the_tail_of_the_whole_one(data, n, batch_size, epoch):
    start = data.draw(st.integers(0, batch_count(n, batch_size)))

    def read(**where):
        how = {"batch_size": batch_size, "seed": 0, "augment": Augment()}
        return drain(train_batches(some_source(n), **how, **where, **PLAIN))

    whole = read(epoch=epoch, epochs=2)
    tail = read(epoch=epoch, epochs=2, start_batch=start)
    assert len(tail) == len(whole) - start
    for a, b in zip(whole[start:], tail, strict=True):
        assert (a.epoch, a.number) == (b.epoch, b.number)
        assert torch.equal(a.inputs[0], b.inputs[0])
        assert torch.equal(a.sample_ids, b.sample_ids)


def test_several_epochs_follow_each_other():
    batches = drain(train_batches(some_source(10), batch_size=4, seed=0, epoch=3, epochs=2, **PLAIN))
    assert [(b.epoch, b.number) for b in batches] == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2)]
    assert torch.cat([b.sample_ids for b in batches[3:]]).tolist() == epoch_order(10, 0, 4).tolist()


def test_evaluation_reads_in_order_and_as_it_is():
    source = some_source(11)
    batches = drain(eval_batches(source, batch_size=4, **PLAIN))
    assert torch.cat([b.sample_ids for b in batches]).tolist() == list(range(11))
    plain = drain(train_batches(source, batch_size=11, seed=0, epoch=0, **PLAIN))[0]
    assert torch.equal(torch.cat([b.inputs[0] for b in batches])[plain.sample_ids], plain.inputs[0])


def test_batches_can_be_channels_last():
    batches = drain(eval_batches(some_source(5), batch_size=5, channels_last=True, **PLAIN))
    assert batches[0].inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_batches_come_in_order_when_a_later_one_is_done_first():
    source = WatchedSource(2)
    with eval_batches(source, batch_size=1, threads=2, **PLAIN) as batches:
        source.begun[0].wait()
        source.go_on[1].set()
        source.begun[1].wait()
        assert not batches.ready()
        source.go_on[0].set()
        assert [b.labels.item() for b in batches] == [0, 1]


def test_loader_runs_ahead_no_further_than_it_may():
    source = WatchedSource(4)
    for event in source.go_on:
        event.set()
    with eval_batches(source, batch_size=1, ahead=2, **PLAIN) as batches:
        source.begun[1].wait()
        assert not source.begun[2].is_set()
        assert batches.get().labels.item() == 0
        source.begun[2].wait()
        assert not source.begun[3].is_set()


def test_only_one_large_batch_is_prepared_ahead():
    source = WatchedSource(4)
    for event in source.go_on:
        event.set()
    pixels = {**PLAIN, "image_size": 1200}  # 17 MB an image
    with train_batches(source, batch_size=1, seed=0, epoch=0, **pixels) as batches:
        while not batches.ready():
            pass
        assert sum(event.is_set() for event in source.begun) == 1
        batches.get()
        while not batches.ready():
            pass
        assert sum(event.is_set() for event in source.begun) == 2


def test_waiting_is_counted_only_when_the_batch_was_late():
    begun, go_on = threading.Event(), threading.Event()
    seconds = iter([10.0, 12.5])

    def prepare(plan):
        if plan.number == 1:
            begun.set()
            go_on.wait()
        nothing = torch.zeros(1)
        return Batch(inputs=(nothing,), labels=nothing, sample_ids=nothing, epoch=0, number=plan.number)

    def clock():
        go_on.set()  # the consumer looks at the clock when it finds that it must wait
        return next(seconds)

    plans = (Plan(ids=np.arange(1), epoch=0, number=number) for number in range(2))
    with Batches(plans, prepare, clock=clock) as batches:
        begun.wait()  # one thread: it has finished batch 0 by now
        assert batches.ready()
        assert batches.get().number == 0
        assert batches.wait_s == 0
        assert not batches.ready()
        assert batches.get().number == 1
        assert batches.wait_s == 2.5


def test_error_reaches_the_consumer_at_its_batch_and_ends_the_threads():
    before = set(threading.enumerate())
    batches = eval_batches(
        DamagedSource(np.zeros((20, 8, 8, 3), np.uint8), np.zeros(20)), batch_size=2, **PLAIN
    )
    assert [batches.get().sample_ids.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="cannot read the image 5"):
        batches.get()
    assert batches.get() is None
    assert set(threading.enumerate()) <= before


def test_closing_early_ends_the_threads_and_the_batches():
    source = WatchedSource(50)
    for event in source.go_on:
        event.set()
    batches = eval_batches(source, batch_size=1, ahead=4, threads=2, **PLAIN)
    assert isinstance(batches.get(), Batch)
    batches.close()
    batches.close()
    assert batches.get() is None
    assert batches.ready()
    assert not any(thread.is_alive() for thread in source.threads)


def test_consumer_that_waits_is_let_go_when_the_loader_closes():
    source = WatchedSource(3)
    got = []
    batches = eval_batches(source, batch_size=1, **PLAIN)
    source.begun[0].wait()
    consumer = threading.Thread(target=lambda: got.extend(batches))
    consumer.start()
    closer = threading.Thread(target=batches.close)
    closer.start()
    for event in source.go_on:
        event.set()
    consumer.join()
    closer.join()
    assert [b.labels.item() for b in got] == list(range(len(got)))


def test_loader_computes_on_one_core_and_leaves_the_others_to_training():
    counts = {}

    class CountingSource(MemorySource):
        def fetch(self, indices, size):
            counts["loader"] = torch.get_num_threads()
            return super().fetch(indices, size)

    def later():
        counts["later"] = torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source = CountingSource(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4))
        with eval_batches(source, batch_size=2, threads=2, **PLAIN) as batches:
            batches.get()
            thread = threading.Thread(target=later)
            thread.start()
            thread.join()
        assert counts == {"loader": 1, "later": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_subset_is_numbered_anew():
    subset = Subset(some_source(20), np.array([3, 7, 11]))
    batch = drain(eval_batches(subset, batch_size=3, **PLAIN))[0]
    assert batch.sample_ids.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [3, 7, 1]


@pytest.mark.parametrize("wrong", [{"ahead": 0}, {"threads": 0}])
def test_loader_refuses_to_have_no_room_or_no_threads(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        eval_batches(some_source(3), batch_size=1, **wrong, **PLAIN)


def test_source_refuses_labels_that_do_not_match():
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        MemorySource(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(2))
