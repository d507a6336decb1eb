"""Chapter 09: schedules are counted and carried out, both checkpoints equal torch's, memory is what is said."""

import math
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint as torchs
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from noise2tokens.display import COLORS
from noise2tokens.flash_attention import flash_attention
from noise2tokens.gradient_checkpointing import experiment, memory, models, pictures, schedules
from noise2tokens.gradient_checkpointing.checkpoint import (
    checkpoint,
    checkpoint_by_hooks,
    run_segments,
)
from noise2tokens.gradient_checkpointing.memory import Timeline, saved_bytes
from noise2tokens.gradient_checkpointing.schedules import Segment
from noise2tokens.transformer import Config, Decoder, generate, next_token_loss


def reentrant(function, *args, **kwargs):
    # This form takes no keyword arguments of the function.
    return torchs(lambda *a: function(*a, **kwargs), *args, use_reentrant=True)


def lazily(function, *args, **kwargs):
    return torchs(function, *args, use_reentrant=False, **kwargs)


PAIRS = [(checkpoint, reentrant), (checkpoint_by_hooks, lazily)]
ways = pytest.mark.parametrize("ours", [checkpoint, checkpoint_by_hooks])
pairs = pytest.mark.parametrize(("ours", "peer"), PAIRS)


def both(n, segments=3):
    """Every schedule of n layers, by name."""
    return {
        "all": schedules.keep_all(n),
        "none": schedules.keep_none(n),
        "segments": schedules.in_segments(schedules.equal_spans(n, segments)),
        "halves": schedules.recursively(n),
        "binomial": schedules.recursively(n, schedules.binomial_split(2)),
    }


# Schedules


