"""Indices that come from outside a partition: none beyond its table reaches an embedding."""

import pytest
import torch
from torch import fx, nn

from common.errors import UserError
from common.lookups import check_lookups, within
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import split
from common.text_config import check_config, inputs_of
from tests.tiny_text import CONFIGS

TOKENS = 12
WORDS, LAYER = "embeddings.word_embeddings", "encoder.layer.1"


def parts_of(kind, **changes):
    config = check_config({"model_type": kind, "vocab_size": 30, **CONFIGS[kind], **changes})
    spec = ModelSpec(name="hf:x", num_classes=2, config=config)
    return split(build_model(spec), (f"{kind}.{WORDS}", f"{kind}.{LAYER}"), inputs_of(config, TOKENS))


def given(infos, number):
    return [torch.full(info.batched(2), number).to(info.dtype) for info in infos]


@pytest.mark.parametrize("number", [-1, 2, 1 << 40])
@pytest.mark.parametrize("training", [True, False])
def test_a_type_that_there_is_not_does_not_reach_the_middle(number, training):
    parts = parts_of("bert")
    parts.middle.train(training)
    parts.middle(*given(parts.cut1, 1))
    with pytest.raises(UserError, match=rf"numbered {number}, and the model's table has 2 rows"):
        parts.middle(*given(parts.cut1, number))


def test_positions_that_follow_from_what_crosses_are_checked_too():
    parts = parts_of("roberta", max_position_embeddings=TOKENS)
    given_ids = given(parts.cut1, 0)
    given_ids[[info.name for info in parts.cut1].index("input_ids")].fill_(5)
    with pytest.raises(UserError, match="table has 12 rows"):
        parts.middle(*given_ids)


def test_a_word_beyond_the_vocabulary_is_told_in_one_line():
    parts = parts_of("bert")
    with pytest.raises(UserError, match="tokenizer do not belong together") as caught:
        parts.front(*given(parts.inputs, 30))
    assert "\n" not in str(caught.value)


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x):
        return self.table(x.long()) + self.table(torch.arange(x.size(0)))[:, None]


def test_only_what_follows_from_values_is_checked():
    model = Looking()
    graph = fx.symbolic_trace(model).graph
    check_lookups(graph, model)
    assert sum(node.target is within for node in graph.nodes) == 1
    run = fx.GraphModule(model, graph)
    assert torch.equal(run(torch.tensor([[3.0]])), model(torch.tensor([[3.0]])))
    with pytest.raises(UserError, match="table has 4 rows"):
        run(torch.tensor([[4.0]]))


def test_a_layer_that_is_none_of_the_models_own_is_passed_over():
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph
    check_lookups(graph, nn.Sequential())
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_no_index_at_all_is_within_any_table():
    assert within(torch.zeros(0, dtype=torch.int64), 3).numel() == 0
    assert within(torch.zeros(2, dtype=torch.int64, device="meta"), 3).is_meta
