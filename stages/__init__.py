"""The pipeline: one module a stage, run by DVC. They never import each other: artifacts are how they speak."""

import os

# Before anything loads OpenMP: how long its threads spin for each other before they sleep. By default
# that is so long that a second busy program makes training on two cores fifteen times slower; with this
# it is two to three times, and a quiet machine loses a few percent.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Before torch is loaded: several processes that train would each warn that a batch used all weights.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# No library of ours calls home.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "true"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)
