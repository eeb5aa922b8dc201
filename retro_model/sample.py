"""A sample corpus for a first run without a network: docstrings of the standard library and of installed packages.

    write_sample(Path("data/sample"), SampleConfig())

writes one document per module, such as `sklearn.linear_model._ridge.txt`, with the docstrings of the module, its
classes and functions in source order. Source files are parsed, never imported, so none of their code runs.

Examples at a prompt (`>>>`) are left out, because the model should learn prose. Packages that repeat text in several
modules (an argument that many estimators share) suit retrieval, because there is related text to find.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from retro_model.core.artifacts import whole_folder
from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError, DocumentError
from retro_model.core.progress import progress

STANDARD_LIBRARY = "python"
MIN_DOCSTRING = 60  # characters; shorter ones repeat the function's name
PROMPTS = (">>>", "...")
# Modules that are left out: tests, vendored copies of other packages, legacy code.
TESTS = ("test", "tests", "testing", "_testing", "idle_test", "conftest")
VENDORED = ("_vendor", "_vendored", "vendor", "externals", "extern", "ensurepip")
OLD = ("lib2to3", "idlelib", "turtledemo", "distutils")
LEFT_OUT = frozenset((*TESTS, *VENDORED, *OLD))


@dataclass(frozen=True)
class SampleConfig(Config, section="sample"):
    """Which text to use: `python` is the standard library, other names are installed packages or parts of them.

    Modules with less than `min_bytes` of text are skipped. The others are taken in the order of a hash of their
    names as long as they fit into `max_bytes`, so that a new release of a package changes the text of the sample but
    hardly its size.
    """

    packages: tuple[str, ...] = (STANDARD_LIBRARY, "sklearn")
    min_bytes: int = setting(1000, minimum=1)
    max_bytes: int = setting(2_900_000, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.packages or len(set(self.packages)) != len(self.packages):
            raise ConfigError(f"sample.packages: found {list(self.packages)}, expected one package or more, each once")


def write_sample(folder: Path, config: SampleConfig) -> dict[str, int]:
    """Write the documents into `folder`, which is replaced, and return the numbers of documents and bytes.

    Raises ConfigError for a package that is not installed, DocumentError if no module has enough text.
    """
    roots = {package: find_package(package) for package in config.packages}
    modules = {name: text for package, root in roots.items() for name, text in read_modules(package, root)}
    chosen = choose(modules, config)
    if not chosen:
        raise DocumentError(
            f"sample.packages: no module of {', '.join(config.packages)} has {config.min_bytes} to "
            f"{config.max_bytes} bytes of docstrings; change sample.packages, min_bytes or max_bytes"
        )
    num_bytes = 0
    with whole_folder(folder) as whole:
        for name in chosen:
            num_bytes += (whole / f"{name}.txt").write_bytes(modules[name].encode())
    return {"sample_documents": len(chosen), "sample_bytes": num_bytes}


def find_package(package: str) -> Path:
    """Return the path of the package's source, a folder or a single file, without importing it.

    Raises ConfigError if the package is not installed as Python source.
    """
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    first, *parts = package.split(".")
    found = importlib.util.find_spec(first) if first.isidentifier() else None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise ConfigError(f"sample.packages: {package} is not installed as Python source; install or remove it")
    origin = Path(found.origin)
    place = (origin.parent if found.submodule_search_locations else origin).joinpath(*parts)
    if not place.exists() and not (place := place.with_name(place.name + ".py")).exists():
        raise ConfigError(f"sample.packages: {package} is no part of the installed {first} ({origin.parent})")
    return place


def read_modules(package: str, root: Path) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each module below `root`, sorted by path."""
    base = root if root.is_dir() else root.parent
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    prefix = () if package == STANDARD_LIBRARY else tuple(package.split("."))
    for file in progress(files, f"sample {package}", total=len(files), unit="module"):
        parts = file.relative_to(base).with_suffix("").parts
        if all(_wanted(part) for part in parts):
            inside = [part for part in parts if part != "__init__"] if root.is_dir() else []
            yield ".".join([*prefix, *inside]), module_text(file.read_bytes())


def _wanted(part: str) -> bool:
    """Return whether a file or folder name is an identifier (site-packages is not) and is not to be left out."""
    return part.isidentifier() and part not in LEFT_OUT and not part.startswith("test_")


def choose(modules: Mapping[str, str], config: SampleConfig) -> list[str]:
    """Return the names of the chosen modules (see SampleConfig), in alphabetical order."""
    sizes = {name: len(text.encode()) for name, text in modules.items()}
    chosen, total = [], 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] >= config.min_bytes and total + sizes[name] <= config.max_bytes:
            chosen.append(name)
            total += sizes[name]
    return sorted(chosen)


def module_text(source: bytes) -> str:
    """Return the docstrings of a module's source in order, each under the name of its class or function.

    Empty if there are none, or if Python 3 cannot parse the source (templates, Python 2).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the packages' code
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    parts = [f"{name}\n{text}" if name else text for name, text in _docstrings(tree, "")]
    return "\n\n".join(parts) + "\n" if parts else ""


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = prose(ast.get_docstring(node) or "")
        if len(text) >= MIN_DOCSTRING:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt):
            yield from _docstrings(child, name)


def prose(docstring: str) -> str:
    """Return the docstring without examples at a prompt, and without headings that only introduce such examples.

    Lone surrogates, which UTF-8 cannot encode, become "?".
    """
    kept = []
    for paragraph in docstring.encode(errors="replace").decode().split("\n\n"):
        lines = list(takewhile(lambda line: not line.lstrip().startswith(PROMPTS), paragraph.split("\n")))
        words = "".join(lines).strip(" -=:")
        if words and words not in ("Example", "Examples"):
            kept.append("\n".join(lines).rstrip())
    return "\n\n".join(kept)
