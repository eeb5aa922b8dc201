"""Stages one by one in this process, without DVC: a folder to run them in, and what a refusal looks like.

folder = run_all(tmp_path)             # a tiny pipeline, run from sample to evaluate
write_params(folder, train__steps=3)   # TINY, and what is named here
refuse("chunk", capsys)                # the one line with which the stage must end
"""

import importlib
import os
import shutil
from pathlib import Path

import pytest
from fixtures import tiny_corpus, tiny_encoder
from paths import ROOT
from project import TINY
from ruamel.yaml import YAML

from stages.common.harness import run_stage

STAGES = ("sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate")
OUTS = {
    "sample": "data/sample",
    "tokenizer": "data/tokenizer",
    "chunk": "data/chunks",
    "embed": "data/embeddings",
    "index": "data/index",
    "knn": "data/neighbors",
    "baseline": "models/baseline",
    "train": "models/retro",
    "evaluate": "reports",
}


def write_params(folder: Path, **changes: object) -> None:
    """Writes params.yaml with the tiny settings; `section__key` names a key of a section."""
    yaml = YAML()
    content = yaml.load(ROOT / "params.yaml")
    for key, value in {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    with (folder / "params.yaml").open("w") as stream:
        yaml.dump(content, stream)


def run(stage: str) -> None:
    """The stage as `python -m` runs it, in this process."""
    run_stage(stage, importlib.import_module(f"stages.{stage}").main)


def run_all(folder: Path, **changes: object) -> Path:
    """Runs every stage in `folder`, which it returns; `changes` are those of `write_params`."""
    tiny_corpus(folder / "tiny" / "documents")
    tiny_encoder(folder / "tiny" / "encoder")
    shutil.copy(ROOT / "dvc.yaml", folder)
    for name in ("models", "data"):
        (folder / name / "none").mkdir(parents=True)  # empty: no other model, no other database
    for name in ("retro_model", "stages"):
        (folder / name).symlink_to(ROOT / name)
    write_params(folder, **changes)
    before = os.getcwd()
    os.chdir(folder)
    try:
        for stage in STAGES:
            run(stage)
    finally:
        os.chdir(before)
    return folder


def copy_of(pipeline: Path, folder: Path) -> Path:
    """A copy of a folder in which all stages have run, without what their work left behind."""
    ignored = shutil.ignore_patterns("mlartifacts", ".retro")
    copy = Path(shutil.copytree(pipeline, folder, symlinks=True, ignore=ignored))
    for path in filter(Path.is_file, copy.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)  # shards are links to kept parts, which are read-only
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by its path below the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(stage: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a stage that must stop with status 1; its one line, after a check that no output was left."""
    out, aside = Path(OUTS[stage]), Path("aside")
    out.rename(aside)  # DVC removes it before it runs a stage
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(stage)
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{stage}: ")
    assert not out.exists()
    assert not list(Path.cwd().glob("*/*.partial"))
    aside.rename(out)
    return line
