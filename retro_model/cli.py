"""The command `retro`: print a chunk's neighbors, generate text with the model, or serve both to browsers and programs.

    retro neighbors --split test --chunk 123
    retro neighbors --text "Return the indices of the largest"
    retro generate --prompt "Return the indices of the largest" --show-neighbors
    retro serve

Reads the pipeline's outputs (data/ and models/retro) and writes nothing. User errors are one line on standard error,
with exit status 1. Ctrl-C exits with 130 and a closed pipe (`| head`) with 141, both silently. Text and names are
printed without control characters, and question marks stand for what the terminal cannot show. Heavy libraries are
imported after arguments and files have been checked.
"""

import argparse
import errno
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.core.errors import ConfigError, MismatchError, RetroError
from retro_model.core.printable import one_line, printable
from retro_model.core.processes import allow_open_files

if TYPE_CHECKING:
    from torch import Tensor

    from retro_model.corpus.tokenizer import Tokenizer
    from retro_model.inference.retriever import Retriever
    from retro_model.network.language_model import LanguageModel

COLUMNS = 100  # width of wrapped text
PARAMS_FILE = Path("params.yaml")
SEARCHED = (
    ("index", "index"),
    ("embeddings", "embeddings/train"),
    ("chunks", "chunks/train"),
    ("tokenizer", "tokenizer"),
)

