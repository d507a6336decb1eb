"""What the page on speed compares does the same work on both sides."""

from pathlib import Path

import pytest
import speed
import torch

from noise2tokens import records
from tools import book_pages

BOOK = Path(__file__).parent.parent / "book"

# Random lines differ; everything else is the same computation, up to rounding and the solvers' tolerance.
TOLERANCE = {"sliced Wasserstein distance, 2000 points in 64 dimensions": 0.05}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chapter, what", speed.CASES, ids=lambda words: words[:40])
def test_both_sides_of_a_comparison_do_the_same_work(chapter, what):
    torch.manual_seed(0)
    calls = speed.CASES[chapter, what]()
    ours = torch.as_tensor(calls.pop("ours")())
    assert calls
    for library, call in calls.items():
        theirs = torch.as_tensor(call())
        assert theirs.shape == ours.shape, library
        if ours.dtype == torch.int64:
            assert torch.equal(theirs, ours)
        else:
            scale = ours.abs().max()
            assert (theirs - ours).abs().max() <= TOLERANCE.get(what, 1e-3) * scale, library


def test_the_page_shows_the_record_of_all_cases():
    record = records.load_record("speed", "long", BOOK)
    recorded = {(row["chapter"], row["what"]) for row in record.results["cases"]}
    assert recorded == set(speed.CASES), "run make speed"
    page = book_pages.speed(BOOK)
    for row in record.results["cases"]:
        assert f"{row['what']} | {row['library']} | {row['ratio']:.2f} |" in page
    assert record.provenance() in page


def test_without_a_record_the_page_says_so(tmp_path):
    assert book_pages.speed(tmp_path) == "Not measured yet."


def test_a_measurement_has_a_row_for_each_library(monkeypatch, capsys):
    calls = {"a": lambda: 1, "b": lambda: 2, "ours": lambda: 3}
    monkeypatch.setattr(speed, "CASES", {("", "thing"): lambda: dict(calls)})
    results, _ = speed.measure(torch.device("cpu"), seed=0, seconds=0.01)
    assert [(row["what"], row["library"]) for row in results["cases"]] == [
        ("thing", "a"),
        ("thing", "b"),
    ]
    assert all(row["ratio"] > 0 and row["milliseconds"] > 0 for row in results["cases"])
