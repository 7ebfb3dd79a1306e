"""What a value costs in the core, without PostgreSQL: runs crates/core/benches/values.rs and reads what it found."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Dict, Tuple

import report

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = (64, 200, 1024, 16384)
GROUPS = ("decrypt bytea 1", "decrypt bytea 1000", "decrypt text 1", "decrypt text 1000", "encrypt bytea 1", "encrypt text 1")


def measure(seconds: float) -> "Dict[Tuple[str, int], float]":
    """Nanoseconds a value, by group and size."""
    timing = ["--warm-up-time", str(seconds / 3), "--measurement-time", str(seconds), "--noplot"]
    done = subprocess.run(["cargo", "bench", "-q", "-p", "vod_tender_core", "--bench", "values", "--", *timing],
                          cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    return {(group, size): _median(group, size) for group in GROUPS for size in SIZES}


def _median(group: str, size: int) -> float:
    path = ROOT / "target" / "criterion" / group / str(size) / "new" / "estimates.json"
    return json.loads(path.read_text())["median"]["point_estimate"]


def text(found: "Dict[Tuple[str, int], float]") -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    lines = ["Nanoseconds a value, medians:", "", "| operation, type, DEKs | " + " | ".join(f"{size:,} bytes" for size in SIZES) + " |",
             "| --- |" + " --- |" * len(SIZES)]
    for group in GROUPS:
        lines.append(f"| {group} | " + " | ".join(f"{found[group, size]:,.0f}" for size in SIZES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="for each figure")
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    report.show("core", text(measure(arguments.seconds)), write=arguments.write)


if __name__ == "__main__":
    main()