@pytest.mark.parametrize("n", [3, 8, 36])
def test_what_schedules_cost(n):
    found = {name: schedules.trace(schedule, n) for name, schedule in both(n).items()}
    assert (found["all"].peak, found["all"].forwards) == (n, n)
    assert (found["none"].peak, found["none"].forwards) == (3 if n > 2 else 2, n * (n + 1) // 2)
    assert found["segments"].forwards == 2 * n - 3
    assert found["binomial"].forwards == schedules.fewest_forwards(n, 2) + 1
    assert found["binomial"].peak <= 2 + 1 + 2
    assert all(trace.kept[-1] <= {0} for trace in found.values())


@pytest.mark.parametrize(("segments", "peak"), [(4, 12), (6, 11), (9, 12), (1, 36), (36, 36)])
def test_segments_keep_k_plus_n_over_k_minus_one(segments, peak):
    spans = schedules.equal_spans(36, segments)
    counted = schedules.trace(schedules.in_segments(spans), 36)
    assert counted.peak == segments + 36 // segments - 1 == peak
    assert schedules.peak_of([Segment(*span, True) for span in spans], [1] * 36) == peak
    assert counted.forwards == 36 + 36 - segments


def test_halving_keeps_logarithmically_many():
    for power in range(2, 8):
        n = 2**power
        found = schedules.trace(schedules.recursively(n), n)
        assert found.peak == power + 1
        assert found.forwards == n * power // 2 + 1


def test_the_fewest_forward_steps_have_the_published_closed_form():
    for n in range(1, 30):
        for slots in range(5):
            assert schedules.fewest_forwards(n, slots) == schedules.binomial_forwards(n, slots)
    assert schedules.fewest_forwards(10, 0) == 45 and schedules.fewest_forwards(10, 9) == 9


@pytest.mark.parametrize("b", [2, 3, 5, 8])
def test_shrinking_segments_are_the_binomial_schedule_of_two_forward_steps(b):
    n = b * (b + 1) // 2
    cuts = [0]
    for length in range(b, 0, -1):
        cuts.append(cuts[-1] + length)
    found = schedules.trace(schedules.in_segments(list(pairwise(cuts))), n)
    assert found.forwards - 1 == schedules.fewest_forwards(n, b - 2) == 2 * n - (b + 1)


@pytest.mark.parametrize("name", list(both(3)))
def test_every_schedule_gives_the_gradient_of_autograd(name):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double() for _ in range(7)]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def loss(y):
        return y.square().sum()

    model = nn.Sequential(*layers)
    loss(model(x)).backward()
    expected = [x.grad, *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    grad = schedules.carry_out(both(7)[name], layers, x, loss)
    for ours, right in zip([grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize(
    "steps",
    [
        [("forward", 1)],
        [("forward", 0), ("forget", 1), ("backward", 1)],
        [("forward", 0), ("backward", 0)],
        [("forward", 0), ("forward", 1), ("backward", 1)],
        [("sideways", 0)],
    ],
    ids=["not kept", "forgotten", "out of order", "unfinished", "unknown"],
)
def test_schedules_that_cannot_be_carried_out_are_refused(steps):
    with pytest.raises(ValueError, match="cannot be done|comes next|are missing"):
        schedules.trace(steps, 2)


def test_no_layers_no_slots_and_splits_outside_are_refused():
    for count in (schedules.fewest_forwards, schedules.binomial_forwards):
        for n, slots in ((0, 1), (3, -1)):
            with pytest.raises(ValueError, match=f"got {n} and {slots}"):
                count(n, slots)
    for sizes in ([], [2, -1]):
        with pytest.raises(ValueError, match="at least one layer, none negative, got"):
            schedules.smallest_budget(sizes)
    with pytest.raises(ValueError, match="at least one segment"):
        list(schedules.in_segments([]))
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        schedules.trace([], 0)
    for segments in ([], [Segment(1, 2, True)], [Segment(0, 1, True)], [Segment(0, 3, False)]):
        with pytest.raises(ValueError, match="must cover 2 layers"):
            schedules.peak_of(segments, [1, 1])
    for n, split in ((0, 0), (4, 0), (4, 4)):
        with pytest.raises(ValueError, match=f"cannot split {n} layers after {split}"):
            list(schedules.recursively(n, lambda length, depth, split=split: split))


def test_spans_and_their_bad_input():
    assert schedules.equal_spans(7, 3) == [(0, 3), (3, 5), (5, 7)]
    for segments in (0, 8):
        with pytest.raises(ValueError, match=f"got {segments}"):
            schedules.equal_spans(7, segments)


@pytest.mark.parametrize(("name", "peak", "steps"), [("segments", 7, 28), ("halves", 5, 33)])
def test_the_picture_shows_the_peak_and_ends(name, peak, steps):
    found = schedules.trace(both(16, 4)[name], 16)
    states = pictures.states(found)
    assert max(len(kept) for _, _, kept in states) == found.peak == peak
    assert len(states) == found.forwards + 16 == steps + 16
    for clock, end in ((len(states) - 1, ""), (len(states), ": done")):
        figure = plt.figure()
        pictures.draw_chains(figure, {name: states}, 16, clock)
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts[:2] == [
            f"kept {0 if end else 1}, at most {peak}",
            f"{steps} forward, 16 back{end}",
        ]
        plt.close(figure)


def test_the_picture_in_the_middle():
    """Filled is what is kept, the ring is at what is computed, and only steps done so far are counted."""
    chains = {
        "all": pictures.states(schedules.trace(schedules.keep_all(3), 3)),
        "none": pictures.states(schedules.trace(schedules.keep_none(3), 3)),
    }
    forward, backward = (to_rgba(COLORS[i]) for i in (2, 1))
    for clock, filled, ring, color, texts in (
        (0, [0, 1], 1, forward, ["kept 2, at most 2", "1 forward, 0 back"]),
        (2, [0, 1, 2], 3, forward, ["kept 3, at most 3", "3 forward, 0 back"]),
        (4, [0, 1], 1, backward, ["kept 2, at most 3", "3 forward, 2 back"]),
        (6, [], None, None, ["kept 0, at most 3", "3 forward, 3 back: done"]),
    ):
        figure = plt.figure()
        pictures.draw_chains(figure, chains, 3, clock)
        _, nodes, *others = figure.axes[0].collections
        assert [i for i, fill in enumerate(nodes.get_facecolors()) if fill[3]] == filled
        assert nodes.get_offsets().tolist() == [[i, 0] for i in range(4)]
        below = 1 if ring is None else 2  # the other row is drawn below, and still runs
        assert len(others) == below + 2 and others[below].get_offsets()[0].tolist() == [0, -1]
        if ring is not None:
            assert others[0].get_offsets().tolist() == [[ring, 0]]
            assert tuple(others[0].get_edgecolors()[0]) == color
        assert [text.get_text() for text in figure.axes[0].texts[:2]] == texts
        plt.close(figure)


def test_halving_and_the_binomial_schedule_at_the_same_peak():
    for slots in (1, 3, 5):
        split = schedules.binomial_split(slots)
        assert schedules.trace(schedules.recursively(128, split), 128).peak == slots + 3
    assert schedules.trace(schedules.recursively(128), 128).peak == 8


# Segments under a budget


def every_cut(n):
    for marks in range(2 ** (n - 1)):
        ends = [i for i in range(1, n) if marks >> (i - 1) & 1]
        yield list(pairwise([0, *ends, n]))


def brute(costs, sizes, budget, inputs):
    """The least time over all cuts and all choices of what is recomputed."""
    best = math.inf
    for cut in every_cut(len(costs)):
        for choice in range(2 ** len(cut)):
            segments = [Segment(*span, bool(choice >> i & 1)) for i, span in enumerate(cut)]
            if schedules.peak_of(segments, sizes, inputs) <= budget:
                best = min(best, sum(sum(costs[s.start : s.stop]) for s in segments if s.recompute))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=6
    ),
    st.integers(1, 25),
)
def test_the_segments_are_as_good_as_the_best_of_all(layers, budget):
    costs, sizes, inputs = (list(part) for part in zip(*layers, strict=True))
    inputs = [min(pair) for pair in zip(inputs, sizes, strict=True)]
    best = brute(costs, sizes, budget, inputs)
    if best == math.inf:
        with pytest.raises(ValueError, match=f"budget of {budget}"):
            schedules.optimal_segments(costs, sizes, budget, inputs)
        return
    found = schedules.optimal_segments(costs, sizes, budget, inputs)
    assert [s.start for s in found] == [0, *(s.stop for s in found)][:-1]
    assert schedules.peak_of(found, sizes, inputs) <= budget
    assert sum(sum(costs[s.start : s.stop]) for s in found if s.recompute) == best


def test_equal_layers_want_segments_that_shrink():
    """b values serve b (b + 1) / 2 layers, of which each is recomputed once: fewer than two roots of n."""
    for b in (3, 5, 8):
        n = b * (b + 1) // 2
        assert schedules.smallest_budget([1] * n) == b
        assert schedules.smallest_budget([1] * (n + 1)) == b + 1
        found = schedules.optimal_segments([1] * n, [1] * n, b)
        assert [s.stop - s.start for s in found] == list(range(b, 0, -1))


def test_blocks_that_keep_much_are_recomputed_one_by_one():
    found = schedules.optimal_segments([1] * 16, [18] * 16, 33, [1] * 16)
    assert [(s.stop - s.start, s.recompute) for s in found[:15]] == [(1, True)] * 15
    assert schedules.peak_of(found, [18] * 16, [1] * 16) == 33


@pytest.mark.parametrize(
    ("costs", "sizes", "inputs", "message"),
    [
        ([], [], None, "each of 0 layers"),
        ([1, 1], [1], None, "each of 2 layers"),
        ([1, -1], [1, 1], None, "none negative"),
        ([1, 1], [1, 1], [1], "each of 2 layers"),
        ([1], [1], [2], "its input at least"),
        ([1, 1], [3, 3], None, "budget of 2"),
    ],
)
def test_bad_segments(costs, sizes, inputs, message):
    with pytest.raises(ValueError, match=message):
        schedules.optimal_segments(costs, sizes, 2, inputs)


# Both checkpoints against torch's


class Net(nn.Module):
    """Dropout, a flag that is no tensor, a keyword argument, two outputs of which one is an integer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.4)

    def forward(self, x, flag, pair, *, scale):
        h = self.drop(torch.tanh(self.first(x))) * scale
        h = self.second(h + pair["a"] if flag else h) * pair["b"][0]
        return h, h.argmax(-1)


def gradients(net, how, autocast=None):
    torch.manual_seed(1)
    x, a, b = (torch.randn(5, 6, requires_grad=True) for _ in range(3))
    torch.manual_seed(2)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        h, index = how(net, x, True, {"a": a, "b": [b]}, scale=0.7)
        after = torch.rand(3)  # the generator goes on as it would
        loss = (h * torch.arange(6)).sum() + h[index == 2].sum()
    loss.backward()
    found = [loss, after, x.grad, *(p.grad.clone() for p in net.parameters())]
    if how is not reentrant:
        found += [a.grad, b.grad]
    net.zero_grad()
    return found, torch.rand(3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pairs
def test_gradients_equal_torchs_bit_by_bit(ours, peer, autocast):
    torch.manual_seed(0)
    net = Net()
    found, then = gradients(net, ours, autocast)
    plain, _ = gradients(net, lambda f, *a, **k: f(*a, **k), autocast)
    theirs, then_theirs = gradients(net, peer, autocast)
    for mine, other in zip(found, plain, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(found, theirs, strict=False):
        assert torch.equal(mine, other)
    assert torch.equal(then, then_theirs)  # the backward pass draws, and leaves no trace of it


@ways
def test_without_the_random_state_dropout_would_differ(ours, monkeypatch):
    """A control: the comparison above notices a generator that is not set back."""
    torch.manual_seed(0)
    net = Net()
    plain, _ = gradients(net, lambda f, *a, **k: f(*a, **k))
    monkeypatch.setattr(
        "noise2tokens.gradient_checkpointing.checkpoint.Surroundings.restored",
        lambda self: nullcontext(),
    )
    found, _ = gradients(net, ours)
    assert not torch.equal(found[2], plain[2])


@ways
def test_parameters_get_gradients_behind_an_input_that_wants_none(ours):
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    net(x).sum().backward()
    expected = net.weight.grad.clone()
    net.zero_grad()
    ours(net, x).sum().backward()
    assert torch.equal(net.weight.grad, expected)
    assert x.grad is None
    with pytest.warns(UserWarning, match="None of the inputs"):
        assert not torchs(net, x, use_reentrant=True).requires_grad  # what people run into


def test_the_anchor_has_what_is_frozen_run_again():
    for ours, runs in ((checkpoint, 2), (checkpoint_by_hooks, 1)):
        frozen, calls = nn.Linear(3, 3).requires_grad_(False), []
        frozen.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        nn.Linear(3, 1)(ours(frozen, torch.randn(4, 3))).sum().backward()
        assert len(calls) == runs and frozen.weight.grad is None


@pairs
def test_nested_checkpoints(ours, peer):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)) for _ in range(4)]

    def run(how):
        def inner(x, i):
            return how(layers[i + 1], layers[i](x)) + x

        def outer(x):
            return inner(how(inner, x, 0), 2)

        torch.manual_seed(3)
        x = torch.ones(2, 4, requires_grad=True)
        how(outer, x).square().sum().backward()
        found = [x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())]
        for layer in layers:
            layer.zero_grad()
        return found

    for mine, theirs, plain in zip(run(ours), run(peer), run(lambda f, *a: f(*a)), strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, plain)


def test_nested_hooks_keep_nothing_of_the_inner_call():
    """The inner call's input is saved by a node too, which the outer call forgets."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.Tanh())

    def outer(x):
        for _ in range(8):
            x = checkpoint_by_hooks(layer, x)
        return x

    x = torch.randn(256, 64, requires_grad=True)
    flat, nested = Timeline(), Timeline()
    with flat:
        out = outer(x)
    kept = flat.live
    del out
    with nested:
        out = checkpoint_by_hooks(outer, x)
    unit = x.nbytes
    assert kept >= 8 * unit and nested.live < 1.1 * unit and flat.live == 0
    del out


@ways
def test_the_function_runs_again_and_not_under_no_grad(ours):
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    y = ours(function, x)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2 and calls[-1]
    with torch.no_grad():
        assert not ours(function, x).requires_grad
    assert len(calls) == 3


@ways
def test_outputs_that_nobody_uses_and_graphs_that_are_used_twice(ours):
    def function(x):
        return {"used": x.sin(), "unused": x.cos(), "text": "kept"}

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    out = ours(function, x)
    assert out["text"] == "kept"
    out["used"].sum().backward(retain_graph=True)
    out["used"].sum().backward()
    assert torch.allclose(x.grad, 2 * x.cos())


def test_gradients_by_name_only_with_hooks():
    net, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="use checkpoint_by_hooks"):
        torch.autograd.grad(checkpoint(net, x).sum(), x)
    (grad,) = torch.autograd.grad(checkpoint_by_hooks(net, x).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(net(x).sum(), x)[0])


