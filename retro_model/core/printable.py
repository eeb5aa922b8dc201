"""Text that is safe to show: in a terminal, on a page, in a chart, in a table and in an error message.

File names and documents come from outside. An escape sequence in them could color or clear a terminal, a line feed
could forge a line of output, and a control that turns the direction of writing could make a name look like another.

The library logs (by `logging`, below the logger `retro_model`); programs print, by `say`. `print_log` joins the two.
"""

import logging
import re
import sys

# Controls are shown as the Unicode pictures of them; other characters that must not be shown, as U+FFFD.
_REPLACEMENTS: dict[int, int] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_REPLACEMENTS |= {0x7F: 0x2421}
_REPLACEMENTS |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), 0xFFFD)
_REPLACEMENTS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # direction of writing

_LINE_REPLACEMENTS: dict[int, int] = {
    **_REPLACEMENTS,
    ord("\n"): 0x240A,
    ord("\t"): 0x2409,
    0x2028: 0xFFFD,  # line separator
    0x2029: 0xFFFD,  # paragraph separator
}

_UNDECODED_BYTES = re.compile("[\udc80-\udcff]+")


def printable(text: str) -> str:
    """Return `text` with a visible sign for each control character, surrogate and noncharacter.

    Line feeds and tabs are kept.
    """
    return text.translate(_REPLACEMENTS)


def one_line(text: str) -> str:
    """Return `text`, such as a file name or an error message, as one printable line.

    Bytes of a file name that are not UTF-8 are spelled as backslash escapes, such as `\\xe9`.
    """
    return _UNDECODED_BYTES.sub(_spell_bytes, text).translate(_LINE_REPLACEMENTS)


def _spell_bytes(found: re.Match[str]) -> str:
    return found[0].encode(errors="surrogateescape").decode(errors="backslashreplace")


def say(text: str) -> None:
    """Print `text` as one printable line; characters that standard output cannot encode become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(one_line(text).encode(encoding, errors="replace").decode(encoding), flush=True)


class PrintHandler(logging.Handler):
    """Prints each log record by `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's message."""
        say(record.getMessage())


def print_log() -> None:
    """Print on standard output what the library logs, from level INFO on, in place of the root logger's handlers."""
    logger = logging.getLogger("retro_model")
    logger.handlers, logger.propagate = [PrintHandler()], False
    logger.setLevel(logging.INFO)
