"""Records come from runs and from nothing else."""

import json
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from noise2tokens import records as module
from noise2tokens.records import best_record, load_record, measured, show_record
from tools import records as tool

BUDGETS = {"long": {"steps": 2}, "full": {"steps": 5}}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch, folder):
    """A stand-in for CUDA, so that the path that writes a record can be followed here; nothing it writes is kept."""
    stand_in = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3_000_000_000,
        "get_device_name": lambda: "Stand-in GPU",
    }
    for name, answer in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return folder


def experiment(device, *, seed, steps):
    figure = plt.figure(figsize=(1, 1))
    results = {
        "device": str(device),
        "nll": torch.tensor(1.5, dtype=torch.float64),
        "curve": {"steps": [1, 2], "loss": torch.tensor([2.0, 1.0])},
        "spent": [steps, seed],
        "drawn": torch.rand(()),
    }
    return results, {"Samples": figure}


def test_a_full_scale_run_leaves_a_record(gpu):
    made = measured("02_nice", experiment, BUDGETS, "full", 3)
    found = load_record("02_nice", "full", gpu)
    assert made == found
    torch.manual_seed(3)
    assert found.results == {
        "device": "cuda",
        "nll": 1.5,
        "curve": {"steps": [1, 2], "loss": [2.0, 1.0]},
        "spent": [5, 3],
        "drawn": torch.rand(()).item(),
    }
    assert found.device == "one Stand-in GPU" and found.peak_memory_gb == 3.0
    assert 0 < found.seconds < 60 and found.budget == {"steps": 5} and found.seed == 3
    assert found.versions["torch"] == torch.__version__ and "CUDA" in found.versions
    assert len(found.commit) >= 7 and list(found.pictures) == ["Samples"]
    for word in ("full scale", "Stand-in GPU", "steps 5", "seed 3", "3.0 GB"):
        assert word in found.provenance()
    assert [path.name for path in gpu.iterdir()] == ["02_nice.full.json"]


def test_a_long_run_is_one_of_the_processor(folder):
    measured("02_nice", experiment, BUDGETS, "long", 0)
    found = load_record("02_nice", "long", folder)
    assert found.results["device"] == "cpu" and found.results["spent"] == [2, 0]
    assert "thread" in found.device and 0.05 < found.peak_memory_gb < 100
    assert "CUDA" not in found.versions


def test_the_best_record_is_the_one_at_full_scale(gpu):
    assert best_record("02_nice", gpu) is None
    measured("02_nice", experiment, BUDGETS, "long", 0)
    assert best_record("02_nice", gpu).scale == "long"
    measured("02_nice", experiment, BUDGETS, "full", 0)
    assert best_record("02_nice", gpu).scale == "full"


def test_small_scale_reads_what_the_book_ships_and_writes_nothing(folder, monkeypatch):
    def never(device, **_):
        pytest.fail("the experiment must not run")

    shipped = measured("02_nice", experiment, BUDGETS, "long", 0)
    (folder / "02_nice.long.json").unlink()
    monkeypatch.setattr(module, "best_record", {"02_nice": shipped}.get)
    assert measured("02_nice", never, BUDGETS, "small", 0) is shipped
    # A chapter whose experiment needs a GPU has no budget for "long", and shows its best record there.
    assert measured("02_nice", never, {"full": {}}, "long", 0) is shipped
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_leaves_none_and_keeps_the_last(folder):
    measured("02_nice", experiment, BUDGETS, "long", 0)
    before = (folder / "02_nice.long.json").read_bytes()
    with pytest.raises(ZeroDivisionError):
        measured("02_nice", lambda device, **_: 1 / 0, BUDGETS, "long", 0)
    assert (folder / "02_nice.long.json").read_bytes() == before
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["results"].update(nll=1.4),
        lambda content: content["budget"].update(steps=20),
        lambda content: content.update(device="NVIDIA H200"),
        lambda content: content.update(seconds=1.0),
        lambda content: content.pop("seal"),
        lambda content: content.update(seal="0" * 64),
        lambda content: content.update(more=1),
    ],
)
def test_a_record_that_was_edited_is_refused(folder, change):
    measured("02_nice", experiment, BUDGETS, "long", 0)
    path = folder / "02_nice.long.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"02_nice\.long\.json"):
        load_record("02_nice", "long", folder)


