"""What the synthesis of part I adds to its chapters: a decoder for points, and the rows of a table."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from noise2tokens.distribution_transforms.distances import sliced_wasserstein
from noise2tokens.distribution_transforms.vae import gaussian_kl
from noise2tokens.part1_synthesis import Entry, PointVAE, judge, parameters, table


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


def test_parameters_counts_numbers():
    assert parameters(nn.Linear(3, 4)) == 16


def test_table_has_a_row_for_each_and_times_relative_to_the_first():
    rows = [
        Entry("A", None, "none", 0.5, 1, 0.1, X),
        Entry("B", 0.25, "exact", 0.125, 20, 1.2, X),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| A | – | none | 0.50 | 1 | 1.0× |"
    assert lines[3] == "| B | 0.25 | exact | 0.12 | 20 | 12× |"
