"""The one way for a test to say that it cannot run here."""

from __future__ import annotations

import os

import pytest


def cannot_run(reason: str) -> None:
    """Skip the calling test for a reason of the machine's; under CI=true that is a failure.

    The reasons are listed at the end of the run, so that nothing is skipped silently.
    """
    if in_ci():
        pytest.fail(f"cannot run here, and under CI=true nothing may be skipped: {reason}", pytrace=False)
    pytest.skip(reason)


def in_ci() -> bool:
    """Whether this run is a CI run."""
    return os.environ.get("CI", "").lower() == "true"
