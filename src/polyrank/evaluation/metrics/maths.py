r"""Exact match of final answers: GSM8K (a number) and MATH (a LaTeX expression).

The answer of a solution is what follows its last marker, whichever kind comes last:

    #### 18            The answer is: 18.            \boxed{\frac{1}{2}}  (or \fbox; braces may nest)

Without any marker it is the last number of the text. GSM8K compares that number by value; MATH compares as in
`_math_forms`. The gold answer is read from the reference (a worked solution, or the bare answer) in the same way.

Source: GSM8K (Cobbe et al. 2021), MATH (Hendrycks et al. 2021); MetaMath's evaluation (Yu et al. 2023), which LoRMA
uses. Differs from MetaMath's scripts: they accept "The answer is: " alone, take the first number behind it, round it
(17.6 scores as 18) and read 1,234,567 as 1,234.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from ...core.errors import DataError
from ._math_forms import normal_form, plain_signs, same_answer, value
from ._registry import metric
from .data_to_text import outputs
from .predictions import Prediction

_SPOKEN = re.compile(r"\banswer\s+is\s*:?", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d/])|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])(?:[-+−]\s?)?[$£€]?\s?(?:{_DIGITS})(?:\s+\d+\s*/\s*\d+|\s*/\s*\d+(?:\.\d+)?)?")
_LATEX_NUMBER = re.compile(r"[-+]?(?:\d+)?\\[dt]?frac\s*(?:\{[-+]?\d+\}\s*\{\d+\}|\d\d)")


def final_answer(text: str, fallback: bool = True) -> str | None:
    """The answer that a solution gives, as it is written there; None where there is no marker (and no number).

    Args:
        fallback: take the last number of a text without a marker.
    """
    found = [(position, answer) for position, answer in (_spoken(text), _hashes(text), _boxed(text)) if answer]
    if found:
        return max(found)[1]
    numbers = _numbers(text) if fallback else []
    return numbers[-1] if numbers else None


def final_number(text: str) -> Fraction | None:
    """The number that a solution gives as its answer; None where it gives none.

    Of several numbers behind the marker the first counts, or the first behind the last = sign.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    numbers = _numbers(answer.rsplit("=", 1)[-1]) or _numbers(answer)
    return _to_fraction(numbers[0]) if numbers else None


def gsm8k_correct(output: str, reference: str) -> bool:
    """Whether an output's final number is the reference's. Raises DataError for a reference without a number."""
    gold = final_number(reference)
    if gold is None:
        raise DataError(f"the reference {reference[-60:]!r} gives no number")
    return final_number(output) == gold


def math_correct(output: str, reference: str) -> bool:
    """Whether an output's final answer is the reference's, in one of its equivalent forms."""
    gold = final_answer(reference, fallback=False)
    answer = final_answer(output)
    return answer is not None and same_answer(answer, reference if gold is None else gold)


@metric("gsm8k_accuracy", better="higher", unit="%", needs=["one_output"], on_request=True)
def gsm8k_accuracy(records: Sequence[Prediction]) -> float:
    """Share of inputs whose final number is the reference's, in percent."""
    return _accuracy(records, gsm8k_correct)


@metric("math_accuracy", better="higher", unit="%", needs=["one_output"], on_request=True)
def math_accuracy(records: Sequence[Prediction]) -> float:
    """Share of inputs whose final answer is the reference's in an equivalent form, in percent."""
    return _accuracy(records, math_correct)


def _accuracy(records: Sequence[Prediction], correct: Callable[[str, str], bool]) -> float:
    texts = outputs(records)
    right = sum(any(correct(text, gold) for gold in r.references) for text, r in zip(texts, records, strict=True))
    return 100.0 * right / len(records)


def _spoken(text: str) -> tuple[int, str]:
    marks = list(_SPOKEN.finditer(text))
    if not marks:
        return -1, ""
    lines = text[marks[-1].end() :].strip().splitlines()
    answer = re.split(r"\.\s|\.$", lines[0].strip())[0] if lines else ""
    return marks[-1].start(), answer.strip()


def _hashes(text: str) -> tuple[int, str]:
    start = text.rfind("####")
    lines = text[start + 4 :].strip().splitlines() if start >= 0 else []
    return start, lines[0].strip() if lines else ""


def _boxed(text: str) -> tuple[int, str]:
    """The content of the last box whose braces close; \\boxed 5 is taken as well."""
    for match in reversed(list(_BOXED.finditer(text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,]+", rest)
            if word:
                return match.start(), word[0]
            continue
        depth = 0
        for i, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return match.start(), rest[1:i].strip()
    return -1, ""


def _numbers(text: str) -> list[str]:
    """Numbers as they are written, in order: 1,234  -$3.50  3/4  2 1/2  \\frac{1}{2}."""
    text = plain_signs(text).replace("\\$", "$").replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    found = [(match.start(), match.end(), match[0]) for match in _LATEX_NUMBER.finditer(text)]
    covered = [(start, end) for start, end, _ in found]
    for match in _NUMBER.finditer(text):
        if not any(start < match.end() and match.start() < end for start, end in covered):
            found.append((match.start(), match.end(), match[0]))
    return [written for _, _, written in sorted(found)]


def _to_fraction(written: str) -> Fraction | None:
    return value(normal_form(re.sub(r"[$£€]\s?|(?<=[-+−])\s", "", written)))
