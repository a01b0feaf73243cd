"""Where a model is worth cutting: deeper only for fewer bytes, and never into the edge's own layers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cut_choice import WORTHWHILE, first_cuts, second_cuts
from common.flops import Operation, profile
from common.graph import find_cut, trace
from common.model_spec import ModelSpec
from common.models import build_model, model_inputs
from common.partition import preset_cuts, split


def operations_of(name, size=64):
    spec = ModelSpec(name=name, num_classes=10, image_size=size)
    model = build_model(spec)
    traced = trace(model, training=False)
    cuts = preset_cuts(name, model)
    places = [find_cut(traced, cut) for cut in cuts]
    return model, spec, traced, cuts, places, profile(model, traced, model_inputs(spec), 1)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # A block ends where its name does; inside one, its wide maps cross.
        (
            "mobilenet_v2",
            ["features.1", "features.2", "features.4", "features.7", "features.14"],
            ["adaptive_avg_pool2d"],
        ),
        ("resnet50", ["maxpool", "layer4.0"], ["avgpool"]),
        # What the head looks at of a transformer is one token already.
        ("vit_b_16", [], []),
    ],
)
def test_known_models(name, first, second):
    _, _, _, _, (cut1, cut2), operations = operations_of(name, 224)
    assert first_cuts(operations, cut1, cut2) == first
    assert second_cuts(operations, cut2) == second


def test_a_model_can_be_cut_at_each_place_and_carries_less_there():
    model, spec, traced, cuts, (cut1, cut2), operations = operations_of("mobilenet_v2")
    crossing = operations[cut1].crossing_bytes
    for name in first_cuts(operations, cut1, cut2):
        parts = split(model, (name, cuts[1]), model_inputs(spec))
        now = sum(info.dense_bytes(1) for info in parts.cut1)
        assert now == operations[find_cut(traced, name)].crossing_bytes <= WORTHWHILE * crossing
        crossing = now
    (pooled,) = second_cuts(operations, cut2)
    parts = split(model, (cuts[0], pooled), model_inputs(spec))
    assert [info.shape for info in parts.cut2] == [(1280, 1, 1)]
    assert {name.partition(".")[0] for name, _ in parts.back.named_parameters()} == {"classifier"}


MODELS = st.lists(
    st.builds(
        lambda macs, crossing: (macs, crossing), st.sampled_from((0, 5)), st.sampled_from((0, 8, 9, 40, 100))
    ),
    min_size=4,
    max_size=14,
).map(
    lambda figures: [
        Operation(name=f"part.{i}", macs=macs, crossing_bytes=crossing)
        for i, (macs, crossing) in enumerate(figures)
    ]
)


@given(operations=MODELS, data=st.data())
def test_whatever_the_model_each_place_carries_less_than_all_before(operations, data):
    cut1 = data.draw(st.integers(0, len(operations) - 3))
    cut2 = data.draw(st.integers(cut1 + 1, len(operations) - 2))
    place_of = {one.name: place for place, one in enumerate(operations)} | {"part": len(operations) - 1}
    chosen = [place_of[name] for name in first_cuts(operations, cut1, cut2)]
    assert chosen == sorted(chosen)
    carried = [operations[place].crossing_bytes for place in (cut1, *chosen)]
    assert all(cut1 < place < cut2 for place in chosen)
    assert all(0 < after <= WORTHWHILE * before for before, after in itertools.pairwise(carried))
    # Nothing in between was as good and left out.
    least = operations[cut1].crossing_bytes
    for place in range(cut1 + 1, cut2):
        crossing = operations[place].crossing_bytes
        if 0 < crossing <= WORTHWHILE * least:
            assert any(operations[one].crossing_bytes == crossing for one in chosen)
            least = crossing
    later = [place_of[name] for name in second_cuts(operations, cut2)]
    assert all(place > cut2 for place in later)
    assert not any(one.macs for place in later for one in operations[cut2 + 1 : place + 1])
