"""What every flow of the book promises, as tests.

A chapter's test module lists its flows as `Case`s and says

    from flow_contract import *  # the tests below, collected in the module that lists the flows

    @pytest.fixture(params=CASES, ids=str)
    def case(request): return request.param

The reference for `log_det` is autograd's Jacobian in float64, so that a wrong sign, a dropped term and a term that
forgets a dimension all fail.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

__all__ = [
    "Case",
    "test_a_batch_is_its_samples",
    "test_bad_input_is_named",
    "test_gradient_of_log_prob_is_right",
    "test_inverse_undoes_forward_and_forward_undoes_inverse",
    "test_log_det_is_that_of_autograds_jacobian",
    "test_log_prob_is_the_change_of_variables",
    "test_samples_follow_seed_and_temperature",
    "test_state_dict_restores_the_flow",
]


@dataclass(frozen=True)
class Case:
    """A flow under test.

    Attributes:
        name: Shown in the test's id.
        build: Makes the flow; called under a fixed seed.
        tolerance: Bound on |x - inverse(forward(x))| in float64.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    tolerance: float = 1e-10

    def __str__(self) -> str:
        return self.name

    def flow(self) -> torch.nn.Module:
        """Build the flow in float64, with parameters moved off their start, where a scale of 1 hides mistakes."""
        torch.manual_seed(0)
        flow = self.build().double().eval()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return flow

    def batch(self, flow: torch.nn.Module, n: int) -> torch.Tensor:
        """Draw n samples of the flow's shape in float64."""
        return torch.randn(
            n, *flow.origin.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )


@pytest.mark.parametrize("n", [1, 5])
def test_inverse_undoes_forward_and_forward_undoes_inverse(case, n):
    flow = case.flow()
    x = case.batch(flow, n)
    kept = x.clone()
    z, _ = flow(x)
    assert z.shape == x.shape
    assert not torch.equal(z, x), "a flow that does nothing proves nothing"
    assert (flow.inverse(z) - x).abs().max() <= case.tolerance
    assert (flow(flow.inverse(x))[0] - x).abs().max() <= case.tolerance
    assert torch.equal(x, kept), "the caller's tensor was written to"


@pytest.mark.parametrize("n", [1, 5])
def test_log_det_is_that_of_autograds_jacobian(case, n):
    flow = case.flow()
    x = case.batch(flow, n)
    _, log_det = flow(x)
    assert log_det.shape == (n,)
    dim = flow.origin.numel()
    for sample, claimed in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: flow(v[None])[0][0], sample
        ).reshape(dim, dim)
        assert claimed.item() == pytest.approx(
            torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9
        )


def test_log_prob_is_the_change_of_variables(case):
    flow = case.flow()
    x = case.batch(flow, 4)
    z, log_det = flow(x)
    assert flow.log_prob(x).shape == (4,)
    torch.testing.assert_close(flow.log_prob(x), flow.prior.log_prob(z) + log_det)


def test_gradient_of_log_prob_is_right(case):
    flow = case.flow()
    x = case.batch(flow, 2).requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, (x,), eps=1e-6, atol=1e-5)
    flow.log_prob(x).sum().backward()
    missing = [
        name for name, p in flow.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not missing, f"no gradient reaches {missing}"


def test_a_batch_is_its_samples(case):
    flow = case.flow()
    x = case.batch(flow, 3)
    torch.testing.assert_close(flow.log_prob(x), torch.cat([flow.log_prob(one[None]) for one in x]))


def test_samples_follow_seed_and_temperature(case):
    flow = case.flow()

    def draw(temperature):
        return flow.sample(3, temperature, torch.Generator().manual_seed(2))

    assert draw(1.0).shape == (3, *flow.origin.shape) and draw(1.0).dtype == torch.float64
    assert torch.equal(draw(1.0), draw(1.0))
    prior = flow.prior.sample(3, flow.origin, torch.Generator().manual_seed(2))
    torch.testing.assert_close(flow(draw(0.5))[0], 0.5 * prior)
    assert not flow.sample(1).requires_grad


def test_state_dict_restores_the_flow(case):
    flow = case.flow()
    torch.manual_seed(99)
    fresh = case.build().double().eval()
    fresh.load_state_dict(flow.state_dict())
    x = case.batch(flow, 3)
    assert torch.equal(fresh.log_prob(x), flow.log_prob(x))
    assert not any(name.endswith("origin") for name in flow.state_dict())


def test_bad_input_is_named(case, unchecked):
    flow = case.flow()
    x = case.batch(flow, 2)
    for bad in (x[..., :-1], x[0, ..., :1], torch.cat([x, x], -1), x[:, None]):
        with pytest.raises(ValueError, match="expected samples of shape"):
            flow(bad)
        with pytest.raises(ValueError, match="expected samples of shape"):
            flow.inverse(bad)
    with pytest.raises(TypeError, match="dequantize"):
        flow(x.long())
    with pytest.raises(ValueError, match="temperature"):
        flow.sample(1, temperature=-1.0)
    with pytest.raises(ValueError, match="n >= 1"):
        flow.sample(0)


@pytest.fixture
def unchecked():
    """Switch the run-time type checker off: what is tested are the messages that readers get without it."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


__all__.append("unchecked")
