r"""Answers of GSM8K and MATH: the gold solutions of GSM8K, and forms written by hand, right and wrong."""

import gzip
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from polyrank.core.errors import DataError
from polyrank.evaluation.metrics import evaluate_predictions
from polyrank.evaluation.metrics.maths import final_answer, final_number, gsm8k_correct, math_correct

DATA = Path(os.environ.get("POLYRANK_DATA", "data")) / "gsm8k" / "test.jsonl.gz"


@pytest.mark.skipif(not DATA.is_file(), reason="POLYRANK_DATA holds no gsm8k")
def test_every_gold_solution_of_gsm8k_gives_its_answer_and_is_right():
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    assert len(solutions) == 1319
    golds = [solution.split("#### ")[1].strip() for solution in solutions]
    assert [final_answer(s) for s in solutions] == golds
    assert [final_number(s) for s in solutions] == [Fraction(g.replace(",", "")) for g in golds]
    assert all(map(gsm8k_correct, solutions, solutions))
    off_by_one = [f"The answer is: {int(g.replace(',', '')) + 1}" for g in golds]
    assert not any(map(gsm8k_correct, off_by_one, solutions))


NUMBERS = [
    ("#### 18", "18", True),
    ("so he has 18.\n#### 18\nThe answer is: 18", "18", True),
    ("The answer is: $18.00", "18", True),
    ("the answer is 18 eggs.", "18", True),
    ("The answer is: 1,234", "1234", True),
    ("The answer is: 1,234,567 dollars", "1234567", True),
    ("The answer is: 50%", "50", True),
    ("The answer is: -3", "-3", True),
    ("The answer is: −3", "-3", True),
    ("The answer is: -$3", "-3", True),
    ("The answer is: $-3$", "-3", True),
    ("The answer is: 3/4", "0.75", True),
    ("The answer is: \\frac{3}{4}", "0.75", True),
    ("The answer is: 2 1/2 hours", "2.5", True),
    ("The answer is: .5", "1/2", True),
    ("The answer is: 5 * 3 = 15", "15", True),
    ("The answer is: x = 15", "15", True),
    ("\\boxed{15} apples", "15", True),
    ("first 3, then 4, in all 7", "7", True),
    ("first the answer is 3. No: the answer is 4.", "4", True),
    ("The answer is: 18", "#### 1,8", False),
    ("The answer is: 17.6", "18", False),
    ("The answer is: 81", "18", False),
    ("The answer is: 3", "-3", False),
    ("The answer is: 1.234", "1234", False),
    ("The answer is: 1,234", "1", False),
    ("The answer is: 3/4", "3", False),
    ("18 eggs, which is 3 more", "18", False),
    ("I do not know", "18", False),
    ("", "18", False),
]


@pytest.mark.parametrize("output, gold, right", NUMBERS)
def test_numbers(output, gold, right):
    assert gsm8k_correct(output, gold) is right


