"""A job comes back from plain values as it was, and nothing that a peer makes up gets further than a UserError."""

import contextlib
import math
from dataclasses import fields, replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.choices import AMP, MEMORY_FORMATS
from common.errors import UserError
from common.model_spec import ModelSpec
from common.optim import OptimSpec
from common.spec import CUTS, DIRECTIONS, MAX_CHUNK_SIZE, MAX_CHUNKS, STREAMS, JobSpec

TEXT = st.text(max_size=12)
SEEDS = st.integers(0, (1 << 63) - 1)
JOBS = st.builds(
    JobSpec,
    model=st.builds(
        ModelSpec,
        name=TEXT,
        num_classes=st.integers(1, 1000),
        weights=st.none() | st.sampled_from(("DEFAULT", "IMAGENET1K_V1")),
        seed=SEEDS,
        image_size=st.none() | st.integers(1, 4096),
    ),
    cuts=st.tuples(TEXT, TEXT),
    bottlenecks=st.tuples(TEXT, TEXT),
    codecs=st.fixed_dictionaries(dict.fromkeys(STREAMS, TEXT)),
    optim=st.builds(
        OptimSpec, name=st.sampled_from(("sgd", "adamw")), lr=st.floats(1e-6, 10), momentum=st.floats(0, 0.99)
    ),
    seed=SEEDS,
    chunks=st.integers(1, MAX_CHUNKS),
    chunk_size=st.integers(1, MAX_CHUNK_SIZE),
    in_flight=st.integers(1, MAX_CHUNKS),
    memory_format=st.sampled_from(MEMORY_FORMATS),
    amp=st.sampled_from(AMP),
    digest=TEXT,
    trace=st.booleans(),
)
JOB = JobSpec(
    model=ModelSpec(name="mobilenet_v2", num_classes=10),
    cuts=("features.0.1", "features.18"),
    optim=OptimSpec(),
)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def read(values):
    """Build a job from values, or None where they are refused as they should be."""
    with contextlib.suppress(UserError):
        return JobSpec.from_map(values)
    return None


def test_there_is_a_stream_for_each_cut_and_direction():
    assert len(STREAMS) == len(CUTS) * len(DIRECTIONS) == len(set(STREAMS)) == 4


@settings(deadline=None)
@given(job=JOBS)
def test_a_job_comes_back_from_plain_values_over_msgpack(job):
    assert JobSpec.from_map(msgpack.unpackb(msgpack.packb(job.to_map()))) == job


@settings(deadline=None)
@given(values=PLAIN)
def test_anything_that_is_no_job_is_refused(values):
    assert read(values) is None


@settings(deadline=None)
@given(place=st.sampled_from(sorted(JOB.to_map())), value=PLAIN)
def test_any_value_of_any_field_builds_a_job_or_is_refused(place, value):
    job = read({**JOB.to_map(), place: value})
    assert job is None or JobSpec.from_map(job.to_map()) == job


@settings(deadline=None)
@given(
    part=st.sampled_from(("model", "optim", "codecs")),
    data=st.data(),
    value=PLAIN,
)
def test_any_value_within_a_part_builds_a_job_or_is_refused(part, data, value):
    values = JOB.to_map()
    place = data.draw(st.sampled_from(sorted(values[part])))
    job = read({**values, part: {**values[part], place: value}})
    assert job is None or JobSpec.from_map(job.to_map()) == job


@pytest.mark.parametrize("part", [None, "model", "optim", "codecs"])
def test_a_field_that_is_missing_or_unknown_is_refused(part):
    whole = JOB.to_map()
    place = whole if part is None else whole[part]
    for name in list(place):
        lacking = {key: value for key, value in place.items() if key != name}
        with pytest.raises(UserError):
            JobSpec.from_map(lacking if part is None else {**whole, part: lacking})
    more = {**place, "command": "rm"}
    with pytest.raises(UserError):
        JobSpec.from_map(more if part is None else {**whole, part: more})


def test_what_is_missing_or_unknown_is_named():
    values = JOB.to_map()
    del values["seed"]
    with pytest.raises(UserError, match="the job has missing or unknown fields: seed, spede"):
        JobSpec.from_map({**values, "spede": 1})


@pytest.mark.parametrize("field", ["seed", "chunks", "chunk_size", "in_flight", "committed"])
def test_a_boolean_is_no_number(field):
    with pytest.raises(UserError, match=f"the job's {field} has type bool"):
        JobSpec.from_map({**JOB.to_map(), field: True})


@pytest.mark.parametrize(
    ("field", "name", "low", "high"),
    [
        ("chunks", "chunks", 1, MAX_CHUNKS),
        ("chunk_size", "chunk size", 1, MAX_CHUNK_SIZE),
        ("in_flight", "chunks in flight", 1, MAX_CHUNKS),
        ("seed", "seed", 0, (1 << 63) - 1),
        ("committed", "committed steps", 0, 1 << 53),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(field, name, low, high):
    for wrong in (low - 1, high + 1):
        with pytest.raises(UserError, match=f"^{name} must be from {low} to {high}, not {wrong}$"):
            replace(JOB, **{field: wrong})
    for right in (low, high):
        assert getattr(replace(JOB, **{field: right}), field) == right


@pytest.mark.parametrize(
    ("field", "message"),
    [("amp", "amp 'fp8' is not one of"), ("memory_format", "memory format 'fp8' is not")],
)
def test_a_choice_that_does_not_exist_is_refused(field, message):
    with pytest.raises(UserError, match=message):
        replace(JOB, **{field: "fp8"})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "weights.pt", "m.safetensors", "a/b.pth"])
def test_a_peer_cannot_name_a_file_of_this_machine(path):
    values = JOB.to_map()
    with pytest.raises(UserError, match="never by a path"):
        JobSpec.from_map({**values, "model": {**values["model"], "weights": path}})


@pytest.mark.parametrize("cuts", [[], ["a"], ["a", "b", "c"], ["a", 1], ["a", None]])
def test_cuts_and_bottlenecks_are_two_texts(cuts):
    for field in ("cuts", "bottlenecks"):
        with pytest.raises(UserError, match=f"{field} must be two strings"):
            JobSpec.from_map({**JOB.to_map(), field: cuts})


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_a_learning_rate_that_is_no_rate_is_refused(number):
    values = JOB.to_map()
    with pytest.raises(UserError, match="learning rate"):
        JobSpec.from_map({**values, "optim": {**values["optim"], "lr": number}})


def test_every_field_crosses():
    assert set(JOB.to_map()) == {field.name for field in fields(JobSpec)}
    assert set(JOB.to_map()["model"]) == {field.name for field in fields(ModelSpec)}
