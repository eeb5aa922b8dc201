"""What comes from outside reaches no terminal as a command, and no terminal makes a program fail."""

import ast
import io
import os
import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from retro_model.core.errors import DocumentError
from retro_model.core.printable import one_line, printable, say

# The controls of C0 and C1, surrogates, and those that turn the direction of writing.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@given(st.text(st.characters(codec=None, categories=None)))
def test_nothing_unsafe_is_left_and_everything_else_is(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text) and not UNSAFE.search(shown)
    assert [one for one in text if not UNSAFE.match(one)] == [
        one for one, before in zip(shown, text, strict=True) if not UNSAFE.match(before)
    ]
    line = one_line(text)
    assert not UNSAFE.search(line) and len(line.splitlines()) <= 1 and one_line(line) == line and "\t" not in line


def test_text_of_any_language_is_kept() -> None:
    text = "\ud55c\uad6d\uc5b4 \u0627\u0644\u0639 e\u0301 \U0001f468\u200d\U0001f469 \u3000\xa0\n\tx"
    assert printable(text) == text


def test_a_name_that_is_not_utf8_is_spelled() -> None:
    assert one_line("caf\udce9 \udcc3\udca9 \ud800") == "caf\\xe9 \xe9 \ufffd"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "caf? a?[31mb"), ("utf-8", "caf\xe9 a\u241b[31mb")])
def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    say("caf\xe9 a\x1b[31mb")
    assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_no_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say("words")


def test_the_message_of_an_error_is_one_printable_line_and_travels() -> None:
    error = DocumentError("a\x1b[31m\nb.txt: not here")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "a\u241b[31m\u240ab.txt: not here"


def test_the_library_logs_and_programs_print() -> None:
    """On standard output; `retro` filters text and names itself, and the summary prints numbers."""
    found = {"print": set[str](), "say": set[str]()}
    for folder in ("retro_model", "stages"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and "sys.stderr" not in ast.unparse(node):
                    found.get(ast.unparse(node.func), set()).add(file.relative_to(ROOT).as_posix())
    assert found["print"] == {"retro_model/cli.py", "retro_model/core/printable.py", "stages/summary.py"}
    programs = {"retro_model/core/printable.py", "retro_model/retrofit/from_gguf.py"}
    assert {name for name in found["say"] if not name.startswith("stages/")} == programs


def test_what_the_library_logs_is_printed_by_programs_that_ask_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    script = """
import logging, sys
from retro_model.core.printable import print_log

logger = logging.getLogger("retro_model.search.build")
logger.info("before")
logger.warning("not to be missed")
print_log()
print_log()
logger.info("100% of caf\\xe9 a\\x1b[31mb")
logging.getLogger("other").info("of another library")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"})
    printed, errors = capfd.readouterr()
    assert printed == "100% of caf\xe9 a\u241b[31mb\n", "once, and printable"
    assert errors == "not to be missed\n", "Python's own way with warnings that no program has asked for"
