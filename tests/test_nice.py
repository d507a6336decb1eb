import math

import FrEIA.modules
import nflows.transforms
import pytest
import scipy.stats
import torch
import zuko
from matplotlib.figure import Figure
from torch import nn

pytest.register_assert_rewrite("flow_contract")
from flow_contract import *  # noqa: E402, F403
from flow_contract import Case  # noqa: E402

from noise2tokens import nice as module  # noqa: E402
from noise2tokens.images import dequantize, digits  # noqa: E402
from noise2tokens.nice import (  # noqa: E402
    NICE,
    PRIORS,
    AdditiveCoupling,
    Chain,
    DiagonalScale,
    Permute,
    bits_per_dim,
    categorical_log_prob,
    evaluate,
    fit,
    full_scale,
    gaussian_log_prob,
    mlp,
)
from noise2tokens.toys import Moons  # noqa: E402
from noise2tokens.training import History  # noqa: E402

REVERSE4 = torch.tensor([3, 2, 1, 0])
CASES = [
    Case("coupling-even-of-4", lambda: AdditiveCoupling(4, "even", [8])),
    Case("coupling-odd-of-5", lambda: AdditiveCoupling(5, "odd", [8])),
    Case("coupling-even-of-2", lambda: AdditiveCoupling(2, "even", [8, 8])),
    Case("permute", lambda: Permute(torch.tensor([2, 0, 1]))),
    Case("scale", lambda: DiagonalScale(3)),
    Case(
        "chain-with-reversal",
        lambda: Chain([AdditiveCoupling(4, "even", [8]), Permute(REVERSE4), DiagonalScale(4)]),
    ),
    Case(
        "scale-inside",
        lambda: Chain(
            [DiagonalScale(4), AdditiveCoupling(4, "odd", [8]), DiagonalScale(4), Permute(REVERSE4)]
        ),
    ),
    Case("nice-logistic-6", lambda: NICE(6, [16, 16])),
    Case("nice-gaussian-odd-7", lambda: NICE(7, [16], couplings=3, prior="gaussian")),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def samples(n, dim, seed=0):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Peers


class WithContext(nn.Module):
    """nflows hands its networks a second argument."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, context=None):
        return self.network(x)


@pytest.mark.parametrize("keep, dim", [("even", 6), ("odd", 6), ("even", 5), ("odd", 5)])
def test_coupling_is_that_of_nflows(keep, dim):
    torch.manual_seed(0)
    ours = AdditiveCoupling(dim, keep, [16]).double()
    moved = [(i % 2 == 0) != (keep == "even") for i in range(dim)]
    theirs = nflows.transforms.AdditiveCouplingTransform(
        moved, lambda inputs, outputs: WithContext(ours.shift)
    )
    x = samples(5, dim)
    for mine, peer in (
        (ours(x)[0], theirs(x)[0]),
        (ours(x)[1], theirs(x)[1]),
        (ours.inverse(x), theirs.inverse(x)[0]),
    ):
        torch.testing.assert_close(mine, peer, rtol=0, atol=1e-14)


def test_two_couplings_are_freias_nice_block():
    torch.manual_seed(0)
    first, second = (
        AdditiveCoupling(6, "odd", [16]).double(),
        AdditiveCoupling(6, "even", [16]).double(),
    )
    networks = iter([first.shift, second.shift])
    theirs = FrEIA.modules.NICECouplingBlock(
        [(6,)], subnet_constructor=lambda inputs, outputs: next(networks)
    )
    # FrEIA splits into halves, NICE into even and odd coordinates.
    halves = Permute(torch.tensor([0, 2, 4, 1, 3, 5]))
    x = samples(5, 6)
    (peer,), log_det = theirs([halves(x)[0]])
    torch.testing.assert_close(halves(Chain([first, second])(x)[0])[0], peer, rtol=0, atol=1e-14)
    assert log_det == 0
    (undone,), _ = theirs([peer], rev=True)
    torch.testing.assert_close(
        Chain([first, second]).inverse(halves.inverse(peer)), halves.inverse(undone)
    )


def test_coupling_is_that_of_zuko():
    # zuko.flows.NICE is affine unless told otherwise (so a RealNVP): the additive law has to be asked for.
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, False, True])
    theirs = zuko.flows.GeneralCouplingTransform(
        5,
        mask=mask,
        univariate=zuko.transforms.AdditiveTransform,
        shapes=[()],
        hidden_features=[16],
    ).double()
    ours = AdditiveCoupling(5, "even", [16]).double()
    ours.shift = theirs.hyper
    x = samples(5, 5)
    y, ladj = theirs().call_and_ladj(x)
    torch.testing.assert_close(ours(x)[0], y, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours(x)[1], ladj.expand(5).double(), rtol=0, atol=0)
    torch.testing.assert_close(ours.inverse(x), theirs().inv(x), rtol=0, atol=1e-14)


# Layers


def test_couplings_preserve_volume_exactly_and_the_scale_alone_changes_it():
    flow = NICE(6, [16])
    with torch.no_grad():
        flow.layers[-1].log_scale += torch.arange(6.0)
    x = samples(4, 6).float()
    for layer in flow.layers[:-1]:
        assert torch.equal(layer(x)[1], torch.zeros(4))
    assert torch.equal(flow(x)[1], torch.full((4,), 15.0))


def reach(flow):
    """Which output depends on which input, over a few points."""
    points = samples(8, flow.origin.numel())
    jacobians = [
        torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x) for x in points
    ]
    return torch.stack(jacobians).abs().amax(0) > 0


@pytest.mark.parametrize("couplings, mixed", [(1, False), (2, False), (3, True), (4, True)])
def test_three_couplings_are_needed_for_every_output_to_see_every_input(couplings, mixed):
    torch.manual_seed(0)
    assert reach(NICE(6, [32], couplings=couplings).double()).all().item() == mixed


@pytest.mark.parametrize("dim, moves", [(6, True), (5, False)])
def test_reversal_swaps_even_and_odd_only_in_even_dimensions(dim, moves):
    torch.manual_seed(0)
    reverse = Permute(torch.arange(dim - 1, -1, -1))
    flow = Chain(
        [AdditiveCoupling(dim, "even", [32]), reverse, AdditiveCoupling(dim, "even", [32]), reverse]
    ).double()
    x = samples(4, dim)
    changed = (flow(x)[0] != x).all(0)
    assert changed[1::2].all()
    assert changed[0::2].all().item() == moves


def test_the_paper_model_has_19_2_million_parameters():
    with torch.device("meta"):
        flow = NICE(784, [1000] * 5)
    coupling = (392 * 1000 + 1000) + 4 * (1000 * 1000 + 1000) + (1000 * 392 + 392)
    assert sum(p.numel() for p in flow.parameters()) == 4 * coupling + 784 == 19_158_352


def test_the_shift_is_a_rectified_network():
    kinds = [type(layer) for layer in mlp(3, [4, 5], 2)]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_a_permutation_is_part_of_the_state():
    assert torch.equal(Permute(REVERSE4).state_dict()["order"], REVERSE4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim=1"):
        AdditiveCoupling(1, "even", [8])
    with pytest.raises(ValueError, match="keep='left'"):
        AdditiveCoupling(4, "left", [8])
    with pytest.raises(ValueError, match=r"permutation of 0\.\.2, got \[0, 0, 2\]"):
        Permute(torch.tensor([0, 0, 2]))
    with pytest.raises(ValueError, match="got 'cauchy'"):
        NICE(4, [8], prior="cauchy")


# Priors


@pytest.mark.parametrize(
    "name, peer", [("gaussian", scipy.stats.norm), ("logistic", scipy.stats.logistic)]
)
def test_priors_agree_with_scipy(name, peer):
    z = torch.cat([samples(20, 3), torch.tensor([[0.0, 50.0, -300.0]], dtype=torch.float64)])
    torch.testing.assert_close(
        PRIORS[name].log_prob(z), torch.from_numpy(peer.logpdf(z.numpy()).sum(1))
    )
    drawn = PRIORS[name].sample(20_000, torch.zeros(1), torch.Generator().manual_seed(0)).squeeze(1)
    assert scipy.stats.kstest(drawn.numpy(), peer.cdf).pvalue > 0.01
    assert drawn.var().item() == pytest.approx(peer.var(), rel=0.04)


def test_a_scaled_gaussian_sample_is_the_tempered_model_but_a_logistic_one_is_not():
    t = 0.7
    spread = {}
    for prior in ("gaussian", "logistic"):
        torch.manual_seed(0)
        flow = NICE(4, [16], prior=prior).double()
        x = samples(50, 4)
        z, log_det = flow(x)
        # Density of f⁻¹(t·z), by the change of variables, against p(x)^(1/t²) without its constant.
        sampled = flow.prior.log_prob(z / t) - 4 * math.log(t) + log_det
        spread[prior] = (sampled - flow.log_prob(x) / t**2).std().item()
    assert spread["gaussian"] < 1e-12
    assert spread["logistic"] > 0.1


# Yardsticks


def test_bits_per_dim_of_known_densities():
    assert bits_per_dim(torch.zeros(1), 784, 256).item() == 8.0
    assert bits_per_dim(torch.tensor([1980.50]), 784, 256).item() == pytest.approx(4.36, abs=0.005)
    # A categorical that is certain costs nothing, a fair coin one bit a dimension.
    assert bits_per_dim(torch.zeros(1), 3, 1).item() == 0
    assert bits_per_dim(torch.tensor([3 * math.log(0.5)]), 3, 1).item() == pytest.approx(1)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gaussian_baseline_agrees_with_scipy(diagonal):
    mix = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 2.0]], dtype=torch.float64)
    train, test = samples(200, 3) @ mix + 1, samples(10, 3, seed=1) @ mix + 1
    covariance = torch.cov(train.T, correction=0)
    covariance = covariance.diagonal().diag() if diagonal else covariance
    peer = scipy.stats.multivariate_normal(train.mean(0).numpy(), covariance.numpy()).logpdf(
        test.numpy()
    )
    torch.testing.assert_close(gaussian_log_prob(train, test, diagonal), torch.from_numpy(peer))


def test_categorical_baseline_counts():
    train = torch.tensor([[0, 2], [0, 1], [1, 1]])
    test = torch.tensor([[0, 0], [1, 1], [2, 2]])
    # Column 0 counts (2, 1, 0) + 1 of 6; column 1 counts (0, 2, 1) + 1 of 6.
    expected = torch.tensor([3 / 6 * 1 / 6, 2 / 6 * 3 / 6, 1 / 6 * 2 / 6]).log()
    torch.testing.assert_close(categorical_log_prob(train, test, 3), expected)


def test_dequantized_log_likelihood_is_below_the_discrete_one():
    torch.manual_seed(0)
    flow, levels = NICE(2, [8], prior="gaussian"), 3
    with torch.no_grad():
        flow.layers[-1].log_scale += 1.0
    grid = (torch.arange(400) + 0.5) / 400
    u = torch.cartesian_prod(grid, grid)
    for v in torch.cartesian_prod(torch.arange(levels), torch.arange(levels)):
        log_p = flow.log_prob((v + u) / levels).double() - 2 * math.log(levels)
        assert log_p.mean() < log_p.exp().mean().log()


# Experiments


def test_no_flow_beats_the_truth_on_moons():
    # Gibbs: the mean log-density of a model is below that of the truth, up to Monte Carlo noise of the difference.
    x = Moons().sample(4000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    gap = Moons().log_prob(x) - NICE(2, [16], prior="gaussian").log_prob(x)
    assert gap.mean() > 4 * gap.std() / math.sqrt(len(x))


def test_fit_gives_the_scales_their_own_learning_rate_and_learns():
    images = digits()[0].flatten(1)
    torch.manual_seed(0)
    flow = NICE(64, [32], prior="gaussian")
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    fit(
        flow,
        images[:256],
        images[256:300],
        17,
        steps=1,
        batch_size=256,
        learning_rate=1e-4,
        scale_learning_rate=1e-2,
    )
    for name, p in flow.named_parameters():
        # Adam's first step is the learning rate, up to its epsilon.
        assert (p - before[name]).abs().max().item() == pytest.approx(
            1e-2 if "log_scale" in name else 1e-4, rel=0.02
        )
    history = fit(flow, images[:1200], images[1200:1400], 17, steps=300, batch_size=100)
    noisy = [
        dequantize(part, 17, torch.Generator().manual_seed(1))
        for part in (images[:1200], images[1400:])
    ]
    ours = evaluate(flow, images[1400:], 17).mean()
    assert ours > gaussian_log_prob(*noisy, diagonal=True).mean()
    assert history.validation[0] - min(history.validation) > 50


def test_fit_dequantizes_afresh_for_training_and_alike_for_validation():
    seen = {True: [], False: []}
    images = digits()[0].flatten(1)
    torch.manual_seed(0)
    flow = NICE(64, [8])
    flow.register_forward_pre_hook(lambda module, args: seen[module.training].append(17 * args[0]))
    fit(flow, images[:40], images[40:60], 17, steps=2, batch_size=40, validate_every=1)
    first, second = (batch.sort(0).values for batch in seen[True])
    assert torch.equal(first.floor(), second.floor()) and not torch.equal(first, second)
    for batch in (first, seen[False][0]):
        assert scipy.stats.kstest((batch % 1).flatten().numpy(), "uniform").pvalue > 0.001
    assert len(seen[False]) == 3
    assert torch.equal(seen[False][0], seen[False][1]) and torch.equal(
        seen[False][0].floor(), images[40:60]
    )


def test_evaluate_averages_the_noise():
    images = digits()[0].flatten(1)[:50]
    torch.manual_seed(0)
    flow = NICE(64, [8])
    single = [evaluate(flow, images, 17, draws=1, seed=seed) for seed in range(2)]
    assert not torch.equal(*single)
    assert torch.equal(single[0], evaluate(flow, images, 17, draws=1))
    many = torch.stack([evaluate(flow, images, 17, draws=1, seed=seed) for seed in range(100)])
    error = evaluate(flow, images, 17, draws=25, seed=999) - many.mean(0)
    # The mean of 25 draws varies a fifth as much as one draw.
    assert error.square().mean().sqrt() < 1.5 * many.std(0).mean() / 5


SLICE = dict(
    steps=3, batch_size=8, hidden=[16] * 2, held_out=1380, test_images=30, samples=25, classifier_steps=3
)  # fmt: skip


def test_full_scale_trains_on_its_split_and_scores_the_test_images(fake_mnist, monkeypatch):
    fake_mnist(module)
    seen = {}

    def spy(flow, *sets, **options):
        seen.update(flow=flow, sets=sets, **options)
        return History(validation=[3.0, 2.0], best_step=1)

    monkeypatch.setattr(module, "fit", spy)
    monkeypatch.setattr(module, "image_rows", lambda rows: seen.update(rows=rows) or Figure())
    torch.manual_seed(0)
    results, pictures = full_scale(torch.device("cpu"), seed=5, **SLICE)
    train_images, _ = module.mnist(train=True)
    test_images = module.mnist(train=False)[0][:30]
    kept, validation, levels = seen["sets"]
    assert torch.equal(kept, train_images[:20].flatten(1)) and levels == 256
    assert torch.equal(validation, train_images[20:].flatten(1))
    assert seen["steps"] == 3 and seen["batch_size"] == 8
    flow = seen["flow"]
    assert isinstance(flow, NICE) and flow.prior is PRIORS["logistic"] and len(flow.layers) == 5
    scores = evaluate(flow, test_images.flatten(1), 256, draws=2, seed=5)
    assert results["test nats"].item() == pytest.approx(scores.mean().item())
    assert results["standard error"].item() == pytest.approx(scores.std().item() / 30**0.5)
    # bits = log2(256) - nats / (784 ln 2)
    bits = 8 - scores.mean().item() / (784 * math.log(2))
    assert results["bits per dimension"].item() == pytest.approx(bits, rel=1e-5)
    assert results["validation nats"] == [-3.0, -2.0] and results["best step"] == 1
    assert list(results["confidence"]) == ["T = 1", "T = 0.8", "test images"]
    assert all(0.1 <= value <= 1 for value in results["confidence"].values())
    assert len(set(results["confidence"].values())) == 3
    torch.testing.assert_close(seen["rows"]["test images"], test_images[:10] / 255)
    assert len(seen["rows"]) == 5 and all(len(row) == 10 for row in seen["rows"].values())
    assert "test images above" in next(iter(pictures))


def test_full_scale_improves_on_its_own_validation(fake_mnist):
    fake_mnist(module)
    torch.manual_seed(0)
    results, _ = full_scale(torch.device("cpu"), seed=0, **SLICE)
    assert results["validation nats"][-1] > results["validation nats"][0]
