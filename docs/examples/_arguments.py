"""What the examples take on their command lines; what makes no sense there is an error before anything is trained."""

from __future__ import annotations

from argparse import ArgumentTypeError
from math import inf
from pathlib import Path


def whole(text: str, least: int = 0) -> int:
    """A seed, or another integer >= 0."""
    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"got {text!r}, expected an integer >= {least}")
    return int(text)


def count(text: str) -> int:
    """An integer >= 1."""
    return whole(text, 1)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise ArgumentTypeError(f"got {text!r}, expected a number > 0")
    return number


def folder(text: str) -> Path:
    """A folder for pictures, made where it is not there."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"got {text!r}, expected a folder: {error.strerror}") from error
    return Path(text)
