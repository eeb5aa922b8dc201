"""Records runs for `mlflow ui`: one MLflow run for each trained model, with its evaluations as child runs.

DVC decides what runs; this module only records it. It changes no output, and outputs contain no MLflow id: evaluate
finds a model's run by the model's fingerprint. The store is `mlflow.db` at the repository's root, which `mlflow ui`
opens without arguments; runs in temporary checkouts use it too.
"""

import fcntl
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retro_model.core.errors import RetroError
from retro_model.core.printable import one_line
from stages.common.harness import full_disk_message, project_root

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "retro"
MODEL_TAG = "retro.model"
WORK_TAG = "retro.work"
STAGE_TAG = "retro.stage"
MAX_PARAM_LENGTH = 6000  # MLflow's own limit
NOT_IN_TAGS = re.compile(r"[^/\w.\- :]")


class TrackedRun:
    """An open MLflow run."""

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str, last_step: int = -1) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id
        self._last_step = last_step

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics at a step; skips steps that an interrupted run has logged already."""
        if step > self._last_step:
            self.log_metrics(values, step)

    def log_metrics(self, values: Mapping[str, object], step: int = 0) -> None:
        """Logs the numbers among `values`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.client.log_batch(
            self.run_id, metrics=[Metric(name, float(value), now, step) for name, value in numbers.items()]
        )

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs the params that the run does not have yet; a continued run has them already."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        new = [
            Param(name, one_line(str(value))[:MAX_PARAM_LENGTH]) for name, value in params.items() if name not in known
        ]
        self.client.log_batch(self.run_id, params=new)

    def log_folder(self, folder: Path, name: str) -> None:
        """Copies a folder's files to the run's artifact folder `name`."""
        self.client.log_artifacts(self.run_id, str(folder), name)

    def log_file(self, file: Path, name: str) -> None:
        """Copies a file to the run's artifact folder `name`."""
        self.client.log_artifact(self.run_id, str(file), name)

    def log_model(self, folder: Path, fingerprint: str, metrics: Mapping[str, object]) -> None:
        """Registers a model folder (safetensors and JSON, no pickle) as this run's logged model."""
        import mlflow

        _connect()
        model = mlflow.initialize_logged_model(
            name=folder.name, source_run_id=self.run_id, model_type="retro", experiment_id=self.experiment_id
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.client.log_metric(self.run_id, name, float(value), model_id=model.model_id)
        self.client.set_tag(self.run_id, MODEL_TAG, fingerprint)


@contextmanager
def training_run(
    stage: str, work_key: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """Opens a run for training a model, or continues the interrupted run with the same `work_key`.

    Ends it as FINISHED, KILLED (by an interrupt) or FAILED.
    """
    with _explain_store_errors():
        yield from _training_run(stage, work_key, params, inputs)


def _training_run(
    stage: str, work_key: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[TrackedRun]:
    client, experiment_id = _connect()
    interrupted = client.search_runs(
        [experiment_id], f"tags.`{WORK_TAG}` = '{work_key}' and attributes.status != 'FINISHED'", max_results=1
    )
    if interrupted:
        run_id = interrupted[0].info.run_id
        history = client.get_metric_history(run_id, "loss")
        client.update_run(run_id, status="RUNNING")
        run = TrackedRun(client, run_id, experiment_id, max((metric.step for metric in history), default=-1))
    else:
        tags = {WORK_TAG: work_key, STAGE_TAG: stage, **_origin_tags(), **_input_tags(inputs)}
        run = _create(client, experiment_id, stage, tags)
    run.log_params(params)
    with _set_final_status(run):
        yield run


@contextmanager
def evaluation_run(
    model_fingerprint: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[tuple[TrackedRun, TrackedRun]]:
    """Opens (the evaluated model's run, a child run for this evaluation).

    A model restored from DVC's cache or a remote has no run here yet; one is created for it.
    """
    with _explain_store_errors():
        yield from _evaluation_run(model_fingerprint, params, inputs)


def _evaluation_run(
    model_fingerprint: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[tuple[TrackedRun, TrackedRun]]:
    client, experiment_id = _connect()
    found = client.search_runs(
        [experiment_id],
        f"tags.`{MODEL_TAG}` = '{model_fingerprint}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if found:
        parent = TrackedRun(client, found[0].info.run_id, experiment_id)
    else:
        tags = {STAGE_TAG: "restored", MODEL_TAG: model_fingerprint, **_origin_tags()}
        parent = _create(client, experiment_id, "restored", tags)
        parent.log_params(params)
        client.set_terminated(parent.run_id, "FINISHED")
    tags = {"mlflow.parentRunId": parent.run_id, STAGE_TAG: "evaluate", **_origin_tags(), **_input_tags(inputs)}
    child = _create(client, experiment_id, "evaluate", tags)
    child.log_params(params)
    with _set_final_status(child):
        yield parent, child


@contextmanager
def _explain_store_errors() -> Iterator[None]:
    """Turns an error of MLflow's store into a RetroError that says how to go on; no output needs the store."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError) as error:
        if full_disk_message(error) is not None:
            raise
        store = project_root() / "mlflow.db"
        raise RetroError(
            f"{store}: MLflow cannot use its record of the runs ({str(error).splitlines()[0]}); "
            f"move {store} away and run `dvc repro` again: nothing else needs it"
        ) from error


def _connect() -> tuple["MlflowClient", str]:
    """The client and the experiment's id. One process creates the store on first use."""
    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # silences a line for each table of the store
    # MLflow raises write errors too, and those are reported in one line. Do not also log a traceback.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    root = project_root()
    uri = f"sqlite:///{root / 'mlflow.db'}"
    (root / ".retro").mkdir(parents=True, exist_ok=True)
    with (root / ".retro" / "mlflow.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the first use migrates the database; two processes at once break it
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return client, str(experiment.experiment_id)
        # By default MLflow would store the working directory of the first process.
        location = (root / "mlartifacts").as_uri()
        return client, str(client.create_experiment(EXPERIMENT, artifact_location=location))


def _create(client: "MlflowClient", experiment_id: str, name: str, tags: Mapping[str, str]) -> TrackedRun:
    experiment_name = os.environ.get("DVC_EXP_NAME")
    run_name = f"{name} {one_line(experiment_name)}" if experiment_name else name
    run = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
    return TrackedRun(client, run.info.run_id, experiment_id)


@contextmanager
def _set_final_status(run: TrackedRun) -> Iterator[None]:
    try:
        yield
    except Exception:
        run.client.set_terminated(run.run_id, "FAILED")
        raise
    except BaseException:
        run.client.set_terminated(run.run_id, "KILLED")
        raise
    run.client.set_terminated(run.run_id, "FINISHED")


def _origin_tags() -> dict[str, str]:
    """Tags that name the code's commit and the DVC experiment."""
    tags = {"mlflow.source.name": "dvc repro"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        # Without optional locks git writes nothing, so it does not fail on a full disk.
        changed = subprocess.run(
            ["git", "--no-optional-locks", "status", "--porcelain"], capture_output=True, text=True, check=False
        )
        tags["git.commit"] = tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = "unknown" if changed.returncode else str(bool(changed.stdout.strip())).lower()
    if "DVC_EXP_NAME" in os.environ:
        tags["dvc.experiment"] = one_line(os.environ["DVC_EXP_NAME"])
    return tags


def _input_tags(inputs: Mapping[str, str]) -> dict[str, str]:
    """Tags that name each input's fingerprint; characters that MLflow takes in no tag's name become underscores."""
    return {f"input.{NOT_IN_TAGS.sub('_', name)}": digest for name, digest in inputs.items()}