def test_second_derivatives_only_with_hooks():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: checkpoint_by_hooks(lambda y: y.exp() * y.sin(), x), x
    )
    y = checkpoint(lambda y: y.exp() * y, x).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        y.backward(create_graph=True)


@ways
def test_an_input_changed_in_place_is_noticed(ours):
    x = torch.randn(3, requires_grad=True)
    h = x * 2
    y = ours(torch.exp, h)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_stop_at_the_last_saved_tensor():
    ends = []

    def function(x):
        y = x.exp()
        ends.append(len(ends))
        return y

    x = torch.randn(3, requires_grad=True)
    checkpoint_by_hooks(function, x).sum().backward()
    assert ends == [0] and torch.equal(x.grad, x.exp())


@pytest.mark.parametrize(
    ("again", "kind"),
    [
        (lambda x: x[:1], r"\(1,\) of torch.float32"),
        (lambda x: x.double(), r"\(3,\) of torch.float64"),
    ],
)
def test_a_function_that_saves_something_else_the_second_time_is_noticed(again, kind):
    """As PyTorch's does by default; the gradient of x_0 would be taken for that of all."""
    for how, error in (
        (checkpoint_by_hooks, rf"\(3,\) of torch.float32 the first time and {kind} when"),
        (partial(torchs, use_reentrant=False), "different metadata"),
    ):
        calls = []

        def function(x, calls=calls):
            calls.append(1)
            return (x if len(calls) == 1 else again(x)).exp()

        x = torch.randn(3, requires_grad=True)
        y = how(function, x)
        with pytest.raises(RuntimeError, match=error):
            y.sum().backward()
        assert len(calls) == 2 and x.grad is None


