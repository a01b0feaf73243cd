"""Chains as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.codecs.registry import codec_class, codec_names
from wire.codecs.spec import StageSpec, check_chain, parse_chain, spell_chain, split_chain
from wire.errors import SpecError


def test_none_is_the_empty_chain():
    assert parse_chain("none") == ()


def test_stages_keep_their_order():
    assert parse_chain("fp16+lz4") == (StageSpec("fp16"), StageSpec("lz4"))


def test_spaces_around_stages_do_not_matter():
    assert parse_chain(" int8 + lz4 ") == parse_chain("int8+lz4")


def test_splitting_takes_names_that_are_no_codecs():
    stages = split_chain("conv:20x3,360x1+int8")
    assert stages == (StageSpec("conv", "20x3,360x1"), StageSpec("int8"))
    assert [stage.position for stage in stages] == [0, 16]
    check_chain(stages[1:], "conv:20x3,360x1+int8")


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "no codec stands at character 1"),
        ("int8+", 5, "no codec stands at character 6"),
        ("+int8", 0, "no codec stands at character 1"),
        ("int8++lz4", 5, "no codec stands at character 6"),
        ("lz4+int9", 4, "unknown codec 'int9' at character 5"),
        ("none+int8", 0, "none at character 1 of 'none+int8' must stand alone"),
        ("int8+none", 5, "must stand alone"),
        ("none:3", 0, "must stand alone"),
        ("int8+lz4+int8", 9, "comes a second time"),
        ("fp16:3", 0, "fp16 takes no arguments"),
        ("int8+lowrank", 5, "lowrank at character 6 of 'int8+lowrank' is wrong: give the rank"),
        ("lowrank:0", 0, "as in lowrank:16"),
        ("lowrank:-3", 0, "as in lowrank:16"),
        ("lowrank:1e3", 0, "as in lowrank:16"),
        ("lowrank:99999999999999999999", 0, "as in lowrank:16"),
        ("int8+ragged", 5, "ragged at character 6 of 'int8+ragged' stands in a wrong place: it comes first"),
        ("bits", 0, "bits at character 1 of 'bits' is always on; leave it out"),
        ("int8:", 4, "no arguments follow the colon at character 5"),
    ],
)
def test_a_spec_that_does_not_parse_is_pointed_at(text, position, words):
    with pytest.raises(SpecError) as caught:
        parse_chain(text)
    assert caught.value.position == position
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_codec_is_answered_with_all_that_exist():
    with pytest.raises(SpecError) as caught:
        parse_chain("gzip")
    for name in ("none", *codec_names()):
        assert name in str(caught.value)


@given(st.lists(st.sampled_from(codec_names()), unique=True), st.data())
def test_a_chain_is_spelt_as_it_is_read(names, data):
    chain = tuple(
        StageSpec(name, data.draw(st.sampled_from(codec_class(name).examples), label=name)) for name in names
    )
    assert split_chain(spell_chain(chain)) == chain


@given(st.text(alphabet="abint8lz4fp16none+: ,=.", max_size=20))
def test_any_text_is_a_chain_or_a_spec_error(text):
    try:
        chain = parse_chain(text)
    except SpecError:
        return
    assert parse_chain(spell_chain(chain)) == chain
