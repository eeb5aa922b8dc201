"""Training learns to use neighbors, is a function of its inputs, and survives being stopped at any moment."""

import dataclasses
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from small_training import CHUNK, MODEL, SEQ_LEN, TRAIN, VOCABULARY, Killed, folder_digests, make_trainer, run
from woven import Woven, write_tokenizer, write_woven

import retro_model.network.model
import retro_model.network.pretrained
import retro_model.training.checkpoints
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import (
    ConfigError,
    DamagedArtifactError,
    MismatchError,
    MissingArtifactError,
    TrainingError,
)
from retro_model.network.config import ModelConfig, RETROConfig
from retro_model.network.model import RETRO
from retro_model.training.checkpoints import Checkpoints
from retro_model.training.config import RetrofitConfig, TrainConfig
from retro_model.training.distributed import ALONE, World
from retro_model.training.optimizer import learning_rate, make_optimizer
from retro_model.training.run import build_model
from retro_model.training.trainer import Trainer, TrainingResult
from retro_model.training.warm_start import start_from

Outcome = tuple[TrainingResult, dict[str, str]]


@pytest.fixture(scope="session")
def woven(tmp_path_factory: pytest.TempPathFactory) -> Woven:
    folder = tmp_path_factory.mktemp("woven")
    return write_woven(folder, chunk_size=CHUNK, vocab_size=VOCABULARY, num_documents=20)