def test_a_function_that_saves_less_the_second_time_is_noticed():
    calls = []

    def function(x):
        calls.append(1)
        return x.exp().sin() if len(calls) == 1 else x.exp()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint_by_hooks(function, x)
    with pytest.raises(RuntimeError, match="torch.float32 the first time and nothing when"):
        y.sum().backward()


@ways
def test_tensors_of_integers_want_no_gradient(ours):
    index = torch.tensor([2, 0])
    weight = torch.randn(3, 4, requires_grad=True)
    ours(nn.functional.embedding, index, weight).sum().backward()
    assert torch.equal(weight.grad.sum(1), torch.tensor([4.0, 0.0, 4.0]))


@ways
def test_a_call_lets_go_of_its_inputs_once_they_are_used(ours):
    x = torch.randn(1000, requires_grad=True)
    with Timeline() as timeline:
        loss = ours(torch.exp, x * 2).sum()
        held = timeline.live
        loss.backward()
        assert held >= x.nbytes
        assert timeline.live == x.grad.nbytes + loss.nbytes


@ways
def test_what_cannot_be_called_is_refused(ours):
    with pytest.raises(TypeError, match="function"):
        ours(torch.ones(2), torch.ones(2))


@ways
@pytest.mark.parametrize("shape", [(0, 4), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_batch_and_dtype_and_layout(ours, shape, dtype):
    net = nn.Linear(4, 4).to(dtype)
    x = torch.randn(shape[::-1]).to(dtype).T.requires_grad_()
    ours(net, x).sum().backward()
    right = torch.autograd.grad(net(x).sum(), x)[0]
    assert torch.equal(x.grad, right)


# Segments of real layers: activations and operations


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(36)))


