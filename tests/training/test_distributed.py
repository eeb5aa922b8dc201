"""Two processes train what one trains, to rounding, and share its checkpoints; stopped, they go on bit for bit.

Slow: a process takes seconds to start.
"""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from small_training import CHUNK, MODEL, SEQ_LEN, TRAIN, VOCABULARY, Killed, folder_digests, make_trainer, run
from woven import Woven, write_woven

from retro_model.core.errors import ConfigError, TrainingError
from retro_model.training.config import TrainConfig
from retro_model.training.distributed import ALONE, World, resolve_processes
from retro_model.training.sharding import ensure_neighbor

# Without dropout, whose masks depend on the process; half of the neighbors are dropped, so that in some
# steps one process has neighbors and the other has none, and in some portions neither has.
PLAIN_MODEL = dataclasses.replace(MODEL, dec_ff_dropout=0.0)
PLAIN = dataclasses.replace(TRAIN, batch_size=8, neighbor_dropout=0.6, validate_sequences=5)
TWO = dataclasses.replace(PLAIN, processes=2)
SHARDED = dataclasses.replace(TWO, shard=True)

# With untied embeddings, copying reads rows of the output matrix, which belongs to another module than the encoder.
COPYING_MODEL = dataclasses.replace(PLAIN_MODEL, copy_tokens=2, cross_attn_sink=True)

