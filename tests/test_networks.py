"""Networks that several chapters use: shapes, what they can see, and that the judge can read."""

import pytest
import torch
from torch import nn

from noise2tokens.images import digits
from noise2tokens.networks import (
    Classifier,
    TimeMLP,
    UNet,
    confidence,
    mlp,
    time_features,
    train_classifier,
)


def test_mlp_has_the_layers_it_is_asked_for():
    network = mlp(3, [5, 7], 2, nn.Tanh)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [p.shape for p in network.parameters() if p.dim() == 2] == [(5, 3), (7, 5), (2, 7)]


def test_time_turns_through_1_to_30_radians():
    t = torch.tensor([0.3, 1.0])
    features = time_features(t, 6)
    for i, frequency in enumerate((1, 30**0.5, 30)):
        torch.testing.assert_close(features[:, i], (frequency * t).cos())
        torch.testing.assert_close(features[:, 3 + i], (frequency * t).sin())


def test_networks():
    torch.manual_seed(0)
    points, images = TimeMLP(3, 16, 2), UNet(2, 16)
    x, picture, t = torch.randn(4, 3), torch.randn(4, 2, 8, 12), torch.rand(4)
    assert points(x, t).shape == x.shape
    assert not torch.allclose(points(x, t), points(x, 1 - t))
    assert len([m for m in points.modules() if isinstance(m, nn.Linear)]) == 3
    assert images(picture, t).shape == picture.shape and not images(picture, t).any()
    nn.init.normal_(images.end[-1].weight)
    assert not torch.allclose(images(picture, t), images(picture, 1 - t), atol=1e-4)
    torch.testing.assert_close(
        images(picture, t)[:1], images(picture[:1], t[:1]), atol=1e-4, rtol=0
    )
    images(picture, t).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in images.parameters())
    with pytest.raises(ValueError, match="divisible by 4"):
        images(torch.randn(1, 2, 8, 6), t[:1])


def test_unet_sees_across_the_image_and_its_details():
    torch.manual_seed(0)
    network = UNet(1, 8)
    nn.init.normal_(network.end[-1].weight)
    x, t = torch.randn(1, 1, 16, 16, requires_grad=True), torch.tensor([0.3])
    (far,) = torch.autograd.grad(network(x, t)[0, 0, 0, 0], x)
    assert far[0, 0, 12, 12] != 0
    assert far[0, 0, 0, 0].abs() > far[0, 0, 12:, 12:].abs().max()


def test_classifier_learns_digits():
    pictures, labels = digits()
    torch.manual_seed(0)
    x = 2 * pictures[:, None].float() / 16 - 1
    model = train_classifier(x[:1500], labels[:1500], steps=80, batch_size=128)
    assert not model.training
    with torch.no_grad():
        assert (model(x[1500:]).argmax(1) == labels[1500:]).float().mean() > 0.85
        torch.testing.assert_close(model.head(model.features(x, 7)), model(x), atol=1e-4, rtol=0)
    assert model.features(x[:10]).shape == (10, 64) and not model.features(x[:2]).requires_grad
    assert Classifier(3, 5, 16)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_confidence_is_the_probability_of_the_likeliest_class():
    torch.manual_seed(0)
    classifier = Classifier(1, 10, 16).eval()
    x = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected = classifier(x).softmax(1).max(1).values
    torch.testing.assert_close(confidence(classifier, x, batch_size=3), expected)
    assert not confidence(classifier, x).requires_grad


def test_a_trained_judge_is_surer_of_digits_than_of_noise():
    pictures, labels = digits()
    torch.manual_seed(0)
    x = pictures[:, None] / 8 - 1
    model = train_classifier(x[:1500], labels[:1500], steps=80, batch_size=128)
    noise = x[1500:].flatten()[torch.randperm(297 * 64)].view(297, 1, 8, 8)
    assert confidence(model, x[1500:]).mean() > 1.3 * confidence(model, noise).mean()
