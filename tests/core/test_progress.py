"""Signs of life: a bar in a terminal, plain lines elsewhere."""

import io
import sys
import time

import pytest

import retro_model.core.progress
from retro_model.core.progress import Progress, progress, report_elapsed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_with_the_note_and_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train", 10, "step", done=2) as shown:
        shown.skip(3)
        shown.update(4)
        shown.update(1, "loss 1.5")
    last = terminal.getvalue().rstrip().splitlines()[-1].rpartition("\r")[2]
    assert last.startswith("train: 100%") and "10/10" in last and "loss 1.5" in last


def test_elsewhere_there_are_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retro_model.core.progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("embed", 10, "chunk") as shown:
        shown.skip(4)
        shown.update(2, "8 a batch")
    assert list(progress("ab", "read", unit="document")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("embed: 6 of 10 chunks, ") and lines[0].endswith(" chunks/s, 8 a batch")
    assert [line.partition(", ")[0] for line in lines[1:]] == ["read: 1 documents", "read: 2 documents"]


def wait_for_error_output(capsys: pytest.CaptureFixture[str]) -> str:
    text = ""
    for _ in range(1000):
        text += capsys.readouterr().err
        if text.endswith("\n"):
            break
        time.sleep(0.01)
    return text


def test_one_long_unit_of_work_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retro_model.core.progress, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(retro_model.core.progress, "SECONDS_BETWEEN_LINES", 0.02)
    with Progress("read", None, "document"):
        assert wait_for_error_output(capsys).startswith("read: 0 documents, ")
    with Progress("embed", 10, "chunk"):
        assert wait_for_error_output(capsys).startswith("embed: 0 of 10 chunks, ? s left, 0.0 chunks/s\n")
    with report_elapsed("train the tokenizer"):
        assert wait_for_error_output(capsys).startswith("train the tokenizer: 0 s so far\n")


def test_nothing_is_reported_after_the_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retro_model.core.progress, "SECONDS_BETWEEN_LINES", 0.01)
    with pytest.raises(ZeroDivisionError), report_elapsed("divide"):
        _ = 1 / 0
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
