"""Everything that retro raises on purpose.

    RetroError (ValueError)
    |-- ConfigError            the user's fault: a param or an argument
    |-- DocumentError          the corpus's fault: the text that was given
    |-- SourceError            a tokenizer, an encoder or a model that cannot be loaded
    |-- TrainingError          the numbers' fault: a loss or a gradient that is not finite
    `-- ArtifactError          the disk's fault
        |-- MissingArtifactError   not there, or never finished
        |-- DamagedArtifactError   there, and not what was written
        `-- MismatchError          whole, but made from something else

Every message is one line that says what, where, what was expected, what was found and what to
do next: a stage prints it instead of a traceback. What only a programmer can get wrong is an
`assert`.
"""


class RetroError(ValueError):
    """Base of all errors that a user, a disk or a corpus can cause."""


class ConfigError(RetroError):
    """A param or an argument has the wrong type, is out of range, or does not fit another."""


class DocumentError(RetroError):
    """The documents cannot be used as they are."""


class SourceError(RetroError):
    """A named tokenizer, encoder or model cannot be loaded."""


class TrainingError(RetroError):
    """Training met a loss or a gradient that is not finite."""


class ArtifactError(RetroError):
    """Base of what can be wrong with a file or folder that a stage wrote."""


class MissingArtifactError(ArtifactError):
    """The artifact is absent, or the process that wrote it never finished."""


class DamagedArtifactError(ArtifactError):
    """The artifact's bytes are not those that were written."""


class MismatchError(ArtifactError):
    """The artifact was made from other inputs, or by another format version, than the reader expects."""
