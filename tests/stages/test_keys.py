"""The name of a stage's unfinished work changes with all that decides its output, and with nothing else.

Otherwise different runs would wait for each other, or one would continue from the work of another.
"""

import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from paths import ROOT
from project import TINY
from stagewise import write_params

from retro_model.training.config import RetrofitConfig
from stages.common import harness

DECLARED: dict[str, dict[str, list[str]]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# For each name under `params` in dvc.yaml: a key of params.yaml with another value than the tests' own.
OTHER_PARAMS: dict[str, dict[str, object]] = {
    "documents": {"documents": "tiny/others"},
    "chunk_size": {"chunk_size": 8},
    "seq_len": {"seq_len": 32},
    "knn": {"knn": 1},
    "seed": {"seed": 1},
    "corpus": {"corpus__valid": 0.2},
    "embed": {"embed__pooling": "cls"},
    "index": {"index__seed": 1},
    "neighbors": {"neighbors__stored": 9},
    "model": {"model__enc_dim": 24},
    "train": {"train__lr": 1e-3},
    "retrofit": {"retrofit__lr": 1e-3},
    "retrofit.base": {"retrofit__base": "tiny/base"},
    "evaluate": {"evaluate__passages": 1},
}


class Reached(Exception):
    """Raised in place of the stage's work, with its key."""


def key_of(stage: str) -> str:
    with pytest.raises(Reached) as caught:
        importlib.import_module(f"stages.{stage}").main()
    return str(caught.value)


def data_dependencies(stage: str) -> list[Path]:
    names = [re.sub(r"\$\{(.+)\}", r"\1", name) for name in DECLARED[stage]["deps"]]
    resolved = {**TINY, "retrofit.init_from": "models/baseline"}
    resolved |= {"evaluate.compare": "models/none", "evaluate.database": "data/none"}
    paths = [Path(str(resolved.get(name, name))) for name in names]
    return [path for path in paths if path.parts[0] not in harness.CODE_FOLDERS]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with dvc.yaml, params.yaml and code, in which stages go as far as their key."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in harness.CODE_FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    write_params(tmp_path)

    def reached(stage: str, path: Path, owner: Path) -> None:
        raise Reached(path.stem)

    made_up = SimpleNamespace(folder=Path("models/baseline"), fingerprint="made up")
    opened = SimpleNamespace(open=lambda *arguments, **options: made_up)
    monkeypatch.setattr(harness, "_wait_for_lock", reached)
    monkeypatch.setattr("stages.evaluate.Artifact", opened)
    monkeypatch.setattr("stages.tracking.learning.Artifact", opened)
    monkeypatch.setattr(RetrofitConfig, "model", lambda config: None)
    return tmp_path


@pytest.mark.parametrize("stage", ["chunk", "embed", "index", "knn", "baseline", "train", "evaluate"])
def test_the_key_changes_with_each_declared_param_and_input(stage: str, project: Path) -> None:
    for path in data_dependencies(stage):
        (path / "part").mkdir(parents=True)
        (path / "part" / "artifact.json").write_text("{}")
        (path / "text.txt").write_text("a document")
    keys = {"as it is": key_of(stage)}
    write_params(project, runtime__evaluate_batch_size=3, train__processes=2)
    assert key_of(stage) == keys["as it is"], "neither changes an output"
    for name in DECLARED[stage]["params"]:
        write_params(project, **OTHER_PARAMS[name])
        keys[name] = key_of(stage)
    write_params(project)
    for path in data_dependencies(stage):
        for name, content in (("part/artifact.json", "[]"), ("text.txt", "a longer document"), ("new.txt", "new")):
            before: Any = (path / name).read_text() if (path / name).exists() else None
            (path / name).write_text(content)
            keys[f"{path}/{name}"] = key_of(stage)
            (path / name).unlink() if before is None else (path / name).write_text(before)
    assert key_of(stage) == keys["as it is"]
    assert len(set(keys.values())) == len(keys), keys


def test_every_stage_with_unfinished_work_is_tested_here(project: Path) -> None:
    sources = {stage: (ROOT / "stages" / f"{stage}.py").read_text() for stage in DECLARED}
    found = {stage for stage, source in sources.items() if "work_folder(" in source or "learn(" in source}
    assert found == {"chunk", "embed", "index", "knn", "baseline", "train", "evaluate"}
