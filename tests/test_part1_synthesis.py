"""What the synthesis of part I adds to its chapters: a decoder for points, one budget for all, the rows of a table."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from noise2tokens import part1_synthesis as module
from noise2tokens.distribution_transforms.distances import sliced_wasserstein
from noise2tokens.distribution_transforms.vae import gaussian_kl
from noise2tokens.part1_synthesis import (
    METHODS,
    Entry,
    PointVAE,
    full_scale,
    judge,
    on_spots,
    run,
    sample_gap,
)


@pytest.fixture
def blind():
    """A VAE whose networks ignore their input: q(z|x) = N(m, e^v) and p(x|z) = N(a, e^b) are known."""
    model = PointVAE(2, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.encoder[-1].bias.copy_(torch.tensor([0.5, -1.0, 0.3, -0.4]))
        model.decoder[-1].bias.copy_(torch.tensor([1.0, 2.0]))
        model.log_var.fill_(0.6)
    return model


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
MEAN, STD = torch.tensor([1.0, 2.0]), torch.tensor([0.6, 0.6]).div(2).exp()


def test_bound_is_the_likelihood_where_the_decoder_ignores_z(blind):
    """p(x) = N(x; a, e^b) then; weights p(z)/q(z) have mean 1, so many draws come close."""
    exact = Normal(MEAN, STD).log_prob(X).sum(1)
    torch.manual_seed(0)
    torch.testing.assert_close(blind.bound(X, 200_000), exact, atol=0.02, rtol=0)
    assert (blind.bound(X, 1) != exact).all(), "one draw is a bound, not the value"


def test_elbo_is_the_likelihood_minus_the_counterweight(blind):
    kl = gaussian_kl(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, -0.4]]))
    exact = Normal(MEAN, STD).log_prob(X).sum(1) - kl
    torch.testing.assert_close(blind.elbo(X), exact)


def test_samples_have_the_decoders_mean_and_spread(blind):
    x = blind.sample(50_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(0), STD, atol=0.03, rtol=0)
    assert torch.equal(x, blind.sample(50_000, torch.Generator().manual_seed(0)))


def test_samples_use_the_latent():
    torch.manual_seed(0)
    model = PointVAE(2, 16)
    with torch.no_grad():
        model.log_var.fill_(-20.0)  # no noise of the decoder's own
    assert model.sample(100).std(0).min() > 1e-3


TARGET = module.EightGaussians()


def points(n, seed=0):
    return TARGET.sample(n, torch.Generator().manual_seed(seed))


def test_judge_counts_calls_and_leaves_no_hook():
    network = nn.Linear(2, 2)
    data, test = points(50), points(60, 1)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))

    def draw():
        return network(network(network(x)))

    ratio = torch.tensor([1.0, 2.0, 6.0])
    row = judge("it", draw, data, test, network=network, log_ratio=ratio, how="exact")
    assert (row.method, row.how, row.evaluations, row.gap) == ("it", "exact", 3, 3.0)
    assert row.distance == sliced_wasserstein(row.samples, data).item()
    assert row.on_spots == on_spots(row.samples)
    assert row.sample_gap == sample_gap(row.samples, test)
    assert not row.samples.requires_grad and row.seconds > 0
    assert not network._forward_hooks

    def fail():
        raise RuntimeError("no samples")

    with pytest.raises(RuntimeError, match="no samples"):
        judge("it", fail, data, test, network=network)
    assert not network._forward_hooks, "a failed draw leaves no hook behind"


def test_a_method_without_a_network_to_count_makes_one_pass():
    row = judge("it", lambda: torch.zeros(3, 2), points(9), points(9))
    assert (row.evaluations, row.gap, row.how) == (1, None, "none")


@pytest.mark.parametrize(
    "x, ratio, how, message",
    [
        (torch.zeros(3, 2), None, "exact", "says how it was found, got 'exact'"),
        (torch.zeros(3, 2), torch.ones(2), "none", "says how it was found, got 'none'"),
        (torch.zeros(3, 2), torch.tensor([1.0, torch.nan]), "exact", "log_ratio must be finite"),
        (torch.zeros(3, 2), torch.ones(0), "exact", "log_ratio must be finite and not empty"),
        (torch.full((3, 2), torch.inf), None, "none", "it drew no samples, or some that are not"),
        (torch.zeros(0, 2), None, "none", "it drew no samples"),
    ],
)
def test_what_is_not_finite_enters_no_row(x, ratio, how, message):
    with pytest.raises(ValueError, match=message):
        judge("it", lambda: x, points(9), points(9), log_ratio=ratio, how=how)


def test_bad_sizes_are_named():
    for dim, width in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match=f"at least 1, got {dim} and {width}"):
            PointVAE(dim, width)
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        PointVAE(2, 4).bound(X, 0)
    with pytest.raises(ValueError, match="numbers of at least 1"):
        run(0, steps=1, batch_size=4, pairs=0, test_points=3, samples=5)
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        full_scale(torch.device("cpu"), seed=0, seeds=0)


def ring(n):
    angle = 2 * torch.pi * torch.rand(n, generator=torch.Generator().manual_seed(3))
    radius = TARGET.means.norm(dim=1)[0]
    return (radius * torch.stack([angle.cos(), angle.sin()], 1)).float()


def test_spots_see_a_ring_that_the_distance_does_not():
    assert on_spots(points(20_000)) == pytest.approx(1 - math.exp(-2), abs=0.01)
    data = points(20_000, 1)
    assert sliced_wasserstein(ring(5000), data) < 0.2
    assert on_spots(ring(5000)) < 0.45
    assert on_spots(torch.zeros(5, 2)) == 0 and on_spots(TARGET.means.float()) == 1


def test_the_gap_of_samples_is_that_of_a_kernel_density_and_orders_known_errors():
    x, test = points(500), points(100, 1)
    mixture = MixtureSameFamily(
        Categorical(torch.ones(500)), Independent(Normal(x.double(), module.BANDWIDTH), 1)
    )
    exact = (TARGET.log_prob(test).double() - mixture.log_prob(test.double())).mean().item()
    assert sample_gap(x, test) == pytest.approx(exact, abs=1e-6)
    test = points(1000, 2)
    good, wide = (
        points(5000, 3),
        points(5000, 4) + 0.15 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(5)),
    )
    floor = sample_gap(good, test)
    assert 0.02 < floor < 0.07
    assert sample_gap(wide, test) > floor + 0.1 and sample_gap(ring(5000), test) > floor + 0.5


@pytest.fixture(scope="module")
def small():
    return run(0, steps=150, batch_size=64, pairs=1000, test_points=200, samples=500)


def test_all_models_have_one_size_and_every_method_a_row(small):
    models, entries, data, floor = small
    assert module.PICTURED == tuple(m for m in METHODS if m not in module.HIDDEN)
    sizes = models.sizes()
    assert len(sizes) == 7 and min(sizes.values()) > 23_000 and max(sizes.values()) < 25_000
    assert sizes["nice"] == sum(p.numel() for p in models.nice.parameters())
    assert tuple(entry.method for entry in entries) == METHODS
    assert all(entry.samples.shape == (500, 2) for entry in entries)
    assert data.shape == (20_000, 2) and len(floor) == 5
    distances = [row.distance for row in floor]
    assert len(set(distances)) == 5 and 0 < min(distances) < max(distances) < 0.5
    assert all(len(row.samples) == 500 and row.on_spots > 0.8 for row in floor)


def test_each_row_scores_its_own_model(small):
    """The gap is log p_true - log p_model of that very model, on points that the run's own seed drew."""
    models, entries, *_ = small
    rows = {entry.method: entry for entry in entries}
    how = {name: row.how for name, row in rows.items()}
    assert (
        how["VAE"] == "bound" and how["GAN"] == "none" and how["NICE"] == how["RealNVP"] == "exact"
    )
    for name in METHODS:
        if name not in ("VAE", "GAN", "NICE", "RealNVP"):
            assert how[name] == ("by the ODE" if name.endswith("ODE") else "none")
    draws = torch.Generator().manual_seed(0)
    # The run drew 150 batches of 64 for each of six trainings, then data, then these test points.
    target = module.EightGaussians()
    for _ in range(6 * 150):
        target.sample(64, draws)
    target.sample(20_000, draws)
    test = target.sample(200, draws)
    truth = target.log_prob(test)
    for name, flow in (("NICE", models.nice), ("RealNVP", models.realnvp)):
        with torch.no_grad():
            assert rows[name].gap == pytest.approx(
                (truth - flow.log_prob(test)).mean().item(), abs=1e-4
            )
    for name, network in (
        ("Flow matching, ODE", models.velocity),
        ("Rectified flow, ODE", models.straight),
    ):
        found = module.log_likelihood(network, test, rtol=1e-4, atol=1e-4).log_prob
        assert rows[name].gap == pytest.approx((truth - found).mean().item(), abs=1e-3)
    noise = partial(module.read_noise, models.denoiser)
    flow = module.predicted_velocity(noise, module.DIFFUSION, "eps")
    found = module.log_likelihood(flow, test, start=1e-3, rtol=1e-4, atol=1e-4).log_prob
    assert rows["Diffusion, ODE"].gap == pytest.approx((truth - found).mean().item(), abs=1e-3)
    with torch.no_grad():
        bounds = [(truth - models.vae.bound(test, 500)).mean().item() for _ in range(3)]
    assert rows["VAE"].gap == pytest.approx(sum(bounds) / 3, abs=0.05)
    evaluations = {name: row.evaluations for name, row in rows.items()}
    assert evaluations["Diffusion, DDPM"] == 1000 and evaluations["Diffusion, DDIM"] == 20
    assert evaluations["Flow matching, 20 steps"] == 20
    assert evaluations["Flow matching, one step"] == evaluations["Rectified flow, one step"] == 1
    assert all(evaluations[name] > 10 for name in METHODS if name.endswith("ODE"))


