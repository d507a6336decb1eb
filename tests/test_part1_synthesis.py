"""What the synthesis of part I adds to its chapters: a decoder for points, one budget for all, the rows of a table."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from noise2tokens import part1_synthesis as module
from noise2tokens.distribution_transforms.distances import sliced_wasserstein
from noise2tokens.distribution_transforms.vae import gaussian_kl
from noise2tokens.part1_synthesis import METHODS, Entry, PointVAE, full_scale, judge, run


@pytest.fixture
def blind():
    """A VAE whose networks ignore their input: q(z|x) = N(m, e^v) and p(x|z) = N(a, e^b) are known."""
    model = PointVAE(2, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.encoder[-1].bias.copy_(torch.tensor([0.5, -1.0, 0.3, -0.4]))
        model.decoder[-1].bias.copy_(torch.tensor([1.0, 2.0, 0.6, -0.2]))
    return model


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
MEAN, STD = torch.tensor([1.0, 2.0]), torch.tensor([0.6, -0.2]).div(2).exp()


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
        model.decoder[-1].bias[2:] = -20.0  # no noise of the decoder's own
    assert model.sample(100).std(0).min() > 1e-3


def test_judge_counts_calls_and_leaves_no_hook():
    network = nn.Linear(2, 2)
    data = torch.randn(50, 2)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))

    def draw():
        return network(network(network(x)))

    row = judge(
        "it", draw, data, network=network, log_ratio=torch.tensor([1.0, 2.0, 6.0]), how="exact"
    )
    assert (row.method, row.how, row.evaluations, row.gap) == ("it", "exact", 3, 3.0)
    assert row.distance == sliced_wasserstein(row.samples, data).item()
    assert not row.samples.requires_grad and row.seconds > 0
    assert not network._forward_hooks


def test_a_method_without_a_network_to_count_makes_one_pass():
    row = judge("it", lambda: torch.zeros(3, 2), torch.ones(3, 2))
    assert (row.evaluations, row.gap, row.how) == (1, None, "none")


@pytest.fixture(scope="module")
def small():
    return run(0, steps=150, batch_size=64, pairs=1000, test_points=200, samples=500)


def test_all_models_have_one_size_and_every_method_a_row(small):
    models, entries, data, floor = small
    sizes = models.sizes()
    assert len(sizes) == 7 and min(sizes.values()) > 23_000 and max(sizes.values()) < 25_000
    assert sizes["nice"] == sum(p.numel() for p in models.nice.parameters())
    assert tuple(entry.method for entry in entries) == METHODS
    assert all(entry.samples.shape == (500, 2) for entry in entries)
    assert data.shape == (20_000, 2) and 0 < floor < 0.3


def test_each_row_scores_its_own_model(small):
    """The gap is log p_true - log p_model of that very model, on points that the run's own seed drew."""
    models, entries, *_ = small
    rows = {entry.method: entry for entry in entries}
    how = {name: row.how for name, row in rows.items()}
    assert (
        how["VAE"] == "bound" and how["GAN"] == "none" and how["NICE"] == how["RealNVP"] == "exact"
    )
    assert {how[name] for name in ("DDIM", "Flow matching", "Rectified flow, one step")} == {
        "by the ODE"
    }
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
        ("Flow matching", models.velocity),
        ("Rectified flow, one step", models.straight),
    ):
        found = module.log_likelihood(network, test, rtol=1e-4, atol=1e-4).log_prob
        assert rows[name].gap == pytest.approx((truth - found).mean().item(), abs=1e-3)
    assert rows["DDPM"].evaluations == 1000 and rows["DDIM"].evaluations == 20
    assert rows["Flow matching, one step"].evaluations == 1
    assert rows["Rectified flow, one step"].evaluations == 1
    assert (
        rows["Rectified flow, one step"].distance < 0.5 * rows["Flow matching, one step"].distance
    )


def run_nothing():
    """Models that no step has trained."""
    return module.Models(
        PointVAE(2, 4), module.GAN(2, 2, width=4), module.NICE(2, [4]), module.RealNVP(2, [4], couplings=2),
        *(module.TimeMLP(2, 4) for _ in range(3)),
    )  # fmt: skip


def test_noise_is_read_from_v():
    """v = α ε - σ x_0 and x = α x_0 + σ ε give ε = α v + σ x, since α² + σ² = 1."""
    x0, eps, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    path = module.DIFFUSION
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]

    models = run_nothing()
    models.denoiser.forward = lambda x, t: alpha * eps - sigma * x0
    torch.testing.assert_close(models.noise_of(alpha * x0 + sigma * eps, t), eps)


def test_full_scale_lists_seeds_and_leaves_out_what_is_missing(monkeypatch):
    seen = []

    def stand_in(seed, *, steps):
        seen.append((seed, steps))
        x = torch.zeros(3, 2)
        rows = [
            Entry(name, None if name == "GAN" else seed + 0.5, "how", float(seed), 7, 0.1, x)
            for name in METHODS
        ]
        return None, rows, x, seed + 0.25

    monkeypatch.setattr(module, "run", stand_in)
    results, pictures = full_scale(torch.device("cpu"), seed=3, seeds=2, steps=9)
    assert seen == [(3, 9), (4, 9)] and results["floor"] == [3.25, 4.25]
    assert results["NICE"] == {
        "gap": [3.5, 4.5], "distance": [3, 4], "evaluations": [7, 7], "seconds": [0.1, 0.1],
    }  # fmt: skip
    assert "gap" not in results["GAN"] and len(pictures) == 1
    titles = [ax.get_title().replace("\n", " ") for ax in next(iter(pictures.values())).axes]
    assert titles == ["data", *METHODS]
