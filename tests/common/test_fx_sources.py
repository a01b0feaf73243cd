"""A server traces models for months."""

import linecache

import torch
from torch import fx, nn

from common.fx_sources import KEPT, forget_old_sources
from common.models import ModelSpec, build_model
from common.partition import image_input, split


def sources() -> tuple[list[str], list[str]]:
    known = fx.graph_module._loader.eval_cache
    return list(known), [name for name in linecache.cache if name.startswith("<eval_with_key>")]


def trace() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_sources_of_the_newest_graphs_stay_and_no_others() -> None:
    for _ in range(2 * KEPT):
        newest = trace()
    linecache.cache["a file"] = (0, None, [], "a file")
    forget_old_sources()
    texts, lines = sources()
    assert len(texts) == KEPT
    assert 0 < len(lines) <= KEPT  # pytest may have cleared some
    assert "a file" in linecache.cache
    del linecache.cache["a file"]
    assert 'getattr(self, "1")' in "".join(linecache.getlines(texts[-1]))
    assert newest(torch.ones(1, 2)).shape == (1, 2)


def test_splitting_models_without_end_keeps_memory_flat() -> None:
    for _ in range(KEPT // 4):
        model = build_model(ModelSpec(name="squeezenet1_1", num_classes=10))
        split(model, ("features.2", "features.5"), image_input(64))
    texts, lines = sources()
    assert max(len(texts), len(lines)) <= KEPT
