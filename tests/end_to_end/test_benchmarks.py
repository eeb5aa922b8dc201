"""Each program of benchmarks/ once at toy size and in this process, so that none rots between two measurements.

`make torture` runs the quick form of `make bench` too, which starts a process for each.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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

from retro_model.network.config import ModelConfig
from retro_model.network.model import RETRO

PARAMS = SimpleNamespace(knn=2, seq_len=SEQ_LEN, seed=0, model=MODEL, train=dataclasses.replace(TRAIN, accumulation=1))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name: str) -> ModuleType:
        for program in (ROOT / "benchmarks").glob("*.py"):
            monkeypatch.delitem(sys.modules, program.stem, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_woven(folder, chunk_size=CHUNK, vocab_size=VOCABULARY, num_documents=20)
    return folder


def test_every_benchmark_joins(benchmark: Any) -> None:
    """All programs of the folder but the two that put them together."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"run_all", "measured"}
    found = benchmark("run_all").programs(ROOT / "benchmarks")
    assert set(found) == names
    assert all(set(lines) == {"full", "quick"} for lines in found.values())
    alone = {name for name, lines in found.items() if not lines["full"]}
    assert alone == {"corpora", "large", "made_up_facts", "strongest_plain"}, (
        "needs params, a GPU, or hours; or no measure"
    )


@pytest.mark.slow
@pytest.mark.torture
def test_the_quick_form_of_all_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--quick", "--without-theirs"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = done.stdout.rpartition("| what |")[2]
    assert "targets met" in table and table.count("\n|") > 5
    assert list(tmp_path.iterdir()) == []


def test_what_the_programs_record_is_put_together(benchmark: Any, tmp_path: Path) -> None:
    """A program that reaches its target, the same without the other side, and one that fails."""
    (tmp_path / "good.py").write_text(
        'MAKE_BENCH = {"full": [], "quick": ["--size 3 --theirs {theirs}", "--theirs {needed_theirs}"]}\n'
        "import json, os, sys\n"
        "record = dict(what=' '.join(sys.argv[1:]), ratio=2.5, at_least=2, at_most=None)\n"
        "record |= dict(ours=1234.5, theirs=None, limit=3, unit='tokens/s')\n"
        "print(json.dumps(record), file=open(os.environ['RETRO_MEASURED'], 'a'))\n"
    )
    (tmp_path / "wrong.py").write_text('MAKE_BENCH = {"full": [], "quick": [""]}\nraise SystemExit(3)\n')
    run_all = benchmark("run_all")
    records, failed = run_all.run(tmp_path, "quick", None, None)
    assert failed == 1 and [record["what"] for record in records] == ["--size 3"]
    records, failed = run_all.run(tmp_path, "quick", ["good"], tmp_path)
    assert failed == 0 and records[1]["what"] == f"--theirs {tmp_path}"
    table = run_all.table([*records, {**records[0], "ratio": 1.5}])
    assert f"| --theirs {tmp_path} | 1,234 tokens/s |  | 3 tokens/s | 2.5 | >= 2 | met |" in table
    assert table.endswith("2 targets met, 1 not met")


def arguments(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *line.split()])