def activations(chain, run):
    """Bytes held at the peak by kind, by torch's tracker, and the bytes of one value."""
    x = torch.randn(512, 32, requires_grad=True)
    tracker = MemTracker()
    tracker.track_external(chain)
    with tracker:
        run(x).square().sum().backward()
    chain.zero_grad()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {str(kind): size for kind, size in snapshot.items()}, x.nbytes


def kept(chain, run):
    snapshot, unit = activations(chain, run)
    (size,) = (size for kind, size in snapshot.items() if kind.endswith("ACT"))
    return (size - 8) / unit  # the loss and its gradient count too


def segments_of(k):
    return [Segment(*span, True) for span in schedules.equal_spans(36, k)]


def test_36_layers_keep_one_value_more_than_the_schedule_counts(chain):
    """That is x_n: kept by a loss whose gradient needs it, and made again by a segment that runs to its end."""
    assert kept(chain, chain) == 37
    for k, expected in ((1, 37), (4, 13), (6, 12), (9, 13)):
        ways = [
            kept(chain, lambda x, k=k, how=how: run_segments(chain, segments_of(k), x, how))
            for how in (checkpoint, reentrant, checkpoint_by_hooks, lazily)
        ]
        # Hooks keep the recomputed tensors and the last one's input together.
        assert ways == [expected, expected, expected + 1, expected + 1]


def test_shrinking_segments_keep_fewer(chain):
    segments = schedules.optimal_segments([1] * 36, [1] * 36, 8)
    # Eight, and the value that a walk is about to leave.
    assert kept(chain, lambda x: run_segments(chain, segments, x)) == 9


