"""What all tests share: no network, no calls home, few threads."""

import os

# Set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as stages/__init__.py does
os.environ["TOKENIZERS_PARALLELISM"] = "true"
for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "RETRO_BERT"):
    os.environ.pop(name, None)