@pytest.mark.parametrize("name", ["03_other.long", "02_nice.full"])
def test_a_record_under_another_name_is_refused(folder, name):
    measured("02_nice", experiment, BUDGETS, "long", 0)
    (folder / "02_nice.long.json").rename(folder / f"{name}.json")
    with pytest.raises(ValueError, match=name):
        load_record(*name.split("."), folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_file_that_is_no_record_is_refused(folder, text):
    (folder / "02_nice.long.json").write_text(text)
    with pytest.raises(ValueError, match="is not a record"):
        load_record("02_nice", "long", folder)


def test_full_scale_without_a_gpu_is_no_record(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA"):
        measured("02_nice", experiment, BUDGETS, "full", 0)
    for scale, budgets in (("medium", BUDGETS), ("long", {"huge": {}})):
        with pytest.raises(ValueError, match="scale must be one of"):
            measured("02_nice", experiment, budgets, scale, 0)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("value", [math.inf, math.nan, object(), {"a": [math.nan]}])
def test_a_record_takes_finite_plain_values_only(folder, value):
    with pytest.raises(TypeError, match="nll"):
        measured("02_nice", lambda device, **_: ({"nll": value}, {}), BUDGETS, "long", 0)


def test_a_large_picture_is_refused(folder):
    def drawn(device, **_):
        figure, ax = plt.subplots(figsize=(8, 8), dpi=100)
        ax.imshow(torch.rand(800, 800).numpy())
        return {}, {"Noise": figure}

    with pytest.raises(ValueError, match="'Noise' takes .* the limit is 150000"):
        measured("02_nice", drawn, BUDGETS, "long", 0)
    plt.close("all")


def test_a_record_is_shown_with_its_pictures_and_none_says_so(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(module, "display", lambda thing: shown.append(thing.data))
    record = measured("02_nice", experiment, BUDGETS, "long", 0)
    show_record(record)
    assert "Measured at long scale" in shown[0] and 'alt="Samples"' in shown[1]
    show_record(None)
    assert "Not measured yet" in shown[2]


def test_every_record_in_the_book_is_as_its_run_left_it(root):
    for path in (root / "src/noise2tokens/recorded").glob("*.json"):
        chapter, scale = path.stem.split(".")
        record = load_record(chapter, scale)
        assert record.seconds > 0 and record.results
        assert (root / "chapters" / f"{chapter}.md").exists()


def test_the_tool_runs_one_chapter_into_the_books_own_records(folder, monkeypatch):
    stand_in = SimpleNamespace(BUDGETS=BUDGETS, full_scale=experiment)
    monkeypatch.setattr(tool, "experiment", lambda chapter: stand_in)
    monkeypatch.setattr(module, "SHIPPED", folder / "book")
    assert tool.main(["run", "02_nice", "long"]) is None
    assert load_record("02_nice", "long", folder / "book").results["spent"] == [2, 0]
    assert "no budget for scale 'huge'" in tool.main(["run", "02_nice", "huge"])
    assert "python -m tools.records" in tool.main([])


def test_the_tool_names_what_is_missing_and_keeps_what_is_there(tmp_path, monkeypatch):
    for chapter in ("02_nice", "08_flash_attention"):
        (tmp_path / "chapters").mkdir(exist_ok=True)
        (tmp_path / "chapters" / f"{chapter}.md").write_text("")
    budgets = {"02_nice": BUDGETS, "08_flash_attention": {"full": {}}}
    monkeypatch.setattr(
        tool, "experiment", lambda chapter: SimpleNamespace(BUDGETS=budgets[chapter])
    )
    build = tmp_path / "_build/long"
    with pytest.raises(ValueError, match="no run at scale long"):
        tool.keep("long", tmp_path)
    assert tool.missing("long", tmp_path) == [
        "02_nice: no executed notebook",
        "02_nice: no record",
        "08_flash_attention: no executed notebook",
    ]
    (build / "book").mkdir(parents=True)
    for chapter in budgets:
        (build / "book" / f"{chapter}.ipynb").write_text("")
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(build / "records"))
    measured("02_nice", experiment, BUDGETS, "long", 0)
    assert tool.missing("long", tmp_path) == []
    assert [path.name for path in tool.keep("long", tmp_path)] == ["02_nice.long.json"]
    # A record at full scale that no GPU made is none.
    (tmp_path / "_build/full/records").mkdir(parents=True)
    content = json.loads((build / "records/02_nice.long.json").read_text()) | {"scale": "full"}
    content.pop("seal")
    path = tmp_path / "_build/full/records/02_nice.full.json"
    path.write_text(json.dumps({**content, "seal": module._seal(content)}))
    assert any("CUDA was not used" in line for line in tool.missing("full", tmp_path))


def test_every_chapter_is_found_by_its_name():
    with pytest.raises(ValueError, match="no chapter 99_none"):
        tool.experiment("99_none")
