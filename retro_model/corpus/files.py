"""Find the files that hold documents: the pipeline's by their type, those of raw memmaps by a glob.

Both walk a folder in the same way. They follow links to folders and visit each folder once, skip hidden files and
folders, and leave out what cannot be read to an end: named pipes, sockets and devices.
"""

import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from retro_model.core.errors import DocumentError
from retro_model.corpus.readers import SUFFIXES, suffix_of

# Takes a folder, the names of its folders and the names of its files; returns those names that may be read.
NameFilter = Callable[[str, list[str], list[str]], tuple[list[str], list[str]]]


class FoundFiles(NamedTuple):
    """The files that can hold documents, sorted by their name, which is their path below the folder searched.

    `special` names the pipes, sockets and devices among them and `ignored` the files and folders that a NameFilter
    left out; neither are in `files`. `other_files` counts files of other types.
    """

    files: list[tuple[Path, str]]  # and their names
    other_files: int
    special: list[str]
    ignored: list[str]


def find_files(path: Path, name_filter: NameFilter | None = None) -> FoundFiles:
    """Return the files of documents below `path`, or `path` itself if it is a file.

    Ignores DVC's `*.dvc` files. Raises DocumentError if there is no file of documents.
    """
    if path.is_file():
        if not suffix_of(path):
            raise DocumentError(f"{path}: not a file of documents, expected one of {', '.join(SUFFIXES)}")
        return FoundFiles([(path, path.name)], 0, [], [])
    if not path.is_dir():
        raise DocumentError(
            f"{path}: no such folder or file; set `documents` in params.yaml to yours, or make it "
            "(`dvc repro` writes the sample, `dvc pull` fetches what a remote has)"
        )
    found = _search(path, lambda name: bool(suffix_of(Path(name))), name_filter)
    if not found.files:
        counts = (
            (found.other_files, "files of other types"),
            (len(found.special), "pipes, sockets or devices"),
            (len(found.ignored), "that .dvcignore hides"),
        )
        kinds = ", ".join(f"{count} {kind}" for count, kind in counts if count) or "none"
        raise DocumentError(f"{path}: no documents, found {kinds}; expected {', '.join(SUFFIXES)} files")
    return found


def matching_files(folder: Path, glob: str) -> FoundFiles:
    """Return the files in `folder` whose names match `glob`; in it, `**` is any number of folders.

    Raises DocumentError if none matches.
    """
    if not folder.is_dir():
        raise DocumentError(f"{folder}: no such folder; name the one with the text files")
    patterns = Path(glob).parts
    depth = None if "**" in patterns else len(patterns) - 1
    found = _search(folder, lambda name: _matches(Path(name).parts, patterns), depth=depth)
    if not found.files:
        raise DocumentError(f"{folder}: no file matches {glob!r}; give another glob, such as '**/*.md'")
    return found


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Tell whether a path matches a glob, both split into their parts."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (bool(parts) and _matches(parts[1:], patterns))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _search(
    path: Path, wanted: Callable[[str], bool], name_filter: NameFilter | None = None, depth: int | None = None
) -> FoundFiles:
    """Return the files whose names are wanted, in folders up to `depth` levels below `path` (None: in all)."""
    found = FoundFiles([], 0, [], [])
    others = 0
    for folder, left_out, names in _walk(path, name_filter, depth):
        below = Path(folder).relative_to(path).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found.ignored.extend(prefix + name for name in left_out if name.endswith("/") or wanted(prefix + name))
        for name in names:
            file, source = Path(folder, name), prefix + name
            if not wanted(source):
                others += file.suffix != ".dvc"
            elif _is_special(file):
                found.special.append(source)
            else:
                found.files.append((file, source))
    for listed in (found.special, found.ignored):
        listed.sort()
    found.files.sort(key=lambda item: item[1])
    return found._replace(other_files=others)


def _walk(path: Path, name_filter: NameFilter | None, depth: int | None) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder with the names in it that the filter leaves out, and its files.

    Links are followed after all that is below `path` itself, so that a file's own folder gives it its name and not a
    link to that folder. Folders that the filter leaves out end with a slash.
    """
    seen, tops = set[str](), [str(path)]
    for top in tops:  # grows while links are found
        for folder, folders, all_files in os.walk(top, onerror=_unlistable_folder(path)):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if depth is not None and len(Path(folder).relative_to(path).parts) >= depth:
                folders.clear()
            files = [name for name in all_files if not name.startswith(".")]
            left_out: list[str] = []
            if name_filter is not None:
                kept_folders, kept_files = (set(names) for names in name_filter(folder, [*folders], [*files]))
                left_out = [f"{name}/" for name in folders if name not in kept_folders]
                left_out += [name for name in files if name not in kept_files]
                folders[:] = [name for name in folders if name in kept_folders]
                files[:] = [name for name in files if name in kept_files]
            tops += [link for name in folders if os.path.islink(link := os.path.join(folder, name))]
            yield folder, left_out, files


def _unlistable_folder(path: Path) -> Callable[[OSError], NoReturn]:
    def refuse(error: OSError) -> NoReturn:
        raise DocumentError(
            f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it out of {path}"
        ) from error

    return refuse


def _is_special(file: Path) -> bool:
    """Tell whether `file` is a pipe, a socket or a device, which may give bytes without end or none ever."""
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False  # a broken link, for example: reading it is an error that names it