@pytest.mark.parametrize("how", [checkpoint, checkpoint_by_hooks, reentrant, lazily])
def test_recomputing_all_costs_a_third_more(chain, how):
    def count(run):
        x = torch.randn(8, 32, requires_grad=True)
        with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
            run(x).sum().backward()
        chain.zero_grad()
        return counter.get_total_flops()

    assert 3 * count(lambda x: run_segments(chain, segments_of(6), x, how)) == 4 * count(chain)


def test_layers_that_segments_leave_over_are_named(chain):
    for segments in ([], [Segment(0, 35, True)], [Segment(0, 2, True), Segment(3, 36, True)]):
        with pytest.raises(ValueError, match="cover 36 layers in order"):
            run_segments(chain, segments, torch.zeros(1, 32))


# Memory


def test_the_timeline_agrees_with_torchs_tracker(chain):
    snapshot, unit = activations(chain, chain)
    x = torch.randn(512, 32, requires_grad=True)
    with Timeline() as timeline:
        chain(x).square().sum().backward()
    parameters = sum(p.nbytes for p in chain.parameters())
    there = snapshot["Total"] - parameters - unit  # made before
    chain.zero_grad()
    assert timeline.peak == pytest.approx(there, rel=0.02)


def test_the_timeline_counts_what_lives():
    with Timeline() as timeline:
        x = torch.zeros(100)
        assert timeline.live == 400
        y = x.view(10, 10)
        z = x + 1
        assert timeline.live == 800
        del x
        assert timeline.live == 800  # the view holds it
        del y
        assert timeline.live == 400
        z.add_(1)
    assert timeline.peak == 800 and timeline.history[0] == 400
    del z
    assert timeline.live == 0 and Timeline().peak == 0
    with timeline:
        wide = torch.empty_strided((10,), (2,))  # ten numbers, and nine in between
    assert timeline.live == 4 * 19 and len(wide) == 10


def test_a_limit_bites():
    with Timeline(limit=800) as timeline:
        x = torch.zeros(200)
        with pytest.raises(torch.OutOfMemoryError, match="0.0 MB are held"):
            torch.zeros(1)
    assert timeline.peak == 804 and len(x) == 200


@pytest.mark.parametrize(("batch", "length", "width", "heads"), [(2, 64, 32, 4), (1, 100, 48, 2)])
def test_a_layer_keeps_what_the_formula_says(batch, length, width, heads):
    x = torch.randn(batch, length, width, requires_grad=True)
    norms = 4 * batch * length

    def count(layer):
        return saved_bytes(lambda: layer(x), layer.parameters()) / 4

    whole = count(models.GPTLayer(width, heads))
    assert whole == models.kept_numbers(batch, length, width, heads) + norms
    selective = count(models.GPTLayer(width, heads, models.recomputed_attention))
    assert selective == models.kept_numbers(batch, length, width, heads, "attention") + norms
    layer = models.GPTLayer(width, heads)
    assert saved_bytes(lambda: checkpoint(layer, x), layer.parameters()) / 4 == models.kept_numbers(
        batch, length, width, heads, "layer"
    )
    # Tiles keep their output and a number a row instead of the matrix.
    tiled = count(models.GPTLayer(width, heads, lambda q, k, v: flash_attention(q, k, v, True)))
    assert tiled == selective + batch * length * width + batch * heads * length


def test_the_layer_is_torchs():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 12)
    layer = models.GPTLayer(12, 3)
    for p in layer.parameters():
        nn.init.normal_(p)
    peer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out", "linear1": "up"}
    names |= {"linear2": "down", "norm1": "norms.0", "norm2": "norms.1"}
    state = layer.state_dict()
    assert len(state) == len(peer.state_dict())
    for name, p in peer.named_parameters():
        ours = next(name.replace(a, b) for a, b in names.items() if name.startswith(a))
        p.data.copy_(state[ours])
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    expected = peer(x, mask, is_causal=True)
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_the_published_count():
    assert models.published_bytes(1, 2048, 12288, 96) == 2048 * 12288 * (
        34 + 5 * 96 * 2048 // 12288
    )
    with pytest.raises(ValueError, match="got 'all'"):
        models.kept_numbers(1, 1, 1, 1, "all")
    for heads in (4, 0, -2):
        with pytest.raises(ValueError, match=f"got 6 and {heads}"):
            models.GPTLayer(6, heads)


