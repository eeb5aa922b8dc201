"""Keep finished parts by content, so that a run makes only what no earlier run has made.

    .retro/parts/                                 a folder that runs, experiments and clones may share
        lock                                      held shared by every run that uses the folder
        embeddings/<settings>-<content>/          a part of a job of this kind, an artifact

`settings` is a digest of all that the parts of a job have in common: its facts, its code, its libraries. Each process
that makes parts computes it for itself. `content` is a digest of what this part was made from. A killed run continues
from the parts that it finished, because they are kept here while it runs.

A part consists of items, such as the chunks of an embeddings part, and `keys.npy` holds a digest of each. If a part is
not here, because a document was added to it, most of its items are in other parts with the same settings: `KeptParts`
finds them, and only the others are made. What knn keeps is different: retro_model.search.earlier describes it.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import DESCRIPTION, NO_LOCKS, Artifact, ArtifactWriter, file_digest, save_array
from retro_model.core.errors import ArtifactError, DamagedArtifactError
from retro_model.jobs.job import Part, delete_leftovers, work_or_temporary

logger = logging.getLogger(__name__)

KEYS = "keys.npy"
SETTINGS = "settings"

Keys = npt.NDArray[np.uint64]  # (items, 2): 128-bit digests


@dataclass(frozen=True)
class Parts:
    """A folder of parts. When a run ends, the parts used longest ago are deleted until the others fit `most_bytes`."""

    folder: Path
    most_bytes: int


@contextlib.contextmanager
def open_parts(parts: Parts | None, kind: str, out: Path) -> Iterator[Path]:
    """Yield the folder for parts of this kind; without `parts`, a temporary one beside `out`.

    Nothing is deleted from the folder while another process uses it. A file system without locks keeps everything.
    """
    if parts is None:
        with work_or_temporary(None, out) as folder:
            yield folder
        return
    folder = parts.folder.absolute() / kind
    folder.mkdir(parents=True, exist_ok=True)
    with (parts.folder / "lock").open("a") as stream:
        if _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for other in filter(Path.is_dir, parts.folder.iterdir()):
                delete_leftovers(other)
        _lock(stream, fcntl.LOCK_SH)
        yield folder
        if _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _delete_oldest(parts)


def _lock(stream: IO[str], kind: int) -> bool:
    """Lock the file; return False if another process holds it, or if the file system has no locks."""
    try:
        fcntl.flock(stream, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _delete_oldest(parts: Parts) -> None:
    found = []
    for part in parts.folder.glob("*/*"):
        if (part / DESCRIPTION).is_file():
            found.append((part.stat().st_mtime_ns, part, sum(file.stat().st_size for file in part.iterdir())))
    total, deleted = sum(size for _, _, size in found), 0
    for _, part, size in sorted(found):
        if total <= parts.most_bytes:
            break
        doomed = part.rename(part.with_name(f"{part.name}.partial"))  # a kill leaves no half of a part
        shutil.rmtree(doomed)
        total, deleted = total - size, deleted + size
    if deleted:
        gigabytes = f"{deleted / 1e9:.2g} GB of parts, to keep {parts.most_bytes / 1e9:g} GB"
        logger.info(f"{parts.folder}: deleted {gigabytes} (runtime.parts_gb)")


# ---- what a part is made from ----------------------------------------------------------------------------------------


def settings_digest(code: str, libraries: Iterable[str], facts: dict[str, Any]) -> str:
    """Return a digest of what all parts of a job have in common; the job's facts hold it under SETTINGS.

    `code` is a `code_digest`, `libraries` names installed distributions whose versions decide the bytes of a part.
    """
    return digest({"facts": facts, "code": code, "libraries": {name: _version(name) for name in libraries}})


_version = functools.cache(importlib.metadata.version)  # it reads a file


def code_digest(*names: str) -> str:
    """Return a digest of the source files of modules and packages of ours.

    Compute it when the code is imported: the files may change while the process runs.
    """
    listed = []
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        file = Path(spec.origin)
        files = sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]
        listed += [(name, path.relative_to(file.parent).as_posix(), file_digest(path)) for path in files]
    return digest(listed)


def digest(value: object) -> str:
    """Return the sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def part_name(settings: str, content: str) -> str:
    """Return the name of a part's folder; the part's facts have the whole digests."""
    return f"{settings[:16]}-{content[:32]}"


