"""Adapters around a base, by every door: `retro serve`, MLflow's loader and the lm-evaluation-harness.

Each answers what `retro generate` or transformers itself does.
"""

import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from based_run import KNN, based_run
from served import running
from transformers import AutoModelForCausalLM

from retro_model import cli
from retro_model.core.errors import SourceError
from retro_model.core.printable import printable
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.pyfunc import TextModel, _load_pyfunc

PROMPT, SEED, LENGTH = "Gaba fuco dilem norpa que ri", 3, 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return based_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return root


def generated(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `retro generate` prints."""
    capsys.readouterr()
    command = ["generate", "--prompt", PROMPT, "--seed", str(SEED), "--max-new-tokens", str(LENGTH), "--device", "cpu"]
    assert cli.main([*command, *options]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def losses_of_base(root: Path, text: str) -> list[float]:
    """The nats of each token of a document and of its end, by transformers alone."""
    tokenizer = Tokenizer.open(root / "data/tokenizer")
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(text).tolist(), tokenizer.end_id]])
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(base(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    return [float(loss) for loss in losses]


def answer(port: int, call: str, asked: dict[str, Any]) -> Any:
    """What a server answers."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{call}", json.dumps(asked).encode(), head)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_retro_serve(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"prompt": PROMPT, "seed": SEED, "max_new_tokens": LENGTH}
    on, off = generated(capsys), generated(capsys, "--knn", "0")
    assert on != off == generated(capsys, "--model", "models/baseline")
    with running(inside) as server:
        assert printable(answer(server.port, "generate", asked)["text"]) == on
        assert printable(answer(server.port, "generate", {**asked, "knn": 0})["text"]) == off
        scores = answer(server.port, "score", {"text": PROMPT})
    assert [token["off"] for token in scores["tokens"]] == pytest.approx(losses_of_base(inside, PROMPT), rel=1e-5)
    assert scores["on"] != pytest.approx(scores["off"], rel=1e-3)


def loaded(root: Path, model: str = "retro", **config: str) -> TextModel:
    places = {"data": str(root / "data"), "encoder": str(root / "encoder"), "device": "cpu"}
    return _load_pyfunc(str(root / "models" / model), {**places, **config})


def test_mlflow(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on, off = generated(capsys), generated(capsys, "--knn", "0")
    monkeypatch.chdir(tmp_path)  # where the recorded name leads nowhere
    monkeypatch.delenv("RETRO_BASE", raising=False)
    with pytest.raises(SourceError, match="base cannot be loaded .*; set the environment variable RETRO_BASE or"):
        loaded(inside)
    asked = {"seed": SEED, "max_new_tokens": LENGTH}
    model = loaded(inside, base=str(inside / "base"))
    assert list(map(printable, model.predict({"prompt": [PROMPT]}, asked))) == [on] != [off]
    assert list(map(printable, model.predict({"prompt": [PROMPT]}, {**asked, "knn": 0}))) == [off]
    monkeypatch.setenv("RETRO_BASE", str(inside / "base"))
    assert list(map(printable, loaded(inside, "baseline").predict({"prompt": [PROMPT]}, asked))) == [off]


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from retro_model.core.artifacts import Artifact
    from retro_model.evaluation.harness import HarnessModel
    from retro_model.evaluation.scoring import Scorer, choose_spans

    monkeypatch.chdir(tmp_path)
    places = {"model": str(inside / "models/retro"), "data": str(inside / "data"), "encoder": str(inside / "encoder")}
    on, off = (HarnessModel(**places, base=str(inside / "base"), device="cpu", knn=knn) for knn in (KNN, 0))
    assert off.loglikelihood_rolling([SimpleNamespace(args=(PROMPT,))]) == [
        pytest.approx(-sum(losses_of_base(inside, PROMPT)), rel=1e-5)
    ]
    chunks = Artifact.open(inside / "data/chunks/test", "chunks")
    (span, *_) = choose_spans(chunks["documents"][:], None, 0)
    scorer = Scorer(chunks, Artifact.open(inside / "data/chunks/train", "chunks"), [span], seq_len=512)
    assert on.retriever is not None
    expected = scorer.losses(on.model, on.retriever.retrieve(scorer.inputs, KNN).ids).sum()
    text = on.tokenizer.decode(chunks["tokens"][span.first : span.stop][:, :-1].reshape(-1).tolist())
    assert on.loglikelihood_rolling([SimpleNamespace(args=(text,))]) == [pytest.approx(-expected, rel=1e-4)]
    assert off.loglikelihood_rolling([SimpleNamespace(args=(text,))]) != [pytest.approx(-expected, rel=1e-3)]
