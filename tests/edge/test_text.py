"""Sentences from CoLA's files and from Hugging Face's data sets, and their way to token ids."""

import datasets
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.partition import text_input
from edge.data.samples import TextSamples
from edge.data.text import TextSource, Tokens, is_text_data, open_text
from tests.tiny_text import sentence, write_cola, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cola(tmp_path):
    return write_cola(tmp_path / "cola", train=30, test=6)


def opened(name, **limits):
    return open_text(name, seed=1, **{"train_limit": None, "test_limit": None, **limits})


def test_cola_is_its_own_files_with_both_development_sets_to_test(cola):
    dataset = opened(cola)
    assert (len(dataset.train), len(dataset.test)) == (30, 12)
    assert dataset.classes == ("unacceptable", "acceptable")
    assert dataset.train.sentences[3] == sentence(3)
    assert [int(label) for label in dataset.train.labels[:11]] == [1] * 5 + [0] * 6


def test_a_limit_keeps_all_classes_alike(cola):
    dataset = opened(cola, train_limit=10, test_limit=4)
    assert np.bincount(dataset.train.labels).tolist() == [5, 5]
    assert len(dataset.test) == 4


def test_quotation_marks_in_a_sentence_are_its_own(tmp_path):
    name = write_cola(tmp_path)
    path = tmp_path / "in_domain_train.tsv"
    path.write_text('x\t1\t\tHe said "no\nx\t0\t*\tShe did"\n')
    assert name.startswith("cola:")
    assert opened(name).train.sentences == ['He said "no', 'She did"']


@pytest.mark.parametrize("line", ["x\t2\t\ta", "x\t1\ta", "", "a\tb\tc\td\te"])
def test_a_damaged_line_is_named(tmp_path, line):
    name = write_cola(tmp_path)
    (tmp_path / "in_domain_dev.tsv").write_text(f"x\t1\t\tfine\n{line}\n")
    with pytest.raises(UserError, match=r"in_domain_dev\.tsv, line 2: expected source"):
        opened(name)


def test_a_folder_without_the_corpus_says_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*in_domain_train.tsv; cola:PATH is a folder with"):
        opened(f"cola:{tmp_path}")


def test_sentences_are_trimmed_to_the_longest(model):
    tokens = Tokens(model, text_input(24), longest=True)
    source = TextSource(["the cat", "the cat sat on the mat and ran", "a dog"], [0, 1, 0])
    ids, mask = tokens.read(source, np.arange(3))
    assert ids.shape == mask.shape == (3, 24)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert mask.sum(1).tolist() == [4, 10, 4]
    assert tokens.trim((ids[::2], mask[::2]))[0].shape == (2, 8)  # in eights
    assert tokens.trim((ids, mask))[0].shape == (3, 16)


def test_padding_to_the_most_stays(model):
    tokens = Tokens(model, text_input(16), longest=False)
    inputs = tokens.read(TextSource(["the cat"], [0]), np.arange(1))
    assert [t.shape for t in tokens.trim(inputs)] == [(1, 16), (1, 16)]


def test_what_is_too_long_is_cut_short(model):
    tokens = Tokens(model, text_input(6), longest=True)
    ids, mask = tokens.read(TextSource(["the cat sat on the mat and ran"], [0]), np.arange(1))
    assert ids.shape == (1, 6)
    assert mask.all()
    assert int(ids[0, -1]) == 3  # the separator is kept


def test_two_sentences_are_told_apart(model):
    tokens = Tokens(model, text_input(16, pairs=True), longest=True)
    inputs = tokens.read(TextSource([("the cat", "a dog ran")], [1]), np.arange(1))
    _, _, types = tokens.trim(inputs)
    assert types[0].tolist() == [0] * 4 + [1] * 4


