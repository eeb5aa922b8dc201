"""The model in the lm-evaluation-harness, against the own scorer and against slow references; without a network."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from small_run import small_run

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

from retro_model.core.artifacts import Artifact  # noqa: E402
from retro_model.core.errors import ConfigError, MismatchError  # noqa: E402
from retro_model.evaluation.harness import HarnessModel  # noqa: E402
from retro_model.evaluation.scoring import Scorer, choose_spans  # noqa: E402
from retro_model.inference.text import Sampling, write_text  # noqa: E402

CONTEXT, CONTINUATION = "Ba co di fu ga lem mi nor", " pa que ri sto tu ver wa zen"


class Request:
    """As the harness's Instance: what the model is given, in `args`."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


def opened(root: Path, **arguments: Any) -> HarnessModel:
    options = {"model": str(root / "models/retro"), "data": str(root / "data"), "encoder": str(root / "encoder")}
    return HarnessModel(**{**options, **arguments})


@pytest.fixture(scope="module")
def model(root: Path) -> HarnessModel:
    return opened(root)


@pytest.mark.parametrize("knn", [0, 2])
def test_rolling_is_what_the_own_scorer_says(root: Path, knn: int) -> None:
    """Documents of several windows; the scorer gets the neighbors that the harness's model finds."""
    model = opened(root, knn=knn)
    chunks = Artifact.open(root / "data/chunks/test", "chunks")
    spans = choose_spans(chunks["documents"][:], None, 0)
    scorer = Scorer(chunks, Artifact.open(root / "data/chunks/train", "chunks"), spans, seq_len=32)
    neighbors = model.retriever.retrieve(scorer.inputs, knn).ids if model.retriever else None
    losses = scorer.losses(model.model, neighbors).sum(1)
    expected = [-losses[scorer.documents == document].sum() for document in np.unique(scorer.documents)]
    texts = texts_of(chunks, model)
    assert len(texts) == len(expected) >= 2 and len(scorer.rows) > 8 * len(texts), "longer than a window"
    found = model.loglikelihood_rolling([Request(text) for text in texts])
    assert found == pytest.approx(expected, rel=1e-4)


def texts_of(chunks: Artifact, model: HarnessModel) -> list[str]:
    """The texts of the documents, in the order of their rows."""
    tokens, documents = chunks["tokens"][:], chunks["documents"][:]
    texts = []
    for document in np.unique(documents):
        ids = tokens[documents == document][:, :-1].reshape(-1).tolist()
        texts.append(model.tokenizer.decode(ids))
    return texts


def test_likelihood_is_that_of_each_token_after_all_before_it(model: HarnessModel) -> None:
    """The reference reads every prefix anew, with the neighbors of its whole chunks."""
    assert model.retriever is not None
    before = [model.tokenizer.begin_id, *model.tokenizer.encode(CONTEXT).tolist()]
    ids = [model.tokenizer.begin_id, *model.tokenizer.encode(CONTEXT + CONTINUATION).tolist()]
    assert ids[: len(before)] == before and len(before) > 8 and len(ids) <= 32
    expected, greedy = 0.0, True
    for place in range(len(before), len(ids)):
        seq = torch.tensor([ids[:place]])
        whole = seq[:, : place // 8 * 8].reshape(1, -1, 8)
        retrieved = model.retriever.for_generation(2)(whole[0])[None]
        with torch.no_grad():
            logits = model.model(seq, retrieved)[0, -1]
        expected += float(logits.log_softmax(-1)[ids[place]])
        greedy &= int(logits.argmax()) == ids[place]
    assert model.loglikelihood([Request(CONTEXT, CONTINUATION)]) == [(pytest.approx(expected, rel=1e-4), greedy)]
    assert model.loglikelihood([Request(CONTEXT + " ", CONTINUATION[1:])])[0][0] == pytest.approx(expected, rel=1e-4)
    long = model.loglikelihood([Request(CONTEXT * 20, CONTINUATION)])[0][0]
    assert long != pytest.approx(expected, rel=1e-4) and long < 0
    with pytest.raises(ConfigError, match="continuation: found .* tokens, expected at most 32"):
        model.loglikelihood([Request(CONTEXT, CONTINUATION * 20)])


def test_text_ends_at_the_first_of_the_strings(model: HarnessModel) -> None:
    assert model.retriever is not None
    ids = [model.tokenizer.begin_id, *model.tokenizer.encode("Ba co").tolist()]
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    retrieve = model.retriever.for_generation(2)
    whole = "".join(piece.text for piece in write_text(model.model, model.tokenizer, ids, sampling, retrieve))
    settings = {"max_gen_toks": 12, "until": []}
    assert model.generate_until([Request("Ba co", settings)]) == [whole] and len(whole) > 4
    stop, later = whole[2:4], whole[4:]
    cut = model.generate_until([Request("Ba co", {**settings, "until": [later, stop]})])
    assert cut == [whole[: whole.find(stop)]]
    assert model.generate_until([Request("Ba co " * 50, {**settings, "until": "nothing"})])[0], "the end of a long one"


def test_a_database_of_another_tokenizer_is_refused(root: Path) -> None:
    with pytest.raises(MismatchError, match="retrieval"):
        opened(root, model=str(root / "models/baseline"), knn=2)


TASKS = {
    "my_rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                   "metric_list": [{"metric": "bits_per_byte"}]},
    "my_choice": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": [" ba", " co"],
                  "doc_to_target": 0, "metric_list": [{"metric": "acc"}]},
    "my_generation": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "co",
                      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
                      "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.mark.slow
def test_the_documented_command_runs_own_tasks(root: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Ba co di", "Fu ga")))
    (tmp_path / "tasks").mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}}}
    for name, task in TASKS.items():
        (tmp_path / f"tasks/{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    page = (ROOT / "docs/evaluation.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("    python -m retro_model.evaluation.harness")]
    line = line.replace("model=models/retro,data=data", "model=models/retro,data=data,encoder=encoder")
    command = shlex.split(line.replace("my_task", ",".join(TASKS)).replace("--include_path tasks", ""))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    options = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *command[1:], *options], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]
    assert found.keys() == TASKS.keys() and found["my_rolling"]["bits_per_byte,none"] > 0