Curve = dict[int, Mapping[str, float]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")


@pytest.fixture(scope="module")
def woven(tmp_path_factory: pytest.TempPathFactory) -> Woven:
    return write_woven(tmp_path_factory.mktemp("woven"), chunk_size=CHUNK, vocab_size=VOCABULARY, num_documents=20)


def curve(woven: Woven, folder: Path, train: TrainConfig, **options: Any) -> Curve:
    """What is logged at each step; the model goes into `folder`."""
    records: Curve = {}
    options = {"model": PLAIN_MODEL, **options}
    run(woven, folder, train, log=records.__setitem__, log_every=1, **options)
    return records


def assert_same_to_rounding(found: Curve, expected: Curve) -> None:
    assert found.keys() == expected.keys()
    for step, record in expected.items():
        assert found[step].keys() == record.keys()
        for name in record.keys() - {"tokens_per_second", "peak_share"}:
            assert found[step][name] == pytest.approx(record[name], rel=2e-4, abs=1e-6), (step, name)


def assert_same_weights(found: Path, expected: Path) -> None:
    weights = load_file(expected / "model.safetensors")
    others = load_file(found / "model.safetensors")
    assert others.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            others[name], tensor, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def alone(woven: Woven, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Path]:
    """What one process does."""
    folder = tmp_path_factory.mktemp("alone")
    return curve(woven, folder, PLAIN), folder / "retro"


# ---- the same losses -----------------------------------------------------------------------------------


def test_the_data_makes_processes_differ(woven: Woven) -> None:
    """What the tests below rest on: portions in which one process has no neighbors, or none has any."""
    trainer = make_trainer(woven, PLAIN)
    kinds = set()
    for step in range(PLAIN.steps):
        for portion in trainer.data(step).portions:
            assert portion.retrieved is not None
            halves = [bool((half != trainer.training.pad_id).any()) for half in portion.retrieved.split(2)]
            kinds.add(tuple(halves))
    assert kinds >= {(True, True), (False, False)} and kinds & {(True, False), (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("train", [TWO, SHARDED], ids=["replicated", "sharded"])
def test_two_processes_have_the_losses_of_one(
    woven: Woven, tmp_path: Path, alone: tuple[Curve, Path], train: TrainConfig
) -> None:
    records = curve(woven, tmp_path, train, work_folder=tmp_path / "work")
    assert_same_to_rounding(records, alone[0])
    assert_same_weights(tmp_path / "retro", alone[1])
    assert torch.get_num_threads() == 1 and not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("train", [TWO, SHARDED], ids=["replicated", "sharded"])
def test_copying_in_two_processes(woven: Woven, tmp_path: Path, train: TrainConfig) -> None:
    """Also with random neighbors, which both processes have to draw alike."""
    assert not COPYING_MODEL.tie_embeddings
    expected = curve(woven, tmp_path / "one", replace_random(PLAIN), model=COPYING_MODEL)
    assert_same_to_rounding(curve(woven, tmp_path / "two", replace_random(train), model=COPYING_MODEL), expected)
    assert_same_weights(tmp_path / "two" / "retro", tmp_path / "one" / "retro")


def replace_random(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, random_neighbors=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("train", [TWO, SHARDED], ids=["replicated", "sharded"])
def test_the_baseline_in_two_processes(woven: Woven, tmp_path: Path, train: TrainConfig) -> None:
    expected = curve(woven, tmp_path / "one", PLAIN, neighbors=None)
    assert_same_to_rounding(curve(woven, tmp_path / "two", train, neighbors=None), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train", [pytest.param(TWO, marks=pytest.mark.torture, id="replicated"), pytest.param(SHARDED, id="sharded")]
)
def test_a_checkpoint_loads_in_any_number_of_processes(
    woven: Woven, tmp_path: Path, alone: tuple[Curve, Path], train: TrainConfig
) -> None:
    """Four steps in two processes, four in one, and the rest in two again."""
    records: Curve = {}
    work = tmp_path / "work"
    for settings, stop in ((train, 4), (PLAIN, 8), (train, None)):

        def log(step: int, record: Mapping[str, float], stop: int | None = stop) -> None:
            records[step] = record
            if stop is not None and step == stop + 1:
                raise Killed

        options: dict[str, Any] = {"model": PLAIN_MODEL, "work_folder": work, "log": log, "log_every": 1}
        if stop is not None:
            with pytest.raises(Killed):
                run(woven, tmp_path, settings, checkpoint_every=4, **options)
            assert [path.name for path in (work / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{stop:08d}"]
        else:
            run(woven, tmp_path, settings, checkpoint_every=4, **options)
    assert_same_to_rounding(records, alone[0])
    assert_same_weights(tmp_path / "retro", alone[1])


# ---- stopping and going on -----------------------------------------------------------------------------

PROGRAM = f"""
import logging, os, signal, sys
sys.path[:0] = {[str(SUPPORT), str(ROOT)]!r}
from pathlib import Path
import dataclasses
from small_training import MODEL, TRAIN
from retro_model.training.run import TrainingRun, train_model

if __name__ == "__main__":
    when, folder, processes, shard, *inputs = sys.argv[1:]
    folder = Path(folder)
    logging.basicConfig(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def log(step, record):
        print("step", step, flush=True)
        if when == f"kill {{step}}":
            os.kill(os.getpid(), signal.SIGKILL)
        if when == f"interrupt {{step}}":
            os.killpg(0, signal.SIGINT)  # as a terminal does: every process gets it

    train = dataclasses.replace(TRAIN, processes=int(processes), shard=shard == "True")
    chunks, neighbors, tokenizer = map(Path, inputs)
    try:
        run = TrainingRun(chunks, neighbors, tokenizer, MODEL, train, knn=2, seq_len={SEQ_LEN}, seed=0,
                          out_folder=folder / "retro", work_folder=folder / "work", log_every=1, checkpoint_every=3)
        train_model(run, log, threads=1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(
    woven: Woven, folder: Path, when: str, *, shard: bool = False, torchrun: bool = False, program: str = PROGRAM
) -> tuple[int, list[int], str]:
    """Runs the program in processes of its own: its status, the steps that it logged, and what it said."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(program)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if torchrun else []
    inputs = [str(path) for path in (woven.chunks, woven.neighbors, woven.tokenizer)]
    command = [sys.executable, *launcher, str(folder / "program.py"), when, str(folder), "2", str(shard), *inputs]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        start_new_session=True, timeout=900,
    )  # fmt: skip
    steps = [int(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("step ")]
    return ended.returncode, steps, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard", [pytest.param(False, marks=pytest.mark.torture, id="replicated"), pytest.param(True, id="sharded")]
)
def test_killed_and_interrupted_they_go_on_bit_for_bit(woven: Woven, tmp_path: Path, shard: bool) -> None:
    status, steps, errors = start(woven, tmp_path / "quiet", "", shard=shard)
    assert status == 0, errors
    assert steps == list(range(1, 13)), "process 0 alone logs"
    expected = folder_digests(tmp_path / "quiet" / "retro")

    status, steps, errors = start(woven, tmp_path / "disturbed", "kill 5", shard=shard)
    assert status == -signal.SIGKILL and steps[-1] == 5, errors
    status, steps, errors = start(woven, tmp_path / "disturbed", "interrupt 8", shard=shard)
    assert status == 130 and steps == [4, 5, 6, 7, 8], errors
    assert "stops after step 8, saved in " in errors
    status, steps, errors = start(woven, tmp_path / "disturbed", "", shard=shard)
    assert status == 0 and steps == [9, 10, 11, 12], errors
    assert folder_digests(tmp_path / "disturbed" / "retro") == expected


@pytest.mark.slow
@pytest.mark.torture  # tests/stages/test_stages.py starts a whole stage both ways
def test_torchrun_starts_what_the_stage_starts_itself(woven: Woven, tmp_path: Path) -> None:
    status, steps, errors = start(woven, tmp_path / "own", "")
    assert status == 0, errors
    status, steps, errors = start(woven, tmp_path / "torchrun", "", torchrun=True)
    assert status == 0, errors
    assert steps == list(range(1, 13))
    assert folder_digests(tmp_path / "torchrun" / "retro") == folder_digests(tmp_path / "own" / "retro")


@pytest.mark.slow
def test_a_process_that_is_gone_is_named_and_the_next_run_goes_on(woven: Woven, tmp_path: Path) -> None:
    def kill_the_other(step: int, record: Mapping[str, float]) -> None:
        if step == 5:
            (other,) = multiprocessing.active_children()
            other.kill()
            other.join()

    options: dict[str, Any] = {"work_folder": tmp_path / "work", "log_every": 1, "checkpoint_every": 3}
    train = dataclasses.replace(TRAIN, processes=2)
    with pytest.raises(TrainingError, match=r"process 1 of 2 ended with status -9 .* go on from the last checkpoint"):
        run(woven, tmp_path, train, log=kill_the_other, **options)
    steps: list[int] = []
    run(woven, tmp_path, train, log=lambda step, record: steps.append(step), **options)
    assert steps == list(range(4, 13))


@pytest.mark.slow
def test_a_process_that_cannot_begin_is_not_waited_for(woven: Woven, tmp_path: Path) -> None:
    """A script without the guard that multiprocessing needs: the other process would start others itself."""
    lines = [line for line in PROGRAM.splitlines() if "__main__" not in line]
    program = "\n".join(line.removeprefix("    ") for line in lines)
    status, steps, errors = start(woven, tmp_path, "", program=program)
    assert status == 1 and not steps
    assert "process 1 of 2 ended with status 1 before it began" in errors


# ---- parts ---------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_shared_evenly_is_refused(woven: Woven, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.batch_size: found 4 in 2 portions, expected a multiple of 6 for 3"):
        make_trainer(woven, TRAIN, world=World(0, 3))


def test_processes_are_as_many_as_gpus_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_processes(0, "cpu", 8) == 1 and resolve_processes(3, "cpu", 8) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert resolve_processes(0, "cuda", 12) == 6 and resolve_processes(2, "cuda", 12) == 2
    assert resolve_processes(0, "cuda", 4) == 4 and resolve_processes(0, "cuda", 7) == 1, "an even share for each"
    assert resolve_processes(0, "cpu", 8) == 1
    with pytest.raises(ConfigError, match="train.processes: found 7, expected at most 6"):
        resolve_processes(7, "cuda", 7)


def test_alone_sums_and_agreements_are_its_own() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.sum(values) is values and ALONE.largest(7) == 7 and ALONE.main


def test_a_batch_without_neighbors_gets_a_sequence_that_teaches_nothing(woven: Woven) -> None:
    trainer = make_trainer(woven)
    rows = trainer.training.training_rows(0, 0, 2)
    bare = trainer.training.batch(rows, without=np.array([True, True]))
    changed = ensure_neighbor(bare, trainer.training.pad_id)
    assert len(changed.seq) == 3 and changed.retrieved is not None
    assert bool((changed.retrieved != trainer.training.pad_id).any())
    model = trainer.model.eval()
    losses = [
        model(b.seq, b.retrieved, return_loss=True, labels=b.labels, documents=b.documents) for b in (bare, changed)
    ]
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    losses[1].backward()
    assert model.encoder is not None
    gradients = [parameter.grad for parameter in model.encoder.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "all took part, none learned"
    full = trainer.training.batch(rows)
    assert ensure_neighbor(full, trainer.training.pad_id) is full
