"""Chapter 13: the router and the layer equal transformers', experts three ways agree, balancing does what it says."""

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MoE,
    DeepseekV3TopkRouter,
)

from noise2tokens.moe import cost, experiment
from noise2tokens.moe.balancing import Balancing, balance_loss, bias_step, load, max_violation
from noise2tokens.moe.experts import grouped, grouped_swiglu, looped, multiply, one_by_one
from noise2tokens.moe.layer import (
    MixtureOfExperts,
    MoEConfig,
    auxiliary_loss,
    balance,
    expert_loads,
    from_transformers,
    mixtures,
    to_transformers,
)
from noise2tokens.moe.router import affinities, keep_groups, route
from noise2tokens.transformer import Config, Decoder, SwiGLU, next_token_loss

# (experts, top_k, hidden, shared, groups, top_groups, scale)
SIZES = [
    MoEConfig(8, 2, 6, 1, 4, 2, 2.5),
    MoEConfig(9, 3, 5, 2, 3, 2, 1.0),
    MoEConfig(10, 4, 4, 1, 5, 3, 1.7),
    MoEConfig(14, 3, 3, 3, 7, 5, 16.0),
    MoEConfig(6, 6, 4, 1, 1, 1, 2.446),
    MoEConfig(12, 1, 4, 1, 3, 1, 2.0),
]
sized = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.experts}-{s.top_k}-{s.groups}")


def peer_config(sizes, width):
    return DeepseekV3Config(
        hidden_size=width,
        moe_intermediate_size=sizes.hidden,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        n_shared_experts=sizes.shared,
        n_group=sizes.groups,
        topk_group=sizes.top_groups,
        routed_scaling_factor=sizes.scale,
        norm_topk_prob=True,
        experts_implementation="eager",
    )


def pair(sizes, width=12, seed=0, compute=grouped):
    """Ours and transformers' layer with the same weights and biases, in float64."""
    torch.manual_seed(seed)
    ours = MixtureOfExperts(Config(5, width, 1, 1), sizes=sizes, compute=compute).double().eval()
    ours.bias = torch.randn(sizes.experts, dtype=torch.float64)
    peer = DeepseekV3MoE(peer_config(sizes, width)).double().eval()
    peer.load_state_dict(to_transformers(ours.state_dict()))
    return ours, peer


def assert_close(ours, right):
    assert (ours - right).abs().max() <= 1e-6 * right.abs().max().clamp_min(1)


def sorted_rows(weights, experts):
    order = experts.argsort(1)
    return weights.gather(1, order), experts.gather(1, order)


# Router


@sized
@pytest.mark.parametrize("seed", range(3))
def test_the_router_is_transformers(sizes, seed):
    torch.manual_seed(seed)
    peer = DeepseekV3TopkRouter(peer_config(sizes, 7))
    torch.nn.init.normal_(peer.weight)
    peer.e_score_correction_bias.normal_()
    x = torch.randn(64, 7)
    _, *theirs = peer(x)
    ours = route(
        affinities(x, peer.weight),
        peer.e_score_correction_bias,
        sizes.top_k,
        groups=sizes.groups,
        top_groups=sizes.top_groups,
        scale=sizes.scale,
    )
    (weights, experts), (right, chosen) = sorted_rows(*ours), sorted_rows(*theirs)
    assert torch.equal(experts, chosen)
    assert (weights - right).abs().max() <= 1e-6 * sizes.scale


