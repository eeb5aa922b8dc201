"""Text without control characters, for the page and for its charts."""

# Control characters are not allowed in HTML, and matplotlib fails on some: show the Unicode pictures of them instead.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), 0xFFFD)


def printable(text: str) -> str:
    """`text` with each control character, surrogate and noncharacter replaced by a visible sign."""
    return text.translate(_PICTURES)
