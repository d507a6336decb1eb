"""Chapter 16: orthogonalization held against SVD, the optimizer against PyTorch's Muon and AdamW."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noise2tokens.moe.layer import MixtureOfExperts, MoEConfig
from noise2tokens.muon import cost, experiment
from noise2tokens.muon.optimizer import (
    Muon,
    matched,
    momentum_direction,
    split_parameters,
    together,
)
from noise2tokens.muon.orthogonalize import (
    CLASSICAL,
    newton_schulz,
    on_singular_values,
    polar,
    quintic,
    reach,
    trapping_interval,
)
from noise2tokens.scaling_laws.fits import fit_power_law
from noise2tokens.scaling_laws.flops import PowerLaw
from noise2tokens.text import windows
from noise2tokens.transformer import Config, Decoder, next_token_loss

SHAPES = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (1, 1), (24, 16)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rotation(n, seed):
    return torch.linalg.qr(matrix(n, n, seed=seed))[0]


# Orthogonalization


@each_shape
def test_polar_is_the_orthogonal_factor_of_scipy(shape):
    scipy = pytest.importorskip("scipy.linalg")
    g = matrix(*shape)
    assert torch.allclose(polar(g), torch.from_numpy(scipy.polar(g.numpy())[0]), atol=1e-12)


@each_shape
def test_polar_has_the_largest_inner_product_of_unit_spectral_norm(shape):
    """Its inner product with G is the nuclear norm, and no other matrix of spectral norm one has more."""
    g = matrix(*shape)
    u = polar(g)
    assert torch.linalg.matrix_norm(u, 2).item() == pytest.approx(1)
    assert (u * g).sum().item() == pytest.approx(torch.linalg.matrix_norm(g, "nuc").item())
    for seed in range(20):
        other = matrix(*shape, seed=seed + 1)
        other = other / torch.linalg.matrix_norm(other, 2)
        assert (other * g).sum() <= (u * g).sum() + 1e-12


def test_polar_leaves_zero_singular_values_zero():
    g = matrix(6, 2) @ matrix(2, 5, seed=1)
    s = torch.linalg.svdvals(polar(g))
    assert torch.allclose(s, torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64), atol=1e-12)
    assert torch.equal(polar(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_polar_keeps_what_is_small_but_no_rounding():
    """Each matrix of a batch by its own size, and down to the rounding of its own precision."""
    q, r = rotation(4, 1), rotation(4, 2)
    g = q @ torch.diag(matrix(4).abs() * torch.tensor([1, 1, 1, 1e-10], dtype=torch.float64)) @ r
    assert torch.allclose(polar(g), q @ r, atol=1e-5)
    batch = torch.stack([g, 1e-40 * g, 1e40 * g])
    assert torch.allclose(polar(batch), (q @ r).expand(3, 4, 4), atol=1e-5)


@each_shape
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_acts_on_singular_values_alone(shape, steps):
    g = matrix(*shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    expected = (u * on_singular_values(s / s.norm(), steps)) @ vh
    assert torch.allclose(newton_schulz(g, steps), expected, atol=1e-12)


@each_shape
def test_the_classical_coefficients_converge_to_the_polar_factor(shape):
    g = matrix(*shape)
    assert torch.allclose(newton_schulz(g, 40, CLASSICAL), polar(g), atol=1e-9)
    if min(shape) > 1:
        assert (newton_schulz(g, 40) - polar(g)).norm() > 0.05  # Muon's do not


@each_shape
def test_rotations_pass_through(shape):
    g = matrix(*shape)
    left, right = rotation(shape[0], 1), rotation(shape[1], 2)
    for f in (newton_schulz, polar):
        assert torch.allclose(f(left @ g @ right), left @ f(g) @ right, atol=1e-11)
        assert torch.allclose(f(g.mT), f(g).mT, atol=1e-12)
        assert torch.allclose(f(-g), -f(g), atol=1e-12)
    if min(shape) > 1:  # an optimizer of single entries has no such symmetry
        assert not torch.allclose((left @ g @ right).sign(), left @ g.sign() @ right, atol=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(-6, 12), st.integers(0, 100))
def test_scale_does_not_matter_above_the_guard(exponent, seed):
    g = matrix(4, 6, seed=seed)
    assert torch.allclose(newton_schulz(10.0**exponent * g), newton_schulz(g), atol=1e-9)


def test_a_zero_matrix_and_one_below_the_guard():
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))
    g = matrix(4, 6)
    small = newton_schulz(1e-12 * g / g.norm())
    assert small.norm() == pytest.approx(1e-5 * 3.4445**5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_matrices_each_for_itself(dtype):
    g = matrix(2, 3, 5, 4, dtype=dtype)
    for f in (newton_schulz, polar):
        one_by_one = torch.stack([torch.stack([f(x) for x in row]) for row in g])
        assert torch.allclose(f(g), one_by_one, atol=1e-5 if dtype == torch.float32 else 1e-12)
        assert f(g).dtype == dtype


def test_low_precision_is_as_good_as_pytorchs():
    """err(ours) <= 2 err(PyTorch's) against float64, both with products in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in [(32, 32), (16, 64), (64, 16)]:
        g = matrix(*shape).float()
        exact = newton_schulz(g.double())
        theirs = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        ours = newton_schulz(g, dtype=torch.bfloat16)
        assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
        errors = [(x.double() - exact).norm() / exact.norm() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] and 1e-4 < errors[0] < 0.05
        assert (newton_schulz(g).double() - exact).norm() / exact.norm() < 1e-5


def test_newton_schulz_can_be_differentiated():
    g = matrix(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz, g)


def test_interval_and_reach():
    low, high = trapping_interval()
    assert (round(low, 3), round(high, 3)) == (0.682, 1.134)
    inside = torch.linspace(low, high, 1001, dtype=torch.float64)
    for steps in range(1, 20):
        after = on_singular_values(inside, steps)
        assert low - 1e-9 <= after.min() and after.max() <= high + 1e-9
    assert quintic(high + 0.15) > high  # a wider one is not mapped into itself
    for steps in (0, 1, 5, 7):
        least = reach(steps)
        assert on_singular_values(least, steps) == pytest.approx(low, abs=1e-3)
        above = np.linspace(least, 1, 20_001)
        assert on_singular_values(above, steps).min() >= (low - 1e-3 if steps else least)
        assert on_singular_values(0.98 * least, steps) < low - 1e-3
    assert reach() == pytest.approx(0.001505, abs=2e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: newton_schulz(torch.ones(3)),
        lambda: newton_schulz(torch.ones(0, 3)),
        lambda: newton_schulz(torch.ones(3, 3), -1),
        lambda: polar(torch.ones(3)),
        lambda: newton_schulz(torch.ones(3, 3, dtype=torch.complex64)),
        lambda: polar(torch.ones(3, 3, dtype=torch.int64)),
        lambda: reach(-1),
        lambda: trapping_interval((1.0, 1.0, 1.0)),
        lambda: trapping_interval((6.0, -8.0, 3.0)),
        lambda: trapping_interval(CLASSICAL),
        lambda: trapping_interval((3.4445, 4 * -4.7750, 16 * 2.0315)),  # around one half
        lambda: Muon([nn.Parameter(torch.ones(3))]),
        lambda: Muon([nn.Parameter(torch.ones(2, 2, 3, 3))]),
        lambda: Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], lr=-1.0),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], lr=math.inf),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], eps=-1.0),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], momentum=1.0),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], momentum=-0.1),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], betas=(1.0, 0.9)),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], betas=(0.9, 1.0)),
        lambda: Muon([nn.Parameter(torch.ones(2, 2))], weight_decay=math.nan),
        lambda: split_parameters(nn.Sequential()),
        lambda: split_parameters(nn.Linear(2, 2), "head"),
        lambda: cost.newton_schulz_flops(0, 2),
        lambda: cost.newton_schulz_flops(2, 0),
        lambda: cost.newton_schulz_flops(2, 2, -1),
        lambda: cost.overhead(2, 2, 0),
        lambda: experiment.equal_loss_ratio(PowerLaw(1, 0.1), PowerLaw(1, -0.1), 1),
        lambda: experiment.equal_loss_ratio(PowerLaw(1, -0.1), PowerLaw(1, 0.1), 1),
        lambda: experiment.updates([]),
        lambda: experiment.ratio_band(
            {"AdamW": [1.0, 2.0], "Muon": [1.0, 2.0]},
            {"AdamW": [[2.0], [1.0]], "Muon": [[2.0], [1.0]]},
            1.0,
            5,
            0,
        ),
        lambda: experiment.train_one(
            "SGD",
            (1.0, 1.0),
            experiment.Text(*torch.zeros(3, 1)),
            seed=0,
            width=8,
            layers=1,
            steps=1,
            batch_size=1,
        ),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises((ValueError, TypeError), match=r"got|maximum|out of itself|Type-check"):
        call()


