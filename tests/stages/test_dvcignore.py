"""Stages read the documents that DVC tracks: what `.dvcignore` hides would change a result and no hash."""

import json
from pathlib import Path

import pytest
from dvc.repo import Repo
from stagewise import copy_of, run, write_params

from retro_model.corpus.files import find_files
from stages.common.dvcignore import dvc_name_filter

FILES = (
    "a.txt", "b.bak.txt", "keep.bak.txt", "drafts/a.txt", "more/drafts/b.txt", "more/c.txt", "more/only.md",
    "more/deep/d.txt", "more/deep/e.tmp.txt", "caf\xe9/\ud55c.txt",
)  # fmt: skip
IGNORED = {
    ".dvcignore": "# a comment\n*.bak.txt\n!keep.bak.txt\ndrafts/\n/texts/documents/more/*.md\n",
    "texts/.dvcignore": "**/*.tmp.txt\n",
}


def tracked_by_dvc(root: Path, name: str) -> list[str]:
    """The files of a folder by the hash that DVC itself records for it."""
    Repo(str(root)).add(name)
    digest = (root / f"{name}.dvc").read_text().split("md5: ")[1].split()[0]
    listed = json.loads((root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).read_text())
    return sorted(entry["relpath"] for entry in listed)


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # DVC's use of pygtrie
def test_the_filter_leaves_what_dvc_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True)
    for name in (*(f"texts/documents/{file}" for file in FILES), *IGNORED):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(IGNORED.get(name, "text"))
    found = find_files(Path("texts/documents"), dvc_name_filter())
    tracked = tracked_by_dvc(tmp_path, "texts/documents")
    assert [name for _, name in found.files] == tracked and "keep.bak.txt" in tracked and len(tracked) == 5
    assert found.ignored == ["b.bak.txt", "drafts/", "more/deep/e.tmp.txt", "more/drafts/", "more/only.md"]
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "b.bak.txt").write_text("DVC ignores nothing outside of its repository")
    assert [name for _, name in find_files(outside, dvc_name_filter()).files] == ["b.bak.txt"]


def test_outside_of_a_dvc_repository_nothing_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dvc_name_filter() is None


def test_no_stage_reads_what_dvcignore_hides(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages tokenizer, chunk and evaluate, whose database may be another one."""
    monkeypatch.chdir(copy_of(pipeline, tmp_path / "copy"))
    Repo.init(no_scm=True)
    Path(".dvcignore").write_text("*.draft.txt\n")
    write_params(Path.cwd(), evaluate__database="tiny/documents", evaluate__passages=0)
    tokenizer = Path("data/tokenizer/tokenizer.json").read_bytes()
    metrics = Path("metrics/chunk.json").read_text()
    for number in range(30):
        Path(f"tiny/documents/{number}.draft.txt").write_text("Zyx qwv not to be read. " * 20)
    for stage in ("tokenizer", "chunk", "evaluate"):
        run(stage)
        capsys.readouterr() if stage == "tokenizer" else None
    assert Path("data/tokenizer/tokenizer.json").read_bytes() == tokenizer
    after = json.loads(Path("metrics/chunk.json").read_text())
    assert after == {**json.loads(metrics), "ignored_files": 30}
    out = capsys.readouterr().out
    assert out.count("not read: 30 that .dvcignore hides: 0.draft.txt, 1.draft.txt, 10.draft.txt") == 2
    assert "Zyx" not in Path("data/tokenizer/tokenizer.json").read_text()
