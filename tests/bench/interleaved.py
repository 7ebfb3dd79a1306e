"""Times of several things that take turns, so that what else the machine does hits all of them."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Dict, List, Mapping


class Times:
    """How long each run took, in seconds for one unit (a row, as a rule)."""

    def __init__(self, each: "List[float]"):
        self.each = each

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def best(self) -> float:
        return min(self.each)


def interleaved(runs: "Mapping[str, Callable[[], float]]", repeats: int) -> "Dict[str, Times]":
    """Run each once to warm up, then `repeats` rounds of all. A run gives its own time.

    Every other round goes backwards, so that what precedes a run is not always the same.
    """
    times: "Dict[str, List[float]]" = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        names = list(runs) if repeat % 2 == 0 else list(reversed(list(runs)))
        for name in names:
            taken = runs[name]()
            if repeat:
                times[name].append(taken)
    return {name: Times(each) for name, each in times.items()}


def query_run(connection, query: str, rows: int, expected=None) -> "Callable[[], float]":
    """A run of a query that looks at so many rows; its result must be what is expected."""

    def run() -> float:
        began = time.perf_counter()
        found = connection.execute(query).fetchone()[0]
        taken = time.perf_counter() - began
        if expected is not None and found != expected:
            raise AssertionError(f"{query} gave {found} instead of {expected}")
        return taken / rows

    return run
