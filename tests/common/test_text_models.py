"""Hugging Face's encoders by folder, by configuration and by what a peer sends."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, model_inputs
from common.spec import JobSpec
from common.text_config import TYPES, check_config, inputs_of, most_tokens
from common.text_models import (
    PRETRAINED,
    build_text_model,
    has_weights,
    is_folder,
    read_config,
    tokenizer_of,
    transformers,
)
from tests.tiny_text import CONFIGS, write_model

BERT = check_config({"model_type": "bert", "vocab_size": 30, **CONFIGS["bert"]})


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_gives_configuration_tokenizer_and_weights(tmp_path, kind):
    name = write_model(tmp_path, kind, weights=True)
    assert has_weights(name)
    config = read_config(name)
    model = build_text_model(name, config, 2, seed=1, pretrained=True, offline=True)
    plain = transformers().AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[key]) for key, t in model.state_dict().items())
    assert model.training
    assert tokenizer_of(name)("the cat")["input_ids"] == [2, 6, 8, 3]


def test_another_number_of_classes_starts_the_classifier_anew_from_the_seed(tmp_path):
    name = write_model(tmp_path, weights=True)
    config = read_config(name)
    models = [build_text_model(name, config, 5, seed=1, pretrained=True, offline=True) for _ in range(2)]
    first, second = (model.state_dict() for model in models)
    assert first["classifier.weight"].shape == (5, 32)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_random_weights_are_a_pure_function_of_the_seed_and_leave_the_generator_alone(tmp_path):
    name = write_model(tmp_path)
    config = read_config(name)
    assert not has_weights(name)
    before = torch.get_rng_state()
    a, b, other = (
        build_text_model(name, config, 2, seed=seed, pretrained=False, offline=True) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, other.classifier.weight)


def test_weights_come_from_a_state_dict_file_too(tmp_path):
    spec = ModelSpec(name="hf:x", num_classes=2, config=BERT, tokens=8, seed=4)
    state = build_model(spec).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    other = ModelSpec(
        name="hf:x", num_classes=2, config=BERT, tokens=8, weights=str(tmp_path / "w.safetensors"), seed=9
    )
    assert all(torch.equal(t, state[key]) for key, t in build_model(other).state_dict().items())


def test_a_folder_without_weights_or_tokenizer_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    name = f"hf:{tmp_path}"
    with pytest.raises(UserError, match=r"the weights of hf:.* could not be read"):
        build_text_model(name, read_config(name), 2, seed=0, pretrained=True, offline=True)
    with pytest.raises(UserError, match="comes without a tokenizer"):
        tokenizer_of(name)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(UserError, match=f"there is no model hf:{tmp_path}") as caught:
        read_config(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/x; hf:PATH is one"):
        read_config(f"hf:{tmp_path}/x")


def test_pickled_weights_are_not_read(tmp_path):
    name = write_model(tmp_path)
    state = build_text_model(name, read_config(name), 2, seed=0, pretrained=False, offline=True).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be read"):
        build_text_model(name, read_config(name), 2, seed=0, pretrained=True, offline=True)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_damaged_weights_are_told_in_one_line(tmp_path, length):
    name = write_model(tmp_path, weights=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"the weights of hf:.* could not be read") as caught:
        build_text_model(name, read_config(name), 2, seed=0, pretrained=True, offline=True)
    assert "\n" not in str(caught.value)


def test_a_configuration_with_a_value_of_another_type_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "hidden_size": "wide"}))
    with pytest.raises(UserError, match="hidden_size") as caught:
        read_config(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_weights_of_a_name_that_there_is_not_are_refused():
    with pytest.raises(
        UserError, match="hf:x has no weights 'IMAGENET1K_V1'; there are pretrained and random"
    ):
        build_model(ModelSpec(name="hf:x", num_classes=2, config=BERT, weights="IMAGENET1K_V1"))


@pytest.mark.parametrize(
    "name", ["hf:~nobody-of-that-name/x", "hf:" + "x" * 5000, "hf:a\0b", "hf:", "hf:a/b/c"]
)
def test_any_name_is_a_folder_or_not(name):
    assert is_folder(name) is (name == "hf:")
    with pytest.raises(UserError, match="could not be read"):
        build_text_model(name, BERT, 2, seed=0, pretrained=True, offline=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must be a map"),
        ([1], "must be a map"),
        ({}, "type 'None' cannot be split"),
        ({"model_type": "gpt2"}, f"type 'gpt2' cannot be split; there are {', '.join(TYPES)}"),
        ({"model_type": "bert", "num_hidden_layers": 100_000}, "layers"),
        ({"model_type": "mobilebert", "num_feedforward_networks": 100_000}, "layers"),
        ({"model_type": "bert", "hidden_size": 1 << 40}, "too large"),
        ({"model_type": "bert", "x": "y" * (1 << 17)}, "too large"),
        ({"model_type": "bert", "x": float("nan")}, "plain values"),
        ({"model_type": "bert", "x": object()}, "plain values"),
    ],
)
def test_a_peers_configuration_is_checked_before_anything_is_built(config, message):
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 33},
        {"hidden_size": "wide"},
        {"hidden_act": "os.system"},
        {"num_attention_heads": 0},
        {"initializer_range": -1.0},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_one_line(changes):
    with pytest.raises(UserError, match="makes no model") as caught:
        build_text_model("hf:x", {**BERT, **changes}, 2, seed=0, pretrained=False, offline=True)
    assert "\n" not in str(caught.value)


def test_a_model_too_large_for_a_server_is_refused_before_it_takes_memory():
    config = {**BERT, "hidden_size": 65536, "num_attention_heads": 4, "intermediate_size": 262144}
    with pytest.raises(UserError, match=r"has [\d,]+ parameters; 4,000,000,000 are allowed"):
        build_text_model("hf:x", config, 2, seed=0, pretrained=False, offline=True)


def test_what_names_files_or_code_does_not_travel():
    config = check_config({**BERT, "auto_map": {"AutoConfig": "evil.Config"}, "_name_or_path": "/home/me"})
    assert config == BERT


def test_a_job_carries_a_text_model():
    spec = ModelSpec(name="hf:x", num_classes=2, config=BERT, tokens=16, weights=PRETRAINED)
    values = {"model": spec, "cuts": ("a", "b")}
    from common.optim import OptimSpec

    job = JobSpec(**values, optim=OptimSpec(name="adamw", lr=1e-3, total_steps=3))
    assert JobSpec.from_map(job.to_map()) == job
    sent = job.to_map()
    sent["model"]["config"] = {"model_type": "gpt2"}
    with pytest.raises(UserError, match="cannot be split"):
        JobSpec.from_map(sent)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "bert"}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 42, "pad_token_id": 0}, 41),
        ({"model_type": "xlm-roberta-xl", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta-prelayernorm", "max_position_embeddings": 514}, 512),
        ({"model_type": "deberta-v2", "max_position_embeddings": -1}, None),
    ],
)
def test_positions_limit_the_tokens(config, most):
    assert most_tokens(config) == most


def test_a_job_of_longer_texts_than_a_model_has_positions_is_refused():
    spec = ModelSpec(name="hf:x", num_classes=2, config=BERT, tokens=41)
    with pytest.raises(UserError, match="hf:x has 40 positions, too few for texts of 41 tokens"):
        model_inputs(spec)


def test_only_models_that_tell_two_sentences_apart_are_told():
    names = {kind: [i.name for i in inputs_of({"model_type": kind, **CONFIGS[kind]}, 8)] for kind in CONFIGS}
    assert names["bert"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert names["roberta"] == names["distilbert"] == ["input_ids", "attention_mask"]
    assert [info.shape for info in model_inputs(ModelSpec(name="hf:x", num_classes=2, config=BERT))] == [
        (128,)
    ] * 3


def test_transformers_is_not_loaded_for_images():
    code = "import sys, edge.command, cloud.server; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
