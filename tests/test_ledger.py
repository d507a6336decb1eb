"""Verdicts follow from numbers; records come from runs and from nothing else."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from noise2tokens import ledger as module
from noise2tokens.ledger import Ledger, Record, ledger_table, load_record, measure, show_record


@pytest.mark.parametrize(
    "values, verdict",
    [
        ({"paper": 2.0, "ours": 2.1, "tolerance": 0.1000001}, "reproduced"),
        ({"paper": 2.0, "ours": 1.9, "tolerance": 0.1000001}, "reproduced"),
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
        ({"paper": 2.0, "ours": math.nan, "tolerance": 1.0, "why": "w"}, "ours nan"),
        ({"paper": 2.0, "ours": 2.0, "tolerance": -1.0, "why": "w"}, "tolerance -1"),
        ({"paper": 2.0, "ours": 2.0, "tolerance": 1.0, "source": " "}, "source"),
    ],
)
def test_a_row_that_would_mislead_is_refused(values, message):
    ledger = Ledger("02_nice")
    with pytest.raises(ValueError, match=message):
        ledger.row("x", **({"source": "Paper"} | values))
    assert ledger.rows == []


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


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A stand-in for CUDA, so that the path that writes a record can be followed here; nothing it writes is kept."""
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(tmp_path))
    stand_in = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 3_000_000_000,
        get_device_name=lambda: "Stand-in GPU",
    )
    monkeypatch.setattr(module.torch, "cuda", stand_in)
    return tmp_path


def test_a_full_scale_run_leaves_a_record(gpu):
    with measure("02_nice", "full") as record:
        record["nll"] = torch.tensor(1.5, dtype=torch.float64)
        record["curve"] = {"steps": [1, 2], "loss": torch.tensor([2.0, 1.0])}
        figure = plt.figure(figsize=(1, 1))
        record.picture("samples", figure)
        plt.close(figure)
    found = load_record("02_nice", "full")
    assert found.results == {"nll": 1.5, "curve": {"steps": [1, 2], "loss": [2.0, 1.0]}}
    assert found.device == "Stand-in GPU" and found.peak_memory_gb == 3.0 and 0 < found.seconds < 60
    assert found.versions["torch"] == torch.__version__ and len(found.commit) >= 7
    assert "Stand-in GPU" in found.provenance() and list(found.pictures) == ["samples"]


def test_a_run_that_fails_leaves_none(gpu):
    with pytest.raises(ZeroDivisionError), measure("02_nice", "full") as record:
        record["nll"] = 1 / 0
    assert load_record("02_nice", "full") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["results"].update(nll=1.4),
        lambda content: content.update(device="NVIDIA H200"),
        lambda content: content.update(seconds=1.0),
        lambda content: content.pop("seal"),
        lambda content: content.update(seal="0" * 64),
    ],
)
def test_a_record_that_was_edited_is_refused(gpu, change):
    with measure("02_nice", "full") as record:
        record["nll"] = 1.5
    path = gpu / "02_nice.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"02_nice\.json"):
        load_record("02_nice", "full")


def test_a_record_under_another_chapters_name_is_refused(gpu):
    with measure("02_nice", "full") as record:
        record["nll"] = 1.5
    (gpu / "02_nice.json").rename(gpu / "03_other.json")
    with pytest.raises(ValueError, match="03_other"):
        load_record("03_other", "full")


def test_small_scale_writes_nothing(gpu):
    with measure("02_nice", "small") as record:
        record["nll"] = 1.5
    assert list(gpu.iterdir()) == []


def test_full_scale_without_a_gpu_is_no_record(monkeypatch, tmp_path):
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA"), measure("02_nice", "full"):
        pytest.fail("the block must not run")
    with pytest.raises(ValueError, match="scale"), measure("02_nice", "medium"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("value", [math.inf, math.nan, object(), {"a": [math.nan]}])
def test_a_record_takes_finite_plain_values_only(value):
    with measure("02_nice", "small") as record, pytest.raises(TypeError, match="nll"):
        record["nll"] = value


def test_a_large_picture_is_refused():
    with measure("02_nice", "small") as record:
        figure, ax = plt.subplots(figsize=(8, 8), dpi=100)
        ax.imshow(torch.rand(800, 800).numpy())
        with pytest.raises(ValueError, match="150000"):
            record.picture("noise", figure)
        plt.close(figure)


def test_a_chapter_without_a_record_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(tmp_path))
    calls = []
    monkeypatch.setattr(module, "display", lambda thing, **options: calls.append(thing.data))
    assert show_record("02_nice", "full") is None
    assert "Not measured yet" in calls[0]


def test_every_record_in_the_book_is_as_its_run_left_it(root):
    for path in (root / "src/noise2tokens/records").glob("*.json"):
        record = load_record(path.stem, "small")
        assert isinstance(record, Record) and record.seconds > 0
        assert (root / "chapters" / f"{path.stem}.md").exists()
