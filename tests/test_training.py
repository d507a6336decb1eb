"""The training loop: what it keeps, what it draws, what it refuses."""

import itertools
import math

import pytest
import torch
from torch import nn

from noise2tokens.training import fit, live, running_average, seed_everything, train


class Point(nn.Module):
    """One number that a loss can pull."""

    def __init__(self, start: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))


def test_reaches_the_minimum_of_a_quadratic():
    model = Point(5.0)
    history = train(
        model,
        lambda batch: (model.value - batch.mean()) ** 2,
        torch.full((16, 1), 2.0),
        steps=200,
        batch_size=4,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    assert abs(model.value.item() - 2.0) < 1e-5
    assert history.steps == list(range(1, 201)) and len(history.losses) == 200
    assert history.losses[0] == pytest.approx(9.0) and history.losses[-1] < 1e-8
    assert history.best_step == 200 and history.seconds > 0


def test_ends_with_the_weights_that_validated_best():
    model = Point(0.0)
    # The loss pulls the value upwards without end; validation is best where it passes 1.
    history = train(
        model,
        lambda batch: -model.value,
        torch.zeros(4, 1),
        steps=30,
        batch_size=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        validate=lambda: (model.value.item() - 1.0) ** 2,
        validate_every=5,
    )
    assert history.validation_steps == [0, 5, 10, 15, 20, 25, 30]
    assert history.best_step == 10
    assert model.value.item() == pytest.approx(1.0, abs=1e-6)


def test_of_equally_good_weights_the_first_are_kept():
    model = Point(0.0)
    history = train(
        model,
        lambda batch: -model.value,
        torch.zeros(4, 1),
        steps=4,
        batch_size=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        validate=lambda: 1.0,
        validate_every=2,
    )
    assert history.best_step == 0 and model.value.item() == 0


def test_validation_runs_in_eval_mode_and_without_gradients():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    seen = []

    def validate() -> float:
        seen.append((model.training, torch.is_grad_enabled()))
        return 1.0

    train(
        model,
        lambda batch: (
            model(batch).mean() if model.training else pytest.fail("trained in eval mode")
        ),
        torch.ones(4, 1),
        steps=2,
        batch_size=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        validate=validate,
        validate_every=1,
    )
    assert seen == [(False, False)] * 3 and not model.training


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    torch.manual_seed(0)
    model, batches = Point(0.0), []

    def loss(batch):
        batches.append(batch.flatten().tolist())
        return model.value * 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, loss, torch.arange(8.0)[:, None], steps=8, batch_size=2, optimizer=optimizer)
    epochs = [list(itertools.chain(*batches[:4])), list(itertools.chain(*batches[4:]))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
    assert epochs[0] != epochs[1]


def test_takes_a_function_that_draws_batches():
    model, sizes = Point(0.0), []

    def draw(n):
        sizes.append(n)
        return torch.ones(n, 1)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, lambda b: model.value * b.sum(), draw, steps=3, batch_size=5, optimizer=optimizer)
    assert sizes == [5, 5, 5]


def test_steps_the_schedule_once_a_step():
    model = Point(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(
        model, lambda b: model.value, torch.ones(2, 1), steps=3, batch_size=2,
        optimizer=optimizer, schedule=schedule,
    )  # fmt: skip
    assert model.value.item() == pytest.approx(-(1 + 0.5 + 0.25))


def test_the_same_seed_gives_the_same_run():
    def run():
        seed_everything(3)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters())
        data = torch.randn(32, 4)
        return train(
            model,
            lambda b: model(b).square().mean(),
            data,
            steps=20,
            batch_size=8,
            optimizer=optimizer,
        )

    assert run().losses == run().losses


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"validate_every": 0}, {"batch_size": 9}]
)
def test_refuses_sizes_that_make_no_sense(bad):
    model = Point(0.0)
    options = {
        "steps": 1,
        "batch_size": 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    } | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        train(model, lambda b: model.value, torch.ones(8, 1), **options)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    model, calls = Point(1.0), itertools.count(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="nan at step 7"):
        train(
            model, lambda b: model.value * (float("nan") if next(calls) == 7 else 1.0), torch.ones(8, 1),
            steps=10, batch_size=2, optimizer=optimizer,
        )  # fmt: skip


