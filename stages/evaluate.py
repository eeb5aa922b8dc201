"""Writes metrics/evaluate.json, plots/evaluate and reports/evaluate.html: what retrieval gave on held-out documents."""

from pathlib import Path

from retro_model.artifacts import Artifact
from retro_model.devices import resolve_device
from retro_model.evaluation import evaluate_models
from stages.harness import record_timing, run_stage
from stages.params import flat_params, read_params
from stages.tracking import evaluation_run


def main() -> None:
    """Both models, test chunks and their neighbors in; figures, curves and a report out."""
    params = read_params("knn", "seq_len", "seed", "evaluate", "runtime")
    retro, baseline = (Artifact.open(Path("models") / name, "model", verify=False) for name in ("retro", "baseline"))
    digests = {"models/retro": retro.fingerprint, "models/baseline": baseline.fingerprint}
    plots, report = Path("plots/evaluate"), Path("reports/evaluate.html")
    with evaluation_run(retro.fingerprint, flat_params(), digests) as (model_run, run):
        result = evaluate_models(
            baseline.folder,
            retro.folder,
            Path("data/chunks"),
            Path("data/neighbors"),
            Path("data/tokenizer"),
            params.evaluate,
            knn=params.knn,
            seq_len=params.seq_len,
            seed=params.seed,
            out_metrics=Path("metrics/evaluate.json"),
            out_plots=plots,
            out_report=report,
            device=resolve_device(params.runtime.device).type,
            batch_size=params.runtime.evaluate_batch_size,
        )
        run.log_metrics(result.timings)
        for place in (run, model_run):  # the child has every evaluation, the model's own run the newest
            place.log_metrics(result.metrics)
            place.log_folder(plots, "evaluate")
            place.log_file(report, "evaluate")
    record_timing("evaluate.scoring", **result.timings)


if __name__ == "__main__":
    run_stage("evaluate", main)
