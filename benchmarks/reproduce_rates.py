"""Compress rates on the socket against the published formulas; see `benchmarks.reproduce`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import published
from benchmarks.product import loopback, run_product
from benchmarks.published import Row
from benchmarks.reproduce import find_cola, minilm, write_section
from benchmarks.step_time import WORKLOAD
from common.narrowing import Decay
from edge.flops import columns

HEADERS = 0.02
HIDDEN, TOKENS = 768, 128
"""Of RoBERTa-base, and of a sentence with its padding."""


def rates(options: argparse.Namespace) -> bool:
    """Measure every published row's rate; returns whether one is further than 2 % off its formula."""
    lines = [("row", "formula", "published", "on the socket", "off by", "")]
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for row, formula, command in (*_images(options), *_texts(options, Path(folder))):
            rate = run_product(loopback(), command, timeout_s=3600).steps[-1]["compress_rate"]
            # Published rates have two or three digits.
            off = max(abs(rate - formula) - 0.0005, 0) / formula
            missed |= off > HEADERS
            verdict = "FAIL" if off > HEADERS else "pass"
            lines.append(
                (row.label, f"{formula:.4f}", f"{row.rate:.3f}", f"{rate:.4f}", f"{off:.1%}", verdict)
            )
    printed = columns(lines)
    print(printed)
    if not options.quick:
        about = (
            "`python -m benchmarks.reproduce rates`: MobileNetV2, 224 px, batch of 64 in 8 chunks; of CoLA, 128 tokens "
            "with H=768 as of RoBERTa-base, from a BERT of two random layers, batch of 32 in 4 chunks. All bytes of "
            "both directions in the last step, headers too, over dense fp32; target: at most 2 % off the formula, "
            "whose last digit may be half of a thousandth off. Of maps, power iteration has the rank that comes "
            "nearest; rank 128 of a sentence would be larger than the sentence, which crosses instead. Widths that "
            "decay are whole after every narrowing, which the published rates are not."
        )
        write_section("Reproduced: rates", about, printed)
    return missed


def _images(options: argparse.Namespace) -> Iterator[tuple[Row, float, list[str]]]:
    """Rows, their formulas and what to train."""
    size = "64" if options.quick else "224"
    for row in (*published.CONV, *published.INT8, *published.LOWRANK_IMAGE):
        assert row.rate is not None
        formula = row.rate
        if row.compress.startswith("lowrank:"):
            # R (C + HW) / (C HW), of both cuts together.
            formula = int(row.compress.removeprefix("lowrank:")) * (32 + 112**2 + 1280 + 7**2)
            formula /= 32 * 112**2 + 1280 * 7**2
        yield row, formula, [*WORKLOAD, "--image-size", size, "--compress", row.compress, "--steps", "2"]


def _texts(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Row, float, list[str]]]:
    """The same of a BERT whose tokenizer comes from MiniLM, made in the folder."""
    tokenizer = Path(minilm().removeprefix("hf:"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(tokenizer / name, folder)
    config = json.loads((tokenizer / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    command = ["--model", f"hf:{folder}", "--data", f"cola:{find_cola(options.data)}", "--weights", "random"]
    command += ["--max-length", str(TOKENS), "--padding", "max", "--no-ragged", "--eval-every", "0"]
    command += ["--batch-size", "8" if options.quick else "32", "--chunks", "4"]
    for row in published.LOWRANK_TEXT:
        rank = int(row.compress.removeprefix("lowrank:"))
        formula = min(1.0, rank * (TOKENS + HIDDEN) / (TOKENS * HIDDEN))
        yield row, formula, [*command, "--compress", row.compress, "--steps", "2"]
    for row in {row.rate: row for row in published.DECAY if row.rate is not None}.values():
        given = dict(option.split("=") for option in row.spec(0).removeprefix("decay:").split(","))
        narrowings = int(given["iterations"])
        formula = 1.0
        for size, rate in ((HIDDEN, given["rate"]), (TOKENS, given.get("rate2", "1"))):
            formula *= Decay(rate=float(rate), steps=1, iterations=narrowings).width(size, narrowings) / size
        yield row, formula, [*command, "--compress", row.spec(0), "--steps", str(narrowings + 2)]
