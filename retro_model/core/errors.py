"""The exceptions that retro raises.

    RetroError (ValueError)
    |-- ConfigError            an invalid param or argument
    |-- DocumentError          unusable documents
    |-- SourceError            a tokenizer, an encoder or a model that cannot be loaded
    |-- TrainingError          a loss or a gradient that is not finite
    `-- ArtifactError          a problem with files on disk
        |-- MissingArtifactError   absent or unfinished
        |-- DamagedArtifactError   changed after it was written
        `-- MismatchError          intact, but made from other inputs

Every message is one line that says what failed, where, what was expected, what was found and what to do next;
a stage prints it instead of a traceback. Programming errors are `assert`s.
"""

from retro_model.core.printable import one_line


class RetroError(ValueError):
    """Base of all errors that users, their data or their disks can cause.

    The message is made printable, because it may quote file names and documents.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(RetroError):
    """A param or an argument has the wrong type, is out of range, or contradicts another one."""


class DocumentError(RetroError):
    """The documents cannot be read or used."""


class SourceError(RetroError):
    """A tokenizer, an encoder or a model cannot be loaded or does not fit its use."""


class TrainingError(RetroError):
    """Training met a loss or a gradient that is not finite."""


class ArtifactError(RetroError):
    """Base of the errors about a file or folder that a stage wrote."""


class MissingArtifactError(ArtifactError):
    """The artifact is absent, or its writer did not finish."""


class DamagedArtifactError(ArtifactError):
    """The artifact's bytes differ from those that were written."""


class MismatchError(ArtifactError):
    """The artifact has other inputs or another format version than the reader expects."""
