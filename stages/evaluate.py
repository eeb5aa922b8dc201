"""Writes metrics/evaluate.json, plots/evaluate and reports/evaluate.html: the effect of retrieval on held-out text."""

from pathlib import Path

from retro_model.core.artifacts import Artifact
from retro_model.core.devices import resolve_device
from retro_model.core.errors import MismatchError, SourceError
from retro_model.core.printable import say
from retro_model.evaluation.evaluate import EvaluationRun, evaluate_models, time_retrieval
from retro_model.evaluation.inputs import Searching
from stages.common.dvcignore import dvc_name_filter
from stages.common.harness import project_root, record_timing, run_stage, work_folder
from stages.common.params import flat_params, read_params
from stages.tracking.runs import Recording, evaluation_run


def main() -> None:
    """Reads both models, the test chunks and their neighbors; writes metrics, curves and the report."""
    params = read_params(
        "knn", "seq_len", "seed", "corpus", "embed", "index", "neighbors", "retrofit.base", "evaluate", "runtime"
    )
    data, retro, baseline = Path("data"), Path("models/retro"), Path("models/baseline")
    plots, report = Path("plots/evaluate"), Path("reports/evaluate.html")
    models = [Artifact.open(folder, "model", verify=False) for folder in (retro, baseline)]
    test = [Artifact.open(data / kind / "test", kind, verify=False) for kind in ("chunks", "neighbors")]
    digests = {artifact.folder.as_posix(): artifact.fingerprint for artifact in (*models, *test)}
    searching = Searching(
        params.corpus,
        params.embed,
        params.index,
        params.neighbors,
        device=params.runtime.device,
        embed_batch_size=params.runtime.embed_batch_size or None,
        engine=params.runtime.make_engine(),
        parts=params.runtime.kept_parts(project_root()),
        name_filter=dvc_name_filter(),
    )
    with (
        work_folder("evaluate", params) as work,
        evaluation_run(models[0].fingerprint, flat_params(), digests, Recording.of(params.runtime)) as (
            model_run,
            tracked,
        ),
    ):
        run = EvaluationRun(
            data,
            baseline,
            retro,
            params.evaluate,
            searching,
            knn=params.knn,
            seq_len=params.seq_len,
            seed=params.seed,
            out_metrics=Path("metrics/evaluate.json"),
            out_plots=plots,
            out_report=report,
            work_folder=work,
            base=params.retrofit.base,
            device=resolve_device(params.runtime.device).type,
            batch_size=params.runtime.evaluate_batch_size,
        )
        result = evaluate_models(run)
        for line in result.lines():
            say(line)
        timings = {**result.timings, **_retrieval_timings(data, searching, params.knn)}
        tracked.log_metrics(timings)
        for place in (tracked, model_run):  # each evaluation has a child run; the model's run shows the newest
            place.log_metrics(result.metrics)
            place.log_folder(plots, "evaluate")
            place.log_file(report, "evaluate")
    record_timing("evaluate.scoring", **timings)


def _retrieval_timings(data: Path, searching: Searching, knn: int) -> dict[str, float]:
    """Milliseconds per chunk for retrieval; empty, with a printed line, if the encoder is not on this machine."""
    try:
        timings = time_retrieval(data, searching, knn)
    except (SourceError, MismatchError) as error:
        say(f"evaluate: retrieval was not timed: {error}")
        return {}
    formatted = ", ".join(f"{value:.2f} {name.rpartition('_')[2]}" for name, value in timings.items())
    say(f"evaluate: retrieval, milliseconds a chunk: {formatted}")
    return timings


if __name__ == "__main__":
    run_stage("evaluate", main)
