"""`dvc repro` after documents were added: it makes what is new, and who has no parts writes the same bytes."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from project import Project

pytestmark = pytest.mark.slow
STAGES = ["tokenizer", "chunk", "embed"]
NEW = "Gaba fuco di mi, stoba nor lem. " * 40


def repro(project: Project, *arguments: str) -> str:
    done = project.run("dvc", *arguments)
    return done.stdout + done.stderr


def made(output: str) -> list[tuple[int, int]]:
    """(made, wanted) of documents tokenized and of chunks embedded."""
    counts = re.findall(r"(?:chunk|embed): ([\d,]+) of ([\d,]+) (?:documents tokenized|chunks embedded)", output)
    return [(int(new.replace(",", "")), int(every.replace(",", ""))) for new, every in counts]


def hashes(project: Project) -> list[str]:
    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    return [out["md5"] for stage in STAGES for out in lock[stage]["outs"] if out["path"].startswith("data/")]


def test_a_new_document_costs_itself_where_the_tokenizer_is_kept(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project")
    shutil.copytree(project.root / "tiny/documents", project.root / "tiny/first")
    project.set(**{"tokenizer.train_on": "tiny/first", "runtime.parts": str(tmp_path / "parts")})
    project.commit("a tokenizer that stays")
    (documents, _), (chunks, _) = made(repro(project, "repro", "knn"))
    assert documents > 30 and chunks > 300

    (project.root / "tiny/documents/document-020b.txt").write_text(NEW)
    project.commit("a new document")
    output = repro(project, "repro", "knn")
    (new_documents, _), (new_chunks, all_chunks) = made(output)
    assert f"knn: {chunks:,} of {all_chunks:,} queries are of an earlier run" in output
    assert f"{new_chunks} of {all_chunks:,} queries looked at all of them" in output
    assert new_documents == 1 and 5 < new_chunks < 0.2 * all_chunks
    assert "tokenizer: it is not the one of the last run" not in output

    clone = project.clone(tmp_path / "clone")
    (clone.root / "tiny/documents/one-more.txt").write_text(NEW + "And some more.")
    clone.commit("one more document here")
    shared = made(repro(clone, "exp", "run", "--temp", "embed"))
    assert shared[0][0] == 1 and shared[1][0] < 0.2 * shared[1][1], "a temporary checkout uses the other clone's parts"


def test_who_pulls_the_data_and_adds_a_document_embeds_that_document(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project")
    shutil.copytree(project.root / "tiny/documents", project.root / "tiny/first")
    project.set(**{"tokenizer.train_on": "tiny/first"})
    (_, (chunks, _)) = made(repro(project, "repro", "embed"))
    project.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"))
    project.run("dvc", "push")
    project.commit("what a colleague gets")

    clone = project.clone(tmp_path / "clone")
    clone.run("dvc", "pull", "embed", "chunk")
    (clone.root / "tiny/documents/document-020b.txt").write_text(NEW)
    output = repro(clone, "repro", "embed")
    new_chunks, all_chunks = made(output)[1]
    assert new_chunks == all_chunks - chunks > 5
    assert f"embed: took over {chunks:,} vectors of the last run" in output
    grown = hashes(clone)

    (project.root / "tiny/documents/document-020b.txt").write_text(NEW)
    shutil.rmtree(project.root / ".retro")
    with (project.root / "retro_model/embedding/config.py").open("a") as code:
        code.write("# other code\n")
    assert made(repro(project, "repro", "embed"))[1] == (all_chunks, all_chunks), "other code made the last vectors"
    assert hashes(project) == grown


def test_a_tokenizer_that_is_trained_on_the_corpus_says_what_a_new_document_costs(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project")
    repro(project, "repro", "chunk")
    (project.root / "tiny/documents/new.txt").write_text("Quite another word: xylophone, xylophones. " * 60)
    output = repro(project, "repro", "chunk")
    assert "tokenizer: it is not the one of the last run, so every document is tokenized" in output
    assert made(output)[0][0] == made(output)[0][1]