EXPRESSIONS = [
    (r"\boxed{\frac{1}{2}}", r"\frac12", True),
    (r"\boxed{\dfrac{1}{2}}", r"0.5", True),
    (r"\boxed{1/2}", r"\tfrac{1}{2}", True),
    (r"\boxed{2/4}", r"\frac{1}{2}", True),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", True),
    (r"\boxed{2\frac{1}{2}}", r"\frac{5}{2}", True),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt3/2", True),
    (r"\boxed{\frac{-\sqrt{3}}{2}}", r"-\frac{\sqrt{3}}{2}", True),
    (r"Nested: $\boxed{\frac{\sqrt{1+\frac{1}{4}}}{2}}$.", r"\frac{\sqrt{1+\frac14}}{2}", True),
    (r"\boxed{10\text{ cm}}", "10", True),
    (r"\boxed{10\text{ cm}^2}", "10", True),
    (r"\boxed{10\mbox{ inches}}", "10", True),
    (r"\boxed{12 square units}", "12", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{90^{\circ}}", r"90\degree", True),
    (r"\boxed{1{,}000}", "1000", True),
    (r"\boxed{1\,000\,000}", "1,000,000", True),
    (r"\boxed{\$5}", "5", True),
    (r"\boxed{5\%}", "5", True),
    (r"\boxed{x=5}", "5", True),
    (r"\boxed{x \in [1,2]}", "[1,2]", True),
    (r"\boxed{(1, 2]}", "(1,2]", True),
    (r"\boxed{\left(-\infty, \tfrac{1}{2}\right)}", r"(-\infty,0.5)", True),
    (r"\boxed{(0.5, 3)}", r"\left(\frac12,3\right)", True),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
    (r"\boxed{1, 2}", "1,2", True),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\boxed{x^{2}+1}", "x^2 + 1", True),
    (r"\boxed{\text{Monday}}", "Monday", True),
    (r"\fbox{3}", "3", True),
    (r"\boxed 3", "3", True),
    (r"first \boxed{3}, at last \boxed{4}", r"so \boxed{4}", True),
    (r"The answer is: \frac{1}{2}.", r"\boxed{\frac{1}{2}}", True),
    (r"The answer is: $\boxed{7}$.", "7", True),
    ("no box, but 42", "42", True),
    (r"\boxed{(1, 2)}", "(1,2]", False),
    (r"\boxed{[1, 2]}", "(1,2)", False),
    (r"\boxed{(2, 1)}", "(1,2)", False),
    (r"\boxed{\{1, 2, 2\}}", r"\{1,2\}", False),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", False),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{3}", False),
    (r"\boxed{1+x}", "x+1", False),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}", False),
    (r"\boxed{2x}", "2", False),
    (r"\boxed{-5}", "5", False),
    (r"\boxed{1010_2}", "1010", False),
    (r"\boxed{}", "5", False),
    (r"\boxed{5", "6", False),
    (r"\boxed{\frac{1}{0}}", r"\frac{2}{0}", False),
    ("", "5", False),
]


@pytest.mark.parametrize("output, gold, right", EXPRESSIONS)
def test_expressions(output, gold, right):
    assert math_correct(output, gold) is right
    if right and "boxed{" in output and "box" not in gold:
        assert math_correct(rf"\boxed{{{gold}}}", output)


def test_accuracy_is_a_share_in_percent():
    rows = [("a", "The answer is: 4", "#### 4"), ("b", "5", "#### 4"), ("c", "no", "#### 1"), ("d", "#### 8", "#### 8")]
    records = [{"id": i, "input": "", "candidates": [c], "references": [r]} for i, c, r in rows]
    assert evaluate_predictions(records, ["gsm8k_accuracy"])["gsm8k_accuracy"] == 50
    assert evaluate_predictions(records, ["math_accuracy"])["math_accuracy"] == 50


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(DataError, match="gives no number"):
        gsm8k_correct("4", "none")


@pytest.mark.parametrize(
    ("output", "gold"),
    [
        ("#### 1e3", "#### 1000"),
        ("The answer is 2.5E-1", "#### 0.25"),
        ("The answer is ½", "#### 0.5"),
        ("The answer is 2½ cups", "#### 2.5"),
        ("#### ¾", "#### 0.75"),
        ("#### 1\u202f250", "#### 1,250"),  # a narrow no-break space
        ("#### 12\u2009000", "#### 12000"),  # a thin space
        ("#### 1\u00a0000\u00a0000", "#### 1000000"),
        ("#### 4\u200b2", "#### 42"),  # a space of no width
    ],
)
def test_numbers_as_typesetters_and_calculators_write_them(output, gold):
    assert gsm8k_correct(output, gold)


@pytest.mark.parametrize("output", ["There are 3 250 gram bags: #### 3", "She has 2 eggs", "3e and 3 e3"])
def test_what_is_no_such_number_stays_apart(output):
    assert not gsm8k_correct(output, "#### 3000")
