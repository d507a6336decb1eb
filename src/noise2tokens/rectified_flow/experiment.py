"""Rectified flow on eight Gaussians, where the truth is known, and on MNIST, where it is not."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms.distances import frechet_distance, wasserstein
from noise2tokens.flow_vs_diffusion.cnf import log_likelihood
from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince
from noise2tokens.images import mnist
from noise2tokens.networks import TimeMLP, UNet, confidence, train_classifier
from noise2tokens.rectified_flow.measures import straightness, transport_cost
from noise2tokens.rectified_flow.reflow import (
    distill,
    fit,
    independent_pairs,
    reflow,
    sample,
    transport_pairs,
)
from noise2tokens.toys import EightGaussians
from noise2tokens.training import running_average


@dataclass(frozen=True)
class Learned:
    """Flows from noise to eight Gaussians, learned with one network and one budget.

    Attributes:
        flows: "1-RF"; "1-RF, trained on", which spends on independent pairs what "2-RF" spends on the pairs of 1-RF;
            and "optimal pairs", with as many steps as those two in all.
        students: Distilled from 1-RF and from 2-RF; good for one step.
        pairs: Those that 1-RF made.
    """

    flows: dict[str, nn.Module]
    students: dict[str, nn.Module]
    pairs: Float[Tensor, "n 2 2"]


def learn_eight_gaussians(
    seed: int, *, steps: int = 1500, more: int = 1000, student_steps: int = 600, pairs: int = 16_384
) -> Learned:
    """Train six velocities from noise to eight Gaussians.

    Args:
        seed: Of the network's start, of the points and of the times.
        steps: Steps of 1-RF.
        more: Further steps of 2-RF, on the pairs of 1-RF, and of the flow that it is compared with.
        student_steps: Steps of each distilled student.
        pairs: Pairs of a reflow, and of optimal transport in batches of 256.

    Returns:
        The flows.
    """
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)

    def fresh(n: int) -> Tensor:
        noise = torch.randn(n, 2, generator=draws)
        return independent_pairs(EightGaussians().sample(n, draws), noise)

    one = TimeMLP(2, 64)
    paired, longer, two = (copy.deepcopy(one) for _ in range(3))
    fit(one, fresh, steps=steps)
    longer.load_state_dict(one.state_dict())
    fit(longer, fresh, steps=more)
    two.load_state_dict(one.state_dict())
    one_pairs = reflow(one, torch.randn(pairs, 2, generator=draws), tolerance=1e-4)
    fit(two, one_pairs, steps=more)
    two_pairs = reflow(two, one_pairs[:, 1], tolerance=1e-4)
    fit(paired, transport_pairs(*fresh(pairs).unbind(1), batch_size=256), steps=steps + more)
    students = {
        "1-RF, distilled": distill(one, one_pairs, steps=student_steps),
        "2-RF, distilled": distill(two, two_pairs, steps=student_steps),
    }
    flows = {"1-RF": one, "1-RF, trained on": longer, "2-RF": two, "optimal pairs": paired}
    return Learned(flows, students, one_pairs)


def stratified_noise(n: int, seed: int) -> Float[Tensor, "{n} 2"]:
    """Draw standard normal points that fill the plane evenly (a scrambled Sobol sequence), in float64.

    Two such sets are nearer to each other than random ones, so that small distances to a target can be seen.
    """
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n)
    return torch.distributions.Normal(0.0, 1.0).icdf(u.double().clamp(1e-6, 1 - 1e-6))


def stratified_target(n: int, seed: int) -> Float[Tensor, "{n} 2"]:
    """Draw points of the eight Gaussians, as many from each and evenly within each, in float64.

    Raises:
        ValueError: If n is no multiple of 8.
    """
    if n % 8:
        raise ValueError(f"{n} points cannot be shared out among eight Gaussians")
    target = EightGaussians()
    noise = stratified_noise(n, seed).view(8, n // 8, 2)
    return (target.means[:, None] + target.std * noise).flatten(0, 1)


def score_eight_gaussians(
    learned: Learned,
    source: Float[Tensor, "n 2"],
    target: Float[Tensor, "n 2"],
    test: Float[Tensor, "m 2"],
    counts: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Measure learned flows where the truth is known.

    Args:
        learned: The flows.
        source: Noise that all flows carry; best stratified.
        target: As many points of the eight Gaussians.
        test: Points whose likelihood is taken.
        counts: Numbers of Euler steps.

    Returns:
        For each flow the Wasserstein distance to the target after each number of steps (named "1", "2", ...), and
        solved adaptively ("solved", with the "evaluations" of that); its straightness "S"; the "cost" of its pairs; its
        "nll" in nats. For students the distance after one step.
    """

    def distance(x: Tensor) -> float:
        return wasserstein(x.double(), target.double())

    found = {}
    for name, flow in learned.flows.items():
        with torch.no_grad():
            solved = dormand_prince(flow, source, 1, 0)
        found[name] = {str(k): distance(sample(flow, source, k)) for k in counts} | {
            "solved": distance(solved.x),
            "evaluations": solved.evaluations,
            "S": straightness(flow, source, steps=25),
            "cost": transport_cost(independent_pairs(solved.x, source)),
            "nll": -log_likelihood(flow, test).log_prob.mean().item(),
        }
    return found | {
        name: {"1": distance(sample(student, source, 1))}
        for name, student in learned.students.items()
    }


