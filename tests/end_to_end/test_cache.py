"""DVC's links: with a cache that the workspace links into, a write into an input would be a write into the cache.

Slow: whole runs of the pipeline. As root too, whom no read-only mode stops.
"""

import hashlib
import os
from pathlib import Path

import pytest
from project import Project

pytestmark = pytest.mark.slow


def check(project: Project, kind: str) -> None:
    """Every object of the cache has the hash that its name says, and the workspace does link to them."""
    objects = [path for path in (project.root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert len(objects) > 20
    for path in objects:
        name = path.parent.name + path.name
        assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir"), path
    weights = project.root / "models" / "retro" / "model.safetensors"
    assert weights.is_symlink() if kind == "symlink" else weights.stat().st_nlink > 1


def broken(project: Project) -> Path:
    """An input, written into in place: what must never happen."""
    path = Path(os.path.realpath(project.root / "data" / "chunks" / "train" / "tokens-00000.npy"))
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    return path


def test_whole_runs_write_into_no_cached_file(tmp_path: Path) -> None:
    """With hard links from the start; then with symbolic ones, which every stage reads that runs again."""
    project = Project.create(tmp_path / "project")
    project.run("dvc", "config", "--local", "cache.type", "hardlink")
    assert len(project.repro()) == 9
    check(project, "hardlink")
    project.run("dvc", "config", "--local", "cache.type", "symlink")
    project.run("dvc", "checkout", "--relink")
    check(project, "symlink")
    project.set(**{"tokenizer.vocab_size": 390})
    assert len(project.repro()) == 8  # all but sample
    check(project, "symlink")
    assert "up to date" in project.run("dvc", "status").stdout
    broken(project)
    with pytest.raises(AssertionError):
        check(project, "symlink")
