"""The benchmark's functions at toy size, so that they do not rot between two measurements."""

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retro_model.network.model import RETRO


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/network.py, by a name under which the processes that it starts find it, too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "network", raising=False)
    return importlib.import_module("network")


def toy(network: ModuleType, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "device": "cpu",
        "network": {
            "num_tokens": 50, "max_seq_len": 32, "enc_dim": 16, "enc_depth": 1, "dec_dim": 8, "dec_depth": 2,
            "dec_cross_attn_layers": (2,), "heads": 2, "dim_head": 4, "chunk_size": 4,
        },
        "batch": 2, "length": 16, "memory_length": 32, "dtypes": {"bfloat16 autocast": torch.bfloat16},
        "compiled": False, "prompt": 4, "written": 12, "places": (8, 24),
    }  # fmt: skip
    return network.Setting(**(arguments | changes))


def test_training(network: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With this project's model in the place of the other side's."""
    package = tmp_path / "retro_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("from retro_model.network.model import RETRO\n", encoding="utf-8")
    seconds = network.training(toy(network), str(tmp_path), 2)
    assert set(seconds) == {"bfloat16 autocast"}
    steps = {"ours", "theirs", "theirs, set up as ours", "without neighbors", "packed documents"}
    assert set(seconds["bfloat16 autocast"]) == steps
    assert all(value > 0 for value in seconds["bfloat16 autocast"].values())
    text = capsys.readouterr().out
    assert "RATIO of tokens a second, ours to theirs" in text
    assert "retrieval costs a factor of" in text


def test_a_compiled_model_is_measured_beside_the_eager_one(
    network: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def spy(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", spy)
    tasks = network.training_tasks("ours", toy(network, compiled=True), None, torch.float32)
    assert list(tasks)[:2] == ["ours", "ours, compiled"]
    assert len(compiled) == 1 and isinstance(compiled[0], RETRO)


def test_writing(network: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    found = network.writing(toy(network), None, 2)
    assert set(found) == {"ours", "early", "late"}
    assert "a token at position 8" in capsys.readouterr().out


def test_pace_is_of_the_tokens_around_a_place(network: ModuleType) -> None:
    stamps = [5.0]  # one piece, the prompt of 10 tokens; then 100 tokens, twice as slow from 60 on
    for place in range(10, 110):
        stamps.append(stamps[-1] + (1.0 if place < 60 else 2.0))
    assert network.pace(stamps, 10, 110, 20) == 1.0
    assert network.pace(stamps, 10, 110, 60) == 1.5  # as many before as after
    assert network.pace(stamps, 10, 110, 100) == 2.0


def test_peak_memory() -> None:
    """In a process of its own, as it must be: at least the gradients, megabytes that no rounding of counters hides."""
    code = """
        import dataclasses, importlib.util, sys
        import torch
        import test_benchmarks
        spec = importlib.util.spec_from_file_location("network", sys.argv[1])
        network = sys.modules["network"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(network)
        setting = test_benchmarks.toy(network)
        wide = {**setting.network, "max_seq_len": 2048, "dec_dim": 256}
        setting = dataclasses.replace(setting, network=wide, memory_length=2048)
        weights = sum(x.numel() for x in network.build("ours", setting, None).parameters())
        print(weights * 4, network.peak_memory("ours", setting, None, torch.float32))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT / "benchmarks" / "network.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    gradients, peak = map(int, done.stdout.split())
    assert peak > gradients > 2_000_000


def test_products_are_those_that_torch_counts(network: ModuleType) -> None:
    """Forward and backward, without the attention, which torch does not count the causal half of."""
    setting = toy(network)
    shape = {**setting.network, "enc_depth": 2, "enc_cross_attn_layers": (2,)}
    setting = dataclasses.replace(setting, network=shape)
    seq, retrieved = network.random_batch(setting, 2, 16)
    model = network.build("ours", setting, None)
    for neighbors, given in ((2, retrieved), (0, None)):
        with FlopCounterMode(display=False) as counter:
            model(seq[:, :-1], given)
        counts = counter.get_flop_counts()["Global"]
        linear = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
        scores = sum(count for name, count in counts.items() if name not in (torch.ops.aten.mm, torch.ops.aten.addmm))
        # causal attention in one block computes all scores; `products` counts the half that is needed
        unneeded = 2 * 16 * setting.config.dec_depth * 2 * 8 * 16
        assert 3 * (linear + scores - unneeded) == network.products(setting.config, 2, 16, neighbors)


def test_known_chips(network: ModuleType) -> None:
    assert network.data_sheet("NVIDIA H100 80GB HBM3") == network.data_sheet("NVIDIA H200") == 989e12
    assert network.data_sheet("NVIDIA A100-SXM4-40GB") == 312e12
    assert network.data_sheet("NVIDIA H100 NVL") == 835e12 and network.data_sheet("NVIDIA L40S") == 362e12
    assert network.data_sheet("AMD EPYC") is None and network.data_sheet("NVIDIA L40") is None
    assert network.chip_of("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_are_networks(network: ModuleType, device: str) -> None:
    setting = network.SETTINGS[device]
    assert setting.device == device
    assert setting.config.max_seq_len >= max(setting.length, setting.memory_length, setting.prompt + setting.written)


def test_cuda_is_waited_for(network: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock starts and stops when the device has nothing left to do."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    network.in_turns({"a": lambda: events.append("a")}, 1, "cuda")
    assert events == ["wait", "a", "wait"] * 2


def test_longest_shared_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", ROOT / "benchmarks" / "evaluation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["evaluation.py", "--chunks", "40", "--turns", "1"])
    module.main()
    assert "longest shared runs: " in capsys.readouterr().out


# ---- all of them -----------------------------------------------------------------------------------


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("run_all")


PROGRAM = """
import sys
from measured import measured
MAKE_BENCH = {
    "full": ["--turns 5 --theirs {theirs}", "fail"],
    "quick": ["--turns 1 --theirs {theirs}", "fail --theirs {needed_theirs}"],
}
if sys.argv[1] == "fail":
    sys.exit(3)
measured("step", ratio=1.5, at_least=2, ours=300.0, theirs=200.0, limit=1234.0, unit="tokens/s")
measured("memory", ratio=0.4, at_most=0.5, ours=0.25, unit=" ".join(sys.argv[1:]))
measured("chunks", ours=7.0)
"""


def test_all_benchmarks_make_one_table(run_all: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(PROGRAM)
    (tmp_path / "measured.py").write_text((ROOT / "benchmarks" / "measured.py").read_text())
    (tmp_path / "no_benchmark.py").write_text("MAKE = 1\n")
    assert list(run_all.programs(tmp_path)) == ["one"]
    records, failed = run_all.run(tmp_path, "full", None, Path("their folder"))
    assert failed == 1 and [record["what"] for record in records] == ["step", "memory", "chunks"]
    assert run_all.table(records).splitlines()[2:] == [
        "| step | 300 tokens/s | 200 tokens/s | 1,234 tokens/s | 1.5 | >= 2 | **not met** |",
        "| memory | 0.25 --turns 5 --theirs their folder |  |  | 0.4 | <= 0.5 | met |",
        "| chunks | 7 |  |  |  |  |  |",
        "",
        "1 targets met, 1 not met",
    ]
    records, failed = run_all.run(tmp_path, "quick", None, None)
    assert failed == 0 and records[1]["unit"] == "--turns 1", "without retro-pytorch its option is left out"
    assert run_all.run(tmp_path, "quick", ["other"], None) == ([], 0)


def test_every_benchmark_joins(run_all: ModuleType) -> None:
    """All programs of the folder but the two that put them together."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"run_all", "measured"}
    found = run_all.programs(ROOT / "benchmarks")
    assert set(found) == names
    assert all(set(lines) == {"full", "quick"} for lines in found.values())
    alone = {name for name, lines in found.items() if not lines["full"]}
    assert alone == {"large", "strongest_plain"}, "a run for a GPU, and one of hours"


@pytest.mark.slow
def test_the_quick_form_of_all_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--quick", "--without-theirs"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = done.stdout.rpartition("| what |")[2]
    assert "targets met" in table and table.count("\n|") > 5
    assert list(tmp_path.iterdir()) == []
