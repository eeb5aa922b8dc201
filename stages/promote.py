"""Gives an alias in MLflow's registry to the best model of the experiment, and adds it as a version if it is none yet.

    python -m stages.promote --by test_bpb_on --alias champion

Then `models:/retro@champion` is that model. No stage: it reads and writes MLflow only.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from retro_model.core.errors import ConfigError, RetroError
from retro_model.core.printable import one_line, say
from stages.common.params import read_params
from stages.tracking.runs import MODEL_TAG, STAGE_TAG, register
from stages.tracking.store import experiment_name, explain_store_errors, open_store, store_name

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.tracking import MlflowClient


def promote(metric: str, alias: str, name: str) -> str:
    """Give `alias` to the model trained with retrieval whose `metric` is lowest; what was done, in a line.

    `name` is that of the registered model. Raises ConfigError if no finished training has the metric.
    """
    client, experiment_id = open_store()
    runs = client.search_runs(
        [experiment_id],
        f"tags.`{STAGE_TAG}` = 'train' and tags.`{MODEL_TAG}` != '' and attributes.status = 'FINISHED' "
        f"and metrics.`{metric}` < 1e300",
        order_by=[f"metrics.`{metric}` ASC", "attributes.start_time DESC"],
    )
    for run in runs:
        model = _model_of(client, run)
        if model is not None:
            version = _version_of(client, name, run) or register(client, name, model.model_id, run.info.run_id)
            client.set_registered_model_alias(name, alias, version)
            value = run.data.metrics[metric]
            return f"models:/{name}@{alias} is version {version}: run {run.info.run_id}, {metric} {value:.4f}"
    raise ConfigError(
        f"--by: found no finished training with the metric {metric} in the experiment {experiment_name()} of "
        f"{store_name()}; expected one; run `dvc repro` first"
    )


def _model_of(client: "MlflowClient", run: "Run") -> "LoggedModel | None":
    """The model that the run has logged; None if it was deleted or never came to be whole."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return next((model for model in found if model.status == "READY"), None)


def _version_of(client: "MlflowClient", name: str, run: "Run") -> str | None:
    """The newest version that is this run's model already."""
    versions = client.search_model_versions(f"name = '{name}'")
    return next((str(version.version) for version in versions if version.run_id == run.info.run_id), None)


def main() -> None:
    """Reads the command line, and prints which model has the alias now."""
    parser = argparse.ArgumentParser("python -m stages.promote", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by", default="test_bpb_on", metavar="METRIC", help="lowest is best (default: test_bpb_on)")
    parser.add_argument("--alias", default="champion", help="default: champion")
    parser.add_argument(
        "--name", help="registered model (default: runtime.registered_model, or retro if that is empty)"
    )
    options = parser.parse_args()
    try:
        name = options.name or read_params("runtime").runtime.registered_model or "retro"
        with explain_store_errors():
            say(promote(options.by, options.alias, name))
    except RetroError as error:
        sys.exit(f"promote: {one_line(str(error))}")


if __name__ == "__main__":
    main()
