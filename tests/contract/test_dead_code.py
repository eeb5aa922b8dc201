"""Nothing in the packages is there for its tests alone: what is defined is used, or it is what users call."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

import retro_model

PACKAGES = sorted(path for folder in ("retro_model", "stages") for path in (ROOT / folder).rglob("*.py"))
USERS = [*PACKAGES, *(ROOT / "benchmarks").glob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]

# Called by others than this repository's code: users' programs, or a library.
CALLED_FROM_OUTSIDE = {
    "emit",  # by logging
    "HarnessModel",  # by the lm-evaluation-harness, which knows it by its registered name
    "_load_pyfunc",  # by MLflow
    "forward",  # by torch
    "get_optimizer",  # of TrainingWrapper
    "locate",  # from a chunk back to its place in its document
    "retrofit",  # a decoder that was trained without retrieval gets it
}


def defined(file: Path) -> Iterator[str]:
    """The names of a file's functions, classes, methods and constants; no dunders, no fields."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def unused(files: list[Path], users: list[Path]) -> list[str]:
    """What is defined in `files` and stands nowhere else in `users`."""
    words = Counter(word for file in users for word in re.findall(r"\w+", file.read_text()))
    known = CALLED_FROM_OUTSIDE | set(retro_model.__all__)
    return [
        f"{file.name}: {name}"
        for file in files
        for name in defined(file)
        if words[name] < 2 and name not in known and not name.startswith("__")
    ]


def test_everything_is_used() -> None:
    assert unused(PACKAGES, USERS) == []


def test_it_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("ONE = 1\nclass Two:\n    def three(self): return ONE\n\ndef four(): return Two\n")
    assert sorted(unused([file], [file])) == ["one.py: four", "one.py: three"]
