"""How a question is put to a model, and when its answer is right.

A question with options is put in two ways: plainly, where each option's likelihood as the answer is compared, and with lettered
options, where the letter that the model generates counts. A question without options is answered freely.
"""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the letter."
VIDEO = "<video>\n"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = {"a", "an", "the"}
_LETTER = re.compile(r"\(?\b([A-Z])\b")
_NAMED = re.compile(r"\b(?i:answer|option|choice)\s*(?i:is|:)?\s*:?\s*\(?([A-Z]\b|[a-z]\b(?=[).:\s]*$))")
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")


def plain(question: str) -> str:
    """What a person says before the answer, with the video first."""
    return f"{VIDEO}{question.strip()}"


def lettered(question: str, options: Sequence[str]) -> str:
    """The same with its options, one a line as `A. option`, and what to do."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{plain(question)}\n{lines}\n{INSTRUCTION}"


def letter_of(text: str, options: Sequence[str]) -> int | None:
    """Number of the option that a generated text names: None where it names none.

    The letter after "answer is" or "option" counts, else the text's first capital that stands alone as a word and is an option's
    letter (so "A man" would be one: the beginning of an option's text is looked for before it), else the only option whose words
    the text holds.
    """
    known = LETTERS[: len(options)]
    text = text.strip()
    if text.rstrip(").:").lstrip("(").upper() in set(known):
        return known.index(text.rstrip(").:").lstrip("(").upper())
    named = [letter.upper() for letter in _NAMED.findall(text) if letter.upper() in known]
    if named:
        return known.index(named[-1])
    whole = [number for number, option in enumerate(options) if words(text) == words(option)]
    if len(whole) == 1:
        return whole[0]
    letter = next((letter for letter in _LETTER.findall(text) if letter in known), None)
    if letter is not None:
        return known.index(letter)
    held = [number for number, option in enumerate(options) if _holds(words(text), words(option))]
    return held[0] if len(held) == 1 else None


def words(text: str) -> tuple[str, ...]:
    """Words and numbers in small letters, without articles and signs; numbers up to ten as digits."""
    found = (word for word in _WORD.findall(text.lower()) if word not in _ARTICLES)
    return tuple(str(NUMBERS.index(word)) if word in NUMBERS else word for word in found)


def exact(text: str, answer: str) -> bool:
    """Whether a text is the answer, up to capitals and blanks around it and a full stop behind it."""
    return text.strip().rstrip(".").strip().lower() == answer.strip().rstrip(".").strip().lower()


def relaxed(text: str, answer: str) -> bool:
    """Whether a text says the answer: its words stand in the text one after the other, or it is a number within 5 % of it."""
    said, wanted = words(text), words(answer)
    if len(wanted) == 1 and len(said) == 1 and _number(wanted[0]) is not None and _number(said[0]) is not None:
        return abs(_number(said[0]) - _number(wanted[0])) <= 0.05 * abs(_number(wanted[0]))
    return bool(wanted) and _holds(said, wanted)


def _holds(said: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return bool(wanted) and any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))


def _number(word: str) -> float | None:
    return float(word) if word[0].isdigit() else None
