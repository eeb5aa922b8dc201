"""params.yaml: the committed one is right, and every wrong one is one line that names the key."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from index_builders import committed_params
from paths import ROOT

from retro_model.core.errors import ConfigError
from stages.common import params as params_module
from stages.common.params import flat_params, parse_params, read_params, read_yaml


def changed(**changes: Any) -> dict[str, Any]:
    """The committed params with some changed; `section__key` names one in a section."""
    content: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in committed_params().items()
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (content[section] if section else content)[key] = value
    return content


def test_the_committed_params_are_whole_and_typed() -> None:
    assert read_yaml(ROOT / "params.yaml")["index"]["builder"] == "autofaiss"
    params = parse_params(changed())
    assert params["train"].lr == 4e-3 and isinstance(params["train"].lr, float)
    assert params["documents"] == "data/sample"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed: found -1, expected >= 0 and < 4294967296"),
        ({"documents": ""}, "documents: found an empty path, expected a folder or a file of documents"),
        ({"chunk_size": 64.0}, "chunk_size: found 64.0, expected a whole number"),
        ({"train": 3}, "train: found 3, expected a section of keys"),
        ({"train__lr": "fast"}, "train.lr: found 'fast', expected a number"),
        ({"index__builder": "scann"}, "index.builder: found 'scann', expected one of autofaiss, faiss"),
        ({"embed__pooling": "max"}, "embed.pooling: found 'max', expected one of mean, cls"),
        ({"corpus__valid": 0}, "corpus.valid: found 0.0, expected > 0.0 and < 1.0"),
    ],
)
def test_a_wrong_param_is_one_line(changes: dict[str, Any], message: str) -> None:
    """tests/contract/test_bad_input.py has more, and files that are no params."""
    with pytest.raises(ConfigError) as caught:
        parse_params(changed(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["train", "index", "runtime"])
def test_a_missing_section_or_key_is_named(section: str) -> None:
    content = changed()
    first_key = next(iter(content[section]))
    del content[section][first_key]
    with pytest.raises(ConfigError, match=rf"^{section}\.{first_key}: missing key; "):
        parse_params(content)
    del content[section]
    with pytest.raises(ConfigError, match=f"^{section}: missing section; "):
        parse_params(content)
    content = changed()
    del content["knn"]
    with pytest.raises(ConfigError, match="^knn: missing key; "):
        parse_params(content)


def read_text(tmp_path: Path, text: str) -> Any:
    (tmp_path / "params.yaml").write_text(text)
    return read_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1e3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("+2", 2),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("1_000", 1000),
        ("12:30", "12:30"),
        ("null", None),
        ("'3'", "3"),
        ("010", 10),
    ],
)
def test_values_have_the_types_that_dvc_sees(tmp_path: Path, text: str, value: Any) -> None:
    found = read_text(tmp_path, f"key: {text}\n")["key"]
    assert found == value and type(found) is type(value)
    from dvc.utils.serialize import loads_yaml

    assert loads_yaml(f"key: {text}\n")["key"] == value


def test_a_missing_file_says_where_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^params.yaml: not found in .*; run from the folder that holds dvc.yaml$"):
        read_params("knn")


def test_a_stage_gets_what_it_named_and_the_whole_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed()))
    assert vars(read_params("knn")) == {"knn": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(train__steps=0)))
    with pytest.raises(ConfigError, match=r"^train\.steps: "):
        read_params("knn")


def test_flat_params_name_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flat = flat_params()
    assert flat["knn"] == 2 and flat["train.lr"] == 4e-3
    content = read_yaml(ROOT / "params.yaml")
    assert len(flat) == sum(len(value) if isinstance(value, dict) else 1 for value in content.values())


def test_an_installation_without_autofaiss_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autofaiss", None)  # type: ignore[arg-type]
    assert parse_params(changed(index__builder="faiss"))["index"].builder == "faiss"
    with pytest.raises(ConfigError) as caught:
        parse_params(changed(index__builder="autofaiss"))
    assert str(caught.value) == (
        "index.builder: found autofaiss, which is not installed; set faiss, which builds the same index, or install "
        "autofaiss: `make install` without LOCK=next, or `pip install -e '.[autofaiss]'`"
    )


def test_checking_params_imports_neither_faiss_nor_transformers_nor_mlflow(tmp_path: Path) -> None:
    """A stage checks all sections at its start, so that has to stay cheap."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed()))
    code = (
        "import sys; from stages.common.params import read_params; read_params('knn'); "
        "print(sorted({'faiss', 'autofaiss', 'transformers', 'mlflow', 'datasketch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_every_section_has_its_dataclass() -> None:
    content = read_yaml(ROOT / "params.yaml")
    assert [name for name in content if isinstance(content[name], dict)] == list(params_module.SECTIONS)
