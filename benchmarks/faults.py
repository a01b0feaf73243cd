"""Nothing lost, nothing done twice: trainings under faults of all kinds against quiet ones.

    python -m benchmarks.faults TABLE... [--quick] [--seeds N] [--first-seed S] [--faults N] [--chains C ...] ...

=======  ============================================================================================================
cuts     random cuts, stalls, delays, truncations and duplicates in every training: final weights bitwise
commit   a cut at every byte of ``commit``, ``committed``, ``rejoin``, ``ready`` and ``resume``: final weights bitwise
kills    SIGKILL of client, server or both, again and again in one training: final weights bitwise
crowd    many clients at once, some of them hostile: the honest ones all finish, with the quiet run's weights
fuzz     random bytes and mutated frames: the server answers the next client, stays small and logs no traceback
cost     time from a cut to the next finished step, at some round-trip times
=======  ============================================================================================================

Each run prints a line with its seed; ``--first-seed`` with ``--seeds 1`` makes it again. The exit status is 1 where
one failed. What a table came to is written into docs/results.md, as `benchmarks.run_all` writes it, unless
``--no-record`` is given.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from benchmarks.fault_cost import HEAD, costs
from benchmarks.fault_crowd import HOSTILE, crowd
from benchmarks.fault_kills import killed_run
from benchmarks.fault_runs import (
    EXCHANGES,
    IMPORTS,
    JOBS,
    TINY_JOB,
    Memory,
    Trial,
    cut_exchange,
    differing,
    faulty_run,
    head_sizes,
    quiet_run,
    server_for_faults,
    train_to_end,
)
from benchmarks.fuzzing import Attack
from benchmarks.intruder import record_with_return
from benchmarks.run_all import HEAD as DOCUMENT_HEAD
from benchmarks.run_all import ROOT, Benchmark, section, with_section
from tests.system.processes import Ended, serving

MIB = 1 << 20
CHAINS = ("none", "conv+int8", "lowrank:8+int4", "decay")
ROUND_TRIPS_S = (0.0, 0.01, 0.05, 0.2)
FUZZ_GROWTH_BYTES = 32 * MIB
FUZZ_ROUNDS = 10
"""An honest client trains after each; memory is compared with that after the first."""
FUZZ_WARM_UP = 2000
"""After so many frames the server's caches and pools are full."""
CROWD_GROWTH_BYTES = 256 * MIB
"""Allocators of many threads keep some; a client's session that stayed would be as much for every few of them."""


