import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge.data.draws import balanced_subset, below, draw, epoch_order

seeds = st.integers(-(2**63), 2**64)
epochs = st.integers(0, 10_000)


@given(n=st.integers(0, 500), seed=seeds, epoch=epochs)
def test_order_of_an_epoch_is_a_permutation_that_comes_back_the_same(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))


@given(seed=seeds, epoch=epochs)
def test_orders_differ_between_epochs_and_between_seeds(seed, epoch):
    order = epoch_order(100, seed, epoch)
    assert (order != epoch_order(100, seed, epoch + 1)).any()
    assert (order != epoch_order(100, seed + 1, epoch)).any()


def test_order_stays_the_same_from_release_to_release():
    # A resumed run relies on it: whoever changes this line breaks every checkpoint there is.
    assert epoch_order(10, 0, 0).tolist() == [6, 2, 8, 3, 1, 7, 4, 0, 9, 5]


@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=50), seed=seeds)
def test_bits_of_a_sample_do_not_depend_on_its_neighbours(ids, seed):
    together = draw(np.array(ids), seed, "flip", 0)
    alone = [draw(np.array([i]), seed, "flip", 0)[0] for i in ids]
    assert together.tolist() == alone


@given(limit=st.integers(1, 1000), bits=st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_bits_become_integers_below_the_limit(limit, bits):
    drawn = below(np.array(bits, np.uint64), limit)
    assert (drawn >= 0).all()
    assert (drawn < limit).all()


def test_integers_below_a_limit_are_equally_frequent():
    counts = np.bincount(below(draw(np.arange(90_000), 0, "right", 0), 9))
    assert len(counts) == 9
    assert counts.min() > 9_600
    assert counts.max() < 10_400


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=100), limit=st.integers(1, 120), seed=seeds)
def test_subset_takes_classes_as_evenly_as_they_come(labels, limit, seed):
    labels = np.array(labels)
    chosen = balanced_subset(labels, limit, seed)
    assert len(chosen) == min(limit, len(labels))
    assert (np.diff(chosen) > 0).all()
    taken, there = np.bincount(labels[chosen], minlength=5), np.bincount(labels, minlength=5)
    # A class that gave all it has may lag; no other differs from the richest by more than one.
    assert ((taken >= taken.max() - 1) | (taken == there)).all()


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), seed=seeds, data=st.data())
def test_larger_subset_keeps_what_a_smaller_one_chose(labels, seed, data):
    labels = np.array(labels)
    limit = data.draw(st.integers(1, len(labels) - 1))
    assert set(balanced_subset(labels, limit, seed)) <= set(balanced_subset(labels, limit + 1, seed))
