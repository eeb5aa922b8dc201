"""Train a model, record it in MLflow and write metrics and curves: shared by the stages baseline and train."""

from pathlib import Path
from types import SimpleNamespace

from retro_model.core.artifacts import Artifact, write_json
from retro_model.core.devices import resolve_device
from retro_model.training.config import RetrofitConfig
from retro_model.training.distributed import is_main_process
from retro_model.training.run import TrainingRun, train_model
from stages.common.harness import record_timing, recorded_timings, work_folder, work_path
from stages.common.params import flat_params
from stages.tracking.runs import Recording, training_run


def learn(stage: str, params: SimpleNamespace, neighbors: Path | None, knn: int, out: Path) -> None:
    """Trains a stage's model and writes it to `out`; also writes its metrics, its curves and its MLflow run.

    `train_model` starts further processes if needed. Under torchrun, processes other than the first only train.
    """
    chunks, tokenizer = Path("data/chunks"), Path("data/tokenizer")
    inputs = {tokenizer: "tokenizer", chunks / "train": "chunks", chunks / "valid": "chunks"}
    if neighbors is not None:
        inputs |= {neighbors / "train": "neighbors", neighbors / "valid": "neighbors"}
        start = params.retrofit.model()
        inputs |= {start.folder: "model"} if start else {}
    decisive = SimpleNamespace(**{**vars(params), "train": params.train.identity()})  # without the number of processes
    run = TrainingRun(
        chunks,
        neighbors,
        tokenizer,
        params.model,
        params.train,
        params.retrofit if neighbors is not None else RetrofitConfig(base=params.retrofit.base),
        knn=knn,
        seq_len=params.seq_len,
        seed=params.seed,
        out_folder=out,
        work_folder=work_path(stage, decisive),
        history_file=Path(f"plots/{stage}.csv"),  # grows while the stage runs, for `dvc plots show`
        device=resolve_device(params.runtime.device).type,
    )
    if not is_main_process():
        train_model(run)
        return
    with work_folder(stage, decisive) as work:
        digests = {
            path.as_posix(): Artifact.open(path, kind, verify=False).fingerprint for path, kind in inputs.items()
        }
        with training_run(stage, work.name, flat_params(), digests, Recording.of(params.runtime)) as tracked_run:
            result = train_model(run, tracked_run.log_step)
            write_json(Path(f"metrics/{stage}.json"), result.metrics)
            tracked_run.log_metrics(result.metrics, step=int(result.history[-1]["step"]))
            if neighbors is not None:
                tracked_run.log_metrics(_retrieval_timings(neighbors / "train"))
            tracked_run.log_folder(out, "best")
            tracked_run.log_folder(work / "last", "last")
            fingerprint = Artifact.open(out, "model", verify=False).fingerprint
            tracked_run.log_model(out, fingerprint, result.metrics, registered=neighbors is not None)
    record_timing(f"{stage}.training", **result.timings)


def _retrieval_timings(neighbors: Path) -> dict[str, float]:
    """The recorded timings of making these neighbors, their vectors and their index, if that was on this machine."""
    found = Artifact.open(neighbors, "neighbors", verify=False)
    made = found.facts["embeddings"], found.facts["index"], found.fingerprint
    return {name: value for fingerprint in made for name, value in recorded_timings(fingerprint).items()}
