"""What the benchmarks must reach: one table of targets, and what the last runs measured.

Each benchmark notes its figures in target/bench; run as a program this prints all of them beside their targets.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, List, Mapping

import report

NOTED = Path(__file__).resolve().parent.parent.parent / "target" / "bench"
AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Target:
    """One figure, and on which side of the bound it has to be."""

    section: str
    name: str
    what: str
    side: str
    bound: float
    unit: str = ""

    def met(self, figure: float) -> bool:
        return figure >= self.bound if self.side == AT_LEAST else figure <= self.bound

    def row(self, figure: "float | None") -> str:
        shown = "not measured" if figure is None else f"{round(figure, 3):.3g}{self.unit}"
        verdict = "" if figure is None else "met" if self.met(figure) else "**missed**"
        return f"| {self.what} | {shown} | {self.side} {self.bound:g}{self.unit} | {verdict} |"


# 200 bytes, one cached DEK, whole queries, unless another thing is said.
TARGETS = [
    Target("hot_path", "decrypt_pgcrypto", "decrypt bytea: times as fast as pgcrypto `decrypt()`", AT_LEAST, 1.6),
    Target("hot_path", "decrypt_pgp", "decrypt bytea: times as fast as `pgp_sym_decrypt()`", AT_LEAST, 200),
    Target("hot_path", "decrypt_floor", "decrypt bytea above its scan: times the floor above its scan", AT_MOST, 1.5),
    Target("hot_path", "text_bytea", "decrypt text: times the bytea query", AT_MOST, 1.4),
    Target("hot_path", "encrypt_pgcrypto", "encrypt bytea: times as fast as pgcrypto `encrypt()`", AT_LEAST, 1.2),
    Target("hot_path", "deks_1000", "1,000 cached DEKs in random order: times one DEK", AT_MOST, 1.3),
    Target("hot_path", "large_floor", "decrypt 16 KB: times the floor", AT_MOST, 1.3),
    Target("memory", "load_ms", "loading the extension into a session", AT_MOST, 1, " ms"),
    Target("memory", "load_mb", "private memory of a session that loaded it", AT_MOST, 1, " MB"),
    Target("memory", "preloaded_load_ms", "the same where it is preloaded", AT_MOST, 1, " ms"),
    Target("memory", "preloaded_mb", "private memory of a session where it is preloaded", AT_MOST, 1, " MB"),
    Target("memory", "kms_alone_mb", "private memory that a session holds after calling AWS KMS, alone", AT_MOST, 12, " MB"),
    Target("memory", "first_call_ms", "what the first call adds to the network's time", AT_MOST, 30, " ms"),
    Target("memory", "session_mb", "an idle session with 1,000 DEKs, of 500", AT_MOST, 6, " MB"),
    Target("audit", "audit_percent", "what the audit adds to a query", AT_MOST, 5, " %"),
    Target("audit", "gate_percent", "what the check of grants is of a query", AT_MOST, 2, " %"),
    Target("calls", "encrypt", "encrypt 2,000 values under fresh DEKs, 50 ms a call, 64 together: times as fast", AT_LEAST, 30),
    Target("calls", "decrypt", "decrypt 2,000 values after a prefetch, likewise", AT_LEAST, 30),
    Target("calls", "rewrap", "rewrap 2,000 values after a prefetch, likewise", AT_LEAST, 30),
    Target("instructions", "growth_percent", "instructions a value, above the recorded ones", AT_MOST, 10, " %"),
]


def note(section: str, figures: "Mapping[str, float]") -> None:
    """Keep what a benchmark measured, and print it beside its targets."""
    NOTED.mkdir(parents=True, exist_ok=True)
    (NOTED / f"{section}.json").write_text(json.dumps(dict(figures), indent=1) + "\n")
    print()
    print(table(target for target in TARGETS if target.section == section))


def missed() -> "List[Target]":
    """The targets that were not met, or not measured."""
    figures = {target: _figure(target) for target in TARGETS}
    return [target for target, figure in figures.items() if figure is None or not target.met(figure)]


def table(targets: "Iterable[Target]") -> str:
    """Figures beside their targets."""
    lines = ["| | measured | target | |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(target.row(_figure(target)) for target in targets)])


def _figure(target: Target) -> "float | None":
    path = NOTED / f"{target.section}.json"
    return json.loads(path.read_text()).get(target.name) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/BENCHMARKS.md")
    parser.add_argument("--enforce", action="store_true", help="fail when a target was missed, or not measured")
    arguments = parser.parse_args()
    report.show("targets", table(TARGETS), write=arguments.write)
    failed = missed()
    if arguments.enforce and failed:
        sys.exit(f"{len(failed)} of {len(TARGETS)} targets were missed")


if __name__ == "__main__":
    main()
