"""Text encoders traced by torch.export and cut in three: bitwise what the whole model computes."""

import pytest
import torch

from common.errors import UserError
from common.exported import export_modes
from common.graph import cut_names
from common.model_spec import ModelSpec
from common.models import build_model, model_inputs
from common.partition import split, text_input
from common.presets import preset_cuts
from common.stage import seeded
from common.text_config import check_config
from tests.tiny_text import CONFIGS

LONGEST = 24


def spec_of(kind, **changes):
    config = check_config({"model_type": kind, "vocab_size": 30, **CONFIGS[kind], **changes})
    return ModelSpec(name=f"hf:tiny-{kind}", num_classes=3, seed=5, config=config, tokens=LONGEST)


@pytest.fixture(scope="module", params=CONFIGS)
def cut(request):
    spec = spec_of(request.param)
    model = build_model(spec)
    return model, split(model, preset_cuts(spec.name, model), model_inputs(spec))


def batch(parts, samples, tokens, *, padded):
    generator = torch.Generator().manual_seed(samples * 100 + tokens)
    given = {
        "input_ids": torch.randint(4, 30, (samples, tokens), generator=generator),
        "attention_mask": torch.ones(samples, tokens, dtype=torch.bool),
        "token_type_ids": torch.randint(0, 2, (samples, tokens), generator=generator),
    }
    if padded:
        given["attention_mask"][-1, (tokens + 1) // 2 :] = False
        given["input_ids"][~given["attention_mask"]] = 0
    return {info.name: given[info.name] for info in parts.inputs}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("samples", "tokens"), [(3, 11), (1, 1), (2, LONGEST), (5, 7)])
def test_the_partitions_compute_bitwise_what_the_model_does(cut, samples, tokens, training):
    model, parts = cut
    inputs = batch(parts, samples, tokens, padded=tokens > 1)
    model.train(training)
    for partition in parts.partitions.values():
        partition.train(training)
    gradients = []
    results = []
    for run in (lambda: model(**inputs).logits, lambda: parts.run(*inputs.values())[0]):
        model.zero_grad(set_to_none=True)
        with seeded(3, torch.device("cpu")):
            logits = run()
        logits.square().sum().backward()
        results.append(logits.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(*results)
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) is (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


def test_what_crosses_is_the_mask_as_it_was_given_and_one_hidden_state(cut):
    _, parts = cut
    mask, hidden = parts.cut1
    assert (mask.name, mask.dtype, mask.shape) == ("attention_mask", torch.bool, (LONGEST,))
    assert (hidden.shape, hidden.dtype, hidden.requires_grad) == ((LONGEST, 32), torch.float32, True)
    assert [info.shape for info in parts.cut2] == [(LONGEST, 32)]
    assert all(info.token_dims == (0,) for info in (*parts.cut1, *parts.cut2))
    assert parts.kept == ()


def test_the_partitions_share_out_the_models_own_names(cut):
    model, parts = cut
    names = [name for part in parts.partitions.values() for name in part.state_dict()]
    assert sorted(names) == sorted(model.state_dict())


def test_padding_changes_nothing_but_rounding(cut):
    _, parts = cut
    for partition in parts.partitions.values():
        partition.eval()
    inputs = batch(parts, 4, 8, padded=False)
    longer = {name: torch.nn.functional.pad(t, (0, 12)) for name, t in inputs.items()}
    torch.testing.assert_close(
        parts.run(*longer.values())[0], parts.run(*inputs.values())[0], atol=1e-5, rtol=0
    )


def test_a_cut_may_be_at_any_layer():
    spec = spec_of("bert")
    model = build_model(spec)
    parts = split(model, ("bert.embeddings", "bert.encoder.layer.0"), model_inputs(spec))
    inputs = batch(parts, 2, 9, padded=True)
    model.eval()
    for partition in parts.partitions.values():
        partition.eval()
    assert torch.equal(model(**inputs).logits, parts.run(*inputs.values())[0])


def test_operations_are_named_by_their_modules():
    traced = export_modes(build_model(spec_of("bert")), text_input(LONGEST, pairs=True))
    names = cut_names(traced[True])
    assert {"bert.embeddings", "bert.encoder.layer.0.attention.output.dense", "classifier"} <= set(names)
    for one in traced.values():
        operations = [one.names[node.name] for node in one.operations()]
        assert len(set(operations)) == len(operations)


def test_an_unknown_cut_is_told_the_nearest():
    spec = spec_of("bert")
    with pytest.raises(
        UserError, match=r"unknown cut 'bert.encoder.layer.7'; the nearest .* bert.encoder.layer"
    ):
        split(build_model(spec), ("bert.embeddings", "bert.encoder.layer.7"), model_inputs(spec))


def test_more_tokens_than_the_way_that_was_traced_is_for_are_refused():
    class Turns(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float() if input_ids.shape[1] <= 20 else attention_mask.float()

    export_modes(Turns(), text_input(20))
    with pytest.raises(UserError, match="more than 20 tokens, and 21 are asked for: give --max-length 20"):
        export_modes(Turns(), text_input(21))


def test_a_model_that_looks_at_values_is_refused_in_one_line():
    class Looks(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float() if input_ids.sum().item() > 3 else attention_mask.float()

    with pytest.raises(UserError, match=r"Looks cannot be traced by torch\.export") as caught:
        export_modes(Looks(), text_input(LONGEST))
    assert "\n" not in str(caught.value)


def test_tables_that_follow_from_sizes_alone_are_made_on_both_sides():
    """Rotary positions crossed as floats with every chunk, for lossy codecs to spoil."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = check_config({"model_type": "esm", "vocab_size": 30, "pad_token_id": 1, **sizes})
    spec = ModelSpec(name="hf:tiny-esm", num_classes=2, config=config, tokens=LONGEST)
    model = build_model(spec)
    parts = split(model, preset_cuts(spec.name, model), model_inputs(spec))
    assert [info.shape for info in parts.cut1] == [(LONGEST,), (LONGEST, 32)]
    inputs = batch(parts, 2, 9, padded=True)
    model.eval()
    for partition in parts.partitions.values():
        partition.eval()
    assert torch.equal(model(**inputs).logits, parts.run(*inputs.values())[0])
