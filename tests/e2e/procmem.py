"""Search a live process's memory for secrets that should not be there.

Reads /proc/PID/mem as /proc/PID/maps lays it out, so it sees freed heap, stacks and libraries' data as
well as what the program still uses. Needs the process's own user with ptrace rights over it, or root.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Iterable, Iterator, Mapping, Union

FIRST_HALF, SECOND_HALF = "first half", "second half"

_CHUNK = 16 << 20
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(.*)")
# Kernel-made mappings that hold no data of the process; some cannot be read at all.
_NOT_DATA = {"[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]"}

Needles = Union[Mapping[str, bytes], Iterable[bytes]]


@dataclass(frozen=True, order=True)
class Hit:
    """Where a needle was found. It never shows the needle itself: hits end up in test reports."""

    needle: str
    form: str
    address: int
    offset: int
    mapping: str

    def __str__(self) -> str:
        return f"{self.needle} as {self.form} at {self.address:#x} ({self.mapping} + {self.offset:#x})"


@dataclass(frozen=True)
class Region:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    name: str


def find_any(pid: int, needles: Needles, include_shared: bool = False) -> "list[Hit]":
    """Every place in the process's memory that holds a needle in any form.

    Needles are a mapping from a name to the secret, or just secrets (named `needle 0`, ...). Forms are
    raw, hexadecimal in either case, base64 at its three alignments, and each half of a secret of 32
    bytes or more: free() overwrites a block's first 16 bytes, so half is what a careless wipe leaves.
    """
    secrets = _named(needles)
    patterns = [(name, form, text) for name, secret in secrets.items() for form, text in forms(secret)]
    longest = max((len(text) for _, _, text in patterns), default=1)
    hits = set()
    for mapping in mappings(pid):
        if not _wanted(mapping, include_shared):
            continue
        for start, chunk in _chunks(pid, mapping, longest - 1):
            hits.update(_search(mapping, start, chunk, patterns))
    return sorted(_without_halves_of_wholes(hits, secrets))


def forms(secret: bytes) -> "list[tuple[str, bytes]]":
    """The byte strings that betray a secret, each with the name of its form."""
    if len(secret) < 8:
        raise ValueError("a needle under 8 bytes would be found by chance")
    digits = secret.hex().encode()
    found = [("raw", secret), ("hex", digits), ("HEX", digits.upper())]
    found += [(f"base64+{shift}", _base64_core(secret, shift)) for shift in range(3)]
    if len(secret) >= 32:
        half = len(secret) // 2
        found += [(FIRST_HALF, secret[:half]), (SECOND_HALF, secret[half:])]
    return found


def mappings(pid: int) -> "list[Region]":
    """The process's mappings."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        matches = [_MAPPING.match(line) for line in lines]
    return [Region(int(m[1], 16), int(m[2], 16), m[3], m[4] or "[anonymous]") for m in matches if m]


def can_read(pid: int) -> bool:
    """Whether this user may read the process's memory."""
    try:
        with open(f"/proc/{pid}/mem", "rb"):
            return True
    except PermissionError:
        return False


def _named(needles: Needles) -> "dict[str, bytes]":
    if isinstance(needles, Mapping):
        return dict(needles)
    return {f"needle {number}": secret for number, secret in enumerate(needles)}


def _base64_core(secret: bytes, shift: int) -> bytes:
    """The base64 digits that depend on the secret alone when `shift` other bytes precede it."""
    digits = base64.b64encode(bytes(shift) + secret)
    first = -(-shift * 8 // 6)
    last = (shift + len(secret)) * 8 // 6
    return digits[first:last]


def _wanted(mapping: Region, include_shared: bool) -> bool:
    readable = mapping.permissions[0] == "r"
    private = mapping.permissions[3] == "p"
    return readable and (private or include_shared) and mapping.name not in _NOT_DATA


def _chunks(pid: int, mapping: Region, overlap: int) -> "Iterator[tuple[int, bytes]]":
    """The mapping's readable bytes in pieces that overlap, so that nothing hides on a seam."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        at = mapping.start
        while at < mapping.end:
            try:
                memory.seek(at)
                chunk = memory.read(min(_CHUNK + overlap, mapping.end - at))
            except (OSError, OverflowError):
                return  # unmapped meanwhile, or a device's memory
            if not chunk:
                return
            if chunk.count(0) != len(chunk):
                yield at, chunk
            at += min(len(chunk), _CHUNK)


def _search(mapping: Region, start: int, chunk: bytes, patterns) -> "Iterator[Hit]":
    for name, form, text in patterns:
        at = chunk.find(text)
        while at >= 0:
            address = start + at
            yield Hit(name, form, address, address - mapping.start, mapping.name)
            at = chunk.find(text, at + 1)


def _without_halves_of_wholes(hits: "set[Hit]", secrets: "dict[str, bytes]") -> "set[Hit]":
    """A whole secret contains both its halves: report it once."""
    wholes = {(hit.needle, hit.address) for hit in hits if hit.form == "raw"}

    def is_part(hit: Hit) -> bool:
        lead = {FIRST_HALF: 0, SECOND_HALF: len(secrets[hit.needle]) // 2}.get(hit.form)
        return lead is not None and (hit.needle, hit.address - lead) in wholes

    return {hit for hit in hits if not is_part(hit)}