@pytest.fixture(scope="session")
def undisturbed(woven: Woven, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that nobody stopped: its result, and the digests of models/retro."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(woven, folder), folder_digests(folder / "retro")


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"dim_head": 7}, "model.dim_head: found 7, expected an even number"),
        (ModelConfig, {"dec_depth": 4, "dec_cross_attn_layers": (2, 5)}, r"found \[2, 5\].*dec_depth = 4"),
        (ModelConfig, {"enc_cross_attn_layers": (3,)}, r"model.enc_cross_attn_layers: found \[3\]"),
        (ModelConfig, {"dec_cross_attn_layers": (2, 2)}, "different layers from 1"),
        (ModelConfig, {"dec_ff_dropout": 1.0}, "model.dec_ff_dropout: found 1.0, expected >= 0.0 and < 1.0"),
        (TrainConfig, {"batch_size": 4, "accumulation": 3}, "train.accumulation: found 3.*batch_size = 4"),
        (TrainConfig, {"steps": 10, "warmup": 11}, "train.warmup: found 11, expected at most train.steps"),
        (TrainConfig, {"schedule": "linear"}, "train.schedule: found 'linear', expected one of cosine"),
    ],
)
def test_settings_that_cannot_work_name_the_key(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_every_setting_of_the_network_reaches_it() -> None:
    config = ModelConfig(
        enc_dim=24,
        enc_depth=3,
        enc_cross_attn_layers=(1, 3),
        dec_dim=20,
        dec_depth=5,
        dec_cross_attn_layers=(2, 5),
        heads=3,
        dim_head=6,
        enc_attn_dropout=0.1,
        enc_ff_dropout=0.2,
        dec_attn_dropout=0.3,
        dec_ff_dropout=0.4,
        gated_rmsnorm=True,
        use_deepnet=True,
        tie_embeddings=True,
        copy_tokens=2,
        cross_attn_sink=True,
    )
    plain = ModelConfig()
    names = [field.name for field in dataclasses.fields(config)]
    assert all(getattr(config, name) != getattr(plain, name) for name in names)
    model = build_model(config, {"vocab_size": 99, "chunk_size": 8, "pad_id": 5}, 64, retrieval=True)
    expected = RETROConfig(
        num_tokens=99, chunk_size=8, pad_id=5, max_seq_len=64, retrieval=True, **dataclasses.asdict(config)
    )
    assert model.config == expected
    baseline = build_model(config, {"vocab_size": 99, "chunk_size": 8, "pad_id": 5}, 64, retrieval=False)
    assert baseline.config == dataclasses.replace(expected, retrieval=False)


# ---- optimization ----------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_then_falls_to_its_floor() -> None:
    settings = {"peak": 2.0, "steps": 110, "warmup": 10, "floor": 0.1}
    rates = [learning_rate(step, schedule="cosine", **settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    assert np.all(np.diff(rates[10:]) < 0)
    constant = [learning_rate(step, schedule="constant", **settings) for step in range(111)]
    assert constant[:10] == rates[:10] and set(constant[10:]) == {2.0}


def test_decay_is_on_matrices_only_and_the_order_is_the_model_s() -> None:
    model = build_model(MODEL, {"vocab_size": 20, "chunk_size": 4, "pad_id": 0}, 8, retrieval=True)
    groups = make_optimizer(model, lr=1e-3, weight_decay=0.2).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    for group, wanted in zip(groups, (lambda p: p.ndim >= 2, lambda p: p.ndim < 2), strict=True):
        expected = [parameter for parameter in model.parameters() if wanted(parameter)]
        assert len(expected) == len(group["params"])
        assert all(a is b for a, b in zip(expected, group["params"], strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    params = [p for group in make_optimizer(model, 1e-3, 0.1).param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in params] == [(2, 3), (2,)]


def test_portions_add_up_to_the_batch(woven: Woven) -> None:
    settings = (dataclasses.replace(TRAIN, accumulation=portions, clip=0.0) for portions in (1, 4))
    whole, parts = (make_trainer(woven, each) for each in settings)
    for trainer in (whole, parts):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # portions draw other dropout masks than the whole
    for step in range(3):
        one, four = whole.data(step), parts.data(step)
        assert (len(one.portions), len(four.portions)) == (1, 4)
        assert torch.cat([batch.seq for batch in four.portions]).equal(one.portions[0].seq)
        assert len({batch.num_labels for batch in four.portions}) > 1, "so that portions must be weighed"
        assert one.num_labels == four.num_labels == one.portions[0].num_labels
        a, b = whole.step(one), parts.step(four)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_gradients_are_clipped(woven: Woven) -> None:
    trainer = make_trainer(woven, dataclasses.replace(TRAIN, clip=1e-3))
    norms = []
    original = trainer.optimizer.step

    def spy() -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        original()

    trainer.optimizer.step = spy  # type: ignore[method-assign,assignment]
    record = trainer.step(trainer.data(0))
    assert record["grad_norm"] > 1e-3 and norms == pytest.approx([1e-3], rel=1e-2)


# ---- what a step sees ------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_knowing_nothing(woven: Woven) -> None:
    trainer = make_trainer(woven)
    assert trainer.step(trainer.data(0))["loss"] == pytest.approx(math.log(VOCABULARY), abs=0.05)


def test_neighbors_are_dropped_for_whole_sequences_and_by_the_step_alone(woven: Woven) -> None:
    trainer = make_trainer(woven, dataclasses.replace(TRAIN, batch_size=10, accumulation=1))
    dropped = []
    for step in range(30):
        (batch,) = trainer.data(step).portions
        kept = trainer.training.batch(batch.rows).retrieved
        assert batch.retrieved is not None and kept is not None
        gone = (batch.retrieved == trainer.training.pad_id).all(dim=(1, 2, 3))
        assert batch.retrieved[~gone].equal(kept[~gone])
        dropped += gone.tolist()
        (again,) = trainer.data(step).portions
        assert again.retrieved is not None and again.retrieved.equal(batch.retrieved)
    assert 0.2 < np.mean(dropped) < 0.4


def test_steps_go_through_the_epoch_one_batch_after_the_other(woven: Woven) -> None:
    trainer = make_trainer(woven)
    rows = [batch.rows for step in range(3) for batch in trainer.data(step).portions]
    assert np.concatenate(rows).tolist() == trainer.training.training_rows(0, 0, 12).tolist()


# ---- what comes out --------------------------------------------------------------------------------


def test_the_model_folder_says_what_it_is_made_of(woven: Woven, tmp_path: Path) -> None:
    result = run(woven, tmp_path, work_folder=tmp_path / "work")
    folder = tmp_path / "retro"
    artifact = Artifact.open(folder, "model")
    train = Artifact.open(woven.chunks / "train", "chunks")
    best = min(result.history, key=lambda row: row["valid_loss"])
    artifact.require(
        retrieval=True,
        knn=2,
        chunk_size=CHUNK,
        seq_len=SEQ_LEN,
        number_type="float32",
        chunks=train.fingerprint,
        tokenizer=train.facts["tokenizer"],
        **best,
    )
    assert {row["step"] for row in result.history} == {5, 10, 12}
    assert result.metrics["best_step"] == best["step"]
    assert Artifact.open(folder / "tokenizer", "tokenizer").fingerprint == train.facts["tokenizer"]
    weights = RETRO.from_pretrained(folder).state_dict()
    assert weights.keys() == result.best_weights.keys()
    assert all(weights[name].equal(result.best_weights[name]) for name in weights)
    assert Artifact.open(tmp_path / "work" / "last", "model").facts["step"] == 12


def test_the_best_weights_are_those_of_the_least_validation_loss(
    woven: Woven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {4: 3.0, 8: 1.0, 12: 1.0}
    seen = {}

    def scripted(trainer: Trainer, neighbors: str, suffix: str) -> dict[str, float]:
        seen[trainer.state.step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return {f"valid_loss{suffix}": losses[trainer.state.step]}

    monkeypatch.setattr(Trainer, "_validation_loss", scripted)
    result = run(woven, tmp_path, dataclasses.replace(TRAIN, validate_every=4))
    assert result.metrics["best_step"] == 8
    saved = load_file(tmp_path / "retro" / "model.safetensors")
    assert all(saved[name].equal(weight) for name, weight in seen[8].items())
    assert any(not saved[name].equal(weight) for name, weight in seen[12].items())


def test_metrics_are_flat_numbers_that_no_param_is_named_like(
    undisturbed: Outcome,
) -> None:
    metrics = undisturbed[0].metrics
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.values())
    assert {"valid_loss", "valid_loss_off", "valid_loss_shuffled", "train_loss", "best_step"} < metrics.keys()
    assert metrics["real_token_share"] > 0.9 and metrics["tokens_seen"] > 0.9 * 12 * 4 * SEQ_LEN
    params = [field.name for config in (ModelConfig, TrainConfig) for field in dataclasses.fields(config)]
    assert not set(params) & metrics.keys()


def test_the_baseline_is_the_same_decoder_without_retrieval(woven: Woven, tmp_path: Path) -> None:
    result = run(woven, tmp_path, neighbors=None)
    assert not Artifact.open(tmp_path / "retro", "model").facts["retrieval"]
    assert {"valid_loss", "valid_bits_per_byte"} < result.metrics.keys()
    assert not {"valid_loss_off", "valid_loss_shuffled"} & result.metrics.keys()
    assert RETRO.from_pretrained(tmp_path / "retro").encoder is None


def test_baseline_and_retro_begin_with_the_same_decoder(woven: Woven, tmp_path: Path) -> None:
    """What differs between them after training is then retrieval, and not the luck of the first weights."""
    train = dataclasses.replace(TRAIN, steps=1, warmup=0, lr=1e-12)
    for name, neighbors in (("baseline", None), ("retro", woven.neighbors)):
        run(woven, tmp_path, train, neighbors=neighbors, out_folder=tmp_path / name)
    plain, retro = (RETRO.from_pretrained(tmp_path / name).state_dict() for name in ("baseline", "retro"))
    for name, weight in plain.items():
        torch.testing.assert_close(weight, retro[name], atol=1e-9, rtol=0)


def test_a_share_of_the_chunks_reads_random_neighbors(woven: Woven) -> None:
    """As many as the setting says, the same ones whenever the step is drawn, and the others keep their own."""
    settings = dataclasses.replace(TRAIN, batch_size=64, accumulation=1, neighbor_dropout=0.0)
    own = make_trainer(woven, settings)
    for share in (0.25, 1.0):
        trainer = make_trainer(woven, dataclasses.replace(settings, random_neighbors=share))
        (portion,), (expected,) = trainer.data(3).portions, own.data(3).portions
        assert portion.retrieved is not None and expected.retrieved is not None
        kept = (portion.retrieved == expected.retrieved).flatten(2).all(-1)  # (B, L)
        assert abs(1 - float(kept.float().mean()) - share) < 0.1
        (again,) = trainer.data(3).portions
        assert again.retrieved is not None and again.retrieved.equal(portion.retrieved)
        (other,) = trainer.data(4).portions
        assert other.retrieved is not None and not other.retrieved.equal(portion.retrieved)
    assert dataclasses.replace(settings, random_neighbors=1.0).of_baseline().random_neighbors == 0.0


def test_validation_averages_over_labels(woven: Woven) -> None:
    trainer = make_trainer(woven, dataclasses.replace(TRAIN, validate_sequences=0))
    row = trainer.validate()
    batch = trainer.validation.batch(trainer.validation.ordered_rows())
    with torch.no_grad():
        loss = trainer.model(
            batch.seq, batch.retrieved, return_loss=True, labels=batch.labels, documents=batch.documents
        )
    assert row["valid_loss"] == pytest.approx(float(loss), rel=1e-5)
    bits = float(loss) * batch.num_labels / math.log(2) / int(batch.bytes.sum())
    assert row["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_equal_inputs_give_equal_bytes_whatever_the_intervals(
    woven: Woven, tmp_path: Path, undisturbed: Outcome
) -> None:
    state = torch.random.get_rng_state()
    result = run(woven, tmp_path, work_folder=tmp_path / "work", log_every=1, checkpoint_every=2)
    assert torch.random.get_rng_state().equal(state), "the caller's random numbers are its own"
    assert folder_digests(tmp_path / "retro") == undisturbed[1]
    assert (result.metrics, result.history) == (undisturbed[0].metrics, undisturbed[0].history)


def test_another_seed_gives_another_model(woven: Woven, tmp_path: Path, undisturbed: Outcome) -> None:
    run(woven, tmp_path, seed=1)
    assert folder_digests(tmp_path / "retro") != undisturbed[1]


def test_records_hold_what_a_person_watches(woven: Woven, tmp_path: Path) -> None:
    records: dict[int, Mapping[str, float]] = {}
    run(woven, tmp_path, log=records.__setitem__, log_every=4)
    assert list(records) == [4, 5, 8, 10, 12]
    always = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_share"}
    assert all(always <= record.keys() for record in records.values())
    validated = [step for step, record in records.items() if "valid_loss" in record]
    assert validated == [5, 10, 12]
    assert {"valid_loss_off", "valid_loss_shuffled", "train_loss"} <= records[12].keys()


# ---- stopping and going on -------------------------------------------------------------------------


def stop_at(step: int) -> Callable[[int, Mapping[str, float]], None]:
    def log(now: int, record: Mapping[str, float]) -> None:
        if now == step:
            raise Killed

    return log


# Before the first checkpoint, at one, after one, and on both sides of a validation; the others are like one of them.
TOLD_APART = (1, 3, 4, 6, 12)
REPEATED = (pytest.mark.slow, pytest.mark.torture)


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step in TOLD_APART else REPEATED) for step in range(1, 13)]
)
def test_a_killed_run_goes_on_bit_for_bit(woven: Woven, tmp_path: Path, undisturbed: Outcome, step: int) -> None:
    work = tmp_path / "work"
    with pytest.raises(Killed):
        run(woven, tmp_path, work_folder=work, log=stop_at(step), log_every=1, checkpoint_every=3)
    steps: list[int] = []
    result = run(
        woven,
        tmp_path,
        work_folder=work,
        log=lambda now, record: steps.append(now),
        log_every=1,
        checkpoint_every=3,
    )
    assert steps == list(range((step - 1) // 3 * 3 + 1, 13)), "from the last checkpoint on"
    assert folder_digests(tmp_path / "retro") == undisturbed[1]
    assert (result.metrics, result.history) == (undisturbed[0].metrics, undisturbed[0].history)


def test_the_curve_grows_at_every_validation_and_a_killed_run_ends_with_the_same_one(
    woven: Woven, tmp_path: Path
) -> None:
    """Validations are after steps 5, 10 and 12, checkpoints after every fourth step: a row goes and comes again."""
    curve, whole, seen = tmp_path / "curve.csv", tmp_path / "whole.csv", dict[int, list[str]]()

    def look(step: int, record: Mapping[str, float]) -> None:
        seen[step] = [line.split(",")[0] for line in curve.read_text().splitlines()[1:]] if curve.exists() else []

    def look_and_stop(step: int, record: Mapping[str, float]) -> None:
        look(step, record)
        stop_at(11)(step, record)

    run(woven, tmp_path, work_folder=tmp_path / "undisturbed", history_file=whole)
    curve.write_text("of another run")
    options: dict[str, Any] = {"work_folder": tmp_path / "work", "history_file": curve, "log_every": 1}
    with pytest.raises(Killed):
        run(woven, tmp_path, log=look_and_stop, checkpoint_every=4, **options)
    assert [seen[step] for step in (1, 4, 5, 9, 10)] == [[], [], ["5"], ["5"], ["5", "10"]]
    seen.clear()
    run(woven, tmp_path, log=look, checkpoint_every=4, **options)
    assert seen == {9: ["5"], 10: ["5", "10"], 11: ["5", "10"], 12: ["5", "10", "12"]}
    assert curve.read_bytes() == whole.read_bytes()
    curve.unlink()
    run(woven, tmp_path, checkpoint_every=4, **options)  # killed after its last step, before DVC took its outputs
    assert curve.read_bytes() == whole.read_bytes()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also below a shell that ignores it in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", [4, 6])
def test_an_interrupt_is_obeyed_after_the_step_is_saved(
    woven: Woven, tmp_path: Path, undisturbed: Outcome, step: int
) -> None:
    def interrupt(now: int, record: Mapping[str, float]) -> None:
        if now == step:
            signal.raise_signal(signal.SIGINT)

    work = tmp_path / "work"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(woven, tmp_path, work_folder=work, log=interrupt, log_every=1)
    assert signal.getsignal(signal.SIGINT) is handler
    steps: list[int] = []
    run(woven, tmp_path, work_folder=work, log=lambda now, record: steps.append(now), log_every=1)
    assert steps == list(range(step + 1, 13))
    assert folder_digests(tmp_path / "retro") == undisturbed[1]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_the_last_step_is_saved_is_obeyed(
    woven: Woven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `dvc repro` would go on with the next stage, as if nobody had asked it to stop."""
    save = Trainer.save

    def interrupted(trainer: Trainer) -> Path | None:
        if trainer.state.step == TRAIN.steps:
            signal.raise_signal(signal.SIGINT)
        return save(trainer)

    monkeypatch.setattr(Trainer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(woven, tmp_path, work_folder=tmp_path / "work")
    assert (tmp_path / f"work/checkpoints/checkpoint-{TRAIN.steps:08}").is_dir()


def test_processes_that_find_different_checkpoints_refuse_to_go_on(woven: Woven, tmp_path: Path) -> None:
    """As on machines that each have a folder of their own."""

    class OfTwo(World):
        def largest(self, number: int) -> int:
            return max(number, 6)

    trainer = make_trainer(woven, checkpoints=Checkpoints(tmp_path, "fingerprint"))
    trainer.step(trainer.data(0))
    trainer.save()
    other = OfTwo(**{field.name: getattr(ALONE, field.name) for field in dataclasses.fields(ALONE)})
    with pytest.raises(TrainingError, match=f"{tmp_path}: .* different checkpoints, this one step 1"):
        make_trainer(woven, checkpoints=Checkpoints(tmp_path, "fingerprint"), world=other)


def test_a_finished_run_is_not_trained_again(woven: Woven, tmp_path: Path, undisturbed: Outcome) -> None:
    run(woven, tmp_path, work_folder=tmp_path / "work")
    steps: list[int] = []
    run(
        woven,
        tmp_path / "again",
        work_folder=tmp_path / "work",
        log=lambda now, record: steps.append(now),
        log_every=1,
    )
    assert steps == [] and folder_digests(tmp_path / "again" / "retro") == undisturbed[1]


CHILD = f"""
import os, signal, sys
sys.path[:0] = {[str(SUPPORT), str(ROOT)]!r}
from pathlib import Path
from small_training import MODEL, TRAIN
from retro_model.training.run import TrainingRun, train_model
"""


@pytest.mark.slow
def test_kill_9_while_training_or_saving(woven: Woven, tmp_path: Path, undisturbed: Outcome) -> None:
    """Two processes in a row are killed, the second in the middle of a checkpoint."""
    program = f"""{CHILD}
import retro_model.training.checkpoints
when, work = sys.argv[1], Path(sys.argv[2])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def log(step, record):
    if when == f"step {{step}}":
        die()
if when == "saving":
    retro_model.training.checkpoints.write_json = die
folders = [Path(folder) for folder in {[str(woven.chunks), str(woven.neighbors), str(woven.tokenizer)]!r}]
run = TrainingRun(*folders, MODEL, TRAIN, knn=2, seq_len={SEQ_LEN}, seed=0, out_folder=work.parent / "retro",
                  work_folder=work, log_every=1, checkpoint_every=3)
train_model(run, log, threads=1)
"""
    work = tmp_path / "work"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for when in ("step 5", "saving"):
        command = [sys.executable, "-c", program, when, str(work)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not (tmp_path / "retro").exists()
    steps: list[int] = []
    run(woven, tmp_path, work_folder=work, log=lambda now, record: steps.append(now), log_every=1)
    assert steps[0] == 4
    assert folder_digests(tmp_path / "retro") == undisturbed[1]


def test_a_disk_that_is_full_at_any_write_costs_what_came_after_the_last_checkpoint(
    woven: Woven, tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run after another, of which the n-th finds the disk full in the middle of its n-th write."""
    work, left = tmp_path / "work", 0

    def until_full(write: Callable[..., Any], path_argument: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                arguments[path_argument].write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device", str(arguments[path_argument]))
            return write(*arguments, **options)

        return wrapped

    monkeypatch.setattr(
        retro_model.training.checkpoints, "write_tensors", until_full(retro_model.training.checkpoints.write_tensors, 1)
    )
    monkeypatch.setattr(
        retro_model.network.pretrained, "write_tensors", until_full(retro_model.network.pretrained.write_tensors, 1)
    )
    monkeypatch.setattr(
        retro_model.training.checkpoints, "write_json", until_full(retro_model.training.checkpoints.write_json, 0)
    )
    full = 0
    for attempt in range(1, 30):
        left = attempt
        try:
            result = run(woven, tmp_path, work_folder=work, checkpoint_every=2)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            full += 1
        assert not list(tmp_path.rglob("checkpoint-*.partial")) and not list(tmp_path.glob("retro*"))
    assert full >= 6
    assert folder_digests(tmp_path / "retro") == undisturbed[1]
    assert (result.metrics, result.history) == (undisturbed[0].metrics, undisturbed[0].history)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_real_limit_of_the_disk_is_an_os_error_and_the_next_run_goes_on(
    woven: Woven, tmp_path: Path, undisturbed: Outcome, limit: int
) -> None:
    """The kernel refuses what goes beyond a file size: the small JSON, or the first of the weights.

    To whatever writes in that process, so that `make coverage` must not measure it.
    """
    program = f"""{CHILD}
import resource
folders = [Path(folder) for folder in {[str(woven.chunks), str(woven.neighbors), str(woven.tokenizer)]!r}]
work = Path(sys.argv[1])
def log(step, record):
    if step == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    run = TrainingRun(*folders, MODEL, TRAIN, knn=2, seq_len={SEQ_LEN}, seed=0, out_folder=work.parent / "retro",
                      work_folder=work, log_every=1, checkpoint_every=3)
    train_model(run, log, threads=1)
except OSError as error:
    sys.exit(f"errno {{error.errno}}")
"""
    command = [sys.executable, "-c", program, str(tmp_path / "work")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["OMP_NUM_THREADS"] = "1"
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == f"errno {errno.EFBIG}", ended.stderr
    steps: list[int] = []
    run(woven, tmp_path, work_folder=tmp_path / "work", log=lambda now, record: steps.append(now), log_every=1)
    assert steps[0] == 7 and folder_digests(tmp_path / "retro") == undisturbed[1]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"knn": 1},
        {"train": dataclasses.replace(TRAIN, lr=2e-2)},
        {"model": dataclasses.replace(MODEL, dec_ff_dropout=0.2)},
    ],
)
def test_other_settings_never_pick_up_a_checkpoint(woven: Woven, tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        run(woven, tmp_path, work_folder=tmp_path / "work", log=stop_at(7), log_every=1, checkpoint_every=3)
    steps: list[int] = []
    options = {"log": lambda now, record: steps.append(now), "log_every": 1, **other}
    run(woven, tmp_path, work_folder=tmp_path / "work", **options)
    assert steps == list(range(1, 13))
    run(woven, tmp_path / "fresh", **other)
    assert folder_digests(tmp_path / "retro") == folder_digests(tmp_path / "fresh" / "retro")


def test_a_checkpoint_has_no_pickle_and_only_the_newest_stays(woven: Woven, tmp_path: Path) -> None:
    result = run(woven, tmp_path, work_folder=tmp_path / "work", checkpoint_every=2)
    assert folder_digests(tmp_path / "work" / "checkpoints").keys() == {
        "checkpoint-00000012/state.json",
        "checkpoint-00000012/weights.safetensors",
        "checkpoint-00000012/optimizer.safetensors",
        f"best-{int(result.metrics['best_step']):08d}.safetensors",
    }


@pytest.mark.parametrize("torn", ["optimizer.safetensors", "state.json"])
def test_a_torn_checkpoint_is_refused(woven: Woven, tmp_path: Path, torn: str) -> None:
    with pytest.raises(Killed):
        run(woven, tmp_path, work_folder=tmp_path / "work", log=stop_at(7), log_every=1, checkpoint_every=3)
    (file,) = (tmp_path / "work").rglob(torn)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedArtifactError, match=rf"{torn} does not have the bytes.*delete"):
        run(woven, tmp_path, work_folder=tmp_path / "work")


# ---- laid out differently in memory and time -------------------------------------------------------


def test_activations_that_are_computed_again_change_nothing(
    woven: Woven, tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose masks are drawn again."""
    again = []
    feed_forward = retro_model.network.model.FeedForward.forward

    def spy(module: retro_model.network.model.FeedForward, x_TD: torch.Tensor) -> torch.Tensor:
        if module.training:
            again.append(torch.is_grad_enabled())
        return feed_forward(module, x_TD)

    monkeypatch.setattr(retro_model.network.model.FeedForward, "forward", spy)
    trainer = make_trainer(woven)
    trainer.step(trainer.data(0))
    calls = len(again)
    trainer = make_trainer(woven, dataclasses.replace(TRAIN, checkpoint_activations=True))
    trainer.step(trainer.data(0))
    assert len(again) == 3 * calls, "once forward, and once more going backward"
    monkeypatch.undo()
    result = run(woven, tmp_path, dataclasses.replace(TRAIN, checkpoint_activations=True))
    for row, expected in zip(result.history, undisturbed[0].history, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, about other parts of torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("checkpoint_activations", [pytest.param(False, marks=pytest.mark.torture), True])
def test_a_compiled_model_has_the_same_losses(
    woven: Woven, monkeypatch: pytest.MonkeyPatch, checkpoint_activations: bool
) -> None:
    """Traced and differentiated by the compiler; C++, which takes minutes, is made in test_model.py (torture)."""
    torch.compiler.reset()
    compiled_models = []

    def trace(model: RETRO) -> None:
        compiled_models.append(model)
        torch.nn.Module.compile(model, backend="aot_eager")

    monkeypatch.setattr(RETRO, "compile", trace)
    settings = dataclasses.replace(TRAIN, neighbor_dropout=0.0, checkpoint_activations=checkpoint_activations)
    eager, compiled = make_trainer(woven, settings), make_trainer(woven, dataclasses.replace(settings, compile=True))
    assert compiled_models == [compiled.model]
    for trainer in (eager, compiled):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled, it draws other masks
    a, b = eager.step(eager.data(0)), compiled.step(compiled.data(0))
    assert b == pytest.approx(a, rel=1e-4)
    weights, others = eager.model.state_dict(), compiled.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], atol=1e-3) for name in weights)


# ---- starting from a trained model -----------------------------------------------------------------


@pytest.fixture(scope="session")
def baseline(woven: Woven, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain decoder, trained."""
    folder = tmp_path_factory.mktemp("baseline")
    run(woven, folder, neighbors=None)
    return folder / "retro"


def test_a_frozen_decoder_stays_and_retrieval_is_learned_around_it(
    woven: Woven, tmp_path: Path, baseline: Path
) -> None:
    records: dict[int, Mapping[str, float]] = {}
    retrofit = RetrofitConfig(init_from=str(baseline), steps=7, lr=2e-2)
    result = run(woven, tmp_path, retrofit=retrofit, log=records.__setitem__, log_every=1)
    assert len(records) == 7, "it has its own number of steps"
    assert records[3]["learning_rate"] == 2e-2, "and its own learning rate, after the warm-up of the others"
    base, found = RETRO.from_pretrained(baseline), RETRO.from_pretrained(tmp_path / "retro")
    for name, weight in base.state_dict().items():
        assert found.state_dict()[name].equal(weight), name
    assert result.history[-1]["valid_loss_off"] == pytest.approx(Artifact.open(baseline, "model").facts["valid_loss"])
    seq = torch.randint(3, VOCABULARY, (2, SEQ_LEN))
    assert found(seq).equal(base(seq)), "without neighbors it is the model that it started from"
    fresh = make_trainer(woven).model.state_dict()
    new = [name for name in fresh if name not in base.state_dict()]
    assert new and all(name.startswith("encoder.") or ".cross_attention." in name for name in new)
    assert any(not found.state_dict()[name].equal(fresh[name]) for name in new)
    assert Artifact.open(tmp_path / "retro", "model").facts["init_from"] == Artifact.open(baseline, "model").fingerprint


def test_a_frozen_decoder_s_batch_without_neighbors_changes_nothing(woven: Woven, baseline: Path) -> None:
    trainer = make_trainer(woven)
    start_from(trainer.model, Artifact.open(baseline, "model"), "decoder")
    trainer.frozen = True
    assert all(bool((p.retrieved != trainer.training.pad_id).any((1, 2, 3)).all()) for p in trainer.data(1).portions)
    trainer.training.neighbor_ids = lambda rows, shuffled=False: np.full((*rows.shape, 2), -1)  # type: ignore[method-assign]
    trainer.optimizer = make_optimizer(trainer.model, 1e-2, 0.0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.step(trainer.data(0))["grad_norm"] == 0
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())


def test_without_freezing_all_of_it_is_trained(woven: Woven, tmp_path: Path, baseline: Path) -> None:
    records: dict[int, Mapping[str, float]] = {}
    retrofit = RetrofitConfig(init_from=str(baseline), freeze="nothing", steps=3, lr=1e-6)
    train = dataclasses.replace(TRAIN, neighbor_dropout=1.0)
    run(woven, tmp_path, train, retrofit=retrofit, log=records.__setitem__, log_every=1)
    assert records[1]["loss"] < math.log(VOCABULARY) - 0.1, "it begins where the baseline ended"
    found = RETRO.from_pretrained(tmp_path / "retro").state_dict()
    assert any(not found[name].equal(weight) for name, weight in RETRO.from_pretrained(baseline).state_dict().items())


def test_a_model_with_retrieval_can_be_trained_further(woven: Woven, tmp_path: Path) -> None:
    run(woven, tmp_path / "first")
    run(woven, tmp_path / "second", retrofit=RetrofitConfig(init_from=str(tmp_path / "first" / "retro"), steps=7))
    before, after = (RETRO.from_pretrained(tmp_path / name / "retro").state_dict() for name in ("first", "second"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all(name.startswith("encoder.") or ".cross_attention." in name for name in changed)
    first, second = (Artifact.open(tmp_path / name / "retro", "model").facts for name in ("first", "second"))
    assert "init_from_chunks" not in first and second["init_from_chunks"] == [first["chunks"]]


def test_a_run_from_another_model_never_picks_up_a_checkpoint(woven: Woven, tmp_path: Path, baseline: Path) -> None:
    retrofit = RetrofitConfig(init_from=str(baseline), freeze="nothing", steps=12)
    options: dict[str, Any] = {"work_folder": tmp_path / "work", "log_every": 1, "checkpoint_every": 3}
    with pytest.raises(Killed):
        run(woven, tmp_path, retrofit=retrofit, log=stop_at(7), **options)
    moved = dataclasses.replace(retrofit, init_from=str(shutil.copytree(baseline, tmp_path / "moved")))
    frozen = dataclasses.replace(moved, freeze="decoder")
    for settings, first in ((moved, 7), (frozen, 1), (RetrofitConfig(), 1)):
        steps: list[int] = []
        run(woven, tmp_path, retrofit=settings, log=lambda now, record, steps=steps: steps.append(now), **options)
        assert steps[0] == first


def test_an_empty_folder_and_no_name_are_new_weights(woven: Woven, tmp_path: Path, undisturbed: Outcome) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / ".gitkeep").touch()
    run(woven, tmp_path, retrofit=RetrofitConfig(init_from=str(tmp_path / "none"), freeze="decoder", steps=3))
    assert folder_digests(tmp_path / "retro") == undisturbed[1]


def test_a_model_that_does_not_fit_names_the_key(woven: Woven, tmp_path: Path, baseline: Path) -> None:
    retrofit = RetrofitConfig(init_from=str(baseline), steps=3)
    with pytest.raises(MismatchError, match=r"made with dec_dim 16, expected 24; set model.dec_dim to 16"):
        run(woven, tmp_path, retrofit=retrofit, model=dataclasses.replace(MODEL, dec_dim=24))
    with pytest.raises(MismatchError, match="made for tokenizer"):
        other = write_woven(tmp_path / "other", chunk_size=CHUNK, vocab_size=VOCABULARY + 1, num_documents=20)
        run(other, tmp_path, retrofit=retrofit)
    with pytest.raises(MissingArtifactError, match="no finished model here"):
        run(woven, tmp_path, retrofit=RetrofitConfig(init_from=str(woven.chunks)))
    with pytest.raises(ConfigError, match=r"retrofit.init_from: found '.*nowhere', expected a path that is there"):
        run(woven, tmp_path, retrofit=RetrofitConfig(init_from=str(tmp_path / "nowhere")))
    run(woven, tmp_path / "retro-model")
    retrofit = RetrofitConfig(init_from=str(tmp_path / "retro-model" / "retro"))
    with pytest.raises(MismatchError, match="a model with retrieval, expected a plain decoder"):
        run(woven, tmp_path, retrofit=retrofit, neighbors=None)


# ---- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_numbers_that_are_not_finite_name_the_step_and_the_chunks(woven: Woven, tmp_path: Path, spoiled: str) -> None:
    checkpoints = Checkpoints(tmp_path, "fingerprint")
    trainer = make_trainer(woven, checkpoints=checkpoints)
    trainer.step(trainer.data(0))
    saved = trainer.save()
    weight = trainer.model.embedding.weight
    if spoiled == "loss":
        weight.data.fill_(torch.nan)
    else:
        weight.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    data = trainer.data(1)
    with pytest.raises(TrainingError) as caught:
        trainer.step(data)
    message = str(caught.value)
    assert message.startswith("step 2: loss ") and f"last good checkpoint: {saved}" in message
    for rows in data.rows:
        assert f"{rows[0]}-{rows[-1]}" in message
    after = trainer.model.state_dict()
    assert all(tensor.equal(after[name]) or tensor.isnan().all() for name, tensor in before.items())


def test_a_validation_loss_that_is_not_finite_stops(woven: Woven, tmp_path: Path) -> None:
    trainer = make_trainer(woven, checkpoints=Checkpoints(tmp_path, "fingerprint"))
    trainer.step(trainer.data(0))
    trainer.model.embedding.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="validation after step 1: loss nan, expected a finite number; last good"):
        trainer.validate()
    assert trainer.state.best is None


def test_another_tokenizer_is_refused(woven: Woven, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", VOCABULARY + 1)
    other = dataclasses.replace(woven, tokenizer=tmp_path / "tokenizer")
    with pytest.raises(MismatchError, match="made for tokenizer"):
        run(other, tmp_path)
    assert not (tmp_path / "retro").exists()


def test_more_neighbors_than_stored_are_refused_before_any_work(woven: Woven, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knn: found 9, expected 1 to 3"):
        run(woven, tmp_path, knn=9, work_folder=tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "retro").exists()
