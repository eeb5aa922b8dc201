"""Write documents about people, places and things that do not exist, so that no model can have read about them.

    python benchmarks/made_up_facts.py data/made-up-facts
    dvc exp run -S documents=data/made-up-facts ...

Each document is a register with entries about several subjects, in a register's own order and wording. A subject has
the same facts in every register that lists it, and some registers are held out. So what an entry of a held-out
register says can be known from the entries in other registers, which is what retrieval finds, and from nowhere else.
With another seed, everything is made up anew; equal seeds give equal bytes.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

MAKE_BENCH: dict[str, list[str]] = {"full": [], "quick": []}  # writes text, measures nothing
SUBJECTS_PER_DOCUMENT = 12
DOCUMENTS_PER_SUBJECT = 5


def words(text: str) -> list[str]:
    """Return what commas part."""
    return text.split(", ")


CONSONANTS = words("b, br, d, dr, f, g, gl, h, k, kr, l, m, n, p, pl, r, s, st, t, tr, v, z")
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in "aeiou"]
TRADES = words(
    "glassblower, cartographer, beekeeper, clockmaker, ferryman, weaver, dyer, mason, printer, falconer, tanner"
)
GOODS = words(
    "amber, barley, chalk, copper, cork, flax, honey, indigo, lamp-oil, paper, pepper, salt, saffron, slate, tallow, "
    "tin, wax, wool"
)
COLORS = words("ash-gray, cobalt, crimson, ivory, moss-green, ochre, pitch-black, russet, silver, violet")
MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
SHAPES = words(
    "a crescent, a broken wheel, two crossed oars, a heron, a seven-pointed star, a closed eye, a ladder, an open hand"
)

# Each fact in three wordings. A register prefers one of them.
WORDINGS: tuple[tuple[str, str, str], ...] = (
    ("{name} was born in {birthplace} in {year}.", "The year {year} saw the birth of {name}, in {birthplace}.",
     "Born: {year}, {birthplace}."),
    ("For {span} years {short} worked as a {trade}.", "{short}'s trade was that of a {trade}, for {span} years.",
     "Trade: {trade}, {span} years."),
    ("{short} learned this from {teacher} of {town}.", "It was {teacher} of {town} who taught {short}.",
     "Teacher: {teacher} of {town}."),
    ("The house of {short} stood beside the river {river} and had a {color} door.",
     "On the river {river} one can still see the house of {short}, known by its {color} door.",
     "House: on the river {river}; door: {color}."),
    ("{short} sold {goods} and {other_goods} at the market of {market}.",
     "At the market of {market}, {short} was known for {goods} and {other_goods}.",
     "Sold: {goods}, {other_goods} (market of {market})."),
    ("The seal of the family shows {shape} above the number {number}.",
     "On letters one finds the family's seal: {shape} above the number {number}.", "Seal: {shape}; number {number}."),
    ("In {month} of {marriage} {short} married {spouse}, who came from {spouse_town}.",
     "{spouse} from {spouse_town} became the spouse of {short} in {month} of {marriage}.",
     "Married: {spouse} of {spouse_town}, {month} {marriage}."),
    ("They had {children} children, and the eldest was called {eldest}.",
     "Of {children} children, {eldest} was the eldest.", "Children: {children}; eldest: {eldest}."),
    ("{short} died in {death} and left {coins} coins to the school of {school}.",
     "The school of {school} received {coins} coins when {short} died in {death}.",
     "Died: {death}; to the school of {school}: {coins} coins."),
)  # fmt: skip


def make_name(source: random.Random, syllables: int) -> str:
    """Return a name of so many syllables."""
    return "".join(source.choice(SYLLABLES) for _ in range(syllables)).capitalize()


def make_subject(source: random.Random) -> dict[str, object]:
    """Return the facts about one person, by the names that WORDINGS use."""
    name, place = (lambda: make_name(source, 2)), (lambda: make_name(source, 3))
    short, born = make_name(source, 3), source.randrange(1400, 1800)
    goods, other_goods = source.sample(GOODS, 2)
    return {
        "name": f"{short} {make_name(source, 3)}", "short": short, "birthplace": place(), "year": born,
        "span": source.randrange(11, 50), "trade": source.choice(TRADES), "teacher": f"{name()} {place()}",
        "town": place(), "river": name(), "color": source.choice(COLORS), "goods": goods, "other_goods": other_goods,
        "market": place(), "shape": source.choice(SHAPES), "number": source.randrange(100, 1000),
        "month": source.choice(MONTHS), "marriage": born + source.randrange(19, 40), "spouse": f"{name()} {place()}",
        "spouse_town": place(), "children": source.randrange(2, 12), "eldest": name(),
        "death": born + source.randrange(50, 95), "coins": source.randrange(1000, 10000), "school": place(),
    }  # fmt: skip


def make_documents(num_documents: int, seed: int) -> list[str]:
    """Return the texts of the registers."""
    source = random.Random(seed)
    num_subjects = num_documents * SUBJECTS_PER_DOCUMENT // DOCUMENTS_PER_SUBJECT
    subjects = [make_subject(source) for _ in range(num_subjects)]
    listed: list[int] = []
    for _ in range(DOCUMENTS_PER_SUBJECT):
        listed += source.sample(range(num_subjects), num_subjects)
    return [
        write_register(
            source, [subjects[place] for place in dict.fromkeys(listed[first : first + SUBJECTS_PER_DOCUMENT])]
        )
        for first in range(0, len(listed), SUBJECTS_PER_DOCUMENT)
    ]


def write_register(source: random.Random, subjects: Sequence[dict[str, object]]) -> str:
    """Return a title and an entry for each subject: all facts, in the register's order and mostly its wording."""
    order = source.sample(range(len(WORDINGS)), len(WORDINGS))
    preferred = source.randrange(3)
    paragraphs = [f"Register of {make_name(source, 3)}, volume {source.randrange(1, 30)}"]
    for subject in subjects:
        wordings = [preferred if source.random() < 0.7 else source.randrange(3) for _ in order]
        sentences = [WORDINGS[fact][wording].format(**subject) for fact, wording in zip(order, wordings, strict=True)]
        paragraphs.append(" ".join([f"{subject['name']}.", *sentences]))
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Writes the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts = make_documents(arguments.documents, arguments.seed)
    arguments.folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (arguments.folder / f"register-{number:04d}.txt").write_text(text, encoding="utf-8")
    print(f"{arguments.folder}: {len(texts):,} documents, {sum(map(len, texts)):,} letters")


if __name__ == "__main__":
    main()