class Report:
    """What a table prints and what of it goes into the results.

    Attributes:
        lines: for the results.
        failed: runs that failed.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = 0

    def trial(self, trial: Trial) -> None:
        """Print a run; only one that failed stands in the results by itself."""
        print(trial, flush=True)
        if trial.problems:
            self.failed += 1
            self.lines.append(str(trial))

    def total(self, what: str, trials: Sequence[Trial]) -> None:
        """Say what many runs came to."""
        made: Counter[str] = sum((Counter(trial.faults) for trial in trials), Counter())
        passed = sum(not trial.problems for trial in trials)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.items()))
        self.say(f"{what}: {passed} of {len(trials)} as the quiet run; {made.total()} faults: {kinds}")

    def check(self, what: str, passed: bool) -> None:
        """Say whether something is as it should be."""
        self.failed += not passed
        self.say(f"{what}: {'PASS' if passed else 'FAIL'}")

    def say(self, line: str) -> None:
        """Print a line that the results hold too."""
        print(line, flush=True)
        self.lines.append(line)


def cuts(options: argparse.Namespace, report: Report) -> None:
    """Random faults in every training."""
    steps, faults = options.steps or 100, options.faults or (40 if options.quick else 200)

    def once(chain: str, seed: int) -> Trial:
        with server_for_faults() as (server, address):
            quiet = quiet_run(address, JOBS[chain], steps, seed)
            trial = faulty_run(address, JOBS[chain], quiet, steps=steps, seed=seed, faults=faults)
            trial.problems += ["a traceback in the server's log"] if "Traceback" in server.err else []
            return trial

    for chain in options.chains:
        trials = _each(options, report, partial(once, chain), 20)
        report.total(f"{chain}, {steps} steps, {faults} faults each, {_seeds(trials)}", trials)


def commit(options: argparse.Namespace, report: Report) -> None:
    """Every byte of the exchanges that conclude a step."""
    with server_for_faults() as (server, address):
        for chain in options.chains:
            sizes = head_sizes(address, JOBS[chain])
            for exchange in EXCHANGES:
                size = sizes[exchange.kind]
                offsets = range(0, size + 1, 7 if options.quick else 1)
                trials = []
                for first in range(0, len(offsets), 100):  # so that a failure is known sooner
                    part = offsets[first : first + 100]
                    trials.append(cut_exchange(address, JOBS[chain], exchange, part, seed=options.first_seed))
                    report.trial(trials[-1])
                report.total(f"{chain}, {exchange.kind} of {size} bytes, {len(offsets)} positions", trials)
        report.check("no traceback in the server's log", "Traceback" not in server.err)


def kills(options: argparse.Namespace, report: Report) -> None:
    """SIGKILL at random moments."""
    steps, times = options.steps or 200, options.faults or (8 if options.quick else 30)

    def once(chain: str, seed: int) -> Trial:
        with server_for_faults() as (_, address):
            quiet = quiet_run(address, JOBS[chain], steps, seed)
        return killed_run(JOBS[chain], quiet, steps=steps, seed=seed, kills=times)

    for chain in options.chains:
        trials = _each(options, report, partial(once, chain), 5)
        report.total(f"{chain}, {steps} steps, {times} kills each, {_seeds(trials)}", trials)


def _each(
    options: argparse.Namespace, report: Report, once: Callable[[int], Trial], most: int
) -> list[Trial]:
    """Make a run of each seed, some at once: they wait for most of their time."""
    trials = []
    seeds = range(options.first_seed, options.first_seed + (options.seeds or (2 if options.quick else most)))
    with ThreadPoolExecutor(options.jobs) as pool:
        for trial in pool.map(once, seeds):
            report.trial(trial)
            trials.append(trial)
    return trials


def crowded(options: argparse.Namespace, report: Report) -> None:
    """Honest clients among hostile ones."""
    minutes = options.minutes or (0.5 if options.quick else 5.0)
    job = JOBS[options.chains[0]]
    steps, clients = options.steps or 30, options.clients or (16 if options.quick else 64)
    result = crowd(job, clients=clients, minutes=minutes, steps=steps, seed=options.first_seed)
    attacks = ", ".join(f"{name} {count}" for name, count in sorted(result.attacks.items()))
    report.say(
        f"{clients} clients, {len(HOSTILE)} of them hostile, {minutes:g} min, seed {options.first_seed}"
    )
    report.say(f"{result.finished} trainings of {steps} steps; attacks: {attacks}")
    for problem, count in Counter(result.problems).items():
        report.say(f"{count} times: {problem}")
    report.check("every honest client finished with the quiet run's weights", not result.problems)
    report.say(
        f"server's memory: {result.before_bytes // MIB} MiB before, {result.most_bytes // MIB} at most,"
        f" {result.after_bytes // MIB} after"
    )
    grown = result.after_bytes - result.before_bytes
    report.check(f"it grew by {grown // MIB} MiB", grown < CROWD_GROWTH_BYTES)


def fuzz(options: argparse.Namespace, report: Report) -> None:
    """Noise and mutated frames, half of them without a token and half behind one."""
    for token in (None, b"a token for the benchmark"):
        _fuzz(options, report, token)


def _fuzz(options: argparse.Namespace, report: Report, token: bytes | None) -> None:
    noise = (options.bytes or (500_000 if options.quick else 10_000_000)) // 2
    frames = (options.frames or (3000 if options.quick else 100_000)) // 2
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "token").write_bytes(token or b"")
        saved, guarded = folder / "model.safetensors", ("--token-file", folder / "token") if token else ()

        def train(to: str, *others: object) -> Ended:
            return train_to_end(to, TINY_JOB, 6, 0, *guarded, "--save", saved, *others)

        def is_good() -> bool:
            return train(address).status == 0 and not differing(expected, load_file(saved))

        keeps = ("--checkpoint", folder / "run", "--checkpoint-every", 1)
        limits = ("--max-sessions", 64, "--state-dir", folder / "state", "--park-after", 3)
        with serving(*IMPORTS, *limits, "--forget-after", 6, *guarded) as (server, address):
            real = record_with_return(address, lambda to: train(to, *keeps))
            expected = load_file(saved)
            attack = Attack(address, real, options.first_seed, token)
            attack.noise(noise // FUZZ_ROUNDS)
            attack.mutate(max(frames // FUZZ_ROUNDS, min(frames // 2, FUZZ_WARM_UP)))
            good = [is_good()]
            with Memory(server) as memory:
                for left in range(FUZZ_ROUNDS - 1, 0, -1):
                    attack.noise((noise - attack.findings.noise_bytes) // left)
                    attack.mutate((frames - attack.findings.frames.total()) // left)
                    good.append(is_good())
            found = attack.findings
            report.say(
                f"{'behind a token' if token else 'without a token'}, seed {options.first_seed}: "
                f"{found.noise_bytes:,} random bytes, {found.frames.total():,} mutated frames; "
                f"answers: {_counts(found.errors)}; tried again: {_counts(found.lost) or 'none'}; "
                f"{found.opened} sessions to attack from within"
            )
            report.say(f"frames by phase and kind: {_counts(found.frames)}")
            for fault in found.faults[:10]:
                report.say(fault)
            is_all = found.noise_bytes >= noise and found.frames.total() >= frames
            report.check("the server has read all of it", is_all)
            report.check("in each phase, each kind of frame", not attack.missed)
            report.check("every connection ended, and no error without a type", not found.faults)
            report.check(f"{len(good)} honest clients in between and after train as before", all(good))
            grown = memory.after - memory.before
            report.check(f"the server's memory grew by {grown / MIB:.1f} MiB", grown < FUZZ_GROWTH_BYTES)
            report.check("no traceback in its log", "Traceback" not in server.err)


def cost(options: argparse.Namespace, report: Report) -> None:
    """What a lost connection costs."""
    with server_for_faults() as (_, address):
        report.say(HEAD)
        for row in costs(address, JOBS[options.chains[0]], ROUND_TRIPS_S, cuts=8 if options.quick else 24):
            report.failed += not row.met
            report.say(str(row))


TABLES: dict[str, tuple[Callable[[argparse.Namespace, Report], None], str]] = {
    "cuts": (cuts, "Random faults at random bytes of either direction, `benchmarks/faulty_proxy.py`."),
    "commit": (commit, "One training for many cuts, each inside the next frame of its kind."),
    "kills": (kills, "SIGKILL at random moments; both sides are started again and go on from checkpoints."),
    "crowd": (crowded, "Slow readers, slow writers, floods and early closers among honest clients."),
    "fuzz": (fuzz, "Random bytes and real frames with something changed, before and after authentication."),
    "cost": (
        cost,
        "From the cut to the next finished step, against one round trip + one step + the back-off.",
    ),
}


def _seeds(trials: Sequence[Trial]) -> str:
    return f"seeds {trials[0].seed} to {trials[-1].seed}" if len(trials) > 1 else f"seed {trials[0].seed}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


def _recorded(output: Path, table: str, report: Report, options: argparse.Namespace, seconds: float) -> None:
    about = TABLES[table][1]
    status = 1 if report.failed else 0
    new = section(
        Benchmark(f"faults {table}", f"Faults: {table}", about),
        options.quick,
        status,
        "\n".join(report.lines),
        seconds,
    )
    document = output.read_text(encoding="utf-8") if output.exists() else DOCUMENT_HEAD
    output.write_text(with_section(document, new), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run tables; return 1 where a run failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/faults.py", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--seeds", type=int, help="trainings of each chain")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--faults", type=int, help="of one training")
    parser.add_argument("--steps", type=int, help="of one training")
    parser.add_argument("--chains", nargs="+", choices=JOBS, default=list(CHAINS), metavar="CHAIN")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once, of cuts and kills")
    parser.add_argument("--minutes", type=float, help="of the crowd")
    parser.add_argument("--clients", type=int, help="of the crowd")
    parser.add_argument("--bytes", type=int, help="of noise")
    parser.add_argument("--frames", type=int, help="that are mutated")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--no-record", action="store_true", help="leave the results as they are")
    options = parser.parse_args(argv)
    failed = 0
    for table in options.tables:
        report, began = Report(), time.monotonic()
        print(f"== {table}", flush=True)
        TABLES[table][0](options, report)
        failed += report.failed
        if not options.no_record:
            _recorded(options.output, table, report, options, time.monotonic() - began)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
