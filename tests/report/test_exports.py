"""LaTeX and CSV of a small record, checked by hand."""

import csv
import dataclasses
import io

import pytest

from polyrank.core.errors import ConfigError
from polyrank.core.records import Metric, Row, new_record, write_record
from polyrank.report import write_report
from polyrank.report.exports import csv_table, latex_table, latex_text
from polyrank.report.tables import build_table


@pytest.fixture
def table():
    metrics = {"bleu": Metric("BLEU", "higher"), "pairwise_bleu": Metric("", "lower", "pairwise"), "n": Metric("bytes")}
    rows = [
        Row("A_1", {"bleu": 10.5, "pairwise_bleu": 3.0, "n": 2048}, 0, {"K": 3}),
        Row("A_1", {"bleu": 12.5, "pairwise_bleu": 3.0, "n": 2048}, 1, {"K": 3}),
        Row("B & C", {"bleu": 20.0, "pairwise_bleu": 5.0, "n": 1024}, 0, {"K": 3}),
        Row("D", {"bleu": 5.0, "n": 1024}, 0, {"K": None}),
    ]
    return build_table(new_record("small", "run", metrics, rows))


def test_best_is_bold_and_second_underlined(table):
    text = latex_table(table)
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert lines[0] == r"method & K & bleu (BLEU) $\uparrow$ & pairwise $\downarrow$ & n (KiB) \\"
    assert lines[1].startswith(r"A\_1 & 3 & \underline{11.50} {\scriptsize $\pm$ 1.41} & \textbf{3}")
    assert lines[2].startswith(r"B \& C & 3 & \textbf{20.00} & \underline{5}")
    assert lines[3].startswith(r"D & -- & 5.00 & -- &")
    assert text.count(r"\begin{tabular}{llrrr}") == 1


def test_csv_has_full_precision_and_the_records_unit(table):
    rows = list(csv.DictReader(io.StringIO(csv_table(table))))
    assert float(rows[0]["bleu"]) == 11.5
    assert float(rows[0]["bleu_std"]) == pytest.approx(2**0.5)
    assert float(rows[0]["n"]) == 2048
    assert rows[1]["bleu_std"] == ""
    assert rows[2]["pairwise_bleu"] == ""
    assert [row["method"] for row in rows] == ["A_1", "B & C", "D"]


def test_what_latex_would_read_as_its_own_is_escaped():
    assert latex_text("a_b{50%} λ=\N{MINUS SIGN}1") == r"a\_b\{50\%\} $\lambda$=$-$1"


def test_files_by_their_ending(table, tmp_path):
    result = write_record(table.record, tmp_path / "result.json")
    (written,) = write_report([result], tmp_path / "table.tex")
    assert written.read_text() == latex_table(table)
    (written,) = write_report([result], tmp_path / "table.csv")
    assert written.read_text() == csv_table(table)
    other = write_record(dataclasses.replace(table.record, name="other"), tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"a .csv holds one result, got 2: small, other"):
        write_report([result, other], tmp_path / "table.csv")
