from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from common.errors import UserError
from common.weights import (
    load_state,
    merge_states,
    partition_state,
    save_model,
    split_bottleneck,
    state_digest,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def some_state():
    return {
        "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "norm.num_batches_tracked": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
    }


def test_a_saved_model_loads_as_it_was(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, some_state(), {"bottleneck.cut1.encoder.0.weight": torch.ones(2)}, {"model": "tiny"})
    own, bottleneck = split_bottleneck(load_state(path))
    assert own.keys() == some_state().keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in some_state().items())
    assert list(bottleneck) == ["bottleneck.cut1.encoder.0.weight"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "tiny"}


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")
    save_model(path, some_state(), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("common.weights.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, some_state(), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}]
)
def test_a_torch_file_of_plain_tensors_is_read(tmp_path, wrap):
    torch.save(wrap(some_state()), tmp_path / "model.pt")
    assert state_digest(load_state(tmp_path / "model.pt")) == state_digest(some_state())


def test_a_file_is_read_by_what_it_holds_and_not_by_its_ending(tmp_path):
    save_model(tmp_path / "model.st", some_state(), {}, {"model": "m"})
    torch.save(some_state(), tmp_path / "model.weights")
    for path in tmp_path.iterdir():
        assert state_digest(load_state(path)) == state_digest(some_state())


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_nothing_in_a_torch_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is no readable weights file"):
        load_state(Path("model.pt"))
    assert not Path("trapped").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(some_state(), path)
    else:
        save_model(path, some_state(), {}, {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="perhaps cut short") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save({"lr": 0.1}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_state(tmp_path / "model.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no weights file .*absent\.pt"):
        load_state(tmp_path / "absent.pt")


def test_partitions_merge_into_the_whole_model_and_the_bottleneck():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = [{f"{i}.{k}": v + 1 for k, v in partition_state(m).items()} for i, m in enumerate(model)]
    parts[1]["bottleneck.cut2.encoder.0.bias"] = torch.zeros(1)
    full, bottleneck = merge_states(initial, *parts)
    assert list(full) == list(initial)
    assert all(torch.equal(full[name], initial[name] + 1) for name in initial)
    assert list(bottleneck) == ["bottleneck.cut2.encoder.0.bias"]


def test_a_name_that_the_model_lacks_is_refused_when_merging():
    with pytest.raises(ValueError, match="the model has no other"):
        merge_states({"weight": torch.ones(1)}, {"other": torch.ones(1)})


@settings(deadline=None, max_examples=30)
@given(st.permutations(list(some_state())), st.booleans())
def test_the_digest_depends_on_neither_order_nor_memory_format(names, contiguous):
    state = {name: some_state()[name] for name in names}
    if contiguous:
        state = {name: tensor.contiguous() for name, tensor in state.items()}
    assert state_digest(state) == state_digest(some_state())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_sees_a_single_changed_bit(dtype):
    state = {"a": torch.zeros(5, dtype=dtype)}
    changed = {"a": state["a"].clone()}
    changed["a"][3] = 1
    assert state_digest(changed) != state_digest(state)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ],
)
def test_the_digest_sees_names_shapes_and_dtypes(other):
    assert state_digest(other) != state_digest({"a": torch.zeros(4)})
