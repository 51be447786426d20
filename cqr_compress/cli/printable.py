"""Text from files of strangers, such as names of tensors, for the terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what a terminal could obey or not encode: control and format characters, and lone surrogates.

    Line breaks stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter == "\n" or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
