"""Verdicts follow from numbers."""

import math
from dataclasses import asdict

import pytest

from noise2tokens import ledger as module
from noise2tokens.ledger import Ledger, ledger_table


@pytest.mark.parametrize(
    "values, verdict",
    [
        # 0.25 is exact in binary, so these stand on the bound, which counts as reproduced.
        ({"paper": 2.0, "ours": 2.25, "tolerance": 0.25}, "reproduced"),
        ({"paper": 2.0, "ours": 1.75, "tolerance": 0.25}, "reproduced"),
        ({"paper": 3, "ours": 3, "tolerance": 0}, "reproduced"),
        ({"paper": 0, "ours": 0.01, "tolerance": 0.1}, "reproduced"),
        ({"paper": 2.0, "ours": [2.1, 1.8, 2.0], "tolerance": 0.25}, "reproduced"),
        ({"paper": 2.0, "ours": [2.0, 2.0, 2.3], "tolerance": 0.25, "why": "w"}, "differs"),
        ({"paper": 2.0, "ours": 2.2, "tolerance": 0.1, "why": "w"}, "differs"),
        ({"paper": 2.0, "ours": 1.8, "tolerance": 0.1, "why": "w"}, "differs"),
        ({"paper": 2.0, "tolerance": 0.1}, "not measured yet"),
        ({"paper": "about two", "why": "too large"}, "out of reach"),
    ],
)
def test_the_verdict_follows_from_the_numbers(values, verdict):
    assert Ledger("02_nice").row("x", source="Paper, Table 1", **values).verdict == verdict


@pytest.mark.parametrize(
    "values, message",
    [
        ({"paper": 2.0, "ours": 3.0, "tolerance": 0.1}, "say why"),
        ({"paper": 2.0}, "say why"),
        ({"paper": 2.0, "ours": 2.0}, "tolerance"),
        ({"paper": "two", "ours": 2.0, "tolerance": 1.0}, "must be a number"),
        ({"paper": 2.0, "ours": math.nan, "tolerance": 1.0, "why": "w"}, "ours must be finite"),
        ({"paper": math.inf, "ours": 2.0, "tolerance": 1.0, "why": "w"}, "paper must be finite"),
        ({"paper": 2.0, "ours": 2.0, "tolerance": math.inf}, "tolerance must be finite"),
        (
            {"paper": 2.0, "ours": 2.0, "tolerance": -1.0, "why": "w"},
            "must not be negative, got -1",
        ),
        ({"paper": 2.0, "ours": 2.0, "tolerance": 1e9}, "says nothing about 2.0"),
        ({"paper": -2.0, "ours": -2.0, "tolerance": 2.5}, "says nothing about -2.0"),
        ({"paper": 2.0, "ours": [2.0, 2.0], "tolerance": 0.1}, "three seeds"),
        ({"paper": 2.0, "ours": 2.0, "tolerance": 1.0, "source": " "}, "source"),
    ],
)
def test_a_row_that_would_mislead_is_refused(values, message):
    ledger = Ledger("02_nice")
    with pytest.raises(ValueError, match=message):
        ledger.row("x", **({"source": "Paper"} | values))
    assert ledger.rows == []


@pytest.mark.parametrize("name", ["paper", "ours", "tolerance"])
def test_a_truth_value_is_no_number(name):
    values = {"paper": 1.0, "ours": 1.0, "tolerance": 0.5} | {name: True}
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        Ledger("02_nice").row("x", source="Paper", **values)


def test_seeds_are_shown_by_mean_and_half_their_range():
    ledger = Ledger("02_nice")
    row = ledger.row("x", source="Paper", paper=2.0, ours=[1.9, 2.0, 2.4], tolerance=0.5)
    assert row.ours == pytest.approx(2.1) and row.spread == pytest.approx(0.25)
    assert "| 2.10 ± 0.2 |" in ledger_table([asdict(row)])


def test_a_derived_value_is_marked():
    row = Ledger("02_nice").row("x", source="P", paper=2, ours=2, tolerance=0, derived=True)
    assert "| 2 (derived) |" in ledger_table([asdict(row)])


def test_the_table_has_a_line_for_each_row_and_the_page_can_collect_them(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "display", lambda thing, **options: calls.append((thing, options)))
    ledger = Ledger("02_nice")
    ledger.row("log p(x) | nats", paper=1980.5, source="T. 1", ours=1979.123, tolerance=5)
    ledger.row("other", paper=1.25, source="T. 2", why="needs a GPU")
    ledger.show()
    table, options = calls[0][0].data, calls[0][1]
    assert table.splitlines()[2:] == [
        "| log p(x) \\| nats | 1980.5 | 1979.1 | ± 5 | **reproduced** | T. 1 |",
        "| other | 1.25 | – |  | **out of reach**: needs a GPU | T. 2 |",
    ]
    assert options["metadata"]["noise2tokens"]["ledger"] == [asdict(row) for row in ledger.rows]
    assert ledger_table(options["metadata"]["noise2tokens"]["ledger"]) == table