def keys_of(items: Iterable[bytes]) -> Keys:
    """Return the digest of each item (items, 2)."""
    digests = b"".join(hashlib.blake2b(item, digest_size=16).digest() for item in items)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def write_keys(writer: ArtifactWriter, keys: Keys) -> None:
    """Add the keys of a part's items to the part."""
    save_array(writer.folder / KEYS, keys)
    writer.add_file(KEYS)


def _read_keys(part: Artifact) -> Keys:
    try:
        keys: Keys = np.load(part.folder / KEYS, allow_pickle=False)
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise DamagedArtifactError(f"{part.folder / KEYS} cannot be read ({error})") from error
    return keys


# ---- items of other parts --------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A part that has some of the wanted items: its item `items[i]` is the wanted item `places[i]`."""

    part: str
    items: IntArray
    places: IntArray


def intact(sources: Iterable[Source], folder: Path, kind: str, keys: Keys) -> Iterator[tuple[Artifact, Source]]:
    """Yield the parts of `sources`, with their items that have the wanted `keys`.

    Leaves out damaged parts: what they hold is made again.
    """
    for source in sources:
        try:
            part = Artifact.open(folder / source.part, kind)
            same = (_read_keys(part)[source.items] == keys[source.places]).all(axis=1)
        except (ArtifactError, IndexError) as error:
            logger.warning(f"{source.part}: its items are made again, what was there is of no use ({error})")
            continue
        yield part, Source(source.part, source.items[same], source.places[same])


class KeptParts:
    """Describes the parts that a run wants, and finds the items of those that are not in `folder`.

    Of the `wanted` items, `found` are in other parts and `made` are in none; the rest is in parts that are there.
    """

    def __init__(self, folder: Path, kind: str, settings: str) -> None:
        self.wanted = self.found = self.made = 0
        self._folder, self._kind, self._settings = folder, kind, settings
        self._known: _KnownItems | None = None

    def part(self, content: str, arguments: tuple[Any, ...], num_items: int, keys: Callable[[], Keys]) -> Part:
        """Return the part that is made from `content`, a digest; `keys` returns the keys of its items.

        The job's `make` gets `arguments`, then where items of the part are found (a list of Source), then facts for the
        part to record.
        """
        facts = {"content": content}
        name = part_name(self._settings, content)
        sources: list[Source] = []
        self.wanted += num_items
        if not (self._folder / name / DESCRIPTION).is_file():
            if self._known is None:
                self._known = _KnownItems(self._folder, self._kind, part_name(self._settings, ""))
            sources = self._known.find(keys()) if len(self._known) else []
            num_found = sum(len(source.items) for source in sources)
            self.found, self.made = self.found + num_found, self.made + num_items - num_found
        return Part(name, (*arguments, sources, facts), facts)


class _KnownItems:
    """The items of all finished parts in `folder` whose name begins with `prefix`. Memory: 16 bytes for each."""

    def __init__(self, folder: Path, kind: str, prefix: str) -> None:
        self._parts = [path.parent.name for path in sorted(folder.glob(f"{prefix}*/{DESCRIPTION}"))]
        heads, numbers, items = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for number, name in enumerate(self._parts):
            try:
                keys = _read_keys(Artifact.open(folder / name, kind, verify=False))
            except ArtifactError:
                continue  # damaged; `intact` would refuse it too
            heads.append(keys[:, 0])
            numbers.append(np.full(len(keys), number, np.int32))
            items.append(np.arange(len(keys), dtype=np.int32))
        order = np.argsort(np.concatenate(heads), kind="stable")
        self._heads = np.concatenate(heads)[order]  # the first half of each key
        self._numbers, self._items = np.concatenate(numbers)[order], np.concatenate(items)[order]

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, keys: Keys) -> list[Source]:
        """Return which parts hold items with these keys. Compares the first half of a key; `intact` compares both."""
        positions = np.minimum(np.searchsorted(self._heads, keys[:, 0]), len(self) - 1)
        places = np.flatnonzero(self._heads[positions] == keys[:, 0])
        numbers, items = self._numbers[positions[places]], self._items[positions[places]]
        return [
            Source(self._parts[number], items[numbers == number], places[numbers == number])
            for number in np.unique(numbers).tolist()
        ]