def test_batches_are_a_pure_function_of_the_seed_and_the_epoch(cola, model):
    dataset = opened(cola)
    tokens = Tokens(model, text_input(16), longest=True)
    read = []
    for _ in range(2):
        samples = TextSamples(dataset, tokens, seed=3)
        with samples.train(batch_size=8, epochs=2, channels_last=False) as batches:
            read.append(list(batches))
    assert [len(batch) for batch in read[0]] == [8, 8, 8, 6] * 2
    for one, other in zip(*read, strict=True):
        assert torch.equal(one.inputs[0], other.inputs[0])
    first, second = ({int(i) for batch in read[0][k : k + 4] for i in batch.sample_ids} for k in (0, 4))
    assert first == second == set(range(30))
    assert not torch.equal(read[0][0].sample_ids, read[0][4].sample_ids)
    one = read[0][2]
    ids, mask = tokens.read(dataset.train, one.sample_ids.numpy())
    assert torch.equal(one.inputs[0], ids)
    assert torch.equal(one.inputs[1], mask)
    assert one.labels.tolist() == dataset.train.labels[one.sample_ids.numpy()].tolist()


def test_the_test_set_is_read_once_in_order(cola, model):
    samples = TextSamples(opened(cola), Tokens(model, text_input(16), longest=True), seed=3)
    with samples.test(batch_size=5, channels_last=False) as batches:
        assert [batch.sample_ids.tolist() for batch in batches] == [
            [0, 1, 2, 3, 4],
            [5, 6, 7, 8, 9],
            [10, 11],
        ]
    assert samples.filler()[0].shape[0] == 1
    assert [t.shape for t in samples.plain(np.arange(7))] == [(7, 16)] * 2


def write_hub(folder, columns, *, splits=("train", "validation"), features=None):
    made = {split: datasets.Dataset.from_dict(columns, features=features) for split in splits}
    datasets.DatasetDict(made).save_to_disk(folder)
    return f"hf:{folder}"


def test_names_that_are_numbers_are_names(tmp_path):
    stars = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    columns = {"text": ["bad", "so so", "good"], "label": [0, 1, 2]}
    dataset = opened(write_hub(tmp_path, columns, features=stars))
    assert dataset.classes == ("1", "2", "3")
    assert dataset.train.labels.tolist() == [0, 1, 2]


def test_a_data_set_of_the_hubs_is_opened_from_its_folder(tmp_path):
    named = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    dataset = opened(write_hub(tmp_path, {"text": ["x", "y"], "label": [1, 0]}, features=named))
    assert dataset.classes == ("bad", "good")
    assert dataset.train.sentences == ["x", "y"]
    assert dataset.train.labels.tolist() == [1, 0]


def test_pairs_and_labels_in_words_are_found(tmp_path):
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": ["yes", "no", "yes"]}
    dataset = opened(write_hub(tmp_path, columns))
    assert dataset.train.sentences == [("a", "d"), ("b", "e"), ("c", "f")]
    assert dataset.classes == ("no", "yes")
    assert dataset.train.labels.tolist() == [1, 0, 1]


def test_a_folder_of_csv_files_is_a_data_set_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("sentence,label\nthe cat,3\na dog,5\n")
    dataset = opened(f"hf:{folder}")
    assert dataset.classes == ("3", "5")
    assert dataset.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("columns", "splits", "message"),
    [
        ({"words": ["x"], "label": [0]}, ("train", "test"), "columns words, label; it needs text"),
        ({"text": ["x"]}, ("train", "test"), "it needs text"),
        ({"text": ["x"], "label": [0]}, ("train",), "splits train; it needs train, and one of"),
    ],
)
def test_a_data_set_that_does_not_fit_says_what_would(tmp_path, columns, splits, message):
    with pytest.raises(UserError, match=message):
        opened(write_hub(tmp_path, columns, splits=splits))


def test_no_such_folder_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot open the data set") as caught:
        opened(f"hf:{tmp_path / 'empty'}")
    assert "\n" not in str(caught.value)


def test_text_data_are_known_by_name():
    assert [is_text_data(name) for name in ("cola:x", "hf:glue", "digits", "folder:x")] == [
        True,
        True,
        False,
        False,
    ]