def test_search_is_measured_against_faiss(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = benchmark("search")
    arguments(monkeypatch, "--rows 1000 --queries 64 -k 8 --turns 1 --keys Flat IVF16,Flat")
    program.main()
    assert "1,000 vectors of 384, 64 queries" in capsys.readouterr().out


def test_adapters_are_measured_beside_all_weights(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where peaks mean nothing."""
    program = benchmark("adapters")
    here = argparse.Namespace(base=None, width=64, depth=6, vocabulary=50, length=64, rows=1, steps=1)
    monkeypatch.setattr(program, "in_a_process", lambda kind, arguments: program.measure(kind, here))
    arguments(monkeypatch, "")
    program.main()
    _, adapters, everything = capsys.readouterr().out.splitlines()
    assert adapters.startswith("adapters") and everything.split()[:2] == ["all", "weights"]
    assert int(adapters.split()[1].replace(",", "")) < int(everything.split()[2].replace(",", ""))


def test_made_up_facts_are_the_same_in_every_register_and_new_with_every_seed(benchmark: Any) -> None:
    made_up = benchmark("made_up_facts")
    texts, others = made_up.make_documents(20, 0), made_up.make_documents(20, 1)
    assert texts == made_up.make_documents(20, 0) and len(set(texts)) == len(texts)
    entries = [entry.split(". ")[0] for text in texts for entry in text.split("\n\n")[1:]]
    counts = Counter(entries)
    assert set(counts.values()) <= {4, 5}, "a register lists nobody twice"
    assert not counts.keys() & {entry.split(". ")[0] for text in others for entry in text.split("\n\n")[1:]}
    subject = made_up.make_subject(random.Random(0))
    registers = [made_up.write_register(random.Random(seed), [subject]) for seed in range(5)]
    told = [str(subject[fact]) for fact in ("birthplace", "coins", "eldest", "school", "river")]
    assert all(word in register for word in told for register in registers) and len(set(registers)) == 5


def test_a_growing_corpus_is_measured(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = benchmark("growing")
    arguments(monkeypatch, f"--chunks 600 --folder {tmp_path}")
    program.main()
    out = capsys.readouterr().out
    assert out.count("chunks and embeddings: ") == out.count("chunk + embed + index + knn: ") == 2


def test_the_evaluation_s_own_work_is_measured(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = benchmark("evaluation")
    arguments(monkeypatch, "--chunks 40 --turns 1")
    program.main()
    assert "chunks that share at most 8 tokens in a row: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_data_stages_are_measured(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stages here, and not in a process for each."""
    program = benchmark("data")

    def stage(command: list[str], **_: object) -> SimpleNamespace:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            program.stage(command[command.index("--name") + 1], Path(command[command.index("--folder") + 1]))
        return SimpleNamespace(stdout=said.getvalue())

    monkeypatch.setattr(program, "subprocess", SimpleNamespace(run=stage))
    monkeypatch.setattr(program.PrivateMemory, "run", lambda self: None)  # it ends with its process
    arguments(monkeypatch, f"curve --sizes 1200 --folder {tmp_path}")
    program.main()
    measured = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " MB " in line]
    assert [name for _, name in measured] == ["chunk", "embed", "index", "knn"]
    assert all(int(rows.replace(",", "")) > 500 for rows, _ in measured)


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    """This project's model in the place of the other side's: a folder to import it from."""
    package = tmp_path / "retro_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("from retro_model.network.model import RETRO\n", encoding="utf-8")
    return str(tmp_path)


def toy(network: ModuleType) -> Any:
    """What to measure, at toy size."""
    return network.Setting(
        device="cpu",
        network={
            "num_tokens": 50, "max_seq_len": 32, "enc_dim": 16, "enc_depth": 1, "dec_dim": 8, "dec_depth": 2,
            "dec_cross_attn_layers": (2,), "heads": 2, "dim_head": 4, "chunk_size": 4,
        },
        batch=2, length=16, memory_length=32, dtypes={"bfloat16 autocast": torch.bfloat16}, compiled=False,
        prompt=4, written=12, places=(8, 24),
    )  # fmt: skip


@pytest.mark.slow
def test_a_step_is_measured_beside_the_other_side(
    benchmark: Any, theirs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = benchmark("network")
    with monkeypatch.context() as patch:  # the steps are other processes' work; for the limit, a little will do
        patch.setattr(nn.functional, "linear", lambda rows, weight: rows[:64] @ weight[:64].T)
        seconds = network.training(toy(network), theirs, 2)
    steps = {"ours", "theirs", "theirs, set up as ours", "without neighbors", "packed documents"}
    assert set(seconds["bfloat16 autocast"]) == steps
    assert all(value > 0 for value in seconds["bfloat16 autocast"].values())
    assert "RATIO of tokens a second, ours to theirs" in capsys.readouterr().out


def test_writing_is_measured_beside_the_other_side(
    benchmark: Any, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = benchmark("network")
    seconds = network.writing(toy(network), theirs, 1)
    assert seconds.keys() == {"ours", "theirs", "early", "late"} and all(value > 0 for value in seconds.values())
    assert "a token at position 8: " in capsys.readouterr().out


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_large_run_at_toy_size(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)