def test_each_row_has_the_samples_of_its_own_sampler(small):
    """One noise goes through one network in several ways: what they make of it is told apart by recomputation."""
    _, entries, *_ = small
    rows = {entry.method: entry.samples for entry in entries}
    names = [name for name in METHODS if name.startswith(("Diffusion", "Flow", "Rectified"))]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (rows[a] - rows[b]).abs().max() > 1e-3, (a, b)
    # The same noise, so that neighbors of one equation agree roughly, and the two equations do not.
    near = (rows["Flow matching, ODE"] - rows["Flow matching, 20 steps"]).norm(dim=1).median()
    far = (rows["Flow matching, ODE"] - rows["Diffusion, DDPM"]).norm(dim=1).median()
    assert near < 0.3 * far
    near = (rows["Diffusion, ODE"] - rows["Diffusion, DDIM"]).norm(dim=1).median()
    assert near < 0.3 * far


def test_one_model_does_not_depend_on_another(monkeypatch):
    """Each starts from the seed: what NICE draws is nothing to the networks after it."""
    budget = dict(steps=3, batch_size=16, pairs=32)

    def train():
        draws = torch.Generator().manual_seed(0)
        return module.train_models(0, lambda n: TARGET.sample(n, draws), **budget)

    first = train()
    nice = module.NICE
    monkeypatch.setattr(module, "NICE", lambda *a, **b: (torch.randn(7), nice(*a, **b))[1])
    second = train()
    for name in ("vae", "gan", "realnvp", "denoiser", "velocity", "straight"):
        for a, b in zip(
            getattr(first, name).parameters(), getattr(second, name).parameters(), strict=True
        ):
            assert torch.equal(a, b), name
    changed = zip(first.nice.parameters(), second.nice.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)


