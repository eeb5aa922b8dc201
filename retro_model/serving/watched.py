"""The files that a server reads from, checked before it starts and again whenever one was touched.

files = WatchedFiles([model, chunks, embeddings, index])
files.check()       # before each answer: a few microseconds for each file

Arrays are read through memory maps, so a file that changes on disk would change what is served, without a word.
"""

from collections.abc import Iterable
from pathlib import Path

from retro_model.core.artifacts import Artifact
from retro_model.core.errors import DamagedArtifactError, RetroError


class FilesChangedError(RetroError):
    """A file was changed while it was served. What is in memory can no longer be trusted, until a new start."""


class WatchedFiles:
    """The files of artifacts, which are opened without `verify`: the first check reads all of them."""

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        self._files = [(artifact, name) for artifact in artifacts for name in artifact.files]
        self._stamps: list[tuple[int, int, int]] = []
        self._changed = ""  # what was found to be changed; it stays, whatever is put back

    def check(self) -> None:
        """Raise DamagedArtifactError at the first call, FilesChangedError later, unless all bytes are those written.

        Later calls read only files whose size or time has changed.
        """
        if not self._stamps:
            stamps = [_stamp(artifact.folder / name) for artifact, name in self._files]  # before they are read
            for artifact, name in self._files:
                artifact.verify(name)
            self._stamps = stamps
        for number, (artifact, name) in enumerate(self._files):
            if not self._changed and (stamp := _stamp(artifact.folder / name)) != self._stamps[number]:
                self._check_again(number, stamp)
        if self._changed:
            raise FilesChangedError(f"{self._changed} while it was served; start `retro serve` again")

    def _check_again(self, number: int, stamp: tuple[int, int, int]) -> None:
        """Look at a file that was touched. If it was replaced, the maps are of a file that nobody can read again."""
        artifact, name = self._files[number]
        try:
            artifact.verify(name)
        except DamagedArtifactError:
            self._changed = f"{artifact.folder / name} was changed"
        else:
            if stamp[0] != self._stamps[number][0]:
                self._changed = f"{artifact.folder / name} was replaced"
            self._stamps[number] = stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    """The file itself, its size and its time; zeros if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
