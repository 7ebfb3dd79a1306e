"""The hot path has not grown, and the check of that would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import instructions  # noqa: E402
from skips import cannot_run  # noqa: E402


@pytest.fixture(scope="module")
def counted():
    reason = instructions.can_count()
    if reason:
        cannot_run(reason)
    return instructions.count()


def test_the_hot_path_takes_as_many_instructions_as_recorded(counted):
    grown = instructions.growth(counted, instructions.read(instructions.RECORDED))
    assert not instructions.too_much(grown), grown


def test_the_record_is_not_so_old_that_growth_would_hide(counted):
    """After the hot path has become much faster, the recorded counts would let it grow back unseen."""
    grown = instructions.growth(counted, instructions.read(instructions.RECORDED))
    assert min(grown.values()) > -instructions.GROWTH_PERCENT, f"record the counts again: {grown}"


@pytest.mark.parametrize("operation", instructions.OPERATIONS)
def test_growth_of_any_operation_is_noticed(counted, operation):
    recorded = {**counted, operation: counted[operation] / 1.11}
    assert instructions.too_much(instructions.growth(counted, recorded)) == [operation]


def test_less_growth_than_the_limit_is_let_through(counted):
    recorded = {operation: each / 1.09 for operation, each in counted.items()}
    assert instructions.too_much(instructions.growth(counted, recorded)) == []


def test_an_operation_without_a_record_is_not_passed_over(counted):
    recorded = {operation: counted[operation] for operation in instructions.OPERATIONS[1:]}
    with pytest.raises(SystemExit, match="Record them again"):
        instructions.growth(counted, recorded)


def test_the_program_fails_with_a_doctored_record(counted, tmp_path):
    doctored = tmp_path / "instructions.json"
    doctored.write_text(json.dumps({"instructions": {**counted, "decrypt_bytea": counted["decrypt_bytea"] * 0.85}}))
    command = [sys.executable, str(Path(instructions.__file__)), "--recorded", str(doctored)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert "more instructions: decrypt_bytea." in done.stderr


def test_where_the_result_is_written_growth_is_left_to_the_targets(counted, tmp_path, monkeypatch, capsys):
    """`make bench` goes on, and fails where targets are enforced; every other failure ends it."""
    recorded = tmp_path / "instructions.json"
    recorded.write_text(json.dumps({"instructions": {**counted, "decrypt_bytea": counted["decrypt_bytea"] * 0.85}}))
    noted = {}
    monkeypatch.setattr(instructions, "RECORDED", recorded)
    monkeypatch.setattr(instructions, "count", lambda: counted)
    monkeypatch.setattr(instructions.report, "show", lambda *_, **__: None)
    monkeypatch.setattr(instructions.targets, "note", lambda section, figures: noted.update({section: figures}))
    monkeypatch.setattr(sys, "argv", ["instructions.py", "--write", "--recorded", str(recorded)])
    instructions.main()
    assert "more instructions: decrypt_bytea." in capsys.readouterr().out
    assert noted["instructions"]["growth_percent"] > instructions.GROWTH_PERCENT
    monkeypatch.setattr(instructions, "count", lambda: {})
    with pytest.raises(SystemExit, match="Record them again"):
        instructions.main()