def test_a_validation_value_that_is_not_finite_stops_the_run():
    model = Point(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="validation"):
        train(
            model, lambda b: model.value, torch.ones(8, 1), steps=2, batch_size=2,
            optimizer=optimizer, validate=lambda: float("inf"),
        )  # fmt: skip


@pytest.mark.parametrize("asks, expected", [(True, True), (False, False)])
def test_a_notebook_is_live_exactly_if_its_front_end_can_be_asked(asks, expected):
    """Run a real kernel as a front end (may ask for input) and as papermill and nbval do (may not)."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        printed = []
        client.execute_interactive(
            "from noise2tokens.training import live; print(live())",
            allow_stdin=asks,
            timeout=120,
            output_hook=lambda message: printed.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "".join(printed).strip() == str(expected)


def test_outside_a_notebook_live_means_a_terminal(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=answer: answer, raising=False)
        assert live() is answer


def test_running_average_is_the_sum_it_says():
    """After the first update, which copies, w̄ ← d w̄ + (1 - d) w: unrolled by hand."""
    model = nn.Linear(1, 1, bias=False)
    average = running_average(model, 0.9)
    seen = []

    def loss(x):
        seen.append(model.weight.detach().clone())  # the weights before this step
        return (model(x) - 1).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(
        model, loss, torch.ones(8, 1), steps=5, batch_size=4, optimizer=optimizer, average=average
    )
    after = [*seen[1:], model.weight.detach()]
    expected = after[0]
    for weight in after[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert not torch.allclose(expected, model.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_running_average_needs_a_share(decay):
    with pytest.raises(ValueError, match="decay"):
        running_average(nn.Linear(1, 1), decay)


def rates_of(steps, **options):
    """The learning rate of each step that `fit` takes."""
    model, rates = Point(0.0), []
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.8}])

    def note(step):
        assert not torch.is_grad_enabled()
        rates.append((step, (before - model.value).item()))

    def loss(batch):
        nonlocal before
        before = model.value.detach().clone()
        return model.value + 0 * batch.sum()

    before = torch.zeros(())
    fit(
        model,
        loss,
        torch.ones(2, 1),
        steps=steps,
        batch_size=1,
        optimizer=optimizer,
        after_step=note,
        **options,
    )
    assert [step for step, _ in rates] == list(range(1, steps + 1))
    return [rate for _, rate in rates]


def test_fit_warms_up_linearly_and_falls_along_a_cosine():
    rates = rates_of(10, warmup=0.4)
    cosine = [0.8 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx([0.16, 0.32, 0.48, 0.64, *cosine], abs=1e-6)
    peer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 10)
    expected = []
    for _ in range(10):
        expected.append(peer.param_groups[0]["lr"])
        peer.step()
        schedule.step()
    assert rates_of(10) == pytest.approx(expected, abs=1e-6)


def test_fit_takes_adam_and_any_batch():
    model = Point(5.0)
    history = fit(
        model,
        lambda batch: (model.value - batch["target"]).square() * batch["weight"],
        lambda n: {"target": 2.0, "weight": n / 4},
        steps=300,
        batch_size=4,
        learning_rate=0.1,
        warmup=0.1,
        validate=lambda: abs(model.value.item() - 2),
        validate_every=300,
    )
    assert abs(model.value.item() - 2) < 1e-2 and history.best_step == 300


@pytest.mark.parametrize("warmup", [-0.1, 1.0, float("nan")])
def test_fit_needs_a_share_for_its_warm_up(warmup):
    with pytest.raises(ValueError, match="warmup"):
        rates_of(3, warmup=warmup)
