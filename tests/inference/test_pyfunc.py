"""A model as MLflow opens it, without MLflow; tests/stages/test_tracking_server.py serves one with it."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import small_run

from retro_model.cli import _parser
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.inference.pyfunc import TextModel, _load_pyfunc
from retro_model.inference.text import Sampling, encode_prompt, write_text
from retro_model.training.mlmodel import CONFIG, FILE, LOADER, write_mlmodel

PROMPTS = {"prompt": ["Ba co di fu", "Lem mi nor"]}
FEW = {"max_new_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(root: Path) -> TextModel:
    return _load_pyfunc(str(root / "models/retro"), config(root))


def config(root: Path) -> dict[str, str]:
    return {"data": str(root / "data"), "encoder": str(root / "encoder"), "device": "cpu"}


def test_it_writes_as_retro_generate_does(model: TextModel) -> None:
    assert model.retriever is not None
    expected = []
    for prompt in PROMPTS["prompt"]:
        ids = encode_prompt(model.model, model.tokenizer, prompt)
        retrieve = model.retriever.for_generation(1)
        sampling = Sampling(temperature=0.7, top_k=5, **FEW)
        pieces = write_text(model.model, model.tokenizer, ids, sampling, retrieve)
        expected.append(prompt + "".join(piece.text for piece in pieces))
    params = {**FEW, "temperature": 0.7, "top_p": 0.95, "top_k": 5, "knn": 1}
    assert model.predict(PROMPTS, params=params) == expected
    assert model.predict(PROMPTS, params={**params, "seed": 4}) != expected
    assert model.predict(PROMPTS, FEW) == model.predict(PROMPTS, {**FEW, "knn": 2}), "as many as in training"


def test_without_a_database_it_says_what_to_set(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RETRO_DATA", raising=False)
    model = _load_pyfunc(str(root / "models/retro"), CONFIG)
    said = "set the environment variable RETRO_DATA or the model config"
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match=said):
        model.predict(PROMPTS, FEW)
    assert len(model.predict(PROMPTS, {**FEW, "knn": 0})) == 2, "no neighbors, as asked"
    monkeypatch.setenv("RETRO_DATA", str(root / "data"))
    monkeypatch.setenv("RETRO_ENCODER", str(root / "encoder"))
    assert len(_load_pyfunc(str(root / "models/retro")).predict(PROMPTS, FEW)) == 2


def test_what_cannot_be_is_refused(root: Path, model: TextModel) -> None:
    with pytest.raises(ConfigError, match="prompt: found list, expected text"):
        model.predict({"prompt": [["a"]]})
    plain = _load_pyfunc(str(root / "models/baseline"), config(root))
    assert len(plain.predict(PROMPTS, FEW)) == 2, "a plain decoder needs no database"
    with pytest.raises(ConfigError, match="knn: .* this model has no retrieval"):
        plain.predict(PROMPTS, {"knn": 2})
    elsewhere = small_run_of_other_text(root)
    with pytest.raises(MismatchError, match="made for tokenizer"):
        _load_pyfunc(str(root / "models/retro"), {**config(root), "data": str(elsewhere)})


def small_run_of_other_text(root: Path) -> Path:
    from fixtures import tiny_corpus, tiny_encoder
    from small_run import write_data

    other = root / "other"
    tiny_corpus(other / "documents", num_documents=20, seed=5)
    tiny_encoder(other / "encoder")
    return write_data(other, other / "data")


def test_the_file_holds_what_is_fixed_and_is_part_of_the_model(root: Path, tmp_path: Path) -> None:
    file = root / "models/retro" / FILE
    content = yaml.safe_load(file.read_text())
    assert list(content) == ["flavors", "signature"], "no clock, no id, no version of a package"
    assert content["flavors"] == {"python_function": {"loader_module": LOADER, "config": CONFIG}}
    assert TextModel.__module__ == LOADER
    write_mlmodel(tmp_path, knn=2)
    assert (tmp_path / FILE).read_bytes() == file.read_bytes()
    assert FILE in Artifact.open(root / "models/retro", "model").files


def test_the_signature_says_the_same_as_the_options_of_retro_generate(root: Path) -> None:
    signature = yaml.safe_load((root / "models/retro" / FILE).read_text())["signature"]
    said: dict[str, Any] = {param["name"]: param["default"] for param in json.loads(signature["params"])}
    assert said.pop("knn") == Artifact.open(root / "models/retro", "model").facts["knn"]
    defaults = {name: item.default for name, item in inspect.signature(Sampling).parameters.items()}
    assert said == {**defaults, "top_k": 0}
    options = vars(_parser().parse_args(["generate", "--prompt", "a"]))
    assert {name: options[name] for name in ("max_new_tokens", "temperature", "seed")}.items() <= said.items()
