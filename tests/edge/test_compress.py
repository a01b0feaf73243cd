"""`--compress`: what each place sets, which wins, and what is refused."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.propagate import TensorInfo
from common.spec import STREAMS
from edge.compress import (
    BOTTLENECKS,
    check_fit,
    check_lengths,
    check_repetition,
    parse_compress,
    with_ragged,
)
from wire.codecs.chain import parse_chain
from wire.errors import SpecError

CHAINS = ("none", "fp16", "bf16", "int8", "lz4", "int8+lz4", "fp16+lz4")
WIDE = ("", "cut1", "cut2")
NARROW = ("act", "grad", *STREAMS)


def given_as(place, spec):
    return f"{place}={spec}" if place else spec


def streams_with(chain, compression):
    return {stream for stream, codec in compression.codecs.items() if codec == chain}


def test_one_spec_sets_both_cuts_and_both_directions():
    compression = parse_compress(["conv+int8"])
    assert compression.bottlenecks == ("conv", "conv")
    assert compression.codecs == dict.fromkeys(STREAMS, "int8")


@pytest.mark.parametrize("texts", [[], ["none"]])
def test_nothing_and_none_leave_everything_dense(texts):
    compression = parse_compress(texts)
    assert compression.bottlenecks == ("", "")
    assert compression.codecs == dict.fromkeys(STREAMS, "none")


@pytest.mark.parametrize(
    ("place", "streams"),
    [
        ("", set(STREAMS)),
        ("cut1", {"cut1.act", "cut1.grad"}),
        ("cut2", {"cut2.act", "cut2.grad"}),
        ("act", {"cut1.act", "cut2.act"}),
        ("grad", {"cut1.grad", "cut2.grad"}),
        *((stream, {stream}) for stream in STREAMS),
    ],
)
def test_a_place_sets_its_own_streams_and_no_other(place, streams):
    compression = parse_compress([given_as(place, "int8")])
    assert streams_with("int8", compression) == streams
    assert streams_with("none", compression) == set(STREAMS) - streams


@settings(deadline=None)
@given(
    settings=st.dictionaries(
        st.sampled_from(WIDE + NARROW),
        st.tuples(st.sampled_from(("", "conv", "conv2", "conv:20x3,360x1")), st.sampled_from(CHAINS)),
    ),
    order=st.randoms(use_true_random=False),
)
def test_the_narrower_place_wins_whatever_the_order(settings, order):
    texts = {}
    for place, (bottleneck, chain) in settings.items():
        stages = [bottleneck] * (place in WIDE) + [chain] * (chain != "none")
        texts[place] = "+".join(filter(None, stages)) or "none"
    arguments = [given_as(place, text) for place, text in texts.items()]
    order.shuffle(arguments)
    compression = parse_compress(arguments)
    for stream in STREAMS:
        cut, direction = stream.split(".")
        # A stream of its own before a direction, a direction before a cut, a cut before everything.
        winner = next((place for place in (stream, direction, cut, "") if place in settings), None)
        assert compression.codecs[stream] == (settings[winner][1] if winner is not None else "none")
        parse_chain(compression.codecs[stream])
    for cut, bottleneck in zip(("cut1", "cut2"), compression.bottlenecks, strict=True):
        winner = next((place for place in (cut, "") if place in settings), None)
        assert bottleneck == (settings[winner][0] if winner is not None else "")


def test_a_bottleneck_of_one_cut_leaves_the_other_alone():
    assert parse_compress(["cut2=conv:360x1+int8"]).bottlenecks == ("", "conv:360x1")
    compression = parse_compress(["conv+int8", "cut1=fp16"])
    assert compression.bottlenecks == ("", "conv")
    assert compression.codecs["cut1.act"] == "fp16"


def test_directions_can_be_set_beside_a_bottleneck():
    compression = parse_compress(["conv+int8", "grad=fp16"])
    assert compression.bottlenecks == ("conv", "conv")
    assert streams_with("fp16", compression) == {"cut1.grad", "cut2.grad"}
    assert streams_with("int8", compression) == {"cut1.act", "cut2.act"}


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_a_bottleneck_alone_sends_its_output_dense(kind):
    compression = parse_compress([kind])
    assert compression.bottlenecks == (kind, kind)
    assert compression.codecs == dict.fromkeys(STREAMS, "none")


def test_arguments_of_a_bottleneck_stay_with_it():
    compression = parse_compress(["conv:32x4/16x1,360x1+int8+lz4"])
    assert compression.bottlenecks == ("conv:32x4/16x1,360x1",) * 2
    assert compression.codecs["cut2.grad"] == "int8+lz4"


def test_spaces_around_stages_do_not_matter_to_what_is_inserted():
    assert parse_compress([" conv + int8"]).bottlenecks == ("conv", "conv")


@pytest.mark.parametrize("place", ["cut3", "activations", "cut1.both", "1", "cut1.act.grad"])
def test_a_place_that_does_not_exist_is_refused_with_those_that_do(place):
    with pytest.raises(UserError) as caught:
        parse_compress([f"{place}=int8"])
    text = str(caught.value)
    assert f"{place} is no place" in text
    assert all(known in text for known in ("cut1", "cut2", "act", "grad", *STREAMS))


@pytest.mark.parametrize(
    ("texts", "what"), [(["int8", "fp16"], "everything"), (["act=int8", "act=int8"], "act")]
)
def test_setting_a_place_twice_is_refused(texts, what):
    with pytest.raises(UserError, match=f"sets {what} twice"):
        parse_compress(texts)


@pytest.mark.parametrize("place", NARROW)
def test_a_bottleneck_for_one_direction_is_refused_with_what_would_do(place):
    with pytest.raises(UserError, match=f"{place}=conv: a bottleneck .*such as cut1=conv"):
        parse_compress([f"{place}=conv+int8"])


@pytest.mark.parametrize("text", ["int8+conv", "conv+conv2", "int8+conv:20x3+lz4", "cut1=fp16+conv2"])
def test_a_bottleneck_after_another_stage_is_refused(text):
    with pytest.raises(UserError, match="comes first and once"):
        parse_compress([text])


@pytest.mark.parametrize(
    ("text", "at_fault"),
    [
        ("int9", "int9"),
        ("int8+zip", "zip"),
        ("int8+int8", "int8"),
        ("cut1=lz4 + nonsense", "nonsense"),
        ("grad=int8:7", "7"),
        ("conv+int8+int9", "int9"),
        ("int8+none", "none"),
    ],
)
def test_a_chain_that_does_not_parse_points_at_the_character(text, at_fault):
    with pytest.raises(SpecError) as caught:
        parse_compress([text])
    error = caught.value
    assert error.text[error.position :] == at_fault
    assert f"character {error.position + 1} " in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["+int8", "int8+", "int8++lz4", "conv++int8", "cut2=lz4+ "])
def test_a_stage_that_is_missing_is_pointed_at(text):
    with pytest.raises(SpecError, match="no codec stands at character"):
        parse_compress([text])


@settings(deadline=None)
@given(
    texts=st.lists(
        st.text(max_size=20) | st.sampled_from(("cut1=", "=int8", "conv:", "cut1.grad=conv")), max_size=4
    )
)
def test_any_text_is_a_compression_or_refused(texts):
    with contextlib.suppress(UserError, SpecError):
        compression = parse_compress(texts)
        assert set(compression.codecs) == set(STREAMS)
        for chain in compression.codecs.values():
            parse_chain(chain)
        for bottleneck in compression.bottlenecks:
            assert bottleneck.partition(":")[0].strip() in ("", *BOTTLENECKS)


@pytest.mark.parametrize("text", ["", "cut1=", "conv+", "+int8", "int8+", "conv+none"])
def test_a_spec_with_nothing_where_a_stage_belongs_is_refused(text):
    with pytest.raises(SpecError):
        parse_compress([text])


def test_a_spec_that_narrower_ones_override_is_checked_all_the_same():
    with pytest.raises(SpecError, match="nonsense"):
        parse_compress(["nonsense", "act=int8", "grad=int8"])


def test_a_bottleneck_for_a_direction_is_refused_even_where_it_would_not_count():
    with pytest.raises(UserError, match="both directions"):
        parse_compress(["act=conv", "cut1.act=int8", "cut2.act=int8"])


def test_widths_of_a_bottleneck_are_checked_before_anything_is_loaded():
    with pytest.raises(UserError, match="character 6"):
        parse_compress(["conv:zz"])


MAPS = ([TensorInfo(name="a", shape=(32, 112, 112))], [TensorInfo(name="b", shape=(1280, 7, 7))])


@pytest.mark.parametrize("texts", [["none"], ["int8+lz4"], ["lowrank:32"], ["lowrank:49", "cut1=lowrank:2"]])
def test_what_fits_what_crosses_is_let_through(texts):
    check_fit(parse_compress(texts), MAPS, chunk=8)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["lowrank:33"], "lowrank:33 does nothing at cut 1: a sample is a matrix 32x12544; ranks up to 31"),
        (["cut2.grad=fp16+lowrank:50"], "lowrank:50 does nothing at cut 2: a sample is a matrix 1280x49"),
    ],
)
def test_a_rank_that_fits_nothing_is_refused(texts, words):
    with pytest.raises(UserError, match=words):
        check_fit(parse_compress(texts), MAPS, chunk=8)


def test_a_rank_has_to_fit_one_tensor_of_a_cut():
    mask = TensorInfo(name="mask", shape=(128,), dtype=torch.int64)
    narrow, wide = (TensorInfo(name=str(width), shape=(128, width)) for width in (8, 768))
    compression = parse_compress(["lowrank:16"])
    check_fit(compression, ([mask, narrow, wide], [mask]), chunk=8)
    with pytest.raises(UserError, match="cut 2"):
        check_fit(compression, ([mask, wide], [mask, narrow]), chunk=8)


MASK = TensorInfo(name="attention_mask", shape=(128,), dtype=torch.bool, token_dims=(0,))
HIDDEN = TensorInfo(name="hidden", shape=(128, 64), requires_grad=True, token_dims=(0,))
MIXED = TensorInfo(name="hidden", shape=(120, 64), requires_grad=True)  # along the sequence
TEXT = ((HIDDEN, MASK), (HIDDEN,))


@pytest.mark.parametrize(
    ("texts", "chain"),
    [([], "ragged"), (["none"], "ragged"), (["int8"], "ragged+int8"), (["ragged+int8"], "ragged+int8")],
)
def test_texts_cross_without_padding_unless_they_have_none(texts, chain):
    compression = parse_compress(texts)
    assert with_ragged(compression, TEXT).codecs == dict.fromkeys(STREAMS, chain)
    for others in [(HIDDEN,), (HIDDEN, TensorInfo(name="m", shape=(4, 4), dtype=torch.bool))]:
        assert with_ragged(compression, (others, (HIDDEN,))) == compression


def test_a_cut_that_is_narrowed_along_the_sequence_has_no_padding_to_leave_out():
    codecs = with_ragged(parse_compress(["int8"]), ((MIXED, MASK), (HIDDEN,))).codecs
    assert codecs == {name: "int8" if "cut1" in name else "ragged+int8" for name in STREAMS}


def test_narrowing_along_the_sequence_needs_texts_of_one_length():
    narrowed = ((MIXED, MASK), (MIXED,))
    check_lengths(TEXT, TEXT, padding="longest")
    check_lengths(TEXT, narrowed, padding="max")
    with pytest.raises(UserError, match="give --padding max"):
        check_lengths(TEXT, narrowed, padding="longest")


def test_a_cut_behind_the_pooling_needs_no_texts_of_one_length():
    pooled = ((HIDDEN, MASK), (TensorInfo(name="pooled", shape=(32,), requires_grad=True),))
    check_lengths(pooled, pooled, padding="longest")


def test_ragged_without_a_mask_is_refused():
    compression = parse_compress(["cut2.act=ragged+int8"])
    check_fit(compression, TEXT, 8)
    with pytest.raises(UserError, match=r"--compress ragged does nothing at cut 2: .* no mask"):
        check_fit(compression, ((HIDDEN,), (HIDDEN,)), 8)


@pytest.mark.parametrize("before", ["", "ragged+"])
def test_rank_of_texts_is_held_against_a_single_one(before):
    check_fit(parse_compress([f"{before}lowrank:60"]), TEXT, 8)
    short = TensorInfo(name="hidden", shape=(32, 64), token_dims=(0,))
    with pytest.raises(UserError, match="a sample is a matrix 32x64; ranks up to 21 make it smaller"):
        check_fit(parse_compress([f"{before}lowrank:50"]), ((short, MASK), (short,)), 8)


@pytest.mark.parametrize(("typo", "meant"), [("cov", "conv"), ("liner:8", "linear"), ("int9", "int")])
def test_an_unknown_stage_is_refused_with_all_there_are_and_the_nearest(typo, meant):
    with pytest.raises(
        SpecError, match=f"did you mean {meant}.*, zstd, and before them conv, conv2, linear, decay"
    ):
        parse_compress([typo])


@pytest.mark.parametrize("text", ["delta+int4", "cut1=ragged+delta", "cut2.act=delta:limit=1M+int8"])
def test_changes_of_samples_that_vary_are_refused(text):
    compression = parse_compress([text])
    check_repetition(compression, varied=False)
    with pytest.raises(UserError, match="give --no-augment"):
        check_repetition(compression, varied=True)


def test_gradients_and_other_codecs_have_no_need_of_the_same_samples():
    check_repetition(parse_compress(["grad=delta+int4"]), varied=True)
    check_repetition(parse_compress(["conv+int8"]), varied=True)