@given(st.integers(0, 10_000), st.sampled_from(SIZES))
@settings(max_examples=30, deadline=None)
def test_choices_are_what_a_search_over_all_of_them_finds(seed, sizes):
    torch.manual_seed(seed)
    scores, bias = torch.rand(3, sizes.experts).double(), torch.randn(sizes.experts).double()
    weights, experts = route(
        scores, bias, sizes.top_k, groups=sizes.groups, top_groups=sizes.top_groups, scale=2.0
    )
    size = sizes.experts // sizes.groups
    for row, w, chosen in zip(scores, weights, experts, strict=True):
        sums = [
            sum(sorted((row + bias)[g * size :][:size].tolist())[-2:]) for g in range(sizes.groups)
        ]
        best = sorted(range(sizes.groups), key=lambda g: -sums[g])[: sizes.top_groups]
        allowed = [e for e in range(sizes.experts) if e // size in best]
        right = max(
            itertools.combinations(allowed, sizes.top_k), key=lambda c: (row + bias)[list(c)].sum()
        )
        assert set(chosen.tolist()) == set(right)
        assert torch.allclose(w, 2.0 * row[chosen] / row[chosen].sum(), rtol=1e-12)


def test_the_bias_is_for_the_choice_alone():
    torch.manual_seed(0)
    scores = torch.rand(50, 6).double().requires_grad_()
    bias = torch.randn(6).double().requires_grad_()
    weights, experts = route(scores, bias, 2)
    plain, _ = route(scores, torch.zeros(6).double(), 6)
    assert not torch.equal(experts, route(scores, torch.zeros(6).double(), 2)[1])
    assert torch.allclose(
        weights, scores.gather(1, experts) / scores.gather(1, experts).sum(1, True)
    )
    (weights * torch.randn_like(weights)).sum().backward()
    assert bias.grad is None and scores.grad.abs().sum() > 0
    assert torch.allclose(plain.sum(1), torch.ones(50).double())


def test_negative_preferences_stay_in_their_groups():
    scores, bias = torch.full((1, 6), 0.1), torch.full((6,), -5.0)
    bias[:2] = -1.0
    _, experts = route(scores, bias, 2, groups=3, top_groups=1)
    assert sorted(experts[0].tolist()) == [0, 1]
    kept = keep_groups(torch.tensor([[-3.0, -9.0, -4.0, -4.0]]), 2, 1)
    assert kept.tolist() == [
        [-torch.inf, -torch.inf, -4.0, -4.0]
    ]  # the sum of two, and not the best


def test_groups_of_one_expert_and_ties():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
    assert route(scores, torch.zeros(4), 1, groups=4, top_groups=2)[1].item() == 1
    weights, experts = route(torch.full((5, 4), 0.5), torch.zeros(4), 3)
    assert all(len(set(row)) == 3 for row in experts.tolist())
    assert torch.allclose(weights, torch.full((5, 3), 1 / 3))


def test_affinities_that_vanish_give_zero_and_not_nan():
    scores = affinities(torch.full((2, 1), -200.0), torch.ones(3, 1))
    assert scores.max() == 0
    assert route(scores, torch.zeros(3), 2)[0].tolist() == [[0.0, 0.0]] * 2
    assert balance_loss(scores[None], 2) == 0


def test_the_router_computes_in_single_precision():
    torch.manual_seed(0)
    x, router = torch.randn(40, 64), torch.randn(16, 64) / 8
    right = (x.bfloat16().double() @ router.bfloat16().double().T).sigmoid()
    low = affinities(x.bfloat16(), router.bfloat16())
    assert low.dtype == torch.float32 and (low - right).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        under = affinities(x, router)
    assert under.dtype == torch.float32 and torch.equal(under, affinities(x, router))
    assert affinities(x.double(), router.double()).dtype == torch.float64


# The layer


@sized
@pytest.mark.parametrize("compute", [looped, grouped, one_by_one])
def test_the_layer_is_transformers(sizes, compute):
    ours, peer = pair(sizes, compute=compute)
    x, y = (torch.randn(2, 9, 12).double() for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(one) for layer, one in zip((ours, peer), inputs, strict=True)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-6
    for out in outputs:
        (out * y).sum().backward()
    # Their router computes in single precision whatever the model is in, so gradients of its weights agree to that.
    assert_close(inputs[0].grad, inputs[1].grad)
    theirs = dict(peer.named_parameters())
    grads = to_transformers({name: p.grad for name, p in ours.named_parameters()})
    assert set(grads) == set(theirs)
    for name, grad in grads.items():
        assert_close(grad, theirs[name].grad)
    assert ours.bias.grad is None and not ours.bias.requires_grad


@sized
@pytest.mark.parametrize("separate", [False, True])
def test_states_convert_both_ways(sizes, separate):
    ours, _ = pair(sizes)
    state = ours.state_dict()
    there = to_transformers(state, separate=separate)
    back = from_transformers(there)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)
    if separate:
        last = sizes.experts - 1
        assert torch.equal(there[f"experts.{last}.down_proj.weight"], ours.experts.down[last])
        assert torch.equal(there["experts.1.gate_proj.weight"], ours.experts.gate[1])
    else:
        peer = DeepseekV3MoE(peer_config(sizes, 12))
        assert set(there) == set(peer.state_dict())


def test_states_that_are_something_else_are_refused():
    state = to_transformers(pair(SIZES[0])[0].state_dict(), separate=True)
    with pytest.raises(ValueError, match="missing"):
        from_transformers({k: v for k, v in state.items() if k != "experts.3.up_proj.weight"})
    with pytest.raises(ValueError, match="unknown names.*what"):
        from_transformers(state | {"what": torch.zeros(1)})


def test_a_mixture_is_a_drop_in_feed_forward_network():
    torch.manual_seed(0)
    config = Config(17, 12, 3, 2)
    moe = partial(MixtureOfExperts, sizes=MoEConfig(8, 2, 4, groups=4, top_groups=2))
    model = Decoder(config, feed_forward=[SwiGLU, moe, moe])
    assert len(mixtures(model)) == 2
    spread = model.blocks[1].feed_forward.experts
    assert spread.down.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.15)
    assert spread.gate.std().item() == pytest.approx(0.02, rel=0.15)
    tokens = torch.randint(17, (2, 10))
    packed = model.eval()(tokens.flatten(), cu_seqlens=torch.tensor([0, 10, 20], dtype=torch.int32))
    assert torch.allclose(packed.view(2, 10, 17), model(tokens), atol=1e-6)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(3, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-6)