# The optimizer


def test_numbers_left_out_are_moonlights():
    found = Muon([nn.Parameter(torch.ones(2, 2))]).defaults
    assert (found["momentum"], found["nesterov"], found["weight_decay"]) == (0.95, True, 0.1)
    assert (found["lr"], found["betas"], found["eps"]) == (1e-3, (0.9, 0.95), 1e-8)


def gradients(shapes, steps, dtype=torch.float64, seed=0):
    """Gradients with a mean, so that momentum matters."""
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    for _ in range(steps):
        yield [mean + torch.randn(mean.shape, dtype=dtype, generator=generator) for mean in means]


def run(make, shapes, steps, dtype=torch.float64):
    params = [nn.Parameter(matrix(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    optimizer = make(params)
    for grads in gradients(shapes, steps, dtype):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_pytorchs(nesterov, decay):
    """Theirs averages gradients where ours adds them up, (1 - μ) times ours: scale does not matter.

    Their products are in bfloat16, and so are ours here; ours in float64 is as near to theirs as bfloat16 allows.
    """
    shapes = [(16, 16), (8, 32), (32, 8)]
    options = dict(lr=0.05, weight_decay=decay, momentum=0.9, nesterov=nesterov)
    theirs = run(partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw", **options), shapes, 10)
    bfloat16 = partial(newton_schulz, dtype=torch.bfloat16)
    ours = run(partial(Muon, orthogonalize=bfloat16, **options), shapes, 10)
    exact = run(partial(Muon, **options), shapes, 10)
    start = [matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    for a, b, c, w in zip(ours, theirs, exact, start, strict=True):
        moved = (b - w).norm()
        assert (a - b).norm() / moved < 0.015
        assert (c - b).norm() / moved < 0.02


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_pytorchs_exactly_where_both_orthogonalize_alike(nesterov, monkeypatch):
    """The rules around it: momentum, scale and decay. With a wrong one they part."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda g, *_: polar(g))
    shapes = [(6, 6), (4, 8), (8, 4)]
    options = dict(lr=0.05, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    theirs = run(partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw", **options), shapes, 10)
    for wrong in (
        dict(),
        dict(momentum=0.89),
        dict(weight_decay=0.09),
        dict(nesterov=not nesterov),
        dict(lr=0.051),
    ):
        ours = run(partial(Muon, orthogonalize=polar, **options | wrong), shapes, 10)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-10) == (not wrong), wrong


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_rest_is_pytorchs_adamw(decay):
    shapes = [(5,), (4, 3), ()]
    options = dict(lr=0.05, weight_decay=decay, betas=(0.8, 0.95), eps=1e-3)
    theirs = run(partial(torch.optim.AdamW, **options), shapes, 10)
    ours = run(lambda params: Muon([{"params": params, "muon": False}], **options), shapes, 10)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_one_step_by_hand():
    """W (1 - η λ) - η 0.2 √max(m, n) U Vᵀ, with the direction (1 + μ) G of the first step."""
    w, g = matrix(3, 5), matrix(3, 5, seed=1)
    p = nn.Parameter(w.clone())
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, orthogonalize=polar)
    p.grad = g
    optimizer.step()
    assert torch.allclose(p, w * 0.95 - 0.1 * 0.2 * math.sqrt(5) * polar(g), atol=1e-12)


def test_momentum_by_hand():
    group, state = dict(momentum=0.5, nesterov=True), {}
    a, b = matrix(2, 2), matrix(2, 2, seed=1)
    assert torch.allclose(momentum_direction(a, state, group), 1.5 * a)
    assert torch.allclose(momentum_direction(b, state, group), b + 0.5 * (b + 0.5 * a))
    plain = momentum_direction(a, state, group | {"nesterov": False})
    assert torch.allclose(plain, a + 0.5 * b + 0.25 * a)


@each_shape
def test_entries_of_a_matched_update_have_the_size_of_moonlights(shape):
    """Lemma 1 of Liu et al.: an orthogonal factor of full rank has entries of size 1 / √max(m, n)."""
    assert experiment.rms(polar(matrix(*shape))) == pytest.approx(1 / math.sqrt(max(shape)))
    assert experiment.rms(matched(polar(matrix(*shape)))) == pytest.approx(0.2)
    assert experiment.rms(experiment.normalized(matrix(*shape))) == pytest.approx(
        1 / math.sqrt(max(shape))
    )


def test_training_in_rotated_coordinates_is_the_rotated_training():
    """f(A X B) from Aᵀ W Bᵀ: Muon's steps rotate along, AdamW's do not."""
    left, right, target = rotation(4, 1), rotation(6, 2), matrix(4, 6, seed=3)

    def train(make, rotated):
        start = matrix(4, 6)
        w = nn.Parameter(left.mT @ start @ right.mT if rotated else start)
        optimizer = make(w)
        for _ in range(5):
            optimizer.zero_grad()
            seen = left @ w @ right if rotated else w
            ((seen - target) ** 4).sum().backward()
            optimizer.step()
        return (left @ w @ right if rotated else w).detach()

    for muon, same in ((True, True), (False, False)):
        make = partial(lambda muon, w: Muon([{"params": [w], "muon": muon}], lr=0.1), muon)
        assert torch.allclose(train(make, True), train(make, False), atol=1e-9) == same


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_the_loss_may_be_scaled(factor):
    shapes = [(4, 6), (5, 5)]

    def scaled(params):
        optimizer = Muon(params, lr=0.05)
        step = optimizer.step

        def with_factor():
            for p in params:
                p.grad.mul_(factor)
            step()

        optimizer.step = with_factor
        return optimizer

    for a, b in zip(run(scaled, shapes, 5), run(Muon_, shapes, 5), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


Muon_ = partial(Muon, lr=0.05)


def test_batched_and_one_by_one_agree():
    shapes = [(4, 6), (6, 4), (4, 6), (3, 4, 6), (5, 5), (3, 4, 6)]
    for orthogonalize in (newton_schulz, polar):
        make = partial(Muon_, orthogonalize=orthogonalize)
        together_, alone = (run(partial(make, batched=x), shapes, 5) for x in (True, False))
        for a, b in zip(together_, alone, strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    assert together(newton_schulz, []) == []
    mixed = [matrix(3, 4, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    assert [x.dtype for x in together(newton_schulz, mixed)] == [torch.float32, torch.float64]
    calls = []
    optimizer = Muon_(
        [nn.Parameter(x) for x in matrix(3, 4, 6)],
        orthogonalize=lambda x: calls.append(x.shape) or x,
    )
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(4, 6, dtype=torch.float64)
    optimizer.step()
    assert calls == [(3, 4, 6)]


def test_stacked_experts_are_as_many_matrices():
    stacked = run(Muon_, [(9, 4, 6)], 1)[0]
    grads = next(gradients([(9, 4, 6)], 1))[0]
    for i in range(9):
        p = nn.Parameter(matrix(9, 4, 6)[i])
        optimizer = Muon_([p])
        p.grad = grads[i].clone()
        optimizer.step()
        assert torch.allclose(p, stacked[i], atol=1e-12)


def decoder_and_batch(seed=0):
    torch.manual_seed(seed)
    model = Decoder(Config(11, 8, 2, 2)).double()
    tokens = torch.randint(11, (2, 7))
    return model, tokens[:, :-1], tokens[:, 1:]


def steps_of(model, optimizer, inputs, targets, count):
    for _ in range(count):
        optimizer.zero_grad()
        next_token_loss(model(inputs), targets).backward()
        optimizer.step()


def test_a_state_that_was_stored_goes_on_as_if_nothing_had_happened(tmp_path):
    model, inputs, targets = decoder_and_batch()
    optimizer = Muon(split_parameters(model), lr=0.01)
    steps_of(model, optimizer, inputs, targets, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    steps_of(model, optimizer, inputs, targets, 3)

    other, *_ = decoder_and_batch(1)
    weights, state = torch.load(tmp_path / "state.pt")
    other.load_state_dict(weights)
    resumed = Muon(split_parameters(other), lr=0.5)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.01
    steps_of(other, resumed, inputs, targets, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh, *_ = decoder_and_batch(1)  # the control: without the state it goes on otherwise
    fresh.load_state_dict(weights)
    steps_of(fresh, Muon(split_parameters(fresh), lr=0.01), inputs, targets, 3)
    assert not torch.allclose(
        fresh.blocks[0].attention.out.weight, other.blocks[0].attention.out.weight
    )


def test_a_schedule_closures_and_missing_gradients():
    model, inputs, targets = decoder_and_batch()
    optimizer = Muon(split_parameters(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(next_token_loss(model(inputs), targets).item())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    schedule.base_lrs = [0.01, 0.01]
    optimizer.zero_grad()
    assert optimizer.step() is None
    p = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [p], "muon": True})
    with pytest.raises(ValueError, match="got"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "muon": True})
    assert len(optimizer.param_groups) == 3


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_who_gets_muon():
    model = Decoder(Config(11, 8, 1, 2))
    hidden, rest = split_parameters(model)
    assert hidden["muon"] and not rest["muon"]
    assert names_of(model, hidden) == {
        *(f"blocks.0.attention.{x}.weight" for x in ("query", "key", "value", "out")),
        *(f"blocks.0.feed_forward.{x}.weight" for x in ("gate", "up", "down")),
    }
    assert names_of(model, rest) == {
        *("embedding.weight", "head.weight", "norm.weight"),
        *(f"blocks.0.{x}_norm.weight" for x in ("attention", "feed_forward")),
    }
    assert "head.weight" in names_of(model, split_parameters(model, ("embedding",))[0])
    model.head.requires_grad_(False)
    assert "head.weight" not in names_of(model, split_parameters(model)[1])
    tied = Decoder(Config(11, 8, 1, 2, tie_embeddings=True))
    assert "embedding.weight" in names_of(tied, split_parameters(tied)[1])
    assert [group["muon"] for group in split_parameters(nn.LayerNorm(3))] == [False]
    nested = nn.ModuleDict(
        {"overhead": nn.Linear(2, 2, False), "head": nn.Sequential(nn.Linear(2, 2))}
    )
    hidden, _ = split_parameters(nn.ModuleDict({"inner": nested}))  # names of modules, whole
    assert names_of(nn.ModuleDict({"inner": nested}), hidden) == {"inner.overhead.weight"}


def test_experts_and_router_get_muon_and_train():
    torch.manual_seed(0)
    sizes = MoEConfig(4, 2, 8, shared=1)
    model = Decoder(Config(11, 8, 1, 2), feed_forward=partial(MixtureOfExperts, sizes=sizes))
    hidden, _ = split_parameters(model)
    names = names_of(model, hidden)
    assert {"blocks.0.feed_forward.router", "blocks.0.feed_forward.experts.gate"} <= names
    tokens = torch.randint(11, (2, 9))
    optimizer = Muon(split_parameters(model), lr=0.02)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# Cost


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_flops_are_those_of_pytorchs_counter(shape):
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(shape), 3)
    assert counter.get_total_flops() == cost.newton_schulz_flops(*shape, 3)
    layer, x = nn.Linear(*shape[::-1], bias=False), torch.randn(10, shape[1], requires_grad=True)
    with FlopCounterMode(display=False) as training:
        layer(x).sum().backward()
    assert cost.overhead(*shape, 10, 3) == pytest.approx(
        counter.get_total_flops() / training.get_total_flops()
    )
    assert cost.step_flops([shape, (3, *shape)], 3) == 4 * counter.get_total_flops()
    assert cost.step_flops([(2, 3, *shape)], 3) == 6 * counter.get_total_flops()


# The experiment


def test_updates_are_those_of_the_optimizers():
    model, *_ = decoder_and_batch()
    model = Decoder(Config(257, 8, 1, 2))
    text = experiment.source_code(torch.device("cpu"), 4)
    history = experiment.gradients(model, text, 3, 2, seed=0)
    assert len(history) == 3 and not any(
        torch.equal(history[0][name], history[1][name]) for name in history[0]
    )
    found = experiment.updates(history)
    for way, make in (
        ("AdamW", partial(torch.optim.AdamW, betas=(0.9, 0.95))),
        ("Muon", partial(Muon, momentum=0.95)),
    ):
        for name in history[0]:
            p = nn.Parameter(torch.zeros_like(history[0][name]))
            optimizer = make([p], lr=1.0, weight_decay=0.0)
            for grads in history:
                before = p.detach().clone()
                p.grad = grads[name].clone()
                optimizer.step()
            assert torch.allclose(before - p, found[way][name], atol=1e-5)


def test_stable_rank_and_rms():
    x = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert experiment.stable_rank(x) == pytest.approx(6 / 4)
    assert experiment.rms(x) == pytest.approx(math.sqrt(6 / 9))


def test_moonlights_ratio_is_not_constant():
    """Liu et al. 2025: 2.506 C^-0.052 and 2.608 C^-0.054, and 52 %."""
    muon, adamw = PowerLaw(2.506, -0.052), PowerLaw(2.608, -0.054)
    found = [experiment.equal_loss_ratio(muon, adamw, c) for c in (1, 20, 100)]
    assert found == pytest.approx([0.464, 0.521, 0.554], abs=1e-3)
    c = found[1] * 20
    assert muon(c) == pytest.approx(adamw(20))


def test_a_ratio_that_is_known_is_found_with_its_band():
    compute = {"AdamW": [1.0, 2.0, 4.0, 8.0], "Muon": [1.0, 2.0, 4.0, 8.0]}
    law, generator = PowerLaw(3, -0.1), np.random.default_rng(0)

    def draw(factor):
        noise = 0.01 * generator.standard_normal((4, 3))
        return [
            (law(c / factor) + n).tolist() for c, n in zip(compute["AdamW"], noise, strict=True)
        ]

    exact = {"AdamW": [[law(c)] * 2 for c in compute["AdamW"]]}
    exact["Muon"] = [[law(c / 0.5)] * 2 for c in compute["Muon"]]
    found = experiment.ratio_band(compute, exact, 4.0, 10, 0)
    assert [found[x] for x in ("ratio", "low", "high")] == pytest.approx([0.5] * 3)
    assert experiment.seed_ratios(compute, exact, 4.0) == pytest.approx([0.5, 0.5])
    twice = {"AdamW": compute["AdamW"], "Muon": [2 * c for c in compute["Muon"]]}
    assert experiment.ratio_band(twice, exact, 4.0, 10, 0)["ratio"] == pytest.approx(1.0)
    inside, widths = 0, []
    for i in range(40):
        noisy = {"AdamW": draw(1.0), "Muon": draw(0.5)}
        band = experiment.ratio_band(compute, noisy, 4.0, 50, i)
        inside += band["low"] <= 0.5 <= band["high"]
        widths.append(band["high"] - band["low"])
    assert 24 <= inside <= 39  # of 40, at 80 %
    # A mean of three losses errs by 0.01 / √3 of about 2.7; a line through four points by √0.3 of that at its third and
    # second; two lines differ by √2 of that; over the exponent 0.1, times the ratio, and 80 % are ± 1.28 of it.
    expected = 2 * 1.28 * 0.5 * (0.01 / 3**0.5 / 2.7) * (0.3 * 2) ** 0.5 / 0.1
    assert np.mean(widths) == pytest.approx(expected, rel=0.2)


def test_budgets():
    budget = experiment.budget_of(5e10, 18, 2)
    scale = experiment.scale_of(experiment.sizes(18, 2))
    spent = budget["steps"] * budget["batch_size"] * experiment.LENGTH * scale
    assert spent == pytest.approx(5e10, rel=0.005)
    for compute in (1e10, 1.1e10, 1.2e10, 1.3e10):  # the nearest number of steps
        one = experiment.budget_of(compute, 18, 2)
        a_step = one["batch_size"] * experiment.LENGTH * scale
        assert abs(one["steps"] * a_step - compute) <= a_step / 2
    assert experiment.budget_of(5e10, 18, 2, 4)["batch_size"] == pytest.approx(
        4 * budget["batch_size"], abs=2
    )
    sizes = experiment.sizes(18, 2)
    expected = 2 * (4 * cost.newton_schulz_flops(18, 18))
    expected += 2 * 3 * cost.newton_schulz_flops(sizes.hidden, 18)
    assert experiment.surcharge(18, 2, 10) == pytest.approx(
        expected / (scale * 10 * experiment.LENGTH)
    )


def test_a_sweep_says_whether_its_best_lies_inside():
    """By the mean over seeds."""
    losses = {(1, 9): [3.0, 3.0], (2, 9): [0.5, 2.0], (3, 9): [2.0, 2.0]}
    assert experiment.best_rates(losses) == (2, 9)
    assert not experiment.at_edge(losses)
    assert experiment.at_edge(losses | {(3, 9): [0.9, 1.0]})
    assert experiment.at_edge(losses | {(1, 9): [1.0, 1.0]})


TINY = dict(width=8, layers=1, steps=3, batch_size=2)


@pytest.fixture(scope="module")
def text():
    return experiment.source_code(torch.device("cpu"), 4)


def test_ways_differ_in_the_optimizer_alone(text):
    """At a rate of zero all end with the same weights; at others none with another's."""
    rates = {
        way: experiment.train_one(way, (0.0, 0.0), text, seed=0, **TINY) for way in experiment.WAYS
    }
    assert len(set(rates.values())) == 1
    trained = {
        way: experiment.train_one(way, (0.02, 0.03), text, seed=0, **TINY)
        for way in experiment.WAYS
    }
    assert len(set(trained.values())) == len(experiment.WAYS)
    outer = {
        way: experiment.train_one(way, (0.0, 0.03), text, seed=0, **TINY) for way in experiment.WAYS
    }
    same = {"AdamW", "Muon", "Muon, exact polar factor", "momentum of Muon's size"}
    assert len({outer[way] for way in same}) <= 2  # two implementations of AdamW
    assert max(outer[way] for way in same) - min(outer[way] for way in same) < 1e-4


def test_groups_of_each_way():
    model = Decoder(experiment.sizes(8, 1))
    for way, hidden in (
        ("AdamW", 7),
        ("Muon", 7),
        ("Muon, head too", 8),
        ("Muon, embedding and head too", 9),
    ):
        optimizer = experiment.WAYS[way](model, 0.01, 0.02)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
        assert len(optimizer.param_groups[0]["params"]) == hidden
        assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)
        assert all(tuple(group["betas"]) == (0.9, 0.95) for group in optimizer.param_groups)
    assert experiment.WAYS["Muon, no decay"](model, 0.01, 0.02).param_groups[0]["weight_decay"] == 0


def test_a_seed_decides_weights_and_windows_and_the_way_neither(text, monkeypatch):
    seen = []

    def look(model, loss, data, **_):
        seen.append((model.head.weight.detach().clone(), data(2)[0]))

    monkeypatch.setattr(experiment, "fit", look)
    for way, seed in (("Muon", 0), ("Muon", 1), ("AdamW", 0)):
        experiment.train_one(way, (0.01, 0.01), text, seed=seed, **TINY)
    for first, other, again in zip(*seen, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_training_that_diverges_is_told(text, monkeypatch):
    def explode(*_, **__):
        raise FloatingPointError

    # In the last step, of which no training loss tells; and before the loss of the next one.
    at_once, soon = TINY | {"steps": 1}, TINY | {"steps": 5}
    assert experiment.train_one("AdamW", (0.01, 1e38), text, seed=0, **at_once) == math.inf
    way = "Muon, exact polar factor"
    assert experiment.train_one(way, (1e30, 1e30), text, seed=0, **soon) == math.inf
    monkeypatch.setattr(experiment, "fit", explode)
    assert experiment.train_one("Muon", (1.0, 1.0), text, seed=0, **TINY) == math.inf
    losses = {(1, 1): [math.inf, 1.0], (2, 1): [2.0, 2.0], (3, 1): [3.0, 4.0]}
    found = experiment.row(1.0, losses, **TINY)
    assert found["by rates"] == {"1, 1": "diverged", "2, 1": 2.0, "3, 1": 3.5}
    assert found["losses"] == [2.0, 2.0]
    assert (found["rates"], found["edge"], found["tokens a step"]) == ([2, 1], "no", 128)


SLICE = dict(
    seeds=2, layers=1, plan=((1e7, 8), (2e7, 8)),
    rates={"AdamW": (0.005, 0.01, 0.02), "Muon": (0.01, 0.02)}, batches=(1.0, 3.0),
    outer_rates=(0.02, 0.03), tuning_seeds=1, held_out=4, resamples=20,
)  # fmt: skip


def test_a_training_has_the_schedule_the_budget_and_the_rates(text, monkeypatch):
    seen, kept = {}, {}
    monkeypatch.setattr(experiment, "fit", lambda model, *_, **rest: seen.update(rest, model=model))
    experiment.train_one("Muon", (0.01, 0.02), text, seed=0, keep=kept, **TINY)
    assert (seen["warmup"], seen["steps"], seen["batch_size"]) == (0.1, 3, 2)
    assert [group["lr"] for group in seen["optimizer"].param_groups] == [0.01, 0.02]
    assert kept == {"Muon": seen["model"]}


def test_ways_orthogonalize_as_they_are_called():
    model = Decoder(experiment.sizes(8, 1))
    for way, orthogonalize in (
        ("Muon", newton_schulz),
        ("Muon, exact polar factor", polar),
        ("momentum of Muon's size", experiment.normalized),
    ):
        assert experiment.WAYS[way](model, 0.01, 0.02).orthogonalize is orthogonalize
    for way, embedding in (("Muon, head too", False), ("Muon, embedding and head too", True)):
        muon = experiment.WAYS[way](model, 0.01, 0.02).param_groups[0]
        assert {"head.weight"} <= names_of(model, muon)
        assert ("embedding.weight" in names_of(model, muon)) == embedding
    assert torch.equal(experiment.normalized(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_gradients_are_those_of_random_windows(text):
    torch.manual_seed(0)
    model = Decoder(experiment.sizes(8, 1))
    found = experiment.gradients(model, text, 2, 3, seed=5)
    draw = windows(text.train, experiment.LENGTH, torch.Generator().manual_seed(5))
    for grads in found:
        model.zero_grad()
        tokens, targets = draw(3)
        next_token_loss(model(tokens), targets).backward()
        for name, grad in grads.items():
            assert torch.allclose(grad, model.blocks.get_parameter(name).grad, atol=1e-7)
    steps = experiment.updates(found, polar)
    for name, grad in found[0].items():
        direction = found[1][name] + 0.95 * (0.95 * grad + found[1][name])
        assert torch.allclose(steps["momentum"][name], direction, atol=1e-6)
        assert torch.equal(steps["Muon"][name], matched(polar(steps["momentum"][name])))


def test_draws_of_a_band_by_hand():
    """Means, moved by the standard deviation, pooled over budgets, over the root of the number of seeds."""
    losses = {
        "AdamW": [[3.0, 3.1], [2.8, 2.82], [2.5, 2.7]],
        "Muon": [[2.9, 2.9], [2.6, 2.7], [2.4, 2.5]],
    }
    compute = {way: [1.0, 2.0, 8.0] for way in losses}
    generator = np.random.default_rng(7)

    def ratio(share):
        laws = {}
        for way, of_way in losses.items():
            pooled = math.sqrt(sum((a - b) ** 2 / 2 for a, b in of_way) / 3)
            noise = share * pooled / math.sqrt(2) * generator.standard_normal(3)
            laws[way] = fit_power_law(compute[way], np.mean(of_way, 1) + noise)
        return experiment.equal_loss_ratio(laws["Muon"], laws["AdamW"], 4.0)

    still, moved = ratio(0), sorted(ratio(1) for _ in range(21))
    band = experiment.ratio_band(compute, losses, 4.0, 21, 7)
    found = [band["ratio"], band["low"], band["high"]]
    assert found == pytest.approx([still, moved[2], moved[18]], rel=1e-9)
    of_seeds = experiment.seed_ratios(compute, losses, 4.0)
    for i, found in enumerate(of_seeds):
        one = {way: [[x[i]] * 2 for x in of_way] for way, of_way in losses.items()}
        assert found == pytest.approx(experiment.ratio_band(compute, one, 4.0, 1, 0)["ratio"])
    assert len(of_seeds) == 2 and of_seeds[0] != pytest.approx(of_seeds[1], rel=0.01)


def test_a_row_says_what_was_found_at_its_budget():
    losses = {(1, 9): [1.0, 3.0], (2, 9): [1.5, 1.6]}
    found = experiment.row(1e7, losses, width=8, layers=2, steps=5, batch_size=3)
    assert (found["C"], found["width"], found["steps"]) == (1e7, 8, 5)
    assert found["surcharge"] == experiment.surcharge(8, 2, 3)
    assert (found["losses"], found["edge"]) == ([1.5, 1.6], "yes")


def test_what_the_pictures_show():
    def lines(draw, *args):
        figure, ax = experiment.plt.subplots()
        draw(ax, *args)
        experiment.plt.close(figure)
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]

    swept = {"Muon": {(2, 9): [2.0, 4.0], (1, 9): [5.0, 6.0]}}
    dots = [([1, 1], [5, 6]), ([2, 2], [2, 4])]
    assert lines(experiment.draw_sweep, swept) == [*dots, ([1, 2], [5.5, 3])]
    spectra = {"Muon": torch.tensor([4.0, 2.0, 1.0])}
    assert lines(experiment.draw_spectra, spectra) == [([1, 2, 3], [1, 0.5, 0.25])]
    runs = [{"C": 1.0, "losses": [2.0, 3.0]}, {"C": 4.0, "losses": [1.0, 1.5]}]
    results = {"runs": {"Muon": runs}, "laws": {"Muon": [2.0, -0.5]}}
    dots = [([1, 4], [2, 1]), ([1, 4], [3, 1.5])]
    assert lines(experiment.draw_laws, results) == [*dots, ([1, 4], [2, 1])]


def test_full_scale_puts_its_parts_together(monkeypatch):
    """With a formula in place of the trainings: AdamW is best with small batches, Muon with large ones."""
    asked = []

    def formula(way, rates, text, *, seed, steps, batch_size, **sizes):
        asked.append((way, rates, seed, steps, batch_size, len(text.inputs), *sizes.values()))
        muon = way == "Muon"
        loss = 3 * (steps * batch_size) ** (-0.1 if muon else -0.09) + 0.001 * seed**2
        loss += 0.0001 * (-batch_size if muon else batch_size)
        return loss + 0.01 * abs(rates[0] - 0.02) + 0.01 * abs(rates[1] - 0.03)

    monkeypatch.setattr(experiment, "train_one", formula)
    rates = {"AdamW": (0.01, 0.02, 0.03), "Muon": (0.02, 0.03)}
    plan = ((1e8, 8), (2e8, 12))
    options = SLICE | dict(plan=plan, layers=2, held_out=7, rates=rates)
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=3, **options)
    for figure in pictures.values():
        experiment.plt.close(figure)
    runs, expected = results["runs"], set()
    for way, factor in (("AdamW", 1.0), ("Muon", 3.0)):
        tuning = [((1e8, 8, 2, x), 0.02, [5]) for x in (1.0, 3.0)]
        tuning += [((1e8, 8, 2, factor), outer, [5]) for outer in (0.02, 0.03)]
        measured = [((*point, 2, factor), 0.03, [3, 4]) for point in plan]
        for point, outer, seeds in tuning + measured:
            b = experiment.budget_of(*point)
            expected |= {
                (way, (rate, outer), seed, b["steps"], b["batch_size"], 7, b["width"], 2)
                for rate in rates[way]
                for seed in seeds
            }
        tuned = results["tuning"][way]
        assert [set(tuned["batch"]), set(tuned["outer"])] == [{"1", "3"}, {"0.02", "0.03"}]
        for one, (point, _, _) in zip(runs[way], measured, strict=True):
            b = experiment.budget_of(*point)
            assert (one["rates"], one["width"]) == ([0.02, 0.03], b["width"])
            assert one["edge"] == ("no" if way == "AdamW" else "yes")
            assert (one["C"], one["steps"]) == (point[0], b["steps"])
            assert one["surcharge"] == experiment.surcharge(b["width"], 2, b["batch_size"])
    assert set(asked) == expected
    losses = {way: [one["losses"] for one in runs[way]] for way in runs}
    spent = {way: [1e8, 2e8] for way in runs}
    dearer = spent | {"Muon": [one["C"] * (1 + one["surcharge"]) for one in runs["Muon"]]}
    for name, compute in (("ratio", spent), ("ratio, all counted", dearer)):
        band = experiment.ratio_band(compute, losses, 2e8, 20, 3)
        assert results[name] == band | {"C": 2e8}
    assert results["ratio of seeds"] == experiment.seed_ratios(spent, losses, 2e8)
    for way, law in results["laws"].items():
        assert law == list(fit_power_law(spent[way], [np.mean(x) for x in losses[way]]))


@pytest.mark.parametrize(
    "wrong",
    [dict(seeds=1), dict(plan=SLICE["plan"][:1]), dict(resamples=0)],
    ids=str,
)
def test_full_scale_refuses_before_it_trains(wrong, monkeypatch):
    monkeypatch.setattr(experiment, "train_one", None)
    with pytest.raises(ValueError, match="got"):
        experiment.full_scale(torch.device("cpu"), seed=0, **SLICE | wrong)


def best_row(rows):
    return min(rows, key=lambda name: np.mean(rows[name]["losses"]))


def test_full_scale_says_what_its_parts_say(text):
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=3, **SLICE)
    assert len(pictures) == 1
    for way in ("AdamW", "Muon"):
        found, runs = results["tuning"][way], results["runs"][way]
        assert [one["C"] for one in runs] == [1e7, 2e7]
        factor, outer = best_row(found["batch"]), best_row(found["outer"])
        assert found["batch"][factor] == found["outer"]["0.02"]
        for name, value, rows in (
            ("batch", "3", found["batch"]),
            ("outer", "0.03", found["outer"]),
        ):
            settings = {"batch": factor, "outer": "0.02"} | {name: value}
            budget = experiment.budget_of(1e7, 8, 1, float(settings["batch"]))
            grid = [(rate, float(settings["outer"])) for rate in SLICE["rates"][way]]
            losses = experiment.sweep(way, grid, text, [5], **budget)
            assert rows[value] == experiment.row(1e7, losses, **budget)
        budget = experiment.budget_of(2e7, 8, 1, float(factor))
        grid = [(rate, float(outer)) for rate in SLICE["rates"][way]]
        losses = experiment.sweep(way, grid, text, [3, 4], **budget)
        assert runs[1] == experiment.row(2e7, losses, **budget)
        law = PowerLaw(*results["laws"][way])
        for one in runs:  # two points lie on their line
            assert law(one["C"]) == pytest.approx(np.mean(one["losses"]))
    muon, adamw = (PowerLaw(*results["laws"][way]) for way in ("Muon", "AdamW"))
    assert results["ratio"]["C"] == 2e7
    assert results["ratio"]["ratio"] == pytest.approx(experiment.equal_loss_ratio(muon, adamw, 2e7))
    assert results["ratio, all counted"]["ratio"] > 1.01 * results["ratio"]["ratio"]
    assert len(results["ratio of seeds"]) == 2
    assert (
        min(results["ratio of seeds"]) < results["ratio"]["ratio"] < max(results["ratio of seeds"])
    )
    one, three = (results["tuning"]["Muon"]["batch"][name] for name in "13")
    assert three["tokens a step"] > one["tokens a step"] and three["steps"] < one["steps"]
    for figure in pictures.values():
        experiment.plt.close(figure)
