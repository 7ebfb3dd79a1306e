"""Counts the instructions that a value takes in the core, and compares them with the recorded ones.

Instructions do not depend on what else the machine does, so this can fail a build where a time could not. Valgrind's
CPU has the same AES instructions on every x86-64 machine with AVX2. Compilers and libraries move the counts a little.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import report
import targets

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDED = Path(__file__).resolve().parent / "instructions.json"
OPERATIONS = ("decrypt_bytea", "decrypt_bytea_1000_deks", "decrypt_text", "decrypt_text_1000_deks", "encrypt_bytea", "encrypt_text")
GROWTH_PERCENT = 10
FEW, MANY = 1000, 11_000


def can_count() -> "str | None":
    """Why nothing can be counted here, if so."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if platform.machine() != "x86_64":
        return f"the counts were recorded on x86_64, and this is {platform.machine()}"
    return None


def count() -> "Dict[str, float]":
    """Instructions a value, by operation."""
    program = _build()
    return {operation: (_run(program, operation, MANY) - _run(program, operation, FEW)) / (MANY - FEW)
            for operation in OPERATIONS}


def _build() -> str:
    command = ["cargo", "bench", "-p", "vod_tender_core", "--bench", "instructions", "--no-run", "--message-format=json"]
    out = subprocess.check_output(command, cwd=ROOT, text=True)
    built = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return next(each["executable"] for each in built if each.get("executable") and each["target"]["name"] == "instructions")


def _run(program: str, operation: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, operation, str(times)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise RuntimeError(f"{operation} failed under valgrind: {done.stderr[-2000:]}")
    return int(re.search(r"Collected : (\d+)", done.stderr).group(1))


def growth(counted: "Dict[str, float]", recorded: "Dict[str, float]") -> "Dict[str, float]":
    """By how many per cent each operation has grown. Both must know the same operations."""
    if set(counted) != set(recorded):
        raise SystemExit(f"{RECORDED.name} knows {sorted(recorded)}; counted were {sorted(counted)}. Record them again.")
    return {operation: 100 * (counted[operation] / recorded[operation] - 1) for operation in counted}


def too_much(grown: "Dict[str, float]") -> "List[str]":
    """The operations that grew by more than is allowed."""
    return [operation for operation, percent in grown.items() if percent > GROWTH_PERCENT]


def read(path: Path) -> "Dict[str, float]":
    """The recorded counts."""
    return json.loads(path.read_text())["instructions"]


def record(counted: "Dict[str, float]", path: Path) -> None:
    """Write what was counted, and with what."""
    page = {"instructions": {operation: round(each) for operation, each in counted.items()},
            "with": [_version("rustc"), _version("valgrind")]}
    path.write_text(json.dumps(page, indent=2) + "\n")


def _version(program: str) -> str:
    return subprocess.check_output([program, "--version"], text=True).strip()


def text(counted: "Dict[str, float]", recorded: "Dict[str, float]") -> str:
    """The counts, as docs/BENCHMARKS.md shows them."""
    lines = ["| 200 bytes | instructions a value | recorded | growth |", "| --- | --- | --- | --- |"]
    for operation, percent in growth(counted, recorded).items():
        lines.append(f"| {operation} | {counted[operation]:,.0f} | {recorded[operation]:,.0f} | {percent:+.1f} % |")
    return "\n".join(lines)


def end(said: str, written: bool) -> None:
    """End with an error. Not where the result is written: a target that is missed or not measured fails there."""
    if not written:
        sys.exit(said)
    print(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the counts as the ones to compare with")
    parser.add_argument("--write", action="store_true",
                        help="put the counts into docs/BENCHMARKS.md; growth is then for targets.py to fail on")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="the file of recorded counts")
    arguments = parser.parse_args()
    reason = can_count()
    if reason:
        return end(f"nothing can be counted here: {reason}", arguments.write)
    counted = count()
    if arguments.record:
        record(counted, arguments.recorded)
    recorded = read(arguments.recorded)
    grown = growth(counted, recorded)
    report.show("instructions", text(counted, recorded), write=arguments.write)
    if arguments.recorded == RECORDED:
        targets.note("instructions", {"growth_percent": max(grown.values())})
    if too_much(grown):
        end(f"more than {GROWTH_PERCENT} % more instructions: {', '.join(too_much(grown))}. If that is meant, "
            "record them with tests/bench/instructions.py --record, and say why in the commit.", arguments.write)


if __name__ == "__main__":
    main()