BUDGETS = {
    "long": {
        "seeds": 3,
        "plane": {"steps": 1500, "more": 1000, "student_steps": 600, "pairs": 16_384},
        "steps": 1500,
        "reflow_steps": 800,
        "student_steps": 400,
        "batch_size": 64,
        "width": 16,
        "pairs": 2000,
        "samples": 1000,
        "test_images": 10_000,
        "classifier_steps": 1000,
        "counts": (1, 2, 4, 16),
        "tolerance": 1e-3,
    },
    "full": {
        "seeds": 5,
        "plane": {"steps": 1500, "more": 1000, "student_steps": 600, "pairs": 16_384},
        "steps": 5000,
        "reflow_steps": 5000,
        "student_steps": 5000,
        "batch_size": 256,
        "width": 64,
        "pairs": 50_000,
        "samples": 10_000,
        "test_images": 10_000,
        "classifier_steps": 3000,
        "counts": (1, 2, 4, 8, 16, 32),
        "tolerance": 1e-4,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    plane: dict[str, int],
    steps: int,
    reflow_steps: int,
    student_steps: int,
    batch_size: int,
    width: int,
    pairs: int,
    samples: int,
    test_images: int,
    classifier_steps: int,
    counts: Sequence[int],
    tolerance: float,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Repeat the eight Gaussians with several seeds; train 1-RF and 2-RF on MNIST, distill both, and measure all.

    Args:
        device: Where to train the networks of images; the points of the plane stay on the CPU.
        seed: The first seed of the eight Gaussians, and the seed of MNIST.
        seeds: Seeds of the eight Gaussians.
        plane: What `learn_eight_gaussians` may use.
        steps: Optimizer steps of 1-RF on MNIST.
        reflow_steps: Steps of 2-RF, which starts from the weights of 1-RF.
        student_steps: Steps of each student.
        batch_size: Pairs a step.
        width: Of the U-Net.
        pairs: Pairs that 1-RF makes for 2-RF and for its student, and 2-RF for its own.
        samples: Samples behind each distance.
        test_images: Test images, what samples are compared with.
        classifier_steps: Steps of the classifier whose features and confidence are the judges.
        counts: Numbers of Euler steps.
        tolerance: Of the adaptive solver, which makes the pairs too.

    Returns:
        "eight gaussians": for each flow and quantity of `score_eight_gaussians` the values of all seeds. "mnist": for
        each model Fréchet distances of features to the test images by number of steps, "solved" for the adaptive solver
        with its "evaluations", and the mean "confidence" in its one-step samples; for "training images" the "floor" of
        the distance and the confidence, both of as many images as there are samples. And a picture of samples.
    """
    results: dict[str, Any] = {"eight gaussians": _eight_gaussians_over_seeds(seed, seeds, plane)}
    torch.manual_seed(seed)
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    data, test = ((part.to(device)[:, None] / 127.5 - 1) for part in (images, unseen[:test_images]))
    classifier = train_classifier(
        data, labels.to(device), steps=classifier_steps, batch_size=batch_size
    )
    real = classifier.features(test)
    noise = torch.randn(samples, 1, 28, 28, device=device)

    def judge(x: Tensor) -> dict[str, float]:
        return {
            "distance": frechet_distance(classifier.features(x), real),
            "confidence": confidence(classifier, x).mean().item(),
        }

    def measure(velocity: Velocity, few: Sequence[int]) -> dict[str, float]:
        drawn = {k: _in_parts(lambda x, k=k: sample(velocity, x, k), noise) for k in few}
        judged = {k: judge(x.clamp(-1, 1)) for k, x in drawn.items()}
        found = {str(k): value["distance"] for k, value in judged.items()}
        return found | {"confidence": judged[1]["confidence"]}

    def fresh(n: int) -> Tensor:
        x0 = data[torch.randint(len(data), (n,), device=device)]
        return independent_pairs(x0, torch.randn_like(x0))

    chosen = data[torch.randperm(len(data), device=device)[:samples]]
    floor = judge(chosen)
    mnist_results = {
        "training images": {"floor": floor["distance"], "confidence": floor["confidence"]}
    }
    rows = {"test images": test[:10]}
    options = {"batch_size": batch_size, "learning_rate": 1e-3}
    teacher, source = UNet(1, width).to(device), fresh
    for name, length in (("1-RF", steps), ("2-RF", reflow_steps)):
        average = running_average(teacher, 0.99)
        fit(teacher, source, steps=length, average=average, **options)
        teacher = average.module.eval()
        ends, evaluations = _solve(teacher, noise, tolerance)
        mnist_results[name] = measure(teacher, counts) | {
            "solved": judge(ends.clamp(-1, 1))["distance"],
            "evaluations": evaluations,
        }
        source = reflow(
            teacher,
            torch.randn(pairs, 1, 28, 28, device=device),
            tolerance=tolerance,
            batch_size=500,
        )
        student = distill(teacher, source, steps=student_steps, **options)
        mnist_results[f"{name}, distilled"] = measure(student, (1,))
        rows[f"{name}, one step"] = sample(teacher, noise[:10], 1)
        rows[f"{name}, solved"] = ends[:10]
        rows[f"{name}, distilled, one step"] = sample(student, noise[:10], 1)
    caption = "MNIST: test images above; below, each row from the same noise: " + "; ".join(
        name for name in rows if name != "test images"
    )
    pixels = {name: (images[:, 0] + 1) / 2 for name, images in rows.items()}
    return results | {"mnist": mnist_results}, {caption: image_rows(pixels)}


def _eight_gaussians_over_seeds(
    seed: int, seeds: int, plane: dict[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Learn and score with each seed; for each flow and quantity, a list over seeds."""
    runs = []
    for each in range(seed, seed + seeds):
        source, target = stratified_noise(512, each).float(), stratified_target(512, each + 1)
        test = EightGaussians().sample(2000, torch.Generator().manual_seed(each + 9))
        floor = {"1": wasserstein(target, stratified_target(512, each + 2))}
        learned = learn_eight_gaussians(each, **plane)
        scores = score_eight_gaussians(learned, source, target, test, (1, 2, 4, 16))
        runs.append({"floor": floor} | scores)
    return {
        name: {quantity: [run[name][quantity] for run in runs] for quantity in found}
        for name, found in runs[0].items()
    }


def _in_parts(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "n *event"]
) -> Float[Tensor, "n *event"]:
    """Apply a function to 500 samples at a time, for the memory's sake."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(500)])


def _solve(
    velocity: Velocity, x1: Float[Tensor, "n *event"], tolerance: float
) -> tuple[Float[Tensor, "n *event"], float]:
    """Solve from t = 1 to 0, 500 samples at a time; return the ends and the mean number of evaluations."""
    with torch.no_grad():
        parts = [
            dormand_prince(velocity, part, 1, 0, tolerance, tolerance) for part in x1.split(500)
        ]
    return torch.cat([part.x for part in parts]), sum(part.evaluations for part in parts) / len(
        parts
    )
