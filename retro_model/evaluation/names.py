"""What an evaluation's models and columns are called where people read them: the report, its charts, the summary.

names = ModelNames.of("models/smollm2")
names.column("baseline")          # "base: smollm2 as it is"
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelNames:
    """The model without retrieval, to be read after "the", and the model with it."""

    plain: str
    retrieving: str
    base: str  # the base's name; "": none

    @classmethod
    def of(cls, base: str) -> "ModelNames":
        """The names with this base, a folder or a name on the hub as in `retrofit.base`; "": RETRO."""
        return cls("base", "the base with adapters", Path(base).name) if base else cls("plain decoder", "RETRO", "")

    def column(self, column: str) -> str:
        """What stands in a column of the evaluation."""
        return {
            "baseline": f"base: {self.base} as it is" if self.base else self.plain,
            "mixed": f"{self.plain} mixed with the bigram rule over the same neighbors",
            "off": f"{self.retrieving}, retrieval off",
            "on": f"{self.retrieving}, retrieval on",
            "random": f"{self.retrieving}, random neighbors",
            "on_train": f"{self.retrieving}, neighbors from the train chunks",
            "compared": "the compared model",
        }[column]
