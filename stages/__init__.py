"""The pipeline's stages, one module each, run by DVC. Stages do not import each other; they exchange artifacts."""

import os

# How long OpenMP threads spin while they wait for each other; set before anything loads OpenMP. With the default, a
# second busy program slows training on two cores down fifteen times; with this value two to three times, and an idle
# machine loses a few percent.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Set before torch is imported: in distributed training, each process would warn that a batch used all weights.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Disable the telemetry of all libraries.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "true"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)
