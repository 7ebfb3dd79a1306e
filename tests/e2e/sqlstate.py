"""SQLSTATEs of the extension's errors (docs/ERRORS.md), and a check that a statement ends in one."""

from __future__ import annotations

import contextlib

import psycopg
import pytest

MALFORMED_TEXT = "22P02"
MALFORMED_BYTEA = "22P03"
UNVERIFIED = "39000"
INVALID_PARAMETER = "22023"
NOT_TEXT = "22021"
UNKNOWN_KEY = "42704"
NOT_READY = "55000"
DENIED = "28000"
THROTTLED = "53400"
UNREACHABLE = "08006"
NO_RIGHT = "42501"
TOO_LARGE = "54000"
CANCELED = "57014"


@contextlib.contextmanager
def fails(state: str, saying: str = ""):
    """The block must raise a PostgreSQL error with this SQLSTATE; gives pytest's exception info."""
    with pytest.raises(psycopg.Error) as caught:
        yield caught
    assert caught.value.sqlstate == state, f"{caught.value.sqlstate}: {caught.value}"
    assert saying in str(caught.value), caught.value


def detail(caught) -> str:
    """DETAIL of a caught error."""
    return caught.value.diag.message_detail or ""