def test_one_step_of_rectified_flow_beats_one_of_flow_matching(small):
    _, entries, *_ = small
    rows = {entry.method: entry for entry in entries}
    assert (
        rows["Rectified flow, one step"].distance < 0.5 * rows["Flow matching, one step"].distance
    )


def test_noise_is_read_from_v():
    """v = α ε - σ x_0 and x = α x_0 + σ ε give ε = α v + σ x, since α² + σ² = 1."""
    x0, eps, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    path = module.DIFFUSION
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]

    torch.testing.assert_close(
        module.read_noise(lambda x, t: alpha * eps - sigma * x0, alpha * x0 + sigma * eps, t), eps
    )


def test_full_scale_lists_seeds_and_leaves_out_what_is_missing(monkeypatch):
    seen = []

    def stand_in(seed, *, steps):
        seen.append((seed, steps))
        x = torch.full((3, 2), float(seed))
        rows = [
            Entry(
                name,
                None if name == "GAN" else seed + 0.5,
                "how",
                2.0 * seed,
                0.1,
                seed + 9.0,
                7,
                0.1,
                x,
            )
            for name in METHODS
        ]
        floor = [
            Entry("data", None, "none", 0.0, 0.8, float(10 * seed + i), 1, 0.0, x) for i in range(2)
        ]
        return None, rows, x, floor

    monkeypatch.setattr(module, "run", stand_in)
    results, pictures = full_scale(torch.device("cpu"), seed=3, seeds=2, steps=9)
    assert seen == [(3, 9), (4, 9)] and results["data"]["distance"] == [30, 31, 40, 41]
    assert results["NICE"] == {
        "gap": [3.5, 4.5], "sample_gap": [6, 8], "on_spots": [0.1, 0.1], "distance": [12, 13],
        "evaluations": [7, 7], "seconds": [0.1, 0.1],
    }  # fmt: skip
    assert "gap" not in results["GAN"] and "gap" not in results["data"] and len(pictures) == 1
    (figure,) = pictures.values()
    titles = [ax.get_title().rpartition("\n")[::2] for ax in figure.axes]
    assert [name.replace("\n", ", ") for name, _ in titles] == ["Data", *module.PICTURED]
    assert titles[1][1] == "10% on a spot"
    assert (figure.axes[3].collections[0].get_offsets() == 3).all()  # the first seed's
