"""The list of benchmarks, and the document that they are written into."""

import importlib.util

import pytest

from benchmarks.run_all import BENCHMARKS, HEAD, with_section


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.module)
def test_every_benchmark_is_there(benchmark):
    assert importlib.util.find_spec(f"benchmarks.{benchmark.module}")


def test_a_section_replaces_the_one_of_its_title_and_no_other():
    document = with_section(with_section(HEAD, "## One\n\nold\n"), "## Two\n\nkept\n")
    document = with_section(document, "## One\n\nnew\n")
    assert document.startswith(HEAD)
    assert document[len(HEAD) :].split() == ["##", "One", "new", "##", "Two", "kept"]
