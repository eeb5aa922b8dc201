"""The programs that measure training, at toy size, so that they do not rot between two measurements."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import tiny_encoder
from paths import ROOT
from small_training import CHUNK, MODEL, SEQ_LEN, TRAIN, VOCABULARY
from torch import nn
from woven import write_woven

from retro_model.network.config import ModelConfig, RETROConfig
from retro_model.network.model import RETRO
from retro_model.training.run import build_model
from retro_model.training.throughput import DATA_SHEETS, peak, products

PARAMS = SimpleNamespace(knn=2, seq_len=SEQ_LEN, seed=0, model=MODEL, train=dataclasses.replace(TRAIN, accumulation=1))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.set_num_threads(1)

    def load(name: str) -> ModuleType:
        for known in ("training", "time_to_loss", "large"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_woven(folder, chunk_size=CHUNK, vocab_size=VOCABULARY, num_documents=20)
    return folder


def test_padded_sequences_hold_every_row_once_and_one_document_each(benchmark: Any, data: Path) -> None:
    training = benchmark("training")
    sequences = training.open_sequences(data, "train", SEQ_LEN, 2)
    rows = training.one_document_a_sequence(sequences)
    assert sorted(rows[rows >= 0].tolist()) == list(range(sequences.num_rows))
    documents = np.asarray(sequences.chunks["documents"][:])
    assert all(len(set(documents[row[row >= 0]])) == 1 for row in rows)
    assert all((np.diff(row >= 0).astype(int) <= 0).all() for row in rows), "padding stands at the end"


def test_training_is_measured(benchmark: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = benchmark("training")
    trainer = training.make_trainer(data, PARAMS)
    found = training.in_turns(trainer, 2)
    assert set(found) == {"packed", "one document a sequence"}
    assert all(rate > 0 and 0 < share <= 1 for rate, share in found.values())
    assert found["packed"][1] > 0.9
    assert training.loader(trainer, 3) > 0
    monkeypatch.chdir(tmp_path)
    assert 0 < training.logging_seconds(3) < 10


def test_time_to_loss_runs_both_sides(benchmark: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this project's network in the place of the other side's."""
    program = benchmark("time_to_loss")
    made = []

    class Theirs(nn.Module):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.inner = RETRO(**arguments)
            made.append(arguments)

        def forward(self, seq: torch.Tensor, retrieved: torch.Tensor, return_loss: bool) -> torch.Tensor:
            loss: torch.Tensor = self.inner(seq, retrieved, return_loss=return_loss)
            return loss

    monkeypatch.setitem(sys.modules, "retro_pytorch", SimpleNamespace(RETRO=Theirs))
    sequences = [program.open_sequences(data, split, SEQ_LEN, 2) for split in ("train", "valid")]
    sides = {
        "theirs": program.theirs("nowhere", PARAMS, sequences[0]),
        "ours": program.ours(PARAMS, sequences[0]),
    }
    assert made[0]["dec_dim"] == MODEL.dec_dim
    runs = {name: program.Run(side, PARAMS, sequences[1], 4, 1e-9) for name, side in sides.items()}
    for run in runs.values():
        seconds, steps, loss = run.turn()
        assert seconds > 0 and steps == 1 and loss == pytest.approx(np.log(VOCABULARY), abs=0.3)


def test_time_to_loss_is_from_one_loss_to_where_the_other_has_it(benchmark: Any) -> None:
    program = benchmark("time_to_loss")
    theirs = program.Curve(1, [(5.0, 2, 3.4), (10.0, 4, 3.0)])
    ours = program.Curve(1, [(1.0, 1, 3.5), (2.5, 3, 2.9), (3.5, 4, 2.8)])
    text = program.report({"theirs": theirs, "ours": ours})
    assert text.endswith("this project reached 3.0000 after 2 s, 3 steps\nRATIO of the times, ours to theirs: 0.25")
    late = program.Curve(1, [(1.0, 1, 3.5)])
    assert program.report({"theirs": theirs, "ours": late}).endswith("this project has not reached 3.0000")


def test_both_sides_have_one_loss_for_one_network(benchmark: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = benchmark("time_to_loss")
    sequences = program.open_sequences(data, "valid", SEQ_LEN, 2)
    torch.manual_seed(0)
    model = build_model(MODEL, sequences.chunks.facts, SEQ_LEN, retrieval=True).eval()
    monkeypatch.setitem(sys.modules, "retro_pytorch", SimpleNamespace(RETRO=lambda **_: model))
    monkeypatch.setattr(program, "build_model", lambda *_, **__: model)
    losses = [
        program.validation_loss(side[1], sequences, "float32", 6)
        for side in (program.theirs("nowhere", PARAMS, sequences), program.ours(PARAMS, sequences))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_the_large_run_at_toy_size(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = benchmark("large")
    model = ModelConfig(
        enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2, dec_cross_attn_layers=(2,), heads=2, dim_head=8
    )
    train = dataclasses.replace(TRAIN, steps=2, warmup=1, batch_size=2, accumulation=1)
    setting = program.Setting(
        ("json", "einops"), model, train, vocab_size=400, chunk_size=16, seq_len=64,
        encoder=str(tiny_encoder(tmp_path / "encoder")),
    )  # fmt: skip
    program.prepare(tmp_path / "work", setting)
    results = program.train(tmp_path / "work", setting, "cpu")
    program.report(tmp_path / "work", setting, results)
    text = capsys.readouterr().out
    assert "baseline: " in text and "retro: " in text and "% of peak" in text
    assert program.large(2000).train.steps == 2000
    assert "python" in program.installed_packages() and "sklearn" in program.installed_packages()
    code = "import large; large.installed_packages(); import setuptools, distutils.core"  # as torch.compile does
    folder = Path(program.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


# ---- the hardware's peak -------------------------------------------------------------------------------


def test_a_known_chip_has_its_data_sheet_and_another_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peak(torch.device("cpu"), "float32")
    assert found.rate > 1e8 and found.source == "the fastest matrix product"
    assert peak(torch.device("cpu"), "float32") == found, "measured once"
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A10G": 70e12}
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak(torch.device("cuda"), "bfloat16").rate == rate, name
        assert peak(torch.device("cuda"), "float32").rate < rate
    assert all(bfloat16 > float32 for bfloat16, float32 in DATA_SHEETS.values())


def test_products_grow_with_what_is_computed() -> None:
    config = RETROConfig(num_tokens=50, enc_dim=16, enc_depth=1, dec_dim=8, dec_depth=2, dec_cross_attn_layers=(2,))
    bare = products(config, 2, 128, 0)
    assert products(config, 4, 128, 0) == 2 * bare
    assert bare < products(config, 2, 128, 1) < products(config, 2, 128, 2)
