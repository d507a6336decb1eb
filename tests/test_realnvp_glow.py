import math

import normflows
import pytest
import torch
import zuko
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

pytest.register_assert_rewrite("flow_contract")
from flow_contract import *  # noqa: E402, F403
from flow_contract import Case  # noqa: E402

from noise2tokens.images import dequantize, digits  # noqa: E402
from noise2tokens.nice import (  # noqa: E402
    Chain,
    DiagonalScale,
    bits_per_dim,
    evaluate,  # noqa: E402
    gaussian_log_prob,
    mlp,
)
from noise2tokens.realnvp_glow import experiment  # noqa: E402
from noise2tokens.realnvp_glow.coupling import (  # noqa: E402
    BOUND,
    SCALES,
    AffineCoupling,
    HalfCoupling,
    RealNVP,
    fit_points,
    log_scale,
    start_at_zero,
)
from noise2tokens.realnvp_glow.experiment import class_walk, fit_images, full_scale  # noqa: E402
from noise2tokens.realnvp_glow.multiscale import (  # noqa: E402
    ActNorm,
    ChannelCoupling,
    Glow,
    ImageRealNVP,
    Invertible1x1Conv,
    Invertible1x1ConvLU,
    PermuteChannels,
    Split,
    Squeeze,
    channel_mask,
    checkerboard,
    convnet,
    glow_step,
    initialize,
)
from noise2tokens.training import History  # noqa: E402

EVEN5 = torch.arange(5) % 2 == 0