def test_shared_experts_are_one_network_or_none():
    torch.manual_seed(0)
    layer = MixtureOfExperts(Config(5, 6, 1, 1), sizes=MoEConfig(4, 2, 3, shared=2))
    assert layer.shared.up.weight.shape == (6, 6)
    alone = MixtureOfExperts(Config(5, 6, 1, 1), sizes=MoEConfig(4, 2, 3, shared=0))
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if "shared" not in k})
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), alone(x) + layer.shared(x))


# Experts


def mixture(tokens, experts, top_k, width, hidden, dtype, choice=None, seed=0):
    torch.manual_seed(seed)
    shapes = [(experts, hidden, width)] * 2 + [(experts, width, hidden)]
    matrices = [(torch.randn(s) / s[2] ** 0.5).to(dtype).requires_grad_() for s in shapes]
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k).to(torch.promote_types(dtype, torch.float32))
    if choice is None:
        choice = torch.rand(tokens, experts).topk(top_k).indices
    return [x, weights.requires_grad_(), choice, *matrices]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "choice"),
    [
        (30, 8, 3, None),
        (1, 8, 3, None),
        (0, 4, 2, torch.zeros(0, 2, dtype=torch.int64)),
        (12, 5, 1, torch.full((12, 1), 3)),
        (12, 64, 2, None),
        (6, 3, 3, torch.tensor([[2, 0, 1]] * 6)),
    ],
    ids=["usual", "one token", "no token", "all to one", "most empty", "all experts"],
)
@pytest.mark.parametrize(
    ("dtype", "width", "hidden"),
    [(torch.float64, 6, 5), (torch.float32, 8, 12), (torch.float32, 7, 5)],
)
def test_grouped_experts_are_the_loop(tokens, experts, top_k, choice, dtype, width, hidden):
    found = []
    for compute in (looped, grouped, one_by_one):
        args = mixture(tokens, experts, top_k, width, hidden, dtype, choice)
        y = compute(*args)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, *(a.grad for a in args if a.requires_grad)])
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other, right in zip(*found[1:], found[0], strict=True):
        assert one.dtype == other.dtype == right.dtype
        assert torch.allclose(one, right, rtol=0, atol=bound)
        assert torch.allclose(other, right, rtol=0, atol=bound)


def test_low_precision_is_as_good_as_the_loop_in_it():
    args = mixture(200, 8, 2, 32, 16, torch.bfloat16)
    with torch.no_grad():
        right = looped(*(a.double() if a.is_floating_point() else a for a in args))
        plain = (looped(*args) - right).abs().max()
        ours = grouped(*args)
    assert ours.dtype == torch.bfloat16
    assert (ours - right).abs().max() <= 2 * plain


