"""Write `MLmodel`, the file that makes a model's folder one that MLflow loads, serves and registers.

It names the module that loads the model, and says what goes in and out. MLflow's own writer would add a time, an id and
package versions. This file depends on the model alone, so equal trainings give equal bytes.
"""

import json
from pathlib import Path
from typing import Any

import yaml

FILE = "MLmodel"
LOADER = "retro_model.inference.pyfunc"

# What the model can be given when it is opened, and what it then uses if it is not given: see the loader.
CONFIG = {"data": "", "encoder": "", "base": "", "device": "auto"}


def write_mlmodel(folder: Path, knn: int) -> None:
    """Write `MLmodel` to a model's folder. `knn` is the number of neighbors that it reads by default; 0: none."""
    params = (
        ("max_new_tokens", "long", 200),
        ("temperature", "double", 0.8),
        ("top_p", "double", 0.95),
        ("top_k", "long", 0),  # 0: top_p is used
        ("seed", "long", 0),
        ("knn", "long", knn),
    )
    content: dict[str, Any] = {
        "flavors": {"python_function": {"loader_module": LOADER, "config": CONFIG}},
        "signature": {
            "inputs": json.dumps([{"type": "string", "name": "prompt", "required": True}]),
            "outputs": json.dumps([{"type": "string", "required": True}]),
            "params": json.dumps(
                [{"name": name, "default": default, "shape": None, "type": kind} for name, kind, default in params]
            ),
        },
    }
    (folder / FILE).write_text(yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8", newline="\n")
