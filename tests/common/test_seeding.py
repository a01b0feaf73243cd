"""Seeds are a pure function of their path: the same on every machine, and different for different paths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.seeding import derive_seed

PART = st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="\x1f"), max_size=12)
PATHS = st.lists(PART, max_size=5).map(tuple)


def test_a_seed_is_the_same_on_every_machine_and_in_every_version():
    assert derive_seed(0, 1, 2, "middle") == 1430322719683596155
    assert derive_seed(7, "bottleneck", 1, 0) == 5197887045689475884


@settings(deadline=None)
@given(path=PATHS)
def test_any_seed_is_one_that_torch_takes(path):
    seed = derive_seed(*path)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


@settings(deadline=None)
@given(one=PATHS, other=PATHS)
def test_different_paths_have_different_seeds(one, other):
    assert (derive_seed(*one) == derive_seed(*other)) is (one == other)


def test_a_number_is_not_its_spelling_and_order_matters():
    seeds = {derive_seed(*path) for path in ((1, 2), (2, 1), ("1", 2), (1, "2"), (12,), ("12",), (1, 2, ""))}
    assert len(seeds) == 7