def test_under_autocast_experts_multiply_in_its_type(monkeypatch):
    seen = []
    real = F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda x, *a, **k: seen.append(x.dtype) or real(x, *a, **k)
    )
    args = mixture(20, 4, 2, 16, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(*args)
        loop = looped(*args)
    assert set(seen) == {torch.bfloat16} and y.dtype == torch.float32
    right = looped(*(a.double() if a.is_floating_point() else a for a in args))
    assert (y - right).abs().max() <= 1.1 * (loop - right).abs().max()


def test_the_fast_path_is_taken_where_it_can_be(monkeypatch):
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    for width, expected in ((8, 1), (6, 0)):
        multiply(torch.randn(5, width), torch.randn(2, 4, width), torch.tensor([2, 3]))
        assert len(calls) == expected
        calls.clear()


def test_rows_meet_the_matrices_of_their_expert():
    x = torch.ones(4, 1).double()
    scales = torch.tensor([1.0, 2.0, 3.0]).double().view(3, 1, 1)
    assert multiply(x, scales, torch.tensor([1, 0, 3])).flatten().tolist() == [1, 3, 3, 3]
    y = grouped_swiglu(x, torch.tensor([2, 1, 1]), scales, 10 * scales, scales)
    assert torch.allclose(y[2], F.silu(torch.tensor(2.0).double()) * 20 * 2)


# Balancing


def test_loads_and_their_violation():
    counts = load(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5)
    assert counts.tolist() == [2, 1, 0, 3, 0]
    assert max_violation(counts).item() == pytest.approx(3 / 1.2 - 1)
    assert max_violation(torch.tensor([[4, 4], [8, 0]])).tolist() == [0, 1]


def test_the_auxiliary_loss_is_the_papers_sum():
    torch.manual_seed(0)
    scores = torch.rand(3, 7, 5).double()
    total = 0.0
    for s in scores:  # one sequence
        for i in range(5):
            chosen = sum(int(i in row.topk(2).indices.tolist()) for row in s)
            f = 5 / (2 * 7) * chosen
            p = sum((row[i] / row.sum()).item() for row in s) / 7
            total += f * p / 3
    assert balance_loss(scores, 2).item() == pytest.approx(total, rel=1e-12)
    batch = balance_loss(scores, 2, "batch").item()
    assert batch == pytest.approx(balance_loss(scores.view(1, 21, 5), 2).item())
    assert batch != pytest.approx(total)


def test_the_auxiliary_loss_is_one_where_even_and_most_where_one_expert_takes_all():
    even = torch.eye(4).double().repeat(3, 1)[None] + 0.5
    assert balance_loss(even, 1).item() == pytest.approx(1)
    one = torch.tensor([[[1.0, 0, 0, 0]] * 6]).double()
    assert balance_loss(one, 1).item() == pytest.approx(4)
    scores = torch.rand(2, 9, 4).double().requires_grad_()
    balance_loss(scores, 1).backward()
    assert scores.grad.abs().sum() > 0


def test_sequences_may_differ_for_the_batch_but_not_for_the_sequence():
    first = torch.tensor([[1.0, 0.1]]).repeat(5, 1)
    scores = torch.stack([first, first.flip(1)])
    assert balance_loss(scores, 1, "batch").item() == pytest.approx(1)
    assert balance_loss(scores, 1, "sequence").item() > 1.5


def test_biases_step_against_the_load():
    counts = torch.tensor([9, 3, 5, 3])
    assert bias_step(counts, 0.1).tolist() == pytest.approx([-0.1, 0.1, 0, 0.1])
    centered = bias_step(counts, 0.1, centered=True)
    assert centered.tolist() == pytest.approx([-0.125, 0.075, -0.025, 0.075])
    assert centered.sum().item() == pytest.approx(0, abs=1e-12)


def trained_layer(balancing, steps=200):
    """A layer whose router prefers a few experts, fed with the same tokens; loads of the last step."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(Config(5, 8, 1, 1), sizes=MoEConfig(8, 2, 4), balancing=balancing)
    x = torch.randn(16, 32, 8) + 1.0
    for _ in range(steps):
        layer(x)
        counts = balance(layer)
    return layer, counts[0]


def test_the_bias_evens_the_load_out():
    before = max_violation(trained_layer(Balancing(), 1)[1])
    assert before > 1
    layer, counts = trained_layer(Balancing(speed=0.01))
    assert max_violation(counts) < 0.15 < before
    assert layer.router.grad is None
    drifted, _ = trained_layer(Balancing(speed=0.01)), None
    centered, even = trained_layer(Balancing(speed=0.01, centered=True))
    assert abs(centered.bias.sum()) < 1e-4 and max_violation(even) < 0.15
    assert abs(drifted[0].bias.sum()) > 0.05


def test_counts_are_of_training_and_once():
    layer = MixtureOfExperts(Config(5, 8, 1, 1), sizes=MoEConfig(8, 2, 4))
    x = torch.randn(2, 3, 8)
    layer(x), layer(x)
    layer.eval()(x)
    assert layer.counts.sum() == 24 and balance(layer).sum() == 24 and layer.counts.sum() == 0
    assert "counts" not in layer.state_dict() and "bias" in layer.state_dict()
    loads = expert_loads(layer, lambda: layer(x))
    assert loads.shape == (1, 8) and loads.sum() == 12 and layer.counts.sum() == 0
    layer(x)
    assert loads.sum() == 12, "a hook was left behind"


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_the_layer_takes_its_auxiliary_loss_in_training(scope):
    torch.manual_seed(0)
    balancing = Balancing(alpha=0.3, scope=scope)
    sizes = MoEConfig(6, 2, 4)
    config = Config(11, 8, 2, 2)
    model = Decoder(
        config, feed_forward=partial(MixtureOfExperts, sizes=sizes, balancing=balancing)
    )
    inputs = []
    for layer in mixtures(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tokens = torch.randint(11, (3, 7))
    model(tokens)
    right = sum(
        0.3 * balance_loss(affinities(x.flatten(0, 1), m.router).view(3, 7, 6), 2, scope)
        for x, m in zip(inputs, mixtures(model), strict=True)
    )
    assert auxiliary_loss(model).item() == pytest.approx(right.item(), rel=1e-5)
    auxiliary_loss(model).backward()
    assert all(layer.router.grad.abs().sum() > 0 for layer in mixtures(model))
    assert all(layer.experts.up.grad is None for layer in mixtures(model)[1:])
    model.eval()(tokens)
    assert auxiliary_loss(model) == 0


def test_an_auxiliary_loss_without_gradient_is_refused():
    layer = MixtureOfExperts(
        Config(5, 8, 1, 1), sizes=MoEConfig(4, 2, 4), balancing=Balancing(alpha=0.1)
    )
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
        assert auxiliary_loss(layer) > 0
    with pytest.raises(RuntimeError, match="checkpoint"):
        auxiliary_loss(layer)


def test_the_gradient_of_the_auxiliary_loss_lowers_what_is_fuller_than_the_mean_by_its_affinities():
    torch.manual_seed(0)
    scores = torch.rand(1, 9, 5).double().requires_grad_()
    balance_loss(scores, 2).backward()
    s = scores.detach()[0]
    f = load(s.topk(2).indices, 5) * 5 / (2 * 9)
    own = (f * s).sum(1, keepdim=True) / s.sum(1, keepdim=True)
    assert torch.allclose(scores.grad[0], (f - own) / (9 * s.sum(1, keepdim=True)), rtol=1e-12)


def test_a_model_can_be_copied_after_a_step_and_its_graph_is_gone():
    layer = MixtureOfExperts(
        Config(5, 8, 1, 1), sizes=MoEConfig(4, 2, 4), balancing=Balancing(alpha=0.1)
    )
    layer(torch.randn(2, 3, 8))
    auxiliary_loss(layer).backward()
    balance(layer)
    assert layer.auxiliary is None and auxiliary_loss(layer) == 0
    copy.deepcopy(layer)


def test_weights_are_allocated_after_the_model_is_made():
    with torch.device("meta"):
        layer = MixtureOfExperts(Config(5, 8, 1, 1), sizes=MoEConfig(4, 2, 4))
    assert layer.to_empty(device="cpu").bias.shape == (4,)


def test_biases_keep_single_precision():
    layer = MixtureOfExperts(Config(5, 8, 1, 1), sizes=MoEConfig(4, 2, 4))
    layer.bias += 1.001
    layer.to(torch.bfloat16)
    assert layer.router.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, torch.full((4,), 1.001))
    layer(torch.randn(2, 8, dtype=torch.bfloat16))
    assert layer.double().bias.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoEConfig(8, 2, 4, groups=3), "divide 8 experts"),
        (lambda: MoEConfig(8, 2, 4, groups=4, top_groups=5), "got 4 and 5"),
        (lambda: MoEConfig(8, 5, 4, groups=4, top_groups=2), "1 to 4.*got 5"),
        (lambda: MoEConfig(8, 0, 4), "got 0"),
        (lambda: MoEConfig(8, 2, 0), "hidden >= 1"),
        (lambda: MoEConfig(8, 2, 4, shared=-1), "shared >= 0"),
        (lambda: MoEConfig(8, 2, 4, scale=0), "scale > 0"),
        (lambda: Balancing(scope="token"), "got 'token'"),
        (lambda: Balancing(alpha=-1), "got -1"),
        (lambda: Balancing(speed=float("nan")), "nan"),
        (lambda: route(torch.rand(2, 4), torch.zeros(4), 5), "got 5"),
        (lambda: balance(SwiGLU(Config(5, 8, 1, 1))), "no mixture.*SwiGLU"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Several processes


@pytest.mark.parametrize("processes", [2, 4])
def test_experts_on_several_processes_are_those_of_one(processes, root):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(root / "tests" / "moe_processes.py")]
    path = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == processes


# Cost


def test_parameters_are_those_of_layers():
    sizes = MoEConfig(7, 2, 6, shared=2)
    model = cost.Model(8, 3, 11, 4 * 64, 20, 1, 8, 7, 2, 2, 6)
    moe = partial(MixtureOfExperts, sizes=sizes)
    ours = Decoder(Config(11, 8, 3, 2, hidden=20), feed_forward=[SwiGLU, moe, moe])
    assert model.parameters() == sum(p.numel() for p in ours.parameters() if p.dim() > 1)
    idle = 2 * 5 * 3 * 8 * 6
    assert model.parameters() - model.parameters(active=True) == idle


def test_operations_are_those_that_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    model = cost.Model(8, 2, 11, 4 * 64, 20, 2, 8)
    ours = Decoder(Config(11, 8, 2, 2, hidden=20))
    tokens = torch.randint(11, (1, 6))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        ours(tokens)
    assert model.training_flops(6) == 3 * counter.get_total_flops()


def test_groups_that_a_token_reaches():
    experts = torch.tensor([[0, 1], [0, 4], [6, 7]])
    assert cost.groups_reached(experts, 8, 4) == pytest.approx(4 / 3)
    drawn = torch.rand(20_000, 16).topk(3).indices
    assert cost.groups_reached(drawn, 16, 4) == pytest.approx(
        cost.expected_groups(16, 3, 4), rel=0.01
    )
    assert cost.expected_groups(8, 8, 4) == 4 and cost.expected_groups(8, 1, 4) == 1


# The experiment


def test_all_ways_start_alike_and_dense_networks_have_the_active_size():
    config, sizes = Config(257, 16, 3, 2), MoEConfig(8, 2, 8)
    ways = experiment.strategies(0.02, 0.01)
    assert list(ways) == [
        "none",
        "sequence-wise loss",
        "batch-wise loss",
        "bias",
        "bias and weak loss",
    ]
    assert ways["bias and weak loss"] == Balancing(alpha=0.0002, speed=0.01)
    assert ways["batch-wise loss"] == Balancing(alpha=0.02, scope="batch")
    models = []
    for balancing in ways.values():
        torch.manual_seed(3)
        models.append(experiment.decoder(config, sizes, balancing).state_dict())
    assert all(torch.equal(m[k], models[0][k]) for m in models for k in m)
    dense = experiment.decoder(config, sizes, None)
    assert not mixtures(dense) and dense.blocks[1].feed_forward.up.weight.shape == (24, 16)
    moe = experiment.decoder(config, sizes, Balancing())
    assert len(mixtures(moe)) == 2 and moe.blocks[0].feed_forward.up.weight.shape == (24, 16)


def test_training_balances_and_reports_validation():
    torch.manual_seed(0)
    data = tuple(part[:6000] for part in experiment.text(torch.device("cpu")))
    config, sizes = Config(257, 32, 2, 4), MoEConfig(16, 4, 16)
    options = dict(seed=0, steps=60, batch=8, length=32, count=8, learning_rate=6e-3)
    found, models = {}, {}
    for name, balancing in {
        "none": Balancing(),
        "bias": Balancing(speed=0.02),
        "dense": None,
    }.items():
        torch.manual_seed(1)
        models[name] = experiment.decoder(config, sizes, balancing)
        found[name] = experiment.train(models[name], data, **options)
    assert set(found["dense"]) == {"loss"}
    assert found["bias"]["max_violation"] < 0.7 * found["none"]["max_violation"]
    loads = found["bias"]["loads"]
    assert loads.shape == (60, 1, 16) and (loads.sum(-1) == 8 * 32 * 4).all()
    right = max_violation(loads[-6:]).mean().item()
    assert found["bias"]["batch_violation"] == pytest.approx(right)
    x, y = experiment.validation_windows(data[1], 32, 8)
    with torch.no_grad():
        loss = next_token_loss(models["bias"](x), y).item()
    assert found["bias"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert mixtures(models["bias"])[0].bias.abs().max() > 0.1
    assert mixtures(models["none"])[0].bias.abs().max() == 0


def test_a_comparison_is_of_trainings_from_the_same_weights_on_the_same_batches():
    data = tuple(part[:2000] for part in experiment.text(torch.device("cpu")))
    config, sizes = Config(257, 16, 3, 2), MoEConfig(8, 2, 8)
    ways = {"dense": None, "none": Balancing(), "loss": Balancing(alpha=1.0)}
    options = dict(steps=3, batch=2, length=16, count=2, learning_rate=0.01)
    results, loads, models = experiment.compare_ways(ways, config, sizes, data, [3, 4], **options)
    for i, seed in enumerate((3, 4)):
        for name, balancing in ways.items():
            torch.manual_seed(seed)
            model = experiment.decoder(config, sizes, balancing)
            right = experiment.train(model, data, seed=seed, **options)
            kept = models[name][i].state_dict()
            assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
            for measure, values in results.items():
                assert values.get(name, [None, None])[i] == right.get(measure)
            if balancing is not None and seed == 3:
                assert torch.equal(loads[name], right["loads"][:, -1])
    assert torch.equal(loads["none"][0], loads["loss"][0])  # before the first step
    assert results["loss"]["none"] != results["loss"]["loss"]
    firsts = []
    for seed in (5, 6):  # the same weights, other batches
        torch.manual_seed(0)
        model = experiment.decoder(config, sizes, Balancing())
        firsts.append(experiment.train(model, data, seed=seed, **options)["loads"][0])
    assert not torch.equal(*firsts)


TIMED = ["grouped", "sorted, one by one", "loop", "dense", "dense, equal parameters"]


def test_what_is_timed_is_grouped_looped_and_of_the_active_size(monkeypatch):
    seen, real = {}, experiment.compare
    monkeypatch.setattr(experiment, "compare", lambda c, **o: seen.update(c) or real(c, **o))
    sizes, cpu = MoEConfig(8, 2, 8, shared=2), torch.device("cpu")
    timings = experiment.speeds(Config(257, 16, 1, 2), sizes, 10, cpu, 0.01)
    layers = {name: call.args[0] for name, call in seen.items()}
    assert list(timings) == list(layers) == TIMED
    assert layers["grouped"].experts.compute is grouped
    assert layers["sorted, one by one"].experts.compute is one_by_one
    assert layers["loop"].experts.compute is looped
    assert layers["dense"].up.weight.shape == (32, 16)
    assert layers["dense, equal parameters"].up.weight.shape == (80, 16)
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())


def test_a_slice_of_the_long_run():
    budget = experiment.BUDGETS["long"] | dict(
        width=16, layers=2, heads=2, experts=8, top_k=2, hidden=8, seeds=2, steps=3, batch=2, length=16,
        tokens=64, seconds=0.01,
    )  # fmt: skip
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=0, **budget)
    assert set(results) == {"loss", "max_violation", "batch_violation", "times"}
    assert list(results["loss"]) == ["dense", *experiment.strategies(0, 0)]
    assert all(len(values) == 2 and values[0] != values[1] for values in results["loss"].values())
    assert "dense" not in results["max_violation"]
    assert results["times"]["grouped"] == 1 and list(results["times"]) == TIMED
    assert len(pictures) == 2
    plt.close("all")


def test_one_change_at_a_time_is_frozen():
    with pytest.raises(AttributeError):
        Balancing().alpha = 1
    assert replace(Balancing(), alpha=1).alpha == 1
