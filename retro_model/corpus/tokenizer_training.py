"""Make the tokenizer: train a byte-level BPE on the documents, or copy a named tokenizer.

    metrics = make_tokenizer(documents, corpus_config, TokenizerConfig(), Path("data/tokenizer"))

The default is a byte-level BPE: rare text falls back to a token per byte, so nothing is unknown in any language. Its
vocabulary is small because the vocabulary takes much of a small model's weights and of each step: at width 256, 4,096
tokens take a fifth of the weights of six layers, 32,768 tokens more than all of them.

Merges never cross the border of a word: letters, digits, punctuation or white space without a break. For each merge
the trainer scans the words that contain the pair, and moves what follows the pair within the word. So training takes
time with the square of a word's length, and a line of Chinese or DNA letters is one word. Training therefore cuts
words longer than MAX_WORD_BYTES. Shorter words stay whole, and encoding never cuts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer

from retro_model.core.artifacts import whole_folder
from retro_model.core.config import Config, optional_path, setting
from retro_model.core.errors import ConfigError
from retro_model.core.progress import report_elapsed
from retro_model.corpus.documents import Corpus, CorpusConfig
from retro_model.corpus.files import NameFilter
from retro_model.corpus.tokenizer import BEGIN, END, PAD, TRAINED, SpecialIds, load, num_rows, save, utf8_size

# Longest word that training keeps whole. Measured on texts without a break: 2,048 changes bytes per token by less than
# 1% and takes 1.1 times as long as 512, which changes them by up to 3%.
MAX_WORD_BYTES = 2048

# What ByteLevel writes for the bytes 0x80 to 0xBF, which continue a character.
_CONTINUATION = "\u00a1-\u00ac\u00ae-\u00bf\u0122-\u0143"


@dataclass(frozen=True)
class TokenizerConfig(Config, section="tokenizer"):
    """`name` is `bpe` to train a tokenizer of `vocab_size` tokens, or a folder or hub name to load one.

    `begin` and `end` are the tokens around each document, if a named tokenizer's special tokens are for other uses, as
    those of chat models are. `train_on` is a folder or file of documents to train on, so that the tokenizer stays as it
    is when the corpus grows. If it is "" or an empty folder, the tokenizer is trained on the corpus.
    """

    name: str = TRAINED
    vocab_size: int = setting(4096, minimum=256 + 3, below=2**31)
    begin: str | None = None  # tokens of a named tokenizer; None: derived from its special tokens
    end: str | None = None
    train_on: str = setting("")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            raise ConfigError(f"tokenizer.name: found '', expected {TRAINED}, a folder or a hub name")

    def of_base(self, base: str) -> "TokenizerConfig":
        """The same settings for a model that is trained already, named by `retrofit.base`; "": none.

        Such a model knows the tokens of its own tokenizer alone, so that replaces one that would be trained.
        """
        return replace(self, name=base) if base and self.name == TRAINED else self


def make_tokenizer(
    documents: Path | str,
    corpus_config: CorpusConfig,
    config: TokenizerConfig,
    folder: Path,
    *,
    name_filter: NameFilter | None = None,
) -> dict[str, float]:
    """Write the configured tokenizer into `folder` and return metrics.

    It is trained on the train split of `documents`, or of `config.train_on` instead, or loaded by name without reading
    documents. Equal documents give equal bytes. Raises DocumentError, ConfigError if `config.train_on` is not there, or
    SourceError if the named tokenizer cannot be loaded.
    """
    metrics: dict[str, float] = {}
    if config.name == TRAINED:
        trained_on = optional_path("tokenizer.train_on", config.train_on) or documents
        corpus = Corpus(trained_on, corpus_config, name_filter)
        backend, special = train(_count_texts(corpus, metrics), config.vocab_size)
    else:
        backend, special = load(config.name, config.begin, config.end)
    with whole_folder(folder) as whole:
        save(whole, backend, special, _short_name(config.name))
    return {"vocabulary": num_rows(backend), **metrics}


def _count_texts(corpus: Corpus, metrics: dict[str, float]) -> Iterator[str]:
    metrics.update(train_documents=0, train_bytes=0)
    for document in corpus.documents("train"):
        metrics["train_documents"] += 1
        metrics["train_bytes"] += utf8_size(document.text)
        yield document.text


def _short_name(name: str) -> str:
    return Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]


def train(texts: Iterable[str], vocab_size: int) -> tuple[Backend, SpecialIds]:
    """Train a byte-level BPE of at most `vocab_size` tokens, with ids 0, 1, 2 for pad, begin and end.

    Time and memory grow linearly with the text, whatever its words are.
    """
    backend = Backend(BPE())
    backend.pre_tokenizer = training_words()
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(ByteLevel.alphabet()),  # all bytes, so that no text is unknown
        show_progress=False,
    )
    with report_elapsed("train the tokenizer"):
        backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return backend, SpecialIds(0, 1, 2)


def training_words() -> PreTokenizer:
    """Return what splits text into the words of the BPE, and cuts those longer than MAX_WORD_BYTES.

    A word is cut from its own start, between characters, so that the pieces are the same wherever the word stands.
    """
    pieces = Regex(f".{{1,{MAX_WORD_BYTES}}}(?![{_CONTINUATION}])")
    return Sequence([ByteLevel(add_prefix_space=False), Split(pieces, "isolated")])
