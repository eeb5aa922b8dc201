"""Text for a first run without a network: the docstrings of Python's own library and of installed packages.

    write_sample(Path("data/sample"), SampleConfig())

writes one document a module, `sklearn.linear_model._ridge.txt`, with the docstrings of the module, its
classes and functions in source order. Source files are parsed and never imported, so nothing of them runs.

Examples at a prompt (`>>>`) are left out: what is to be learned here is prose. Packages whose modules
say the same thing in several places (an argument that many estimators share) are a fair ground for
retrieval: there is something to find.
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
# Tests, vendored copies of other packages, and what is kept for its age only.
TESTS = ("test", "tests", "testing", "_testing", "idle_test", "conftest")
VENDORED = ("_vendor", "_vendored", "vendor", "externals", "extern", "ensurepip")
OLD = ("lib2to3", "idlelib", "turtledemo", "distutils")
LEFT_OUT = frozenset((*TESTS, *VENDORED, *OLD))


@dataclass(frozen=True)
class SampleConfig(Config, section="sample"):
    """Which text: `python` is the standard library, anything else an installed package or a part of one.

    Modules with less than `min_bytes` of text are skipped. Of what is left, modules are chosen by a hash
    of their names until they would exceed `max_bytes`, so that a new release of a package changes what
    the sample says and hardly how long a run takes.
    """

    packages: tuple[str, ...] = (STANDARD_LIBRARY, "sklearn")
    min_bytes: int = setting(1000, minimum=1)
    max_bytes: int = setting(2_900_000, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.packages or len(set(self.packages)) != len(self.packages):
            raise ConfigError(f"sample.packages: found {list(self.packages)}, expected one package or more, each once")


def write_sample(folder: Path, config: SampleConfig) -> dict[str, int]:
    """Writes the documents into `folder`, which is replaced, and returns how many documents and bytes.

    Raises ConfigError for a package that is not installed, DocumentError where no module has text enough.
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
    """Where the package's source is: a folder, or a file for a single module. Nothing is imported."""
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
    """Yields the dotted name and the text of each module below `root`, in the order of their paths."""
    base = root if root.is_dir() else root.parent
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    prefix = () if package == STANDARD_LIBRARY else tuple(package.split("."))
    for file in progress(files, f"sample {package}", total=len(files), unit="module"):
        parts = file.relative_to(base).with_suffix("").parts
        if all(_wanted(part) for part in parts):
            inside = [part for part in parts if part != "__init__"] if root.is_dir() else []
            yield ".".join([*prefix, *inside]), module_text(file.read_bytes())


def _wanted(part: str) -> bool:
    """Whether a folder or file name can be part of a module's name (site-packages cannot) and is no test."""
    return part.isidentifier() and part not in LEFT_OUT and not part.startswith("test_")


def choose(modules: Mapping[str, str], config: SampleConfig) -> list[str]:
    """The names of modules with text enough, up to the bytes allowed, in alphabetical order."""
    sizes = {name: len(text.encode()) for name, text in modules.items()}
    chosen, total = [], 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] >= config.min_bytes and total + sizes[name] <= config.max_bytes:
            chosen.append(name)
            total += sizes[name]
    return sorted(chosen)


def module_text(source: bytes) -> str:
    """The docstrings of a module's source in order, each under the name of what it describes.

    Empty where there is none, and for a template or for Python 2, which no Python 3 can import either.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escapes
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
    """The docstring without its examples at a prompt, and without the heading that stood above them only.

    Half surrogates, which no file can hold, become "?".
    """
    kept = []
    for paragraph in docstring.encode(errors="replace").decode().split("\n\n"):
        lines = list(takewhile(lambda line: not line.lstrip().startswith(PROMPTS), paragraph.split("\n")))
        words = "".join(lines).strip(" -=:")
        if words and words not in ("Example", "Examples"):
            kept.append("\n".join(lines).rstrip())
    return "\n\n".join(kept)
