"""Draw the front page's picture: python -m tools.front_picture

Noise from a Gaussian runs backwards through the layers of a NICE flow that was trained on two half moons. The picture
is committed; run this again when the model changes.
"""

import matplotlib.pyplot as plt
import seaborn as sns
import torch

from noise2tokens.display import use_style
from noise2tokens.nice import NICE
from noise2tokens.toys import Moons
from noise2tokens.training import seed_everything, train
from tools.inputs import ROOT


def main() -> None:
    seed_everything(0)
    generator = torch.Generator().manual_seed(0)
    flow = NICE(2, (64, 64), couplings=5, prior="gaussian")
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    steps = 6000
    train(
        flow,
        lambda x: -flow.log_prob(x).mean(),
        lambda n: Moons().sample(n, generator),
        steps=steps,
        batch_size=512,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )
    z = torch.randn(9000, 2, generator=generator)
    color = torch.atan2(z[:, 1], z[:, 0]).numpy()
    frames = [z]
    with torch.no_grad():
        for layer in reversed(flow.layers):
            frames.append(layer.inverse(frames[-1]))
    del frames[1]  # the scale alone only stretches the axes
    use_style()
    hues = sns.husl_palette(
        256, s=0.85, l=0.6, as_cmap=True
    )  # of one lightness, for light and dark pages
    figure, axes = plt.subplots(1, len(frames), figsize=(13, 2.2))
    for ax, points in zip(axes, frames, strict=True):
        ax.scatter(*points.T.numpy(), c=color, cmap=hues, s=0.9, linewidths=0)
        center, reach = points.mean(0), 2.6 * points.std(0).max()
        ax.set(
            xlim=(center[0] - reach, center[0] + reach), ylim=(center[1] - reach, center[1] + reach)
        )
        ax.set_aspect("equal")
        ax.axis("off")
    figure.savefig(
        ROOT / "book/_static/front.webp", dpi=130, pil_kwargs={"quality": 80, "method": 6}
    )


if __name__ == "__main__":
    main()
