"""Encoders and decoders: descriptions, buffers, checks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.errors import CorruptPayload

CHAINS = ["none", "fp16", "int8", "lz4", "int8+lz4", "fp16+lz4", "bf16+int8+lz4"]


def encode(chain, x, role=Role.ACTIVATION):
    encoded = Encoder(parse_chain(chain), role).encode(x, seed=1)
    return encoded.desc, bytearray(b"".join(encoded.buffers))


def decode(chain, desc, payload, **options):
    return Decoder(parse_chain(chain), Role.ACTIVATION).decode(desc, payload, **options)


def compressible(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu().round(decimals=1)


def test_a_raw_tensor_is_described_by_a_leaf():
    desc, payload = encode("none", torch.arange(6.0).view(2, 3))
    assert desc == {"dtype": "float32", "shape": [2, 3], "order": "C", "size": 24}
    assert payload[:24] == torch.arange(6.0).numpy().tobytes()
    assert payload[24:] == bytes(40)


def test_a_chain_is_described_by_a_tree():
    desc, _ = encode("int8+lz4", compressible(2, 4, 32, 32))
    assert desc["codec"] == "int8"
    levels, params = desc["parts"]
    assert levels["codec"] == "lz4"
    assert params == {"dtype": "float32", "shape": [2, 4], "order": "C", "size": 32}


def test_channels_last_memory_crosses_in_its_own_order():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    desc, payload = encode("none", x)
    assert (desc["order"], desc["shape"]) == ("NHWC", [2, 3, 4, 5])
    assert payload[: x.nbytes] == x.permute(0, 2, 3, 1).numpy().tobytes()


def test_other_strides_are_made_contiguous():
    x = torch.randn(5, 4, 3).transpose(0, 2)
    desc, payload = encode("none", x)
    y, _ = decode("none", desc, payload)
    assert torch.equal(x, y)
    assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(8, 1280, 1, 1), (8, 1, 5, 5), (1, 3, 1, 7)])
def test_ambiguous_memory_orders_keep_their_strides(shape):
    for x in (torch.randn(shape), torch.empty(shape, memory_format=torch.channels_last).fill_(1)):
        y, _ = decode("none", *encode("none", x))
        assert y.stride() == x.stride()


def test_raw_buffers_view_the_tensor_itself():
    x = torch.zeros(64)
    encoded = Encoder((), Role.ACTIVATION).encode(x, seed=0)
    x.fill_(1)
    assert bytes(encoded.buffers[0]) == torch.ones(64).numpy().tobytes()


def test_a_raw_tensor_is_decoded_without_a_copy():
    desc, payload = encode("none", torch.zeros(64))
    y, _ = decode("none", desc, payload)
    payload[:4] = torch.ones(1).numpy().tobytes()
    assert y[0] == 1


def test_read_only_payloads_are_copied():
    desc, payload = encode("none", torch.ones(64))
    y, _ = decode("none", desc, bytes(payload))
    y.add_(1)
    assert y[0] == 2


def test_several_tensors_lie_in_one_payload():
    tensors = [torch.randn(3, 5), torch.empty(0), torch.tensor(2.0), torch.arange(7)]
    encoder, decoder = (end(parse_chain("int8"), Role.ACTIVATION) for end in (Encoder, Decoder))
    encoded = [encoder.encode(x, seed=0) for x in tensors]
    payload = bytearray(b"".join(b for e in encoded for b in e.buffers))
    offset = 0
    for e, x in zip(encoded, tensors, strict=True):
        assert offset % 64 == 0
        y, offset = decoder.decode(e.desc, payload, offset=offset)
        assert y.shape == x.shape
    assert offset == len(payload)


def test_tensors_that_need_gradients_are_sent_as_values():
    desc, payload = encode("int8", torch.randn(8, 64, requires_grad=True))
    assert not decode("int8", desc, payload)[0].requires_grad


def test_dtypes_that_cannot_cross_are_refused_by_the_encoder():
    with pytest.raises(ValueError, match="complex64 cannot cross"):
        encode("none", torch.zeros(3, dtype=torch.complex64))


def test_the_thread_count_is_set_for_the_call_only():
    before = torch.get_num_threads()
    Encoder(parse_chain("fp16"), Role.ACTIVATION, threads=before + 1).encode(torch.randn(100), seed=0)
    assert torch.get_num_threads() == before


def test_a_state_of_another_chain_is_refused():
    with pytest.raises(ValueError, match="does not belong to int8"):
        Encoder(parse_chain("int8"), Role.ACTIVATION).load_state_dict({":lowrank:8": {"q": 1}})
    with pytest.raises(ValueError, match="keeps no state"):
        Encoder(parse_chain("int8"), Role.ACTIVATION).load_state_dict({":int8": {"q": 1}})


def test_a_codec_that_was_not_agreed_on_is_refused():
    desc, payload = encode("int8+lz4", compressible(4, 4, 32, 32))
    for chain in ("none", "int8", "lz4", "lz4+int8"):
        with pytest.raises(CorruptPayload, match="not agreed on"):
            decode(chain, desc, payload)


def test_codecs_do_not_apply_to_parts_that_they_are_not_for():
    desc, payload = encode("int8+lz4", compressible(4, 4, 32, 32))
    desc["parts"][1] = {"codec": "lz4", "meta": {"size": 30}, **desc["parts"][1], "parts": []}
    del desc["parts"][1]["size"]
    with pytest.raises(CorruptPayload, match="not agreed on"):
        decode("int8+lz4", desc, payload)


LEAF = {"dtype": "float32", "shape": [4], "order": "C", "size": 16}


@pytest.mark.parametrize(
    "desc",
    [
        None,
        [],
        {},
        {**LEAF, "more": 1},
        {**LEAF, "dtype": "float33"},
        {**LEAF, "dtype": "complex64"},
        {**LEAF, "dtype": ["float32"]},
        {**LEAF, "dtype": 4},
        {**LEAF, "shape": 4},
        {**LEAF, "shape": [-4]},
        {**LEAF, "shape": [4.0]},
        {**LEAF, "shape": [True], "size": 4},
        {**LEAF, "shape": [1] * 9, "size": 4},
        {**LEAF, "shape": [1 << 40, 0], "size": 0},
        {**LEAF, "shape": [1 << 20, 1 << 20, 1 << 20], "size": 1 << 62},
        {**LEAF, "order": "NHWC"},
        {**LEAF, "order": "F"},
        {**LEAF, "size": 15},
        {**LEAF, "size": 16.0},
        {**LEAF, "size": "16"},
        {"codec": "int8", "meta": {}, "dtype": "float32", "shape": [4], "order": "C", "parts": []},
        {
            "codec": "int8",
            "meta": {"a": 1},
            "dtype": "float32",
            "shape": [4],
            "order": "C",
            "parts": [LEAF, LEAF],
        },
        {"codec": "int8", "meta": {}, "dtype": "float32", "shape": [4], "order": "C", "parts": [LEAF, LEAF]},
        {"codec": "int8", "meta": {}, "dtype": "int32", "shape": [4], "order": "C", "parts": [LEAF, LEAF]},
        {"codec": "int8", "meta": 0, "dtype": "float32", "shape": [4], "order": "C", "parts": [LEAF, LEAF]},
        {"codec": ["int8"], "meta": {}, "dtype": "float32", "shape": [4], "order": "C", "parts": [LEAF]},
    ],
)
def test_nonsense_in_place_of_a_description_is_corrupt(desc):
    with pytest.raises(CorruptPayload):
        decode("int8+lz4", desc, bytearray(1 << 12))


@pytest.mark.parametrize("chain", CHAINS)
def test_every_truncated_payload_is_corrupt(chain):
    desc, payload = encode(chain, compressible(4, 16))
    for size in range(0, len(payload), 16):
        with pytest.raises(CorruptPayload):
            decode(chain, desc, payload[:size])


@pytest.mark.parametrize("offset", [-1, 1, 64, 1 << 70])
def test_an_offset_beyond_the_payload_is_corrupt(offset):
    desc, payload = encode("none", torch.zeros(16))
    with pytest.raises(CorruptPayload):
        decode("none", desc, payload, offset=offset)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a description, as the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_description_is_corrupt_or_decodes(data):
    chain = data.draw(st.sampled_from(CHAINS))
    desc, payload = encode(chain, compressible(2, 3, 8, 8))
    *path, key = data.draw(st.sampled_from([place for place in places(desc) if place]))
    desc = copy.deepcopy(desc)
    target = desc
    for step in path:
        target = target[step]
    near = (
        st.integers(0, 600)
        if isinstance(target[key], int)
        else st.sampled_from(["int8", "uint8", "bool", "C"])
    )
    target[key] = data.draw(near | PLAIN)
    try:
        y, _ = decode(chain, desc, payload)
    except CorruptPayload:
        return
    assert y.nbytes <= 255 * len(payload)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_payload_is_corrupt_or_decodes_to_the_same_shape(data):
    chain = data.draw(st.sampled_from(CHAINS))
    x = compressible(2, 3, 8, 8)
    desc, payload = encode(chain, x)
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        y, _ = decode(chain, desc, payload)
    except CorruptPayload:
        return
    assert y.shape == x.shape