DESCRIPTION = "Look at what the pipeline made: a chunk's neighbors, and what the model writes; or serve it."
EPILOG = """\
Run it from the folder that holds data/ and models/, after `dvc repro` or `dvc pull`:

  retro neighbors --split test --chunk 123
  retro neighbors --text "Return the indices of the largest"
  retro generate --prompt "Return the indices of the largest" --show-neighbors
  retro serve

`retro COMMAND --help` says what a command takes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    if sys.stderr is None:  # closed (`2>&-`): progress bars would fail, and `print` would write to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process runs)
    if sys.stdout is None:
        print("retro: standard output is closed", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run_command(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output(sys.stdout, sys.stderr)
        return 141
    except OSError as error:  # no command writes a file, so an error that names none is standard output's
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _discard_output(sys.stdout)
        print(f"retro: standard output: {error.strerror}", file=sys.stderr)
        return 1


def _discard_output(*streams: TextIO) -> None:
    """Lead streams nowhere: the interpreter flushes them again at exit and would report what is wrong with them."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _run_command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    allow_open_files()
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except RetroError as error:
        sys.stdout.flush()
        print(f"retro: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("retro", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_neighbors(commands)
    _add_generate(commands)
    _add_serve(commands)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs and device")
    group.add_argument(
        "--data", type=Path, default=Path("data"), metavar="FOLDER", help="outputs of the stages (default: data)"
    )
    group.add_argument(
        "--encoder",
        metavar="NAME",
        help="the encoder: a package, hub name or folder, as in embed.encoder (default: embed.encoder of "
        "./params.yaml if that file exists, else the name recorded in data/embeddings)",
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=Path("models/retro"), metavar="FOLDER", help="default: models/retro"
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="the base of a model that is adapters: a hub name or folder, as in retrofit.base (default: retrofit.base "
        "of ./params.yaml if that is set, else the name recorded in the model)",
    )


def _at_least(least: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: a number >= `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} or more")
        return value

    parse.__name__ = "number"  # in argparse's message "invalid number value"
    return parse


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number above 0 and at most 1")
    return value


# ---- neighbors -------------------------------------------------------------------------------------


def _add_neighbors(commands: Any) -> None:
    text = "Print a chunk or a text with its nearest database chunks: distance, document and continuation."
    parser = commands.add_parser("neighbors", help="print the neighbors of a chunk or a text", description=text)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--chunk",
        type=_at_least(0, int),
        metavar="NUMBER",
        help="number of a chunk in the split, from 0: prints its stored neighbors",
    )
    query.add_argument("--text", help="any text: embeds it, up to the encoder's maximum length, and searches now")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of --chunk (default: test)")
    parser.add_argument(
        "-k", "--knn", type=_at_least(1, int), default=4, metavar="K", help="number of neighbors (default: 4)"
    )
    _add_common(parser)
    parser.set_defaults(run=_neighbors)


def _neighbors(options: argparse.Namespace) -> None:
    if options.text is None:
        _stored_neighbors(options)
    else:
        _neighbors_of_text(options)


def _stored_neighbors(options: argparse.Namespace) -> None:
    """Prints a chunk of a split with the neighbors that the knn stage stored for it."""
    chunks = Artifact.open(options.data / "chunks" / options.split, "chunks", verify=False)
    if options.chunk >= chunks.rows:
        raise ConfigError(f"--chunk: found {options.chunk}, expected 0 to {chunks.rows - 1} (split {options.split})")
    neighbors = Artifact.open(options.data / "neighbors" / options.split, "neighbors", verify=False)
    database = Artifact.open(options.data / "chunks" / "train", "chunks", verify=False)
    neighbors.require(chunks=chunks.fingerprint, database=database.fingerprint)
    stored = neighbors["ids"].shape[1]
    if options.knn > stored:
        raise ConfigError(f"--knn: found {options.knn}, expected at most {stored}, which {neighbors.folder} stores")
    from retro_model.corpus.chunks import describe_rows
    from retro_model.corpus.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(options.data / "tokenizer")
    chunks.require(tokenizer=tokenizer.fingerprint)
    row = options.chunk
    _print(_heading(f"{options.split} chunk {row}: {describe_rows(chunks, [row])[row]}"))
    _print(_wrapped(tokenizer.decode(chunks["tokens"][row][:-1].tolist())))
    ids, distances = neighbors["ids"][row][: options.knn], neighbors["distances"][row][: options.knn]
    _print_neighbors(database, tokenizer, ids.tolist(), distances.tolist())


def _neighbors_of_text(options: argparse.Namespace) -> None:
    """Embeds a text, searches for its neighbors and prints both."""
    text = _text_of_argument("--text", options.text)
    if not text.strip():
        raise ConfigError("--text: found no text, expected some")
    retriever = _open_retriever(options)
    found = retriever.retrieve_text([text], options.knn)
    _print(_heading("text"))
    _print(_wrapped(text))
    _print_neighbors(retriever.chunks, retriever.tokenizer, found.ids[0].tolist(), found.distances[0].tolist())


def _print_neighbors(database: Artifact, tokenizer: "Tokenizer", ids: list[int], distances: list[float]) -> None:
    for lines in _format_neighbors(database, tokenizer, ids, distances):
        _print("")
        _print(lines)


def _format_neighbors(
    database: Artifact, tokenizer: "Tokenizer", ids: list[int], distances: list[float]
) -> Iterator[str]:
    """Yields a few lines of text for each neighbor in `ids`, database rows; skips -1 (no neighbor)."""
    import numpy as np

    from retro_model.core.rows import retrieved_tokens
    from retro_model.corpus.chunks import describe_rows

    rows = [row for row in ids if row >= 0]
    if not rows:
        yield "no neighbors: the database holds no chunk of another document"
        return
    names = describe_rows(database, rows)
    retrieved = retrieved_tokens(database, np.array(rows))
    for number, (row, distance, tokens) in enumerate(zip(rows, distances, retrieved, strict=False), start=1):
        neighbor, continuation = (tokenizer.decode(half.tolist()) for half in np.split(tokens, 2))
        parts = [_heading(f"{number}. distance {distance:.4f}, {names[row]}"), _wrapped(neighbor)]
        parts += ["   continued:", _wrapped(continuation)] if continuation else ["   (its document ends here)"]
        yield "\n".join(parts)


def _heading(text: str) -> str:
    return f"\033[1m{one_line(text)}\033[0m" if sys.stdout.isatty() else one_line(text)


def _wrapped(text: str) -> str:
    """The text indented and wrapped, with its own line breaks kept and control characters replaced."""
    lines = [
        part
        for line in printable(text).splitlines()
        for part in textwrap.wrap(line, COLUMNS, replace_whitespace=False) or [""]
    ]
    return textwrap.indent("\n".join(lines), "   ", lambda line: True)


def _text_of_argument(option: str, value: str) -> str:
    """The value of a command line option, whose bytes must be UTF-8."""
    return _decode_text(option, os.fsencode(value))


def _decode_text(place: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ConfigError(f"{place}: found {byte}, expected text in UTF-8") from error


def _read_prompt(prompt: str) -> str:
    """The prompt that the option gives, from standard input if it is `-`."""
    if prompt != "-":
        return _text_of_argument("--prompt", prompt)
    if sys.stdin is None:
        raise ConfigError("--prompt: standard input is closed, expected the text there, or another prompt than -")
    try:
        content = sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(f"--prompt: standard input cannot be read ({error.strerror})") from error
    return _decode_text("--prompt, standard input", content).replace("\r\n", "\n")


def _print(text: str) -> None:
    print(text, flush=True)


def _open_retriever(options: argparse.Namespace) -> "Retriever":
    for kind, folder in SEARCHED:
        Artifact.open(options.data / folder, kind, verify=False)  # fail before the heavy imports if missing
    encoder = options.encoder or _of_params("embed", "encoder")
    from retro_model.inference.retriever import Retriever

    return Retriever.open(options.data, encoder=encoder, device=options.device, verify=False)


def _open_retriever_of(model: Artifact, options: argparse.Namespace) -> "Retriever":
    """The retriever, whose tokenizer and chunk size must be the model's."""
    retriever = _open_retriever(options)
    if retriever.tokenizer.fingerprint != model.facts["tokenizer"]:
        raise MismatchError(
            f"{options.model}: its tokenizer is not that of {options.data}; run `dvc repro`, or name the data that it "
            "was trained on (--data)"
        )
    model.require(chunk_size=retriever.chunk_size)
    return retriever


def _open_model(artifact: Artifact, options: argparse.Namespace) -> "LanguageModel":
    """The model, with its base if it is adapters."""
    from retro_model.core.devices import resolve_device
    from retro_model.retrofit.loading import open_model

    base = options.base or _of_params("retrofit", "base") or ""
    return open_model(artifact, base, resolve_device(options.device))


def _of_params(section_name: str, key: str) -> str | None:
    """A text in ./params.yaml, if that is there; of a folder, outputs may record only the name, not the path."""
    if not PARAMS_FILE.is_file():
        return None
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(PARAMS_FILE)
    except YAMLError as error:
        raise ConfigError(f"{PARAMS_FILE}: not valid YAML: {' '.join(str(error).split())}") from error
    section = content.get(section_name) if isinstance(content, dict) else None
    value = section.get(key) if isinstance(section, dict) else None
    return value if isinstance(value, str) else None


# ---- generate --------------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    text = (
        "Continue a prompt token by token, and retrieve neighbors for every finished chunk. Stops when the model ends "
        "the document, after --max-new-tokens, or at the length that the model was trained for."
    )
    parser = commands.add_parser("generate", help="continue a prompt with the model", description=text)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads it from stdin")
    _add_model(parser)
    parser.add_argument("--max-new-tokens", type=_at_least(1, int), default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature",
        type=_at_least(0, float),
        default=0.8,
        metavar="T",
        help="0: always the likeliest token (default: 0.8)",
    )
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--top-k", type=_at_least(1, int), metavar="K", help="sample from the K likeliest tokens")
    cut.add_argument(
        "--top-p",
        type=_probability,
        metavar="P",
        help="sample from the likeliest tokens that together reach probability P (default: 0.95)",
    )
    parser.add_argument("--seed", type=_at_least(0, int), default=0, metavar="N", help="seed for sampling (default: 0)")
    parser.add_argument(
        "-k",
        "--knn",
        type=_at_least(0, int),
        metavar="K",
        help="neighbors per chunk; 0: none (default: as in training)",
    )
    parser.add_argument(
        "--show-neighbors", action="store_true", help="print the retrieved neighbors at the end of each chunk"
    )
    _add_common(parser)
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    artifact = Artifact.open(options.model, "model", verify=False)
    knn = artifact.facts["knn"] if options.knn is None else options.knn
    if knn and not artifact.facts["retrieval"]:
        raise ConfigError(f"--knn: found {knn}, expected 0: {options.model} has no retrieval")
    if options.show_neighbors and not knn:
        raise ConfigError(
            "--show-neighbors: nothing is retrieved here; expected a model with retrieval and --knn above 0"
        )
    text = _read_prompt(options.prompt)
    retriever = _open_retriever_of(artifact, options) if knn else None
    from retro_model.corpus.tokenizer import Tokenizer

    tokenizer = retriever.tokenizer if retriever else Tokenizer.open(options.model / "tokenizer")
    for piece in _write(artifact, options, text, tokenizer, retriever, knn):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write(
    artifact: Artifact,
    options: argparse.Namespace,
    text: str,
    tokenizer: "Tokenizer",
    retriever: "Retriever | None",
    knn: int,
) -> Iterator[str]:
    """Yields the prompt, then each piece of generated text, with the retrieved neighbors if asked for."""
    from retro_model.inference.text import Sampling, encode_prompt, write_text

    model = _open_model(artifact, options)
    ids = encode_prompt(model, tokenizer, text, "--prompt")
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p or Sampling.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    neighbor_blocks: list[str] = []
    retrieve = None if retriever is None else _make_retrieve(retriever, knn, neighbor_blocks)
    yield printable(text)
    for piece in write_text(model, tokenizer, ids, sampling, retrieve):
        if options.show_neighbors:
            yield from neighbor_blocks
        neighbor_blocks.clear()
        yield printable(piece.text)


def _make_retrieve(retriever: "Retriever", knn: int, neighbor_blocks: list[str]) -> Callable[["Tensor"], "Tensor"]:
    """The retrieve function for `Writer`; appends a text about each chunk's neighbors to `neighbor_blocks`."""
    import torch

    chunks_before = 0

    def retrieve(token_chunks: "Tensor") -> "Tensor":
        nonlocal chunks_before
        found = retriever.retrieve(token_chunks.cpu().numpy(), knn)
        for ids, distances in zip(found.ids.tolist(), found.distances.tolist(), strict=True):
            chunks_before += 1
            lines = "\n".join(_format_neighbors(retriever.chunks, retriever.tokenizer, ids, distances))
            block = f"retrieved with chunk {chunks_before} of this text, for the next one\n{lines}"
            neighbor_blocks.append("\n\n" + textwrap.indent(block, "  | ", lambda line: True) + "\n\n")
        return torch.from_numpy(found.tokens).to(token_chunks.device)

    return retrieve


# ---- serve -----------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    text = (
        "Serve the model to browsers and programs: a page that shows text as it is written, with its neighbors, and a "
        "JSON API (/docs says how to call it). Documents that are added to the database stay in memory. One request "
        "runs at a time, and a few wait. There is no login: whoever can reach the address can use it. Ctrl-C ends it."
    )
    parser = commands.add_parser("serve", help="serve a web page and a JSON API", description=text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument(
        "--port", type=_port, default=8000, metavar="NUMBER", help="port to listen on; 0: any free one (default: 8000)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this server in the address of its page, for example that of a proxy; can be repeated",
    )
    parser.add_argument(
        "--queue", type=_at_least(0, int), default=8, metavar="N", help="requests that may wait (default: 8)"
    )
    parser.add_argument(
        "--wait", type=_at_least(0, float), default=60, metavar="SECONDS", help="how long one may wait (default: 60)"
    )
    parser.add_argument(
        "--timeout",
        type=_at_least(0, float),
        default=300,
        metavar="SECONDS",
        help="how long one may run (default: 300)",
    )
    _add_model(parser)
    _add_common(parser)
    parser.set_defaults(run=_serve)


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 to 65535")
    return value


def _serve(options: argparse.Namespace) -> None:
    artifact = Artifact.open(options.model, "model", verify=False)
    if not artifact.facts["retrieval"]:
        raise ConfigError(f"--model: {options.model} has no retrieval; expected a model that retrieves")
    from retro_model.serving.server import listen, serve

    with listen(options.host, options.port) as listening:
        from retro_model.serving.watched import WatchedFiles

        data = (Artifact.open(options.data / folder, kind, verify=False) for kind, folder in SEARCHED)
        files = WatchedFiles([artifact, *data])
        files.check()
        retriever = _open_retriever_of(artifact, options)
        from retro_model.serving.live import LiveDatabase
        from retro_model.serving.service import Service
        from retro_model.serving.worker import Worker

        model = _open_model(artifact, options)
        worker = Worker(options.queue, options.wait, options.timeout)
        service = Service(model, LiveDatabase(retriever), artifact.facts["knn"], worker, files)
        host = f"[{options.host}]" if ":" in options.host else options.host
        _print(f"serving {options.model} at http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        serve(service, listening, options.host, options.allow_host)
