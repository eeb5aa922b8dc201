"""Texts without a break: what a splitter at spaces takes for one word. Each is generated from a seed."""

import base64

import numpy as np

LETTERS = {
    "words": "etaoinshrdlucmfwypvbgk",
    "Chinese": "".join(map(chr, range(0x4E00, 0x5200))),
    "Japanese": "".join(map(chr, [*range(0x3041, 0x3097), *range(0x4E00, 0x4F00)])),
    "Thai": "".join(map(chr, range(0x0E01, 0x0E2F))),
}
LONGEST = {"words": 9, "Chinese": 3, "Japanese": 4, "Thai": 7}  # letters of a word
KINDS = ("DNA", "protein", "base64", "minified code", *LETTERS)


def unbroken_text(kind: str, num_bytes: int, seed: int = 0) -> str:
    """About `num_bytes` bytes of one kind of text, without white space."""
    random = np.random.default_rng(seed)
    if kind == "DNA":
        return "".join(random.choice(list("ACGT"), num_bytes).tolist())
    if kind == "protein":
        letters = list("LAGVESIKRDTPNQFYMHCW")
        return "".join(random.choice(letters, num_bytes, p=_zipf(len(letters))).tolist())
    if kind == "base64":
        return base64.b64encode(random.bytes(num_bytes * 3 // 4)).decode()
    if kind == "minified code":
        names = _vocabulary(random, "abcdefghijklmnopqrstuvwxyz", 7, 500)
        signs = ["=", "(", ")", "{", "}", ";", ",", ".", "&&", "||", "+", "?", ":", "[", "]", "==="]
        drawn = zip(random.choice(names, num_bytes, p=_zipf(500)), random.choice(signs, num_bytes), strict=True)
        return "".join(name + sign for name, sign in drawn)[:num_bytes]
    words = _vocabulary(random, LETTERS[kind], LONGEST[kind], 2000)
    length = num_bytes // len(LETTERS[kind][0].encode())
    return "".join(random.choice(words, length, p=_zipf(len(words))))[:length]


def _zipf(num: int) -> np.ndarray:  # type: ignore[type-arg]
    shares = 1 / np.arange(1, num + 1)
    return shares / shares.sum()


def _vocabulary(random: np.random.Generator, letters: str, longest: int, num: int) -> list[str]:
    return ["".join(random.choice(list(letters), random.integers(1, longest + 1))) for _ in range(num)]
