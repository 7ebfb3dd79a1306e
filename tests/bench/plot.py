"""The plots of docs/plots: lines over logarithmic axes, as SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple
from xml.sax.saxutils import escape

PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "plots"
COLOURS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c92a2a", "#e67700", "#495057", "#1864ab")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 80, 220, 40, 60

Line = List[Tuple[float, float]]


def draw(results: dict, counted: dict, write: bool) -> None:
    """Both plots of the hot path; with `write`, into docs/plots."""
    names = ["scan bytea", "floor", "decrypt bytea", "decrypt text", "encrypt bytea", "pgcrypto decrypt",
             "pgcrypto encrypt", "pgp_sym_decrypt"]
    by_size = {name: [(size, 1e9 * times[name].median) for size, times in results.items()]
               for name in names if all(name in times for times in results.values())}
    rooms = sorted({room for room, _ in counted}, reverse=True)
    by_deks = {f"dek_cache_entries = {room:,}": [(count, 1e9 * times.median) for (of, count), times in counted.items() if of == room]
               for room in rooms}
    made = {
        "value_size.svg": svg("Whole query, by the size of the value", "bytes of plaintext", "nanoseconds a row", by_size),
        "data_keys.svg": svg("Decrypting 200 bytes, by the number of data keys", "data keys in the table",
                             "nanoseconds a row", by_deks),
    }
    if write:
        PLOTS.mkdir(parents=True, exist_ok=True)
        for name, picture in made.items():
            (PLOTS / name).write_text(picture)


def svg(title: str, x_label: str, y_label: str, lines: "Dict[str, Line]") -> str:
    """Lines over two logarithmic axes."""
    points = [point for line in lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    y_ticks = decades([y for _, y in points])
    across = scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    up = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        words(LEFT, 24, title, size=16),
        words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label, anchor="middle"),
        f'<g transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{words(0, 0, y_label, anchor="middle")}</g>',
    ]
    for y in y_ticks:
        parts.append(rule(LEFT, up(y), WIDTH - RIGHT, up(y)))
        parts.append(words(LEFT - 8, up(y) + 4, f"{y:,.0f}", anchor="end"))
    for x in xs:
        parts.append(rule(across(x), TOP, across(x), HEIGHT - BOTTOM))
        parts.append(words(across(x), HEIGHT - BOTTOM + 20, f"{x:,.0f}", anchor="middle"))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
    # The legend is in the order of the lines' right ends, from above.
    order = sorted(enumerate(lines.items()), key=lambda each: -each[1][1][-1][1])
    for row, (number, (name, _)) in enumerate(order):
        y = TOP + 10 + 22 * row
        parts.append(f'<rect x="{WIDTH - RIGHT + 20}" y="{y}" width="14" height="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(words(WIDTH - RIGHT + 42, y + 6, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def decades(values: "Sequence[float]") -> "List[float]":
    """Powers of ten around all values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0 ** power for power in range(low, max(high, low + 1) + 1)]


def scale(low: float, high: float, start: float, end: float) -> "Callable[[float], float]":
    """Where a value is on a logarithmic axis."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dee2e6"/>'


def words(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
