r"""When two answers written in LaTeX or plain text are the same: a normal form, exact rational values, brackets.

Own code: the published MATH numbers rest on string forms (Hendrycks et al. 2021), which a symbolic checker such as
math-verify (sympy, an ANTLR grammar, time limits by signals) does not reproduce: it takes 1 + x for x + 1 and \sqrt{12}
for 2\sqrt{3}. Here those stay different, as there. Differs from there: numbers are compared by value (0.5, 1/2,
\frac12, 2/4, 50.0 and 50), thousands separators, mixed numbers, \{sets\} in any order.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SPACES = re.compile(r"\\[!,;: ]|~|\\quad|\\qquad|\\displaystyle|\\limits")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textrm|textit|mathit|operatorname)\s*\{([^{}]*)\}")
_WORD_UNIT = re.compile(r"(?<=[\d}.)])\s+[A-Za-z]{2,}\.?(?:\s+[A-Za-z]{2,}\.?)*(?:\^\{?\d\}?)?$")
_TEXT_UNIT = re.compile(r"(?<=[\w}.)])\s*\\(?:text|mbox|mathrm|textrm)\s*\{\s*[A-Za-z ./]+\s*\}(?:\^\{?\d\}?)?$")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°")
_SIDE = re.compile(r"^(?:[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?)\s*(?:=|\\in)\s*")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_SCIENTIFIC = re.compile(rf"[-+]?{_NUMBER}[eE][-+]?\d{{1,3}}")
_WHITE = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")  # no-break, thin and other spaces of typesetting
_UNSEEN = re.compile("[\u200b-\u200d\u2060\ufeff]")
_FRACTION = re.compile(rf"([-+]?)({_NUMBER})?\\frac\{{([-+]?{_NUMBER})\}}\{{([-+]?{_NUMBER})\}}")
_PAIRS = {"(": ")]", "[": ")]"}


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are the same number, the same brackets around the same entries, or the same normal form."""
    first, second = normal_form(first), normal_form(second)
    if first == second:
        return first != ""
    values = value(first), value(second)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    return _same_entries(first, second)


def plain_signs(text: str) -> str:
    """Typeset signs as they are typed: spaces of any width as a space, no joiners, one half as 1/2, 2 and a half as
    2 1/2, the minus sign as a hyphen."""
    text = _UNSEEN.sub("", _WHITE.sub(" ", text.replace("−", "-")))
    written: list[str] = []
    for sign in text:
        form = unicodedata.normalize("NFKC", sign) if unicodedata.decomposition(sign).startswith("<fraction>") else ""
        if "\u2044" in form and not form.endswith("\u2044"):
            space = " " if written and written[-1][-1:].isdigit() else ""
            written.append(space + form.replace("\u2044", "/"))
        else:
            written.append(sign.replace("\u2044", "/"))
    return "".join(written)


def normal_form(text: str) -> str:
    """One spelling for all of an answer: no spaces, units, degree, currency or percent signs, no delimiters."""
    text = plain_signs(text).strip().replace("\\\\", "\0")  # \\ ends a matrix row
    for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left):
            text = text[len(left) : -len(right)].strip()
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "").replace("{,}", ",")
    text = text.strip().rstrip(".").rstrip()
    text = _TEXT_UNIT.sub("", _DEGREES.sub("", text))
    text = _SPACES.sub(" ", text.replace("\\left", "").replace("\\right", ""))
    text = _WORD_UNIT.sub("", _TEXT.sub(r" \1 ", text).strip())
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", ",", text)  # 1 000 and 1\,000
    text = _SIDE.sub("", text)
    text = re.sub(r"(?<=\d)\s+(?=\d+\s*/\s*\d)", "+", text)  # 2 1/2
    text = "".join(text.split()).replace("\0", "\\\\")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\\cdot", "*").replace("\\times", "*")
    text = re.sub(r"\\ne(?![a-z])", r"\\neq", text).replace("\\{", "\1").replace("\\}", "\2")
    text = _arguments(text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return _slash(re.sub(r"([_^])\{(.)\}", r"\1\2", text))


def value(form: str) -> Fraction | None:
    """The rational number that a normal form is; None for anything else."""
    if re.fullmatch(rf"[-+]?{_NUMBER}", form):
        return Fraction(form)
    if _SCIENTIFIC.fullmatch(form):
        return Fraction(form)  # 1e3, 2.5E-4
    match = _FRACTION.fullmatch(form)
    if match is None:
        mixed = re.fullmatch(r"([-+]?)(\d+)\+(\d+)/(\d+)", form)
        if mixed is None or not int(mixed[4]):
            return None
        size = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
    else:
        if not Fraction(match[4]):
            return None
        size = Fraction(match[2] or 0) + Fraction(match[3]) / Fraction(match[4])
        mixed = match
    return -size if mixed[1] == "-" else size


def split_top(text: str, separator: str = ",") -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{\1") - (character in ")]}\2")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _same_entries(first: str, second: str) -> bool:
    """Tuples, intervals and lists entry by entry, in order; sets in any order."""
    if first[:1] == second[:1] == "\1" and first[-1:] == second[-1:] == "\2":
        left, right = split_top(first[1:-1]), split_top(second[1:-1])
        if len(left) != len(right):
            return False
        for entry in left:
            match = next((i for i, other in enumerate(right) if same_answer(entry, other)), None)
            if match is None:
                return False
            right.pop(match)
        return True
    same_brackets = first[:1] == second[:1] and first[-1:] == second[-1:]
    if same_brackets and first[-1:] in _PAIRS.get(first[:1], ""):
        return _in_order(split_top(first[1:-1]), split_top(second[1:-1]), 1)
    return _in_order(split_top(first), split_top(second), 2)


def _in_order(left: list[str], right: list[str], fewest: int) -> bool:
    return len(left) == len(right) >= fewest and all(same_answer(a, b) for a, b in zip(left, right, strict=True))


def _arguments(text: str) -> str:
    r"""Braces around arguments that were written without: \frac12 -> \frac{1}{2}, \sqrt3 -> \sqrt{3}."""
    argument = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[a-z]+|[^\\{}])"

    def braced(part: str) -> str:
        return f"{{{_arguments(part[1:-1] if part.startswith('{') else part)}}}"

    text = re.sub(r"\\sqrt" + r"(?=[^{\[])" + argument, lambda m: f"\\sqrt{braced(m[1])}", text)
    text = re.sub(r"\\frac" + argument + argument, lambda m: f"\\frac{braced(m[1])}{braced(m[2])}", text)
    return re.sub(r"\\frac\{-((?:[^{}+-]|\{[^{}]*\})+)\}", r"-\\frac{\1}", text)


def _slash(text: str) -> str:
    r"""a/b as \frac{a}{b} where each side is one term; 2+1/2 (a mixed number) is left to `value`."""
    parts = split_top(text, "/")
    sign = "-" if text.startswith("-") else ""
    if len(parts) != 2 or re.fullmatch(r"[-+]?\d+\+\d+/\d+", text):
        return text
    top, bottom = parts[0].removeprefix("-"), parts[1]
    for part in (top, bottom):
        if not part or any(len(split_top(part, s)) > 1 for s in "+-,=<>"):
            return text
    if bottom.startswith("(") and bottom.endswith(")"):
        bottom = bottom[1:-1]
    return f"{sign}\\frac{{{top}}}{{{bottom}}}"