# Decoders


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(Config(50, 16, 5, 2)), torch.randint(50, (2, 12))


def decoder_gradients(model, tokens):
    next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("how", [checkpoint, checkpoint_by_hooks])
@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 2), (2, 5)], [(1, 3)]])
def test_a_decoder_that_recomputes_has_the_same_gradients(decoder, spans, how):
    model, tokens = decoder
    expected, names = decoder_gradients(model, tokens), set(model.state_dict())
    with models.recomputing(model, spans, how):
        assert len(model.blocks) == 5 - sum(stop - start - 1 for start, stop in spans)
        next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert set(model.state_dict()) == names and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_attention_that_is_recomputed_has_the_same_gradients(decoder):
    model, tokens = decoder
    plain = decoder_gradients(model, tokens)
    cores = [block.attention.core for block in model.blocks]
    with models.attending(model, models.stored_attention):
        stored = decoder_gradients(model, tokens)
    with models.attending(model, models.recomputed_attention):
        again = decoder_gradients(model, tokens)
    assert [block.attention.core for block in model.blocks] == cores
    for name, grad in plain.items():
        assert torch.equal(stored[name], again[name])
        assert torch.allclose(stored[name], grad, atol=1e-7)


def test_a_decoder_is_as_before_after_an_error(decoder):
    model, _ = decoder
    blocks, first = list(model.blocks), model.blocks[0].attention.core
    model.blocks[0].attention.core = models.stored_attention  # layers need not attend alike
    cores = [block.attention.core for block in blocks]
    for change in (
        models.recomputing(model, [(0, 5)]),
        models.attending(model, models.recomputed_attention),
    ):
        with pytest.raises(RuntimeError, match="meanwhile"), change:
            raise RuntimeError("meanwhile")
        assert list(model.blocks) == blocks
        assert [block.attention.core for block in blocks] == cores
    model.blocks[0].attention.core = first


def test_caches_and_packed_sequences_are_refused(decoder):
    model, tokens = decoder
    spans = schedules.equal_spans(5, 5)
    with models.recomputing(model, spans), pytest.raises(ValueError, match="take no cache"):
        generate(model, tokens, 2)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    for core in (models.stored_attention, models.recomputed_attention):
        with models.attending(model, core), pytest.raises(ValueError, match=r"at \[0, 5, 12\]"):
            model(tokens[0], cu_seqlens=offsets)


@pytest.mark.parametrize("spans", [[(0, 0)], [(0, 3), (2, 5)], [(3, 6)], [(2, 3), (0, 1)]])
def test_spans_that_do_not_fit_a_decoder(decoder, spans):
    with pytest.raises(ValueError, match="within 5 blocks"), models.recomputing(decoder[0], spans):
        pass


# The experiment


def test_a_step_holds_no_memory_for_gradients_of_parameters():
    model = Decoder(Config(experiment.VOCABULARY, 64, 3, 2))
    size = sum(p.nbytes for p in model.parameters())
    step = experiment.training_step(model, torch.zeros(1, 9, dtype=torch.long))
    with Timeline() as timeline:
        step()
    assert timeline.peak < size and timeline.live == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    before = [p.grad.data_ptr() for p in model.parameters()]
    experiment.training_step(model, torch.zeros(1, 9, dtype=torch.long))()
    assert [p.grad.data_ptr() for p in model.parameters()] == before


def test_a_step_makes_the_gradients_of_the_next_tokens(decoder):
    model, tokens = decoder
    seen = []
    handle = model.head.weight.register_hook(seen.append)
    experiment.training_step(model, tokens)()
    handle.remove()
    assert torch.equal(seen[0], decoder_gradients(model, tokens)["head.weight"])


def test_what_each_strategy_recomputes():
    model = Decoder(Config(50, 16, 5, 2))
    found = {}
    for name, strategy in experiment.STRATEGIES.items():
        with strategy(model):
            found[name] = [
                (len(block.blocks), block.how) if isinstance(block, models.Recomputed) else None
                for block in model.blocks
            ]
    one = (1, checkpoint)
    assert found["every block"] == [one] * 5
    assert found["every second block"] == [one, None, one, None, one]
    assert found["segments of √n"] == [(3, checkpoint), (2, checkpoint)]
    assert found["the same by hooks"] == [(3, checkpoint_by_hooks), (2, checkpoint_by_hooks)]
    for name in ("keep all", "attention stored", "attention stored, recomputed"):
        assert found[name] == [None] * 5


