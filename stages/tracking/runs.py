"""Records runs for `mlflow ui`: one MLflow run for each trained model, with its evaluations as child runs.

DVC decides what runs; this module only records it. It changes no output, and outputs contain no MLflow id: evaluate
finds a model's run by the model's fingerprint. `store.py` says where the runs are, `outbox.py` what happens while
MLflow cannot be reached.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retro_model.core.errors import RetroError
from retro_model.core.printable import one_line
from stages.tracking.outbox import Outbox
from stages.tracking.store import is_unreachable, open_experiment, open_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

MODEL_TAG = "retro.model"
WORK_TAG = "retro.work"
STAGE_TAG = "retro.stage"
MAX_PARAM_LENGTH, MAX_DIGEST_LENGTH = 6000, 36  # MLflow's own limits
NOT_IN_TAGS = re.compile(r"[^/\w.\- :]")


@dataclass(frozen=True)
class Recording:
    """How runs are recorded, as the section `runtime` of params.yaml says."""

    tracking: str = "required"
    registered_model: str = ""  # a model that is trained with retrieval becomes a version of it; empty: none
    system_metrics: bool = False

    @classmethod
    def of(cls, runtime: Any) -> "Recording":
        """The part of the section that is about recording."""
        return cls(runtime.tracking, runtime.registered_model, runtime.system_metrics)


class TrackedRun:
    """An MLflow run. If it is deleted in MLflow's pages, recording goes on in a new run.

    Everything goes through the outbox, so it may be written later than it is logged, or never.
    """

    client: "MlflowClient"
    run_id: str
    experiment_id: str

    def __init__(self, outbox: Outbox, recording: Recording, find: "Callable[[], FoundRun]") -> None:
        self._outbox, self._recording, self._find = outbox, recording, find
        self._monitor: SystemMetricsMonitor | None = None
        self._model_id = ""
        outbox.send("the run", self._open)

    def _open(self) -> None:
        self.client, run, self._last_step = self._find()
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._name, self._tags, self._params = run.info.run_name, dict(run.data.tags), dict(run.data.params)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics at a step; skips steps that an interrupted run has logged already."""
        self._log_metrics(values, step, lambda: step > self._last_step)

    def log_metrics(self, values: Mapping[str, object], step: int = 0) -> None:
        """Logs the numbers among `values`."""
        self._log_metrics(values, step, lambda: True)

    def _log_metrics(self, values: Mapping[str, object], step: int, is_new: Callable[[], bool]) -> None:
        now = _now()

        def write() -> None:
            if is_new():
                self._write(lambda run_id: self.client.log_batch(run_id, metrics=_metrics(values, now, step)))

        self._outbox.send("metrics", write, since=f" from step {step} on" if step else "")

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs the params that the run does not have yet; a continued run has them already."""
        self._outbox.send("params", lambda: self._write_params(params))

    def _write_params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param  # imported with the store, which takes seconds

        new = {
            name: one_line(str(value))[:MAX_PARAM_LENGTH] for name, value in params.items() if name not in self._params
        }
        self._write(
            lambda run_id: self.client.log_batch(run_id, params=[Param(name, value) for name, value in new.items()])
        )
        self._params.update(new)

    def log_inputs(self, inputs: Mapping[str, str], context: str) -> None:
        """Logs each input, a path and its fingerprint, as a dataset; `context` says what it is used for."""
        self._outbox.send("inputs", lambda: self._write_inputs(inputs, context))

    def _write_inputs(self, inputs: Mapping[str, str], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag  # imported with the store, which takes seconds

        datasets = [
            DatasetInput(
                Dataset(one_line(path), digest[:MAX_DIGEST_LENGTH], "local", json.dumps({"uri": one_line(path)})),
                [InputTag("mlflow.data.context", context)],
            )
            for path, digest in inputs.items()
        ]
        self._write(lambda run_id: self.client.log_inputs(run_id, datasets))

    def log_folder(self, folder: Path, name: str) -> None:
        """Copies a folder's files to the run's artifact folder `name`."""
        self._outbox.send(
            f"{name}/", lambda: self._write(lambda run_id: self.client.log_artifacts(run_id, str(folder), name))
        )

    def log_file(self, file: Path, name: str) -> None:
        """Copies a file to the run's artifact folder `name`."""
        self._outbox.send(
            f"{name}/{file.name}", lambda: self._write(lambda run_id: self.client.log_artifact(run_id, str(file), name))
        )

    def log_model(
        self, folder: Path, fingerprint: str, metrics: Mapping[str, object], registered: bool = False
    ) -> None:
        """Logs a model folder as this run's model; with `registered` also as a version of `runtime.registered_model`.

        The folder holds an MLmodel, safetensors and JSON, and no pickle.
        """
        now, name = _now(), self._recording.registered_model

        def tag() -> None:
            self._write(lambda run_id: self.client.set_tag(run_id, MODEL_TAG, fingerprint))
            self._tags[MODEL_TAG] = fingerprint

        def create() -> None:
            model = self.client.create_logged_model(
                self.experiment_id, name=folder.name, source_run_id=self.run_id, model_type="retro"
            )
            self._model_id = model.model_id

        def fill() -> None:  # in one message: a model without its files must be neither ready nor registered
            self.client.log_model_artifacts(self._model_id, str(folder))
            self.client.finalize_logged_model(self._model_id, "READY")
            self.client.log_batch(self.run_id, metrics=_metrics(metrics, now, 0, self._model_id))
            if registered and name:
                register(self.client, name, self._model_id, self.run_id)

        for write in (tag, create, fill):
            self._outbox.send("the model", write)

    @contextmanager
    def running(self) -> Iterator["TrackedRun"]:
        """Gives the run its final status after the block: FINISHED, KILLED (by an interrupt) or FAILED."""
        if self._recording.system_metrics:
            self._outbox.send("system metrics", self._start_monitor)
        try:
            yield self
        except BaseException as error:
            try:
                self._end("FAILED" if isinstance(error, Exception) else "KILLED")
            except RetroError as second:  # the first error is the one to report
                print(one_line(f"mlflow: the run is not marked as ended: {second}"), file=sys.stderr, flush=True)
            raise
        self._end("FINISHED")

    def _end(self, status: str) -> None:
        if self._monitor is not None:
            self._monitor.finish()  # type: ignore[no-untyped-call]
        self._outbox.send("the end of the run", lambda: self.set_status(status))
        self._outbox.close()

    def set_status(self, status: str) -> None:
        """Gives the run its final status, unless it was deleted."""
        if not self._is_deleted():
            self.client.set_terminated(self.run_id, status)

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # as the store

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # what is lost, the outbox says
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=store_uri())  # type: ignore[no-untyped-call]
        self._monitor.start()  # type: ignore[no-untyped-call]

    def _write(self, write: Callable[[str], object]) -> None:
        """Calls `write` with the run's id, and again with that of a new run if the run was deleted."""
        from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

        try:
            write(self.run_id)
        except MlflowException as error:
            if is_unreachable(error) or not self._is_deleted():
                raise
            self._continue_after_deletion()
            write(self.run_id)

    def _is_deleted(self) -> bool:
        from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

        try:
            return bool(self.client.get_run(self.run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True  # for good, by `mlflow gc`

    def _continue_after_deletion(self) -> None:
        """Creates a new run with the same name, tags and params, if the old one is not restored with its experiment."""
        self.experiment_id = open_experiment(self.client)
        if not self._is_deleted():
            return
        run = self.client.create_run(self.experiment_id, run_name=self._name, tags=self._tags)
        print(f"mlflow: the run {self._name} was deleted; a new one goes on from here", file=sys.stderr)
        self.run_id = run.info.run_id
        params, self._params = self._params, {}
        self._write_params(params)


class FoundRun(NamedTuple):
    """A run to record in, and the last step that it has already."""

    client: "MlflowClient"
    run: "Run"
    last_step: int = -1


@contextmanager
def training_run(
    stage: str,
    work_key: str,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
    recording: Recording = Recording(),
) -> Iterator[TrackedRun]:
    """Opens a run for training a model, or continues the interrupted run with the same `work_key`.

    Ends it as FINISHED, KILLED (by an interrupt) or FAILED.
    """

    def find() -> FoundRun:
        client, experiment_id = open_store()
        interrupted = client.search_runs(
            [experiment_id], f"tags.`{WORK_TAG}` = '{work_key}' and attributes.status != 'FINISHED'", max_results=1
        )
        if interrupted:
            run_id = interrupted[0].info.run_id
            history = client.get_metric_history(run_id, "loss")
            client.update_run(run_id, status="RUNNING")
            return FoundRun(client, interrupted[0], max((metric.step for metric in history), default=-1))
        tags = {WORK_TAG: work_key, STAGE_TAG: stage, **_origin_tags(), **_input_tags(inputs)}
        return FoundRun(client, _create(client, experiment_id, stage, tags))

    run = TrackedRun(Outbox(recording.tracking), recording, find)
    run.log_params(params)
    run.log_inputs(inputs, "training")
    with run.running():
        yield run


@contextmanager
def evaluation_run(
    model_fingerprint: str,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
    recording: Recording = Recording(),
) -> Iterator[tuple[TrackedRun, TrackedRun]]:
    """Opens (the evaluated model's run, a child run for this evaluation).

    A model restored from DVC's cache or a remote has no run here yet; one is created for it.
    """

    def find_parent() -> FoundRun:
        client, experiment_id = open_store()
        found = client.search_runs(
            [experiment_id],
            f"tags.`{MODEL_TAG}` = '{model_fingerprint}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if found:
            return FoundRun(client, found[0])
        tags = {STAGE_TAG: "restored", MODEL_TAG: model_fingerprint, **_origin_tags()}
        run = _create(client, experiment_id, "restored", tags)
        client.set_terminated(run.info.run_id, "FINISHED")
        return FoundRun(client, run)

    def create_child() -> FoundRun:
        tags = {"mlflow.parentRunId": parent.run_id, STAGE_TAG: "evaluate", **_origin_tags(), **_input_tags(inputs)}
        return FoundRun(parent.client, _create(parent.client, parent.experiment_id, "evaluate", tags))

    outbox = Outbox(recording.tracking)
    parent = TrackedRun(outbox, recording, find_parent)
    parent.log_params(params)  # those that a restored model has not
    child = TrackedRun(outbox, recording, create_child)
    child.log_params(params)
    child.log_inputs(inputs, "evaluation")
    with child.running():
        yield parent, child


def register(client: "MlflowClient", name: str, model_id: str, run_id: str) -> str:
    """Adds a logged model to the registry, as a version of the registered model `name`; the version's number."""
    from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, f"models:/{model_id}", run_id, model_id=model_id).version)


def _create(client: "MlflowClient", experiment_id: str, name: str, tags: Mapping[str, str]) -> "Run":
    experiment_name = os.environ.get("DVC_EXP_NAME")
    run_name = f"{name} {one_line(experiment_name)}" if experiment_name else name
    return client.create_run(experiment_id, run_name=run_name, tags=dict(tags))


def _now() -> int:
    return int(time.time() * 1000)


def _metrics(values: Mapping[str, object], now: int, step: int, model_id: str | None = None) -> "list[Metric]":
    """The numbers among `values`, as MLflow logs them."""
    from mlflow.entities import Metric  # imported with the store, which takes seconds

    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return [Metric(name, float(value), now, step, model_id) for name, value in numbers.items()]


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