def coupling(shape=(4, 2, 3), scale="sigmoid"):
    return ChannelCoupling(shape, convnet(shape[0] // 2, 8, shape[0]), scale)


CASES = [
    Case("affine-tanh", lambda: AffineCoupling(EVEN5, mlp(5, [8], 10))),
    Case("affine-exp", lambda: AffineCoupling(~EVEN5, mlp(5, [8], 10), "exp")),
    Case("affine-sigmoid", lambda: AffineCoupling(EVEN5, mlp(5, [8], 10), "sigmoid")),
    Case("half-even", lambda: HalfCoupling(5, "even", [8])),
    Case("half-odd", lambda: HalfCoupling(5, "odd", [8], "sigmoid")),
    Case("checkerboard", lambda: AffineCoupling(checkerboard((2, 3, 4)), convnet(2, 8, 4))),
    Case("channel-mask", lambda: AffineCoupling(~channel_mask((4, 2, 3)), convnet(4, 8, 8))),
    Case("channel-coupling", coupling),
    Case("actnorm-image", lambda: ActNorm((3, 2, 4))),
    Case("actnorm-vector", lambda: ActNorm((3,))),
    Case("permute", lambda: PermuteChannels(torch.tensor([2, 0, 1]), (3, 2, 2))),
    Case("conv", lambda: Invertible1x1Conv((3, 2, 4))),
    Case("conv-lu", lambda: Invertible1x1ConvLU((3, 2, 4))),
    Case("squeeze", lambda: Squeeze(coupling())),
    Case("split-normal", lambda: Split(coupling(), None)),
    Case("split-conditional", lambda: Split(coupling(), convnet(4, 8, 8))),
    Case("realnvp", lambda: RealNVP(5, [8], 3)),
    Case("image-realnvp", lambda: ImageRealNVP((1, 4, 4), 2, 8)),
    Case("glow", lambda: Glow((1, 8, 8), 2, 2, 8)),
    Case("glow-three-levels", lambda: Glow((1, 8, 8), 3, 1, 8)),
    Case("glow-reverse", lambda: Glow((1, 4, 4), 2, 2, 8, permutation="reverse")),
    Case(
        "glow-shuffle-tanh",
        lambda: Glow((1, 4, 4), 2, 2, 8, permutation="shuffle", scale="tanh"),
    ),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def samples(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off_start(module):
    """Move the parameters away from where they start, and to float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def same(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_inverse_has_minus_the_log_det_of_forward(case):
    flow = case.flow()
    x = case.batch(flow, 1)
    z, log_det = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.inverse(v[None])[0], z[0])
    dim = flow.origin.numel()
    backward = torch.linalg.slogdet(jacobian.reshape(dim, dim)).logabsdet
    assert (log_det + backward).abs().item() < 1e-9


# Peers. normflows calls the way from latents to data forward; where a layer is its own kind of inverse this matters.


class Interleaved(nn.Module):
    """normflows reads shifts from the even channels of the network's output and scales from the odd ones."""

    def __init__(self, network, translate=lambda h, t: (h, t)):
        super().__init__()
        self.network, self.translate = network, translate

    def forward(self, x):
        h, shift = self.translate(*self.network(x).chunk(2, 1))
        return torch.stack([shift, h], 2).flatten(1, 2)


@pytest.mark.parametrize("ours, theirs", [("exp", "exp"), ("sigmoid", "sigmoid_inv")])
def test_coupling_is_that_of_normflows(ours, theirs):
    flow = off_start(coupling((4, 2, 3), ours))
    peer = normflows.flows.AffineCouplingBlock(Interleaved(flow.network), scale_map=theirs)
    x = samples(5, 4, 2, 3)
    for mine, other in zip(flow(x), peer(x), strict=True):
        same(mine, other)
    same(flow.inverse(x), peer.inverse(x)[0])


def test_1x1_convolutions_are_those_of_normflows():
    for use_lu in (False, True):
        flow = off_start((Invertible1x1ConvLU if use_lu else Invertible1x1Conv)((4, 2, 3)))
        peer = normflows.flows.Invertible1x1Conv(4, use_lu).double()
        with torch.no_grad():
            if use_lu:
                peer.P, peer.sign_S = flow.permutation, flow.sign
                peer.L.copy_(flow.lower)
                peer.U.copy_(flow.upper)
                peer.log_S.copy_(flow.log_s)
            else:
                peer.W.copy_(flow.weight)
        x = samples(5, 4, 2, 3)
        z, log_det = peer.inverse(x)
        same(flow(x)[0], z)
        same(flow(x)[1], log_det.expand(5))
        same(flow.inverse(x), peer(x)[0])


def test_squeeze_is_that_of_normflows_and_takes_2x2_squares():
    class Spy(DiagonalScale):
        def __init__(self):
            super().__init__(1)
            self.origin = torch.zeros(8, 2, 3)

        def forward(self, x):
            self.seen = x
            return x, x.new_zeros(len(x))

    inner, x = Spy(), samples(3, 2, 4, 6)
    Squeeze(inner)(x)
    same(inner.seen, normflows.flows.Squeeze().inverse(x)[0], atol=0)
    corners = [x[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
    same(inner.seen, torch.stack(corners, 2).flatten(1, 2), atol=0)


@pytest.mark.parametrize("shape", [(3, 2, 4), (3,)])
def test_actnorm_is_that_of_normflows_started_from_data(shape):
    x = 5 + 3 * samples(40, *shape)
    flow = ActNorm(shape).double()
    initialize(flow, x)
    # The layer of normflows starts from whichever direction runs first: here the one from data to latents.
    peer = normflows.flows.ActNorm((shape[0],) + (1,) * (len(shape) - 1)).double()
    z, _ = peer.inverse(x)
    n = x.transpose(0, 1).flatten(1).shape[1]
    same(flow(x)[0], z * math.sqrt(n / (n - 1)), atol=1e-5)  # it divides by n - 1
    with torch.no_grad():
        peer.s.copy_(-flow.log_s[None])
        peer.t.copy_(-flow.shift[None])
    z, log_det = peer.inverse(x)
    same(flow(x)[0], z)
    same(flow(x)[1], log_det.expand(40))


def test_a_step_is_the_glow_block_of_normflows():
    flow = off_start(Chain(glow_step((4, 2, 3), 8)))
    norm, conv, last = flow.layers
    peer = normflows.flows.GlowBlock(4, 8, use_lu=True).double()
    # From data to latents it computes s · (x - shift); ours is s · x + shift.
    peer.flows[0].flows[1].param_map = Interleaved(
        last.network, lambda h, t: (h, -t / torch.sigmoid(h + 2))
    )
    with torch.no_grad():
        peer.flows[1].P, peer.flows[1].sign_S = conv.permutation, conv.sign
        peer.flows[1].L.copy_(conv.lower)
        peer.flows[1].U.copy_(conv.upper)
        peer.flows[1].log_S.copy_(conv.log_s)
        peer.flows[2].s.copy_(-norm.log_s[None])
        peer.flows[2].t.copy_(-norm.shift[None])
        peer.flows[2].data_dep_init_done = torch.tensor(1.0)
    x = samples(5, 4, 2, 3)
    for mine, other in zip(flow(x), peer.inverse(x), strict=True):
        same(mine, other)
    same(flow.inverse(x), peer(x)[0])


def test_coupling_is_that_of_zuko():
    peer = zuko.flows.GeneralCouplingTransform(5, mask=EVEN5, hidden_features=[16]).double()

    class Clipped(nn.Module):
        """zuko's network sees the kept part only, and its affine map clips log s softly at log 1000."""

        def forward(self, x):
            a = peer.hyper(x[:, EVEN5]).unflatten(1, (2, 2))
            full = x.new_zeros(2, len(x), 5)
            full[1][:, ~EVEN5] = a[..., 0]
            full[0][:, ~EVEN5] = a[..., 1] / (1 + abs(a[..., 1] / math.log(1e-3)))
            return torch.cat([*full], 1)

    ours = AffineCoupling(EVEN5, Clipped(), "exp")
    x = 3 * samples(5, 5)
    for mine, other in zip(ours(x), peer().call_and_ladj(x), strict=True):
        same(mine, other)
    same(ours.inverse(x), peer().inv(x))


# Layers


def test_log_scales_have_their_bounds_and_start():
    h = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    assert torch.equal(log_scale(h, "exp"), h)
    assert log_scale(h, "tanh").abs().max() <= BOUND
    same(log_scale(h, "sigmoid"), torch.sigmoid(h + 2).log(), atol=1e-6)
    assert log_scale(h, "sigmoid").max() <= 0
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for kind, start, slope in (("tanh", 0, 1), ("sigmoid", math.log(0.8808), 1 - 0.8808)):
        value = log_scale(zero, kind)
        (gradient,) = torch.autograd.grad(value, zero)
        assert value.item() == pytest.approx(start, abs=1e-4)
        assert gradient.item() == pytest.approx(slope, abs=1e-4)


def test_masks_follow_the_grid():
    assert checkerboard((2, 2, 3)).int().tolist() == [[[1, 0, 1], [0, 1, 0]]] * 2
    assert channel_mask((4, 1, 2)).int().tolist() == [[[1, 1]]] * 2 + [[[0, 0]]] * 2
    assert "keep" not in AffineCoupling(EVEN5, mlp(5, [8], 10)).state_dict()


def test_the_kept_part_stays_and_the_network_sees_nothing_else():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.cat([x, x], 1)

    keep, x = checkerboard((1, 4, 4)), samples(3, 1, 4, 4)
    flow = AffineCoupling(keep, Spy())
    y, _ = flow(x)
    assert torch.equal(y[:, keep], x[:, keep])
    flow.inverse(y)
    assert torch.equal(seen[0], x * keep) and torch.equal(seen[1], x * keep)


@pytest.mark.parametrize("scale", ["exp", "tanh", "sigmoid"])
def test_the_fast_channel_coupling_agrees_with_the_masked_one(scale):
    fast = off_start(coupling((4, 2, 3), scale))

    class Padded(nn.Module):
        def forward(self, x):
            h, shift = fast.network(x[:, :2]).chunk(2, 1)
            nothing = torch.zeros_like(h)
            return torch.cat([nothing, h, nothing, shift], 1)

    slow = AffineCoupling(channel_mask((4, 2, 3)), Padded(), scale)
    x = samples(5, 4, 2, 3)
    for mine, other in zip(fast(x), slow(x), strict=True):
        same(mine, other)
    same(fast.inverse(x), slow.inverse(x))


def test_split_is_a_conditional_gaussian_times_the_density_of_the_rest():
    flow = off_start(Split(coupling(), convnet(4, 8, 8)))
    x = samples(5, 8, 2, 3)
    first, second = x[:, :4], x[:, 4:]
    mean, log_sigma = flow.network(first).chunk(2, 1)
    given = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(second).flatten(1).sum(1)
    same(flow.log_prob(x), flow.inner.log_prob(first) + given)
    plain = Split(flow.inner, None)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(second).flatten(1).sum(1)
    same(plain.log_prob(x), flow.inner.log_prob(first) + normal)


def test_samples_of_a_split_have_the_conditional_spread():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.cat([3 * x, torch.full_like(x, math.log(0.1))], 1)

    flow = Split(PermuteChannels(torch.tensor([0]), (1, 1, 1)), Fixed())
    x = flow.sample(20_000, 0.5, torch.Generator().manual_seed(0))
    first, second = x[:, 0], x[:, 1]
    assert first.std().item() == pytest.approx(0.5, rel=0.03)
    assert (second - 3 * first).std().item() == pytest.approx(0.05, rel=0.03)


def test_lu_is_the_plain_convolution_with_the_product_of_the_factors():
    lu, plain = off_start(Invertible1x1ConvLU((4, 2, 3))), Invertible1x1Conv((4, 2, 3)).double()
    lower, upper = lu.factors()
    assert torch.equal(lower.triu(), torch.eye(4)) and torch.equal(upper.tril(-1), 0 * upper)
    with torch.no_grad():
        plain.weight.copy_(lu.permutation @ lower @ upper)
    x = samples(5, 4, 2, 3)
    for mine, other in zip(lu(x), plain(x), strict=True):
        same(mine, other)
    same(lu.inverse(x), plain.inverse(x))


@pytest.mark.parametrize("kind", [Invertible1x1Conv, Invertible1x1ConvLU])
def test_1x1_convolutions_start_as_rotations(kind):
    torch.manual_seed(0)
    flow, x = kind((6, 2, 3)).double(), samples(5, 6, 2, 3)
    y, log_det = flow(x)
    assert log_det.abs().max() < 1e-5  # made in float32
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    assert (y - x).abs().max() > 0.1
    torch.manual_seed(1)
    assert not torch.allclose(kind((6, 2, 3)).double()(x)[0], y)


def test_initialize_standardizes_every_actnorm_on_the_way_and_nothing_else():
    torch.manual_seed(0)
    flow = Glow((1, 8, 8), 2, 2, 8).double()
    x = 100 + 20 * samples(64, 1, 8, 8)
    before = {name: p.clone() for name, p in flow.named_parameters()}
    initialize(flow, x)
    arrived = []
    norms = [layer for layer in flow.modules() if isinstance(layer, ActNorm)]
    for layer in norms:
        layer.register_forward_hook(lambda layer, inputs, output: arrived.append(output[0]))
    state = {name: p.clone() for name, p in flow.named_parameters()}
    flow(x)
    assert len(arrived) == len(norms) == 4
    for y in arrived:
        std, mean = torch.std_mean(y, dim=(0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-9 and (std - 1).abs().max() < 1e-4
    owned = {id(p) for layer in norms for p in layer.parameters()}
    for name, p in flow.named_parameters():
        assert torch.equal(p, state[name]), "a plain forward pass must not start anything anew"
        assert (id(p) in owned) or torch.equal(p, before[name])


def test_a_constant_channel_does_not_divide_by_zero():
    flow = ActNorm((2, 3, 3))
    x = torch.randn(8, 2, 3, 3)
    x[:, 0] = 1
    initialize(flow, x)
    assert torch.isfinite(flow(x)[0]).all() and torch.isfinite(flow(x)[1]).all()


def test_zero_starts():
    torch.manual_seed(0)
    x = samples(5, 6)
    assert torch.equal(RealNVP(6, [16]).double()(x)[0], x)
    images = samples(5, 4, 2, 3)
    y, log_det = coupling().double()(images)
    same(y[:, 2:], images[:, 2:] * torch.sigmoid(torch.tensor(2.0).double()), atol=1e-7)
    same(log_det, torch.full((5,), 12 * math.log(0.8807970779778823)).double(), atol=1e-5)
    network = start_at_zero(mlp(3, [4], 2))
    assert not network(torch.randn(5, 3)).any() and network[0].weight.any()


def test_realnvp_of_vectors_takes_turns():
    flow = RealNVP(5, [8], 3)
    kept = [torch.arange(5)[layer.kept].tolist() for layer in flow.layers]
    assert kept == [[0, 2, 4], [1, 3], [0, 2, 4]]


@pytest.mark.parametrize("keep", ["even", "odd"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_half_coupling_is_the_masked_one_without_what_the_mask_throws_away(keep, scale):
    fast = off_start(HalfCoupling(5, keep, [8], scale))
    mask = EVEN5 if keep == "even" else ~EVEN5

    class Padded(nn.Module):
        def forward(self, x):
            assert not x[:, ~mask].any()
            full = torch.full((len(x), 2, 5), torch.nan, dtype=x.dtype)
            full[:, :, ~mask] = fast.network(x[:, mask]).view(len(x), 2, -1)
            return full.flatten(1)

    slow, x = AffineCoupling(mask, Padded(), scale), samples(7, 5)
    for ours, reference in zip(fast(x), slow(x), strict=True):
        same(ours, reference)
    same(fast.inverse(x), slow.inverse(x))
    moved = int((~mask).sum())
    shapes = [(layer.in_features, layer.out_features) for layer in fast.network[::2]]
    assert shapes == [(5 - moved, 8), (8, 2 * moved)]


def test_realnvp_of_images_alternates_masks_and_every_pixel_is_moved():
    torch.manual_seed(0)
    flow = off_start(ImageRealNVP((1, 8, 8), 2, 8))
    x = samples(20, 1, 8, 8)
    untouched = torch.ones(1, 8, 8, dtype=torch.bool)
    scale_one = [layer for layer in flow.layers if isinstance(layer, AffineCoupling)]
    assert len(scale_one) == 3
    for layer in scale_one:
        x, _ = layer(x)
        untouched &= layer.keep
    assert not untouched.any()
    assert torch.equal(scale_one[0].keep, ~scale_one[1].keep)
    assert torch.equal(scale_one[0].keep, scale_one[2].keep)
    squeezed = [
        layer for layer in flow.layers[-1].inner.layers if isinstance(layer, AffineCoupling)
    ]
    assert [layer.keep[:, 0, 0].tolist() for layer in squeezed] == [
        [True, True, False, False],
        [False, False, True, True],
        [True, True, False, False],
    ]
    last = [layer for layer in flow.modules() if isinstance(layer, AffineCoupling)][-4:]
    assert all(layer.keep.shape == (2, 4, 4) for layer in last)


def test_glow_has_the_papers_layout():
    flow = Glow((3, 32, 32), 3, 2, 8)
    shapes = [tuple(layer.origin.shape) for layer in flow.modules() if isinstance(layer, ActNorm)]
    assert shapes == [(12, 16, 16)] * 2 + [(24, 8, 8)] * 2 + [(48, 4, 4)] * 2
    assert sum(isinstance(layer, Split) for layer in flow.modules()) == 2
    step = flow.layers[0].inner.layers[:3]
    assert [type(layer) for layer in step] == [ActNorm, Invertible1x1ConvLU, ChannelCoupling]
    torch.manual_seed(0)
    other = Glow((1, 16, 16), 3, 1, 8, permutation="reverse", scale="tanh")
    kinds = [type(layer) for layer in other.modules()]
    splits = [layer for layer in flow.modules() if isinstance(layer, Split)]
    assert all(layer.network[-1].out_channels == layer.origin.shape[0] for layer in splits)
    assert kinds.count(PermuteChannels) == 3 and Invertible1x1ConvLU not in kinds
    for layer in other.modules():
        assert not isinstance(layer, ChannelCoupling) or layer.scale == "tanh"
    orders = [
        glow_step((8, 2, 2), 8, permutation)[1].order.tolist()
        for permutation in ("reverse", "shuffle")
    ]
    assert orders[0] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert sorted(orders[1]) == list(range(8)) and orders[1] not in (orders[0], list(range(8)))


def test_float32_inverts_a_deep_flow_only_as_long_as_its_scales_are_tame():
    error, x = {}, torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for scale in ("exp", "tanh", "sigmoid"):
        torch.manual_seed(0)
        flow = RealNVP(8, [32], 16, scale)
        with torch.no_grad():
            for layer in flow.layers:
                layer.network[-1].weight.normal_(0, 0.3)
            z, _ = flow(x)
            error[scale] = (flow.inverse(z) - x).abs().median().item()
        print(scale, error[scale], z.abs().max())
    assert math.isnan(error["exp"])
    assert error["sigmoid"] < 1e-5 and error["tanh"] > 1e-3


def test_bad_arguments_are_named():
    nothing = torch.zeros(4, dtype=torch.bool)
    for mask in (nothing, ~nothing):
        with pytest.raises(ValueError, match="keep some coordinates and move some"):
            AffineCoupling(mask, mlp(4, [8], 8))
    with pytest.raises(ValueError, match="got 'relu'"):
        RealNVP(4, [8], scale="relu")
    with pytest.raises(ValueError, match="got 'relu'"):
        coupling(scale="relu")
    for dim, keep in ((1, "even"), (4, "first")):
        with pytest.raises(ValueError, match=f"got dim={dim} and keep='{keep}'"):
            HalfCoupling(dim, keep, [8])
    with pytest.raises(ValueError, match="got 'relu'"):
        log_scale(torch.zeros(1), "relu")
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        ChannelCoupling((3, 2, 2), convnet(1, 8, 3))
    with pytest.raises(ValueError, match="multiple of 4 channels, got 2"):
        Squeeze(coupling((2, 2, 2)))
    with pytest.raises(ValueError, match=r"permutation of 0\.\.2, got \[0, 0, 2\]"):
        PermuteChannels(torch.tensor([0, 0, 2]), (3, 2, 2))
    with pytest.raises(ValueError, match=r"\(1, 28, 28\) 3 times"):
        Glow((1, 28, 28), 3, 1, 8)
    with pytest.raises(ValueError, match=r"\(1, 6, 6\) 2 times"):
        ImageRealNVP((1, 6, 6), 3, 8)
    with pytest.raises(ValueError, match="got 'swap'"):
        Glow((1, 4, 4), 1, 1, 8, permutation="swap")


# Experiments


def test_one_affine_coupling_learns_a_spread_that_no_volume_preserving_flow_can():
    draws = torch.Generator().manual_seed(0)

    def spread(x):
        return 0.05 + 0.95 * torch.sigmoid(4 * x)

    def draw(n):
        noise = torch.randn(n, 2, generator=draws)
        return torch.stack([noise[:, 0], spread(noise[:, 0]) * noise[:, 1]], 1)

    torch.manual_seed(0)
    flow = RealNVP(2, [64, 64], 1)
    history = fit_points(flow, draw, steps=300, learning_rate=1e-2)
    assert len(history.losses) == 300
    x = draw(20_000)
    truth = torch.distributions.Normal(0.0, torch.stack([torch.ones(len(x)), spread(x[:, 0])], 1))
    with torch.no_grad():
        gap = truth.log_prob(x).sum(1) - flow.log_prob(x)
    # The floor of volume-preserving flows (last chapter) is 0.108 nats above the truth.
    assert gap.mean() < 0.005


def test_fit_images_starts_from_data_and_learns():
    images = digits()[0][:, None]
    torch.manual_seed(0)
    flow = Glow((1, 8, 8), 2, 2, 16)
    history = fit_images(
        flow, images[:1200], images[1200:1400], 17, steps=120, batch_size=100, learning_rate=4e-3
    )
    untrained = bits_per_dim(torch.tensor([-history.validation[0]]), 64, 17).item()
    assert untrained < 5, "without a start from data it is above 5"
    noisy = [
        dequantize(part.flatten(1), 17, torch.Generator().manual_seed(1))
        for part in (images[:1200], images[1400:])
    ]
    ours = evaluate(flow, images[1400:], 17).mean()
    assert ours > gaussian_log_prob(*noisy, diagonal=True).mean()
    assert len(history.losses) == 120 and history.best_step > 0


@pytest.fixture
def without_noise(monkeypatch):
    """Dequantize to the middle of the cell, so that values can be compared."""
    monkeypatch.setattr(
        "noise2tokens.nice.dequantize", lambda v, levels, generator: (v + 0.5) / levels
    )


def test_evaluate_in_parts_is_the_log_density_of_each(without_noise):
    images = digits()[0][:10, None]
    torch.manual_seed(0)
    flow = Glow((1, 8, 8), 1, 1, 8)
    parts = evaluate(flow, images, 17, draws=3, batch_size=4)
    with torch.no_grad():
        torch.testing.assert_close(parts, flow.log_prob((images + 0.5) / 17))


def test_evaluate_draws_noise_from_its_seed():
    images = digits()[0][:10, None]
    torch.manual_seed(0)
    flow = Glow((1, 8, 8), 1, 1, 8)
    first, again, other = (evaluate(flow, images, 17, draws=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_class_walk_moves_mean_latents_from_class_to_class():
    flow = off_start(coupling())
    x, labels = samples(6, 4, 2, 3), torch.tensor([0, 1, 2, 1, 2, 2])
    walked = class_walk(flow, x, labels, 1, 2, torch.tensor([0.0, 0.5, 1.0]))
    assert walked.shape == (2, 3, 4, 2, 3)
    same(walked[:, 0], x[labels == 1], atol=1e-9)
    start, half, end = (flow(walked[:, k])[0] for k in range(3))
    same(end.mean(0), flow(x[labels == 2])[0].mean(0), atol=1e-9)
    same(half, (start + end) / 2, atol=1e-9)
    with pytest.raises(ValueError, match="label 7"):
        class_walk(flow, x, labels, 1, 7, torch.ones(1))


SLICE = dict(
    digit_seeds=1, digit_steps=2,
    permutations=("reverse", "conv"), steps=2, batch_size=8, depth=1, width=8, held_out=1380,
    test_images=30, samples=25, classifier_steps=2,
)  # fmt: skip


def test_what_full_scale_trains_scores_and_shows(fake_mnist, monkeypatch):
    fake_mnist(experiment)
    seen = []

    def training(flow, images, validation, levels, **options):
        seen.append((flow, images, validation, levels, options))
        return History(validation=[9000.0, 8000.0])

    rows = []
    monkeypatch.setattr(experiment, "_digits_over_seeds", lambda *sizes: {"called": sizes})
    monkeypatch.setattr(experiment, "fit_images", training)
    monkeypatch.setattr(experiment, "image_rows", lambda found: rows.append(found) or Figure())
    results, pictures = full_scale(torch.device("cpu"), seed=5, **SLICE)
    images, tests = experiment.mnist(train=True)[0], experiment.mnist(train=False)[0][:30]
    assert (
        list(results) == ["digits", "reverse", "conv", "overflow", "confidence"] and len(seen) == 2
    )
    assert results["digits"] == {"called": (5, 1, 2)}
    for (flow, kept, validation, levels, options), way in zip(
        seen, SLICE["permutations"], strict=True
    ):
        assert torch.equal(kept, F.pad(images[:20, None], (2, 2, 2, 2))) and levels == 256
        assert torch.equal(validation, F.pad(images[20:, None], (2, 2, 2, 2)))
        assert options["steps"] == 2 and options["batch_size"] == 8
        kind = Invertible1x1ConvLU if way == "conv" else PermuteChannels
        assert any(isinstance(part, kind) for part in flow.modules())
        # Bits for the padded image, shared among the 784 pixels that it has; the border costs its 8 bits a pixel.
        scores = evaluate(flow, F.pad(tests[:, None], (2, 2, 2, 2)), 256, draws=2, seed=5)
        bits = (1024 * 8 - scores / math.log(2)) / 784
        assert results[way]["bits"].item() == pytest.approx(bits.mean().item(), rel=1e-5)
        error = bits.std().item() / 30**0.5
        assert results[way]["standard error"].item() == pytest.approx(error, rel=1e-4)
        expected = [(1024 * 8 + nats / math.log(2)) / 784 for nats in (9000.0, 8000.0)]
        torch.testing.assert_close(
            results[way]["validation bits"].tolist(), expected, rtol=1e-5, atol=0
        )
    assert list(results["confidence"]) == ["T = 1", "T = 0.7", "test images"]
    assert all(value == 0 for value in results["overflow"].values())
    samples, ways = rows
    torch.testing.assert_close(samples["test images"], tests[:10] / 255)
    assert len(samples) == 5 and all(row.shape == (10, 28, 28) for row in samples.values())
    # The walk starts at fours of the training set (up to the noise of a pixel).
    fours = images[experiment.mnist(train=True)[1] == 4][:4]
    starts = torch.stack([way[0] for way in ways.values()])
    torch.testing.assert_close(starts, (fours + 0.5) / 256, atol=0.003, rtol=0)
    assert len(pictures) == 2 and "test images above" in next(iter(pictures))


def test_the_comparison_on_digits_is_at_equal_steps_and_over_consecutive_seeds(monkeypatch):
    seen = []

    def training(flow, images, validation, levels, **options):
        seen.append((type(flow).__name__, images, options["steps"], torch.rand(()).item()))
        return History(losses=[50.0, 40.0, 30.0])

    monkeypatch.setattr(experiment, "fit_images", training)
    found = experiment._digits_over_seeds(4, 2, 3)
    assert [name for name, *_ in seen] == ["ImageRealNVP", *["Glow"] * 4] * 2
    assert all(len(images) == 1293 and steps == 3 for _, images, steps, _ in seen)
    assert not torch.equal(seen[0][1], seen[5][1]) and torch.equal(seen[0][1], seen[4][1])
    assert list(found) == list(experiment.DIGIT_FLOWS)
    assert found["Glow, 1×1"]["loss"] == pytest.approx(
        [math.log2(17) + 30 / (64 * math.log(2))] * 2, rel=1e-5
    )
    assert len(found["RealNVP"]["bits"]) == 2
    flows, _, bits = experiment.compare_on_digits(4, steps=3)
    assert bits["RealNVP"].shape == (360,)
    for (
        name,
        build,
    ) in (
        experiment.DIGIT_FLOWS.items()
    ):  # each starts from the seed, not from where the last one left it
        torch.manual_seed(4)
        for ours, fresh in zip(flows[name].parameters(), build().parameters(), strict=True):
            assert torch.equal(ours, fresh)
    assert found["RealNVP"]["bits"][0] == pytest.approx(bits["RealNVP"].mean().item(), rel=1e-5)
    mixers = {"reverse": PermuteChannels, "shuffle": PermuteChannels, "1×1": Invertible1x1ConvLU}
    for name, kind in mixers.items():
        assert any(isinstance(part, kind) for part in flows[f"Glow, {name}"].modules())


def test_full_scale_counts_samples_that_overflow(fake_mnist, monkeypatch):
    fake_mnist(experiment)
    monkeypatch.setattr(experiment, "_digits_over_seeds", lambda *sizes: {})
    monkeypatch.setattr(experiment, "fit_images", lambda *_, **__: History(validation=[1.0]))
    draw = Glow.sample

    def overflow(self, n, temperature):
        x = draw(self, n, temperature)
        x[:5] = math.nan if temperature == 1 else x[:5]
        return x

    monkeypatch.setattr(Glow, "sample", overflow)
    results, _ = full_scale(torch.device("cpu"), seed=5, **SLICE)
    found = {name: float(value) for name, value in results["overflow"].items()}
    assert found == pytest.approx({"T = 1": 0.2, "T = 0.7": 0, "test images": 0})
    assert all(0.1 <= value <= 1 for value in results["confidence"].values())


def test_full_scale_runs_as_it_is(fake_mnist, monkeypatch):
    fake_mnist(experiment)
    monkeypatch.setattr(experiment, "_digits_over_seeds", lambda *sizes: {})
    results, _ = full_scale(torch.device("cpu"), seed=0, **{**SLICE, "permutations": ("conv",)})
    curve = results["conv"]["validation bits"]
    assert curve[-1] < curve[0] < 12