def test_blocks_are_recomputed_in_the_way_that_is_asked_for(decoder):
    model, tokens = decoder
    calls = []

    def how(function, *args):
        calls.append(args[0].shape)
        return function(*args)

    with models.recomputing(model, [(0, 2), (3, 5)], how):
        model(tokens)
    assert calls == [(2, 12, 16)] * 2


def test_the_largest_batch_is_where_the_limit_says():
    held = []

    def step(batch):
        held.append(torch.zeros(batch, 100))
        held.clear()

    cpu = torch.device("cpu")
    for batch in (1, 5, 8, 13):
        assert experiment.largest_batch(step, cpu, 400 * batch + 10) == batch
    assert experiment.largest_batch(step, cpu, 10) == 0
    assert experiment.largest_batch(step, cpu, 1e9, most=6) == 6


def test_values_of_a_slice_of_full_scale():
    results, pictures = experiment.full_scale(
        torch.device("cpu"), seed=0, depths=(4, 9), depth=4, width=32, heads=2, length=64, batch=2, limit=8e6,
        seconds=0.05,
    )  # fmt: skip
    peaks, steps = results["peaks"], results["steps"]
    assert peaks.keys() == steps.keys() == experiment.STRATEGIES.keys()
    assert all(len(column) == 2 and column[0] < column[1] for column in peaks.values())
    for i in range(2):
        kept = {name: column[i] for name, column in peaks.items()}
        assert kept["every block"] < kept["segments of √n"] < kept["keep all"]
        assert kept["every block"] < kept["every second block"] < kept["keep all"]
        assert kept["the same by hooks"] == pytest.approx(kept["segments of √n"], rel=0.05)
        assert kept["attention stored, recomputed"] < kept["attention stored"]
    assert peaks["keep all"][1] / peaks["keep all"][0] > 1.7
    assert peaks["every block"][1] / peaks["every block"][0] < 1.7
    assert steps["keep all"]["time"] == 1 and steps["every block"]["time"] > 1
    assert steps["every block"]["largest batch"] > steps["keep all"]["largest batch"] >= 1
    for row in steps.values():
        assert row["tokens a second"] == pytest.approx(2 * 64 / row["seconds"])
    # The largest batch fits, and one more does not.
    model = Decoder(Config(experiment.VOCABULARY, 32, 4, 2))
    batch = steps["keep all"]["largest batch"]
    for count, fits in ((batch, True), (batch + 1, False)):
        step = experiment.training_step(model, torch.zeros(count, 65, dtype=torch.long))
        assert (experiment.peak(step, torch.device("cpu")) <= 8e6) == fits
    step = experiment.training_step(model, torch.zeros(2, 65, dtype=torch.long))
    assert experiment.peak(step, torch.device("cpu")) == peaks["keep all"][0]
    (figure,) = pictures.values()
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines.keys() == peaks.keys()
    for name, line in lines.items():
        assert list(line.get_xdata()) == [4, 9]
        assert [1e6 * y for y in line.get_ydata()] == pytest.approx(peaks[name])
    plt.close("all")


def test_training_is_the_same_whatever_is_recomputed():
    torch.manual_seed(0)
    batches = [torch.randint(20, (4, 17)) for _ in range(4)]
    curves = {
        name: experiment.losses(strategy, batches, 1)
        for name, strategy in experiment.STRATEGIES.items()
    }
    plain = curves["keep all"]
    assert len(plain) == 4 and plain[-1] < plain[0] - 0.5
    for name, curve in curves.items():
        if "stored" in name:
            assert curve == curves["attention stored"]
            assert curve == pytest.approx(plain, rel=1e-4)
        else:
            assert curve == plain
    assert experiment.losses(experiment.STRATEGIES["keep all"], batches, 2) != plain
    torch.manual_seed(1)
    model = Decoder(Config(experiment.VOCABULARY, 64, 6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for tokens, expected in zip(batches, plain, strict=True):
        logits = model(tokens[:, :-1]).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:])
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        model.zero_grad()
        loss.backward()
        optimizer.step()


def test_segments_of_the_root():
    assert experiment.root_spans(16) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert [len(experiment.root_spans(depth)) for depth in (1, 2, 6, 7)] == [1, 1, 2, 3]
    assert memory.saved_bytes(lambda: torch.ones(3)) == 0
