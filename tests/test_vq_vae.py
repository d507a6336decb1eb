"""Chapter 7: quantizers held against vector-quantize-pytorch, SciPy and scikit-learn; what priors see, and no more."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from noise2tokens.transformer import Config
from noise2tokens.vq_vae import autoencoder, experiment, measures, priors, quantizers
from noise2tokens.vq_vae.autoencoder import VQVAE, discretized_logistic, fit_scale, vqvae_loss
from noise2tokens.vq_vae.quantizers import FSQ, VectorQuantizer


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The nearest code


def test_nearest_codes_are_those_of_a_tree():
    z, codebook = draws(500, 3, dtype=torch.float64), draws(40, 3, seed=1, dtype=torch.float64)
    _, found = cKDTree(codebook).query(z)
    assert torch.equal(quantizers.nearest(z, codebook), torch.from_numpy(found))
    assert torch.equal(
        quantizers.nearest(z.view(5, 100, 3).transpose(0, 1), codebook),
        torch.from_numpy(found).view(5, 100).T,
    )


def test_nearest_is_exact_for_codes_that_single_precision_can_tell_apart():
    grid = torch.cartesian_prod(torch.arange(-8.0, 9), torch.arange(-8.0, 9))
    assert torch.equal(quantizers.nearest(grid + 0.49, grid), torch.arange(len(grid)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_choose_in_single_precision(dtype):
    z, codebook = draws(300, 8), draws(64, 8, seed=1)
    expected = quantizers.nearest(z, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizers.nearest(z, codebook), expected)
    half = z.to(dtype)
    assert torch.equal(
        quantizers.nearest(half, codebook), quantizers.nearest(half.float(), codebook)
    )


def test_no_vectors_and_one_vector():
    quantizer = VectorQuantizer(5, 2).eval()
    found = quantizer(torch.zeros(0, 4, 2))
    assert found.indices.shape == (0, 4) and found.values.shape == (0, 4, 2)
    assert quantizer(torch.zeros(1, 2)).indices.shape == (1,)


# Gradients through the choice


def test_straight_through_passes_values_forward_and_gradients_back():
    z = draws(6, 3).requires_grad_()
    values, weight = draws(6, 3, seed=1).requires_grad_(), draws(6, 3, seed=2)
    out = quantizers.straight_through(z, values)
    torch.testing.assert_close(out, values)
    gradient, into_values = torch.autograd.grad(
        (out * weight).sum(), (z, values), allow_unused=True
    )
    assert torch.equal(gradient, weight) and into_values is None


def rotation(z, value):
    """The rotation from z's direction to the value's, in their plane, from its definition."""
    u, w = z / z.norm(), value / value.norm()
    cosine = u @ w
    v = (w - cosine * u) / (w - cosine * u).norm()
    sine = (1 - cosine**2).sqrt()
    plane = torch.stack([u, v], 1)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=z.dtype)
    return torch.eye(len(z), dtype=z.dtype) + plane @ (turn - torch.eye(2, dtype=z.dtype)) @ plane.T


def test_rotating_through_is_a_rotation_and_a_scale():
    z, values = draws(7, 4, dtype=torch.float64), draws(7, 4, seed=1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizers.rotate_through(z, values), z)
    for i in range(7):
        expected = values[i].norm() / z[i].norm() * rotation(z[i], values[i])
        torch.testing.assert_close(jacobian[i, :, i], expected)
        torch.testing.assert_close(expected @ z[i], values[i])
    torch.testing.assert_close(quantizers.rotate_through(z, values), values)


def test_rotating_through_survives_a_zero_and_an_opposite_vector():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    values = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
    out = quantizers.rotate_through(z, values)
    torch.testing.assert_close(out, values)
    assert torch.autograd.grad(out.sum(), z)[0].isfinite().all()


# The vector quantizer and its peer


def peer(quantizer, **options):
    from vector_quantize_pytorch import VectorQuantize

    defaults = dict(
        decay=0.99, commitment_weight=0.25, rotation_trick=False, threshold_ema_dead_code=0
    )
    theirs = VectorQuantize(quantizer.dim, quantizer.codes, **{**defaults, **options})
    with torch.no_grad():
        theirs._codebook.embed.copy_(quantizer.codebook[None])
        theirs._codebook.embed_avg.copy_(quantizer.codebook[None])
    return theirs


def test_five_steps_equal_the_library():
    torch.manual_seed(0)
    ours = VectorQuantizer(16, 4)
    theirs = peer(ours)
    for step in range(5):
        z = draws(8, 10, 4, seed=step).requires_grad_()
        weight = draws(8, 10, 4, seed=100 + step)
        found, (values, indices, loss) = ours(z), theirs(z)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.values, values, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.loss, loss.squeeze(), atol=1e-7, rtol=1e-6)
        mine = torch.autograd.grad((found.values * weight).sum() + found.loss, z)[0]
        other = torch.autograd.grad((values * weight).sum() + loss.squeeze(), z)[0]
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-5)
        ours.move()
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.counts_C, theirs._codebook.cluster_size[0])


def test_the_rotation_trick_equals_the_library():
    torch.manual_seed(0)
    ours = VectorQuantizer(16, 4, estimator=quantizers.rotate_through)
    theirs = peer(ours, rotation_trick=True)
    z, weight = draws(50, 4).requires_grad_(), draws(50, 4, seed=1)
    found, (values, _, _) = ours(z), theirs(z[None])
    torch.testing.assert_close(found.values, values[0], atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad((found.values * weight).sum(), z)
    (other,) = torch.autograd.grad((values[0] * weight).sum(), z)
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_codes_learned_by_gradient_equal_the_library():
    torch.manual_seed(0)
    ours = VectorQuantizer(16, 4, decay=None)
    theirs = peer(ours, learnable_codebook=True, ema_update=False)
    z = draws(50, 4)
    (mine,) = torch.autograd.grad(ours(z).loss, ours.codebook)
    _, _, loss = theirs(z[None])
    # Theirs weighs the codebook by 1 and the commitment by 0.25, as ours does.
    (other,) = torch.autograd.grad(loss.squeeze(), theirs._codebook.embed)
    scale = (mine.norm() / other[0].norm()).item()
    torch.testing.assert_close(mine, other[0] * scale, atol=1e-6, rtol=1e-5)


def test_both_terms_of_the_loss_and_where_their_gradients_go():
    quantizer = VectorQuantizer(3, 2, decay=None, beta=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]))
    z = torch.tensor([[1.0, 0.0], [4.0, 1.0]], requires_grad=True)
    found = quantizer(z)
    # Squared distances 1 and 1, four numbers: a mean of 1/2 for each term.
    assert found.loss.item() == pytest.approx(0.5 * 0.5 + 0.5)
    into_z, into_codes = torch.autograd.grad(found.loss, (z, quantizer.codebook))
    # d/dz of β (z - e)² / 4 and d/de of (e - z)² / 4.
    torch.testing.assert_close(into_z, torch.tensor([[0.25, 0.0], [0.0, 0.25]]))
    torch.testing.assert_close(into_codes, torch.tensor([[-0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]))


def test_a_moving_average_without_memory_is_one_step_of_k_means():
    z = draws(400, 2)
    start = z[:6].clone()
    quantizer = VectorQuantizer(6, 2, decay=0.0)
    quantizer.codebook.copy_(start)
    for _ in range(100):
        quantizer(z)
        quantizer.move()
    fitted = KMeans(6, init=start.numpy(), n_init=1, max_iter=100, tol=0).fit(z.numpy())
    torch.testing.assert_close(
        quantizer.codebook, torch.from_numpy(fitted.cluster_centers_).float(), atol=1e-4, rtol=1e-4
    )
    assert quantizer(z).indices.tolist() == fitted.labels_.tolist()


def test_a_start_by_k_means_survives_the_first_step():
    z = draws(500, 3)
    quantizer = VectorQuantizer(8, 3)
    quantizer.start(z, seed=0, batch=500)
    before = quantizer.codebook.clone()
    assert quantizer.counts_C.sum().item() == pytest.approx(500)
    assert len(quantizer(z).indices.unique()) == 8
    quantizer.move()
    assert (quantizer.codebook - before).abs().max() < 1e-3  # their means are where they stand
    with pytest.raises(ValueError, match="need 8 finite vectors or more"):
        quantizer.start(z[:7], seed=0, batch=7)
    with pytest.raises(ValueError, match="finite"):
        quantizer.start(torch.full((9, 3), math.nan), seed=0, batch=9)
    with pytest.raises(ValueError, match="at least one vector"):
        quantizer.start(z, seed=0, batch=0)


def test_a_start_from_many_vectors_weighs_as_one_batch():
    z = draws(2000, 3)
    quantizer = VectorQuantizer(8, 3, decay=0.9, revive_below=1.0)
    quantizer.start(z, seed=0, batch=100)
    assert quantizer.counts_C.sum().item() == pytest.approx(100)
    batch = 5 + 0.1 * z[:100]  # all the data has moved away; one code takes it
    quantizer(batch)
    quantizer.move()
    for _ in range(30):
        quantizer(batch)
        quantizer.move()
    # Codes of 12.5 vectors that nothing chooses fall below 1 within log(12.5) / log(1 / 0.9) = 24 batches.
    assert (quantizer.codebook - 5).norm(dim=1).max() < 1


def test_counts_decay_and_codes_are_averages_of_what_chose_them():
    quantizer = VectorQuantizer(2, 1, decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.sums_Cd.copy_(quantizer.codebook)
    quantizer(torch.tensor([[1.0], [2.0], [3.0], [11.0]]))
    quantizer.move()
    torch.testing.assert_close(quantizer.counts_C, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(quantizer.sums_Cd, torch.tensor([[3.0], [10.5]]))
    torch.testing.assert_close(
        quantizer.codebook, torch.tensor([[1.5], [10.5]]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("decay", [0.9, None])
def test_dead_codes_come_back_at_vectors_of_the_batch_and_live_ones_stay(decay):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2, decay=decay, revive_below=0.95)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [100, 0], [0, 100]]))
    if decay is not None:
        quantizer.sums_Cd.copy_(quantizer.codebook)
    z = torch.tensor([[0.0, 0.1], [1.0, 0.1]]).repeat(50, 1)
    for _ in range(10):
        quantizer(z)
        quantizer.move(torch.Generator().manual_seed(0))
    codebook = quantizer.codebook.detach()
    assert codebook.abs().max() < 2
    assert quantizer.counts_C.min() >= 0.95  # who was born has a count to live on
    assert (codebook[0] - torch.tensor([0.0, 0.1])).abs().max() < 0.11
    known = {tuple(row) for row in z.tolist()}
    if decay is None:
        assert tuple(codebook[2].tolist()) in known and tuple(codebook[3].tolist()) in known
    else:  # the sums were born with the code, so the next step does not throw it away
        torch.testing.assert_close(
            quantizer.sums_Cd / quantizers.smoothed(quantizer.counts_C)[:, None], codebook
        )
    none = VectorQuantizer(4, 2, decay=decay)
    with torch.no_grad():
        none.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [100, 0], [0, 100]]))
    none(z)
    if decay is None:
        none.move()
        assert none.codebook.abs().max() == 100


def test_counts_that_start_at_zero_throw_codes_away():
    """The mistake that the chapter shows: with counts of 0 and sums of e, an unused code is divided by nearly 0."""
    quantizer = VectorQuantizer(8, 2)
    quantizer.counts_C.zero_()
    norm = quantizer.codebook.norm()
    quantizer(torch.ones(20, 2))
    quantizer.move()
    assert quantizer.codebook.norm() > 1000 * norm


def test_moving_needs_a_batch_and_takes_it_once():
    quantizer = VectorQuantizer(4, 2)
    with pytest.raises(RuntimeError, match="quantize a batch in train mode"):
        quantizer.move()
    quantizer(draws(5, 2))
    quantizer.move()
    with pytest.raises(RuntimeError):
        quantizer.move()
    quantizer.eval()(draws(5, 2))
    with pytest.raises(RuntimeError):
        quantizer.move()


def test_a_quantizer_says_what_is_wrong():
    for wrong in (
        dict(codes=0, dim=2), dict(codes=2, dim=0), dict(codes=2, dim=2, decay=1.0),
        dict(codes=2, dim=2, beta=-1.0), dict(codes=2, dim=2, revive_below=-1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="need|must"):
            VectorQuantizer(wrong.pop("codes"), wrong.pop("dim"), **wrong)
    quantizer = VectorQuantizer(4, 2)
    with pytest.raises(ValueError, match=r"need vectors of 2 dimensions, got \(3, 5\)"):
        quantizer(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="need indices 0 to 3, got 1 to 4"):
        quantizer.look_up(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="-1"):
        quantizer.look_up(torch.tensor([-1]))


def test_a_saved_quantizer_goes_on_where_it_was():
    first, second = VectorQuantizer(6, 2), VectorQuantizer(6, 2)
    for seed in range(3):
        first(draws(30, 2, seed=seed))
        first.move()
    second.load_state_dict(first.state_dict())
    for quantizer in (first, second):
        quantizer(draws(30, 2, seed=9))
        quantizer.move()
    assert torch.equal(first.codebook, second.codebook)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_half_precision_vectors_keep_their_type():
    quantizer = VectorQuantizer(6, 4)
    found = quantizer(draws(10, 4).bfloat16())
    assert found.values.dtype == torch.bfloat16
    quantizer.move()
    assert quantizer.codebook.dtype == torch.float32 and quantizer.codebook.isfinite().all()
    double = VectorQuantizer(6, 4).double()
    assert double(draws(10, 4, dtype=torch.float64)).values.dtype == torch.float64
    double.move()


def test_perplexity_counts_what_is_used():
    assert quantizers.perplexity(torch.arange(8), 8).item() == pytest.approx(8)
    assert quantizers.perplexity(torch.zeros(5, dtype=torch.long), 8).item() == pytest.approx(1)
    uneven = torch.tensor([0, 0, 0, 1])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert quantizers.perplexity(uneven, 3).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="no index"):
        quantizers.perplexity(torch.zeros(0, dtype=torch.long), 3)


# FSQ and residual quantization


@pytest.mark.parametrize("levels", [[5, 4], [8, 6, 5], [3, 3, 3], [7]])
def test_fsq_equals_the_library(levels):
    from vector_quantize_pytorch import FSQ as Theirs

    ours, theirs = FSQ(levels), Theirs(levels)
    z = (3 * draws(40, 5, len(levels))).requires_grad_()
    weight = draws(40, 5, len(levels), seed=1)
    found, (values, indices) = ours(z), theirs(z)
    torch.testing.assert_close(found.values, values)
    assert torch.equal(found.indices, indices.long()) and found.loss == 0
    (mine,) = torch.autograd.grad((found.values * weight).sum(), z)
    (other,) = torch.autograd.grad((values * weight).sum(), z)
    torch.testing.assert_close(mine, other)
    everything = torch.arange(ours.codes)
    torch.testing.assert_close(ours.look_up(everything), theirs.indices_to_codes(everything))


@pytest.mark.parametrize("levels", [[5, 4], [8, 6, 5]])
def test_every_code_of_fsq_is_reached_and_found_again(levels):
    quantizer = FSQ(levels)
    assert quantizer.codes == math.prod(levels)
    found = quantizer(1.5 * draws(60_000, len(levels)))
    assert len(found.indices.unique()) == quantizer.codes
    torch.testing.assert_close(quantizer.look_up(found.indices), found.values.detach())
    assert len(quantizer.look_up(torch.arange(quantizer.codes)).unique(dim=0)) == quantizer.codes


def test_fsq_says_what_is_wrong():
    for levels in ([], [2, 5]):
        with pytest.raises(ValueError, match="three values or more"):
            FSQ(levels)
    with pytest.raises(ValueError, match="2 dimensions"):
        FSQ([5, 5])(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="need indices 0 to 24"):
        FSQ([5, 5]).look_up(torch.tensor([25]))


def test_residual_quantization_gets_closer_and_equals_the_library():
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(0)
    stages = [VectorQuantizer(8, 4) for _ in range(3)]
    for i, stage in enumerate(stages):
        stage.codebook.mul_(0.5**i)
    theirs = ResidualVQ(dim=4, num_quantizers=3, codebook_size=8, rotation_trick=False).eval()
    for ours, layer in zip(stages, theirs.layers, strict=True):
        layer._codebook.embed.copy_(ours.codebook[None])
    z = draws(1, 200, 4).requires_grad_()
    errors = []
    for depth in (1, 2, 3):
        values, indices = quantizers.residual(z, stages[:depth])
        errors.append((values - z).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    other, other_indices, _ = theirs(z)
    assert torch.equal(indices, other_indices)
    torch.testing.assert_close(values, other)
    assert torch.equal(torch.autograd.grad(values.sum(), z)[0], torch.ones_like(z))
    chosen = sum(stage.look_up(indices[..., i]) for i, stage in enumerate(stages))
    torch.testing.assert_close(values.detach(), chosen)
    with pytest.raises(ValueError, match="at least one"):
        quantizers.residual(z, [])


# The autoencoder


@pytest.mark.parametrize(("channels", "halvings", "size"), [(1, 1, (8, 8)), (3, 2, (12, 16))])
def test_an_image_becomes_a_map_of_codes_and_an_image_again(channels, halvings, size):
    model = VQVAE(VectorQuantizer(8, 3), channels=channels, width=16, halvings=halvings).eval()
    x = draws(5, channels, *size)
    reconstruction, quantized = model(x)
    step = 2**halvings
    assert quantized.indices.shape == (5, size[0] // step, size[1] // step)
    assert reconstruction.shape == x.shape
    indices = model.encode(x, batch_size=2)
    assert torch.equal(indices, quantized.indices)
    torch.testing.assert_close(
        model.decode(indices, batch_size=2), reconstruction, atol=1e-5, rtol=1e-5
    )


def test_a_residual_block_adds_to_its_input():
    block = autoencoder.Residual(4)
    nn.init.zeros_(block.body[-1].weight)
    nn.init.constant_(block.body[-1].bias, 0.5)
    x = draws(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x + 0.5)


def test_an_autoencoder_without_a_quantizer():
    model = VQVAE(None, width=8, dim=3)
    x = draws(2, 1, 8, 8)
    reconstruction, quantized = model(x)
    assert quantized is None and torch.equal(vqvae_loss(model, x), F.mse_loss(reconstruction, x))


def test_the_loss_reaches_encoder_decoder_and_codes():
    model = VQVAE(VectorQuantizer(8, 3, decay=None), width=8)
    x = draws(4, 1, 8, 8)
    loss = vqvae_loss(model, x)
    reconstruction, quantized = model(x)
    torch.testing.assert_close(loss, F.mse_loss(reconstruction, x) + quantized.loss)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_an_autoencoder_says_what_is_wrong():
    with pytest.raises(ValueError, match="do not fit"):
        VQVAE(None)
    with pytest.raises(ValueError, match="do not fit"):
        VQVAE(VectorQuantizer(8, 3), dim=4)
    with pytest.raises(ValueError, match=r"divisible by 2, got \(8, 7\)"):
        VQVAE(VectorQuantizer(8, 3))(torch.zeros(1, 1, 8, 7))


# The likelihood of integers


@settings(max_examples=60, deadline=None)
@given(st.floats(-0.5, 1.5), st.floats(-7.0, 1.0), st.sampled_from([2, 17, 256]))
def test_probabilities_of_all_values_add_up_to_one(mean, log_scale, levels):
    values = torch.arange(levels)
    found = discretized_logistic(
        values,
        torch.full((levels,), mean, dtype=torch.float64),
        torch.tensor([log_scale], dtype=torch.float64),
        levels,
    )
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_probabilities_are_differences_of_the_distribution_function():
    mean = torch.linspace(0, 1, 17, dtype=torch.float64)
    values = torch.arange(17)
    scale = 0.05
    found = discretized_logistic(values, mean.flip(0), torch.tensor([math.log(scale)]).double(), 17)
    cdf = [torch.sigmoid((values / 16 + half - mean.flip(0)) / scale) for half in (-1 / 32, 1 / 32)]
    expected = (cdf[1] - cdf[0])[1:-1]
    torch.testing.assert_close(found[1:-1].exp(), expected)
    torch.testing.assert_close(found[0].exp(), cdf[1][0])
    torch.testing.assert_close(found[-1].exp(), 1 - cdf[0][-1])


def test_a_value_far_from_a_sharp_mean_has_a_finite_logarithm():
    mean = torch.zeros(3, requires_grad=True)
    found = discretized_logistic(torch.tensor([0, 100, 255]), mean, torch.tensor([-7.0]), 256)
    assert found.isfinite().all() and found[1] < -100
    found.sum().backward()
    assert mean.grad.isfinite().all()
    with pytest.raises(ValueError, match="two levels"):
        discretized_logistic(torch.zeros(2), torch.zeros(2), torch.zeros(2), 1)


def test_the_fitted_scale_is_the_likeliest_of_each_pixel():
    torch.manual_seed(0)
    scale = torch.tensor([0.02, 0.2])
    u = torch.rand(20_000, 2)
    mean = torch.full((20_000, 2), 0.5)
    values = ((mean + scale * (u / (1 - u)).log()) * 255).round().clamp(0, 255)
    found = fit_scale(values, mean, 256)
    assert found.shape == (2,)
    torch.testing.assert_close(found.exp(), scale, rtol=0.08, atol=0)
    best = discretized_logistic(values, mean, found, 256).mean(0)
    for factor in (0.8, 1.25):
        other = discretized_logistic(values, mean, found + math.log(factor), 256).mean(0)
        assert (best > other).all()
    with pytest.raises(ValueError, match="got 0"):
        fit_scale(values[:0], mean[:0], 256)


# Priors


def all_priors():
    torch.manual_seed(0)
    return {
        "masked": priors.PixelCNN(6, width=16, layers=5),
        "gated": priors.GatedPixelCNN(6, width=16, layers=5),
        "transformer": priors.TransformerPrior(Config(6, 16, 2, 2)),
    }


@pytest.mark.parametrize("name", ["masked", "gated", "transformer"])
def test_no_prior_sees_a_place_that_comes_later(name):
    prior = all_priors()[name].double().eval()
    for place in ((0, 0), (0, 4), (2, 2), (4, 0), (4, 4)):
        seen = priors.receptive_field(prior, (5, 5), place)
        before = torch.arange(25).view(5, 5) < place[0] * 5 + place[1]
        assert (seen[~before] == 0).all(), f"{name} at {place} sees {seen}"


@pytest.mark.parametrize("name", ["gated", "transformer"])
def test_priors_without_a_blind_spot_see_every_place_before(name):
    prior = all_priors()[name].double().eval()
    for place in ((2, 2), (4, 0), (4, 4)):
        seen = priors.receptive_field(prior, (5, 5), place)
        before = torch.arange(25).view(5, 5) < place[0] * 5 + place[1]
        assert (seen[before] > 0).all(), f"{name} at {place} sees {seen}"


def test_masked_convolutions_have_a_blind_spot_however_many():
    torch.manual_seed(0)
    prior = priors.PixelCNN(6, width=16, layers=12).double()
    seen = priors.receptive_field(prior, (7, 7), (5, 2))
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    before = (rows < 5) | ((rows == 5) & (columns < 2))
    # With kernels of 3 one row up means at most one column to the right.
    blind = before & (columns - 2 > 5 - rows)
    assert blind.sum() > 0 and (seen[blind] == 0).all() and (seen[before & ~blind] > 0).all()


@pytest.mark.parametrize("name", ["masked", "gated", "transformer"])
def test_the_probabilities_of_all_maps_add_up_to_one(name):
    torch.manual_seed(0)
    prior = {
        "masked": priors.PixelCNN(3, width=8, layers=2),
        "gated": priors.GatedPixelCNN(3, width=8, layers=2),
        "transformer": priors.TransformerPrior(Config(3, 8, 1, 2)),
    }[name].eval()
    maps = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    with torch.no_grad():
        found = priors.log_prob(prior, maps)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    loss = priors.prior_loss(prior, maps)
    torch.testing.assert_close(loss, -found.mean() / 4)


@pytest.mark.parametrize("name", ["masked", "gated", "transformer"])
def test_samples_come_as_often_as_the_prior_says(name):
    torch.manual_seed(0)
    prior = {
        "masked": priors.PixelCNN(2, width=8, layers=2),
        "gated": priors.GatedPixelCNN(2, width=8, layers=2),
        "transformer": priors.TransformerPrior(Config(2, 8, 1, 2)),
    }[name].eval()
    for parameter in prior.parameters():  # as they are, all maps are about as likely
        parameter.data.mul_(3)
    draw = prior.sample if name == "transformer" else lambda *x: priors.sample(prior, *x)
    found = draw(20_000, (2, 2), torch.Generator().manual_seed(0))
    maps = torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2)
    with torch.no_grad():
        expected = priors.log_prob(prior, maps).exp()
    number = (found.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    assert expected.max() > 2 * expected.min()
    assert (number / 20_000 - expected).abs().max() < 0.012


def test_the_transformer_samples_the_same_with_and_without_a_cache():
    torch.manual_seed(0)
    prior = priors.TransformerPrior(Config(4, 16, 2, 2)).eval()
    cached = prior.sample(50, (3, 3), torch.Generator().manual_seed(0))
    plain = priors.sample(prior, 50, (3, 3), torch.Generator().manual_seed(0))
    logits = [prior(maps).log_softmax(-1) for maps in (cached, plain)]
    assert cached.shape == plain.shape == (50, 3, 3)
    # The draws differ (top-k sorts first); their mean log-probabilities must not.
    means = [
        x.gather(-1, maps[..., None]).mean()
        for x, maps in zip(logits, (cached, plain), strict=True)
    ]
    torch.testing.assert_close(*means, atol=0.1, rtol=0)


def test_a_map_of_one_place_and_wrong_maps():
    prior = all_priors()["gated"].eval()
    assert priors.sample(prior, 2, (1, 1)).shape == (2, 1, 1)
    for wrong in ((0, (2, 2)), (1, (0, 2))):
        with pytest.raises(ValueError, match="at least one"):
            priors.sample(prior, *wrong)
    for name, prior in all_priors().items():
        with pytest.raises(ValueError, match="need indices 0 to 5"):
            prior(torch.full((1, 2, 2), 6))
        assert prior(torch.zeros(0, 2, 2, dtype=torch.long)).shape == (0, 2, 2, 6), name
    with pytest.raises(ValueError, match="odd size"):
        priors.GatedPixelCNN(6, size=4)


def test_gates_and_dropout():
    x = torch.tensor([[[[2.0]], [[0.0]]]])
    torch.testing.assert_close(priors.gate(x), torch.tensor([[[[math.tanh(2.0) / 2]]]]))
    prior = priors.GatedPixelCNN(4, width=16, dropout=0.5)
    maps = torch.zeros(2, 3, 3, dtype=torch.long)
    assert not torch.equal(prior(maps), prior(maps))
    prior.eval()
    assert torch.equal(prior(maps), prior(maps))
    assert any(isinstance(layer, nn.Dropout) for layer in prior.head)


# The experiments


def test_blocks_and_vectors_are_replaced_by_the_means_of_k_means():
    train, _, test = experiment.digit_images(0)
    found = measures.block_k_means(train, test[:20], 4, seed=0)
    blocks = {tuple(b) for b in F.pixel_unshuffle(found, 2).movedim(1, -1).reshape(-1, 4).tolist()}
    assert found.shape == test[:20].shape and len(blocks) <= 4
    more = measures.block_k_means(train, test, 32, seed=0)
    assert F.mse_loss(more, test) < 0.5 * F.mse_loss(
        measures.block_k_means(train, test, 4, 0), test
    )
    model = VQVAE(None, width=8, dim=2).eval()
    exact = measures.quantize_afterwards(model, test[:3], test[:3], 48, seed=0)
    torch.testing.assert_close(exact, model(test[:3])[0], atol=1e-4, rtol=1e-4)
    coarse = measures.quantize_afterwards(model, train, test, 4, seed=0)
    assert (coarse - model(test)[0]).square().mean() > 0


def test_learning_lowers_the_error_and_moves_codes():
    torch.manual_seed(0)
    train, held_out, _ = experiment.digit_images(0)
    assert (len(train), len(held_out)) == (1297, 200) and 0 <= train.min() < train.max() == 1
    model = VQVAE(VectorQuantizer(16, 2, decay=0.9, revive_below=1.0), width=16)
    history = experiment.learn(model, train, held_out, steps=60)
    assert history.validation[-1] < 0.6 * history.validation[0]
    starts = VQVAE(VectorQuantizer(16, 2, decay=0.9), width=16)
    before = starts.quantizer.codebook.clone()
    experiment.learn(starts, train, held_out, steps=1, fit_codes=False)
    moved = (starts.quantizer.codebook - before).norm(dim=1)
    assert (moved > 1e-3).any()


def test_a_prior_learns_what_codes_follow_one_another():
    torch.manual_seed(0)
    first = torch.randint(5, (600, 1, 1))
    maps = (first + torch.arange(9).view(3, 3)) % 5  # the first code decides the map
    prior = priors.GatedPixelCNN(5, width=16, layers=3)
    experiment.learn_prior(prior, maps[:500], maps[500:], steps=120, learning_rate=5e-3)
    nats = priors.prior_loss(prior, maps[500:]).item()
    assert math.log(5) / 9 - 0.02 < nats < math.log(5) / 9 + 0.1
    found = measures.shares_nats(measures.shares(maps[:500], 5), maps[500:])
    assert found == pytest.approx(math.log(5), abs=0.02)


def test_shares_count_codes_that_never_occurred_and_tell_places_apart():
    seen = torch.zeros(1, 2, 2, dtype=torch.long)
    new = torch.tensor([[[0, 1], [1, 0]]])
    pooled = measures.shares(seen, 2)
    expected = -(math.log(5 / 6) + math.log(1 / 6)) / 2
    assert measures.shares_nats(pooled, new) == pytest.approx(expected)
    torch.manual_seed(0)
    maps = torch.stack([torch.randint(3, (400, 2)), 2 - torch.randint(3, (400, 2)) // 2], 1)
    p = measures.shares(maps, 3, by_place=True)
    for i, j, c in ((0, 0, 1), (1, 1, 0), (1, 0, 2)):
        assert p[i, j, c].item() == pytest.approx(((maps[:, i, j] == c).sum().item() + 1) / 403)
    torch.testing.assert_close(measures.shares(maps, 3)[0, 0], measures.shares(maps, 3)[1, 1])
    drawn = measures.draw_shares(p, 20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2, 2)
    torch.testing.assert_close(F.one_hot(drawn, 3).double().mean(0), p, atol=0.02, rtol=0)


def test_counted_bits_are_those_of_a_dictionary():
    torch.manual_seed(0)
    seen = torch.randint(3, (200,)), torch.randint(5, (200,))
    new = torch.randint(3, (50,)), torch.randint(5, (50,))
    counts = {}
    for pair in zip(*(x.tolist() for x in seen), strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    total = 0.0
    for c, v in zip(*(x.tolist() for x in new), strict=True):
        of_context = sum(n for (context, _), n in counts.items() if context == c)
        total -= math.log2((counts.get((c, v), 0) + 1) / (of_context + 5))
    assert measures.counted_bits(seen, new, 3, 5) == pytest.approx(total / 50)
    # A pixel that never changes costs next to nothing, one that is uniform costs log2 of its values.
    fit_on, values = (torch.zeros(4000, 1, 1, 2, dtype=torch.long) for _ in range(2))
    fit_on[..., 1], values[..., 1] = (torch.randint(4, (4000, 1, 1)) for _ in range(2))
    assert measures.histogram_bits(fit_on, values, 4) == pytest.approx(1.0, abs=0.01)


def test_a_decoder_learns_to_read_the_means():
    torch.manual_seed(0)
    train, held_out, test = experiment.digit_images(0)
    model = VQVAE(None, width=16, dim=2)
    experiment.learn(model, train, held_out, steps=100)
    encoder = [p.clone() for p in model.encoder.parameters()]
    before = F.mse_loss(measures.quantize_afterwards(model, train, test, 16, 0), test)
    found = measures.decoder_afterwards(model, train, held_out, test, 16, steps=100, seed=0)
    assert F.mse_loss(found, test) < 0.85 * before
    assert all(map(torch.equal, encoder, model.encoder.parameters()))
    again = measures.quantize_afterwards(model, train, test, 16, 0)
    torch.testing.assert_close(found, again, atol=1e-5, rtol=1e-5)


def test_a_smaller_picture_keeps_smooth_ones():
    smooth = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    assert measures.psnr(measures.resized(smooth, 4, 8), smooth) > 38
    assert measures.psnr(measures.resized(smooth, 4, 2), smooth) < 25


def test_bits_are_those_of_the_codes_and_those_of_the_pixels():
    torch.manual_seed(0)
    model = VQVAE(VectorQuantizer(8, 2), width=8).eval()
    prior = priors.GatedPixelCNN(8, width=8, layers=2).eval()
    values = torch.randint(0, 17, (30, 1, 8, 8))
    found = measures.bits_per_dim(model, prior, values, values, 17)
    indices = model.encode(values / 16)
    with torch.no_grad():
        codes = -priors.log_prob(prior, indices).mean() / (64 * math.log(2))
    assert found["codes"] == pytest.approx(codes.item(), rel=1e-5)
    assert found["total"] == pytest.approx(found["codes"] + found["pixels"])
    mean = model.decode(indices)
    scale = fit_scale(values, mean, 17)
    by_hand = sum(
        discretized_logistic(values[:, :, i, j], mean[:, :, i, j], scale[:, i, j], 17).sum()
        for i in range(8)
        for j in range(8)
    )
    assert found["pixels"] == pytest.approx(-by_hand.item() / (30 * 64 * math.log(2)), rel=1e-4)
    bins = [(x.clamp(0, 1) * 32).round().long().flatten() for x in (mean, mean)]
    flat = values.flatten()
    counted = measures.counted_bits((bins[0], flat), (bins[1], flat), 33, 17)
    assert found["counted"] == pytest.approx(counted, rel=1e-6)
    # The scales are those that suit other images, so these cost more.
    others = measures.bits_per_dim(model, prior, values // 4, values, 17)
    assert others["pixels"] > found["pixels"] + 0.1 and others["codes"] == found["codes"]
    # A pixel of 17 values that is uniform costs log2(17) = 4.09 bits; no model may promise much less.
    assert 4.0 < found["pixels"] < 5.5


def test_pictures_become_gray_and_are_cut_into_squares():
    picture = torch.arange(5 * 9 * 3, dtype=torch.uint8).view(5, 9, 3)
    made = experiment.gray(picture)
    assert made.shape == (1, 4, 8)
    assert made[0, 1, 2].item() == pytest.approx(picture[1, 2].float().mean().item() / 255)
    pictures = [made, made.flip(2)]
    squares = experiment.crops(pictures, 40, 3, torch.Generator().manual_seed(0))
    assert squares.shape == (40, 1, 3, 3)
    windows = torch.cat(
        [p[0].unfold(0, 3, 1).unfold(1, 3, 1).flatten(0, 1).flatten(1) for p in pictures]
    )
    windows = torch.cat([windows, 1 - windows])
    distance = torch.cdist(squares.flatten(1), windows, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5 and len(distance.argmin(1).unique()) > 15
    assert 10 < (distance.argmin(1) >= len(windows) // 2).sum() < 30  # negatives
    for wrong in ([], [made[:, :2]]):
        with pytest.raises(ValueError, match="3 pixels a side"):
            experiment.crops(wrong, 1, 3, torch.Generator())
    assert measures.psnr(torch.zeros(4), torch.full((4,), 0.1)).item() == pytest.approx(20)


def test_jpeg_takes_no_more_bits_than_it_may_and_uses_them():
    x = torch.linspace(0, 1, 64).expand(1, 48, 64) * torch.rand(
        1, 48, 64, generator=torch.Generator().manual_seed(0)
    )
    coarse, few = measures.jpeg(x, 2.5)
    fine, many = measures.jpeg(x, 6.0)
    assert few <= 2.5 < many <= 6
    assert coarse.shape == x.shape and measures.psnr(fine, x) > measures.psnr(coarse, x) > 10
    assert measures.jpeg(x, 0.0)[1] > 0


def test_what_the_chapter_says_of_the_library_is_so():
    import inspect

    from vector_quantize_pytorch import VectorQuantize

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(VectorQuantize.__init__).parameters.items()
    }
    assert defaults["decay"] == 0.8 and defaults["commitment_weight"] == 1.0
    assert VectorQuantize(dim=2, codebook_size=4).rotation_trick


def test_a_slice_of_the_long_run_holds_true_values(fake_mnist):
    fake_mnist(experiment)
    budget = dict(
        seeds=1, digit_steps=20, steps=20, batch_size=16, width=8, prior_steps=20, prior_width=16,
        prior_layers=1, samples=70, test_images=60, classifier_steps=120,
    )  # fmt: skip
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=0, **budget)
    assert set(experiment.VARIANTS) < set(results["digits"])
    assert len(results["digits"]) == len(experiment.VARIANTS) + 4
    for found in results["digits"].values():
        assert 0.001 < found["MSE"][0] < 0.5
        assert 1 <= found.get("perplexity", [1])[0] <= found.get("used", [32])[0] <= 32
    assert set(results["priors"]) == {
        "VQ, gated PixelCNN", "VQ, transformer", "FSQ, 8 × 6 × 5, gated PixelCNN"
    }  # fmt: skip
    for found in results["priors"].values():
        assert found["total"] == pytest.approx(found["codes"] + found["pixels"])
        # 49 codes on 784 pixels, and nats are 1 / log 2 bits.
        assert found["codes"] == pytest.approx(found["nats"] * 49 / 784 / math.log(2))
        assert 0 < found["nats"] < 1.2 * math.log(256)
    samples = results["samples"]
    assert all(0.1 <= found["confidence"] <= 1 for found in samples.values())
    assert samples["test images"]["distance"] < samples["VQ, shares"]["distance"]
    assert 0.3 < results["accuracy"] <= 1 and 0.5 < results["histogram"] < 8
    for found in results["codes"].values():
        assert 0 < found["shares by place"] < 1.2 * math.log(256) > found["shares"] > 0
    squares = results["photographs"]
    assert squares["bits a pixel"] == pytest.approx(squares["gated PixelCNN"] / 16 / math.log(2))
    assert 5 < squares["PSNR, dB"] < 40 and 1 <= squares["perplexity"] <= squares["used"] <= 128
    assert len(pictures) == 2
    for figure in pictures.values():
        figure.clf()
