"""A tiny text model and corpus in a folder, as the real ones lie there: a tokenizer, a configuration, sentences."""

import json
from pathlib import Path

from common.text_models import transformers

WORDS = "the a cat dog sat ran on under mat house and quickly slowly big small red it was not very".split()  # noqa: SIM905

CONFIGS = {
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 40,
    },
    "roberta": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 42,
        "type_vocab_size": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_heads": 2,
        "n_layers": 2,
        "max_position_embeddings": 40,
    },
}

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
}
OTHERS = {
    "mpnet": {**SMALL, "pad_token_id": 0, "initializer_range": 0.2},
    "deberta-v2": {
        **SMALL,
        "initializer_range": 0.2,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 8,
    },
    "convbert": {**SMALL, "embedding_size": 32, "conv_kernel_size": 3, "initializer_range": 0.2},
}
"""Models of which more crosses than the tokens need."""


def write_model(folder: Path, kind: str = "bert", *, weights: bool = False) -> str:
    """Write a model's folder; returns its name. With weights it is a checkpoint with a classifier of two."""
    folder.mkdir(parents=True, exist_ok=True)
    library = transformers()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    library.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = library.AutoConfig.for_model(kind, vocab_size=len(words), **{**CONFIGS, **OTHERS}[kind])
    if weights:
        library.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(config.to_diff_dict()))
    return f"hf:{folder}"


def sentence(number: int) -> str:
    """Two to twelve words, a pure function of the number."""
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(2 + number % 11))


def write_cola(folder: Path, *, train: int = 40, test: int = 9) -> str:
    """Write a corpus as CoLA's own files are; returns its name. Long sentences are unacceptable."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, count in (("in_domain_train", train), ("in_domain_dev", test), ("out_of_domain_dev", test)):
        lines = [f"src\t{int(n % 11 < 5)}\t\t{sentence(n)}" for n in range(first, first + count)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        first += count
    return f"cola:{folder}"
