"""Where a benchmark's result goes: to the terminal, and on demand into docs/BENCHMARKS.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "docs" / "BENCHMARKS.md"


def machine() -> str:
    """One line about where it ran."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 1024 / 1024
    pg_config = os.environ.get("PG_CONFIG", "pg_config")
    postgresql = subprocess.check_output([pg_config, "--version"], text=True).strip()
    rust = subprocess.check_output(["rustc", "--version"], text=True).split()[1]
    return (f"{os.cpu_count()} cores of {cpu.group(1) if cpu else 'an unnamed CPU'}, {memory:.0f} GB, Linux {platform.release()}, "
            f"{postgresql}, Rust {rust}, vod_tender_crypto {version()}")


def version() -> str:
    """The extension's version, and the commit where there is one."""
    root = BENCHMARKS.parent.parent
    number = re.search(r'^version = "(.*)"', (root / "Cargo.toml").read_text(), re.MULTILINE).group(1)
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, text=True, capture_output=True)
    return f"{number} ({described.stdout.strip()})" if described.returncode == 0 else number


def show(section: str, text: str, write: bool) -> None:
    """Print a result; with `write`, put it between the section's marks in docs/BENCHMARKS.md."""
    print(text)
    if not write:
        return
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    stamped = f"{begin}\n{text}\n\nMeasured on {datetime.date.today()}: {machine()}.\n{end}"
    page = BENCHMARKS.read_text()
    replaced, count = re.subn(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: stamped, page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{BENCHMARKS} has no marks for {section}")
    BENCHMARKS.write_text(replaced)
