"""What docs/team.md says about models and documents of other repositories, with a local repository as the other."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import dvc.api
import pytest
from paths import ROOT
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow


def run(folder: Path, *command: str) -> None:
    names = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=folder, env={**os.environ, **names, "PATH": path}, check=True, capture_output=True)


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """The commands of the page's section, in order, without comments."""
    page = (ROOT / "docs/team.md").read_text(encoding="utf-8")
    section = page.partition("## Models and documents of another repository")[2].partition("\n## ")[0]
    return [shlex.split(line, comments=True) for line in re.findall(r"^    (.+)$", section, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, commands: list[list[str]]) -> Path:
    """A repository with the models under the names of dvc.yaml, documents, and the page's tag."""
    folder = tmp_path_factory.mktemp("team")
    for file, text in (("models/retro/config.json", "1"), ("models/baseline/config.json", "2"), ("data/texts/a", "x")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    declared = YAML(typ="safe").load(ROOT / "dvc.yaml")
    with (folder / "dvc.yaml").open("w") as stream:
        YAML().dump({"artifacts": declared["artifacts"]}, stream)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "add", "--quiet", "models/retro", "models/baseline", "data/texts")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "models and documents")
    (tag,) = (command for command in commands if command[:2] == ["git", "tag"])
    run(folder, *tag)
    return folder


def test_models_come_by_name_by_version_and_by_path(team: Path, commands: list[list[str]], tmp_path: Path) -> None:
    (team / "models/retro/config.json").chmod(0o644)
    (team / "models/retro/config.json").write_text("later")  # in no version
    for number, command in enumerate(command for command in commands if "get" in command[:3]):
        here = tmp_path / str(number)
        (here / "models").mkdir(parents=True)
        run(here, *(str(team) if word.startswith("https://") else word for word in command))
        (found,) = here.rglob("config.json")
        assert found.read_text() == "1", command
    assert number == 2, "the page shows three ways"
    assert dvc.api.artifacts_show("retro", repo=str(team))["path"] == "models/retro"


def test_documents_of_another_repository_are_imported_and_updated(
    team: Path, commands: list[list[str]], tmp_path: Path
) -> None:
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    (tmp_path / "my").mkdir()
    (bring,) = (command for command in commands if command[:2] == ["dvc", "import"])
    run(tmp_path, *(str(team) if word.startswith("https://") else word for word in bring))
    assert [path.name for path in (tmp_path / "my/texts").iterdir()] == ["a"]
    (team / "data/texts/b").write_text("y")
    run(team, "dvc", "commit", "--quiet", "--force", "data/texts.dvc")
    run(team, "git", "commit", "--quiet", "--all", "--message", "a new document")
    (update,) = (command for command in commands if command[:2] == ["dvc", "update"])
    run(tmp_path, *update)
    assert sorted(path.name for path in (tmp_path / "my/texts").iterdir()) == ["a", "b"]
