"""What encrypting and decrypting cost in a query, beside pgcrypto, a scan that opens nothing, and a floor.

The queries of one size take turns, each in a session of its own that has its DEKs at hand. `octet_length` and not
`length` makes use of every value: `length(text)` counts characters, which takes longer than decrypting.
"""

from __future__ import annotations

import argparse
from typing import Dict

import data_keys
import plot
import report
import storage
import targets
from bench_server import ONE_DEK, have, server, session
from cluster import Cluster
from helpers import one
from interleaved import Times, interleaved, query_run
from tables import KINDS, PASSPHRASE, PGCRYPTO_KEY, Shape, envelopes, header_length, make

# Part of the rows, so that each size takes about as long.
SIZES = {64: 1.0, 200: 1.0, 1024: 0.25, 16384: 0.02}
DEKS = 1000
Results = Dict[int, Dict[str, Times]]


def shape_of(size: int, rows: int) -> Shape:
    """What is measured of one size."""
    count = max(int(rows * SIZES[size]), 100)
    return Shape(size, count, min(DEKS, count))


def repeats_of(size: int, repeats: int) -> int:
    """What the targets are about is measured more often: differences of medians are among them."""
    return repeats * (3 if size == 200 else 1)


def measure(rows: int, repeats: int) -> Results:
    """Seconds a row of every query, by size."""
    extensions = {name: have(name) for name in ("vod_tender_floor", "pgcrypto")}
    results = {}
    for size in SIZES:
        shape = shape_of(size, rows)
        with server() as cluster:
            make(cluster, shape, extensions)
            results[size] = interleaved(queries(cluster, shape, extensions), repeats_of(size, repeats))
    return results


def queries(cluster: Cluster, shape: Shape, extensions: "dict[str, bool]") -> "Dict[str, object]":
    """The runs of one size, by name."""
    total = shape.size * shape.rows
    runs = {}

    def add(name: str, value: str, table: str, expected=None, rows=shape.rows, uses=None) -> None:
        settings = [*ONE_DEK, f"dek_cache_entries = {DEKS}", *([f"dek_max_uses = {uses}"] if uses else [])]
        connection = session(cluster, *settings)
        runs[name] = query_run(connection, f"SELECT sum(octet_length({value})) FROM {table}", rows, expected)

    for kind in KINDS:
        add(f"scan {kind}", "v", envelopes(kind, 1, False))
        add(f"scan plain {kind}", "v", f"plain_{kind}", total)
        for deks in (1, shape.deks):
            label = "" if deks == 1 else ", 1000 DEKs"
            uses = None if deks == 1 else -(-shape.rows // deks)
            add(f"decrypt {kind}{label}", "envelope_decrypt(v)", envelopes(kind, deks, False), total)
            add(f"decrypt {kind}, aad{label}", "envelope_decrypt(v, aad => a)", envelopes(kind, deks, True), total)
            add(f"encrypt {kind}{label}", "envelope_encrypt(v)", f"plain_{kind}", uses=uses)
            add(f"encrypt {kind}, aad{label}", "envelope_encrypt(v, aad => a)", f"plain_{kind}", uses=uses)
        add(f"decrypt {kind}, view", "v", f"v_{kind}", total)
    if extensions["vod_tender_floor"]:
        with cluster.connect() as connection:
            padding = header_length(connection, shape)
            lengths = one(connection, f"SELECT array_agg(DISTINCT octet_length(v)) FROM {envelopes('bytea', 1, False)}")
            assert lengths == one(connection, "SELECT array_agg(DISTINCT octet_length(v)) FROM floor"), lengths
        add("scan floor", "v", "floor")
        add("floor", f"floor_open(v, {padding})", "floor", total)
        add("floor, loaded ahead", f"floor_open_ahead(v, {padding})", "floor", total)
        add("floor, RustCrypto", f"floor_open_rust_crypto(v, {padding})", "floor", total)
    if extensions["pgcrypto"]:
        add("pgcrypto decrypt", f"decrypt(v, {PGCRYPTO_KEY}, 'aes')", "pgc", total)
        add("pgcrypto encrypt", f"encrypt(v, {PGCRYPTO_KEY}, 'aes')", "plain_bytea")
        add("pgp_sym_decrypt", f"pgp_sym_decrypt(v, {PASSPHRASE})", "pgp", shape.size * shape.sample, shape.sample)
        add("pgp_sym_encrypt", f"pgp_sym_encrypt(v, {PASSPHRASE})", f"(SELECT v FROM plain_text LIMIT {shape.sample}) s",
            rows=shape.sample)
    return runs


def figures(results: Results) -> "Dict[str, float]":
    """What the targets are about. A figure that this PostgreSQL cannot give is left out."""
    token, large = results[200], results[16384]
    found = {
        "text_bytea": token["decrypt text"].median / token["decrypt bytea"].median,
        "deks_1000": token["decrypt bytea, 1000 DEKs"].median / token["decrypt bytea"].median,
    }
    if "floor" in token:
        above = token["decrypt bytea"].median - token["scan bytea"].median
        found["decrypt_floor"] = above / (token["floor"].median - token["scan floor"].median)
        found["large_floor"] = large["decrypt bytea"].median / large["floor"].median
    if "pgcrypto decrypt" in token:
        found["decrypt_pgcrypto"] = token["pgcrypto decrypt"].median / token["decrypt bytea"].median
        found["decrypt_pgp"] = token["pgp_sym_decrypt"].median / token["decrypt bytea"].median
        found["encrypt_pgcrypto"] = token["pgcrypto encrypt"].median / token["encrypt bytea"].median
    return found


def text(results: Results, rows: int, repeats: int) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    sizes = list(results)
    counts = ", ".join(f"{shape_of(size, rows).rows:,}" for size in sizes)
    lines = [f"Nanoseconds a row, whole query, medians of {repeats} interleaved runs ({repeats_of(200, repeats)} for 200 bytes) "
             f"over {counts} rows; in brackets how many times the bytea query of the same size and direction.", ""]
    lines += ["| query | " + " | ".join(f"{size:,} bytes" for size in sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for name in results[sizes[0]]:
        lines.append(f"| {name} | " + " | ".join(cell(results[size], name) for size in sizes) + " |")
    noise = sorted(100 * (times.median / times.best - 1) for size in sizes for times in results[size].values())
    lines += ["", f"How quiet the machine was: medians are {noise[len(noise) // 2]:.0f} % above the best run, as a rule, and at "
                  f"most {noise[-1]:.0f} %."]
    return "\n".join(lines)


def cell(times: "Dict[str, Times]", name: str) -> str:
    """A time, and its ratio to ours."""
    own = times["encrypt bytea" if "encrypt" in name or "plain" in name else "decrypt bytea"].median
    return f"{1e9 * times[name].median:,.0f} ({times[name].median / own:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put results into docs/BENCHMARKS.md and docs/plots")
    arguments = parser.parse_args()
    results = measure(arguments.rows, arguments.repeats)
    report.show("hot_path", text(results, arguments.rows, arguments.repeats), write=arguments.write)
    counted = data_keys.measure(arguments.rows, arguments.repeats)
    report.show("data_keys", data_keys.text(counted, arguments.rows), write=arguments.write)
    report.show("storage", storage.text(storage.measure(arguments.rows, arguments.repeats)), write=arguments.write)
    plot.draw(results, counted, write=arguments.write)
    targets.note("hot_path", figures(results))


if __name__ == "__main__":
    main()
