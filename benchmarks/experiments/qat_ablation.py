"""Which gradient through rounding is worth it: `python -m benchmarks.experiments.qat_ablation --data FOLDER`.

Trains a small CNN and an MLP on Fashion-MNIST (Debian's `dataset-fashion-mnist`, `/usr/share/datasets/fashion-mnist`;
or any folder with its four files), rounds them to 8, 4 and 2 bits of weights and activations (first and last layer: 8),
and trains them on with each estimator from the same start: steps of least squared error, which are those of
post-training rounding (`ptq`). `lsq (mean)` starts from the paper's steps instead, `(slow)` moves steps at a tenth of
the rate, `(inner)` learns none in the first and last layer, `(adam)` takes AdamW instead of SGD. `wide` is the float
network trained on as long, so that what more training does is not counted for rounding. Accuracy is that of the
converted module on the integer kernels over the 10,000 test images, after the last pass; nothing is chosen by it. Every
run is kept in `--out` as it ends, so a stopped experiment goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from benchmarks.experiments.fashion_mnist import Data, read_data
from dseek.compress import qat
from dseek.core.errors import ConfigError

BATCH = 64
CALIBRATION_BATCHES = 8
WIDE_RATE = 0.05
QAT_RATE, QAT_RATE_OF_8_BITS = 0.01, 0.001
"""Source: Esser et al. 2020, LSQ, section 3: a tenth of the network's own rate, and a tenth of that for 8 bits."""

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4

ARMS = (
    "wide",
    "ptq",
    "ste",
    "ewgs",
    "lsq",
    "lsq+ewgs",
    "lsq (mean)",
    "lsq (slow)",
    "lsq+ewgs (slow)",
    "lsq (inner)",
    "lsq+ewgs (inner)",
    "ste (adam)",
    "lsq (adam)",
    "lsq+ewgs (adam)",
)
ADAM_RATE = 0.001
SLOW_STEPS = 0.1


def small_cnn() -> torch.nn.Sequential:
    """Three convolutions with batch norm and a linear layer, 6,300 parameters."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    )


def mlp() -> torch.nn.Sequential:
    """Three linear layers, 109,000 parameters."""
    sizes = (784, 128, 64)
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))


MODELS: dict[str, Callable[[], torch.nn.Sequential]] = {"cnn": small_cnn, "mlp": mlp}


def batches(data: Data, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Go through the data once in a random order.

    Args:
        data: images and labels.
        seed: of the order.
    """
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(BATCH)[: len(order) // BATCH]:
        yield data.images[chosen], data.labels[chosen]


def train(
    net: torch.nn.Module,
    groups: Iterable[dict[str, object]],
    data: Data,
    num_passes: int,
    seed: int,
    before_pass: Callable[[int], None] = lambda index: None,
    *,
    adam: bool = False,
) -> None:
    """Train with momentum, or Adam, and a rate that falls along a cosine.

    Args:
        net: in place.
        groups: of parameters.
        data: images and labels.
        num_passes: over the data.
        seed: of the order.
        before_pass: called with the number of the pass.
        adam: whether AdamW takes the steps.
    """
    chosen = list(groups)
    optimizer = torch.optim.AdamW(chosen) if adam else torch.optim.SGD(chosen, momentum=MOMENTUM, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_passes * (len(data.labels) // BATCH))
    for number in range(num_passes):
        before_pass(number)
        net.train()
        for images, labels in batches(data, 1000 * seed + number):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            scheduler.step()
    net.eval()


@torch.no_grad()
def accuracy(net: torch.nn.Module, data: Data) -> float:
    """Share of images that a network in evaluation names right.

    Args:
        net: the network.
        data: images and labels.
    """
    right = [
        (net(images).argmax(-1) == labels).sum()
        for images, labels in zip(data.images.split(1000), data.labels.split(1000), strict=True)
    ]
    return float(sum(right)) / len(data.labels)


def config_of(net: torch.nn.Sequential, arm: str, bits: int) -> qat.QatConfig:
    """Settings of an arm: the first and the last layer have 8 bits.

    Args:
        net: the network, for the names of its layers.
        arm: of `ARMS`.
        bits: of weights and activations.
    """
    estimator = "ste" if arm == "ptq" else arm.split()[0]
    options = {
        "activations": "static",
        "estimator": estimator,
        "step_rule": "mean" if arm.endswith("(mean)") else "error",
        "batch_norm": "batch",
    }
    products = [name for name, layer in net.named_children() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    fixed = {"estimator": estimator.removeprefix("lsq+").replace("lsq", "ste")} if arm.endswith("(inner)") else {}
    ends = {name: qat.QatConfig(**options | fixed) for name in (products[0], products[-1])}
    return qat.QatConfig(weight_bits=bits, activation_bits=bits, overrides=ends, **options)


def run_arm(
    net: torch.nn.Sequential, arm: str, bits: int, seed: int, num_passes: int, rate: float, training: Data, test: Data
) -> dict[str, float]:
    """Round a trained network, train it on, and measure its integers.

    Args:
        net: trained, in float; left as it is.
        arm: of `ARMS`.
        bits: of weights and activations.
        seed: of the order of images.
        num_passes: over the training images.
        rate: largest learning rate.
        training, test: the data.

    Returns:
        Accuracy, and the mean delta where gradients were scaled.
    """
    net = copy.deepcopy(net)
    if arm == "wide":
        groups = [{"params": list(net.parameters()), "lr": rate, "weight_decay": WEIGHT_DECAY}]
        train(net, groups, training, num_passes, 50 + seed)
        return {"accuracy": accuracy(net, test)}
    prepared = qat.prepare(net, config_of(net, arm, bits))
    few = [images for images, _ in batches(training, 7)][:CALIBRATION_BATCHES]
    qat.calibrate(prepared, few, rule="mean" if arm.endswith("(mean)") else "error")
    deltas: list[float] = []
    if arm != "ptq":

        def before_pass(number: int) -> None:
            if number == num_passes - 1 and num_passes > 1:
                qat.freeze_batch_norm(prepared)
            if "ewgs" in arm:
                prepared.train()
                images, labels = next(batches(training, 900 + number))
                qat.freeze_batch_norm(prepared)
                found = qat.update_deltas(prepared, lambda: F.cross_entropy(prepared(images), labels))
                qat.freeze_batch_norm(prepared, frozen=number == num_passes - 1 and num_passes > 1)
                deltas.extend(found.values())

        adam = arm.endswith("(adam)")
        rate = ADAM_RATE if adam else rate
        steps = rate * (SLOW_STEPS if arm.endswith("(slow)") else 1.0)
        groups = qat.parameter_groups(
            prepared, learning_rate=rate, weight_decay=WEIGHT_DECAY, step_learning_rate=steps, adaptive=adam
        )
        train(prepared, groups, training, num_passes, 50 + seed, before_pass, adam=adam)
    result = {"accuracy": accuracy(qat.convert(prepared), test)}
    return result | ({"delta": statistics.mean(deltas)} if deltas else {})


def experiment(arguments: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """Run what is not in the file yet.

    Args:
        arguments: of the command.
        progress: shows how far it is.

    Returns:
        All runs.
    """
    training = read_data(arguments.data, "train", arguments.images)
    test = read_data(arguments.data, "t10k")
    common = {
        "passes": arguments.passes,
        "qat_passes": arguments.qat_passes,
        "images": arguments.images,
        "rate": arguments.qat_rate,
    }
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    runs = [run for run in map(json.loads, lines) if common.items() <= run.items()]
    wanted = [
        {"model": model, "seed": seed, "bits": bits, "arm": arm, **common}
        for model in arguments.models
        for seed in arguments.seeds
        for bits in ("-", *arguments.bits)
        for arm in (("wide",) if bits == "-" else arguments.arms)
    ]
    task = progress.add_task("runs", total=len(wanted))
    nets: dict[tuple[str, int], torch.nn.Sequential] = {}
    for run in wanted:
        if not any(run.items() <= done.items() for done in runs):
            model, seed = str(run["model"]), int(str(run["seed"]))
            progress.update(task, description=f"{model} {run['bits']} bits {run['arm']} seed {seed}")
            if (model, seed) not in nets:
                torch.manual_seed(seed)
                nets[model, seed] = MODELS[model]()
                groups = [
                    {"params": list(nets[model, seed].parameters()), "lr": WIDE_RATE, "weight_decay": WEIGHT_DECAY}
                ]
                train(nets[model, seed], groups, training, arguments.passes, seed)
            bits = 8 if run["bits"] == "-" else int(str(run["bits"]))
            rate = arguments.qat_rate or (QAT_RATE_OF_8_BITS if run["bits"] == 8 else QAT_RATE)
            found = run_arm(nets[model, seed], str(run["arm"]), bits, seed, arguments.qat_passes, rate, training, test)
            runs.append({**run, **found})
            with arguments.out.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
        progress.advance(task)
    return runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    model: str
    bits: str
    arm: str
    mean: float
    spread: float
    gain_over_ste: float | None
    gain_error: float | None
    num_seeds: int


def summary(runs: Sequence[dict[str, object]]) -> list[Row]:
    """Mean accuracy and its spread over seeds, and the mean gain over STE, seed by seed, with its standard error.

    Args:
        runs: of `experiment`.
    """
    rows = []
    accuracies: dict[tuple[str, str, str], dict[object, float]] = {}
    for run in runs:
        key = (str(run["model"]), str(run["bits"]), str(run["arm"]))
        accuracies.setdefault(key, {})[run["seed"]] = float(str(run["accuracy"]))
    for (model, bits, arm), by_seed in accuracies.items():
        values, straight = list(by_seed.values()), accuracies.get((model, bits, "ste"), {})
        gains = [value - straight[seed] for seed, value in by_seed.items() if seed in straight] if arm != "ste" else []
        several = len(gains) > 1
        rows.append(
            Row(
                model=model,
                bits=bits,
                arm=arm,
                mean=statistics.mean(values),
                spread=statistics.stdev(values) if len(values) > 1 else 0.0,
                gain_over_ste=statistics.mean(gains) if gains else None,
                gain_error=statistics.stdev(gains) / math.sqrt(len(gains)) if several else None,
                num_seeds=len(values),
            )
        )
    return rows


def main() -> None:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), default=[8, 4, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=list(ARMS[1:]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5_000, help="training images, the first ones")
    parser.add_argument("--passes", type=int, default=6, help="over the images before rounding")
    parser.add_argument("--qat-passes", type=int, default=2, help="with rounding")
    parser.add_argument("--qat-rate", type=float, help="learning rate with rounding (0.01; 0.001 for 8 bits)")
    parser.add_argument("--out", type=Path, default=Path("qat_ablation.jsonl"), help="where runs are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            rows = summary(experiment(arguments, progress))
    except ConfigError as error:
        print(f"qat_ablation: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print("| model | bits | estimator | accuracy | over STE |\n|---|---|---|---|---|")
    for row in rows:
        over = "" if row.gain_over_ste is None else f"{100 * row.gain_over_ste:+.2f}"
        over += "" if row.gain_error is None else f" +- {100 * row.gain_error:.2f}"
        print(f"| {row.model} | {row.bits} | {row.arm} | {100 * row.mean:.2f} +- {100 * row.spread:.2f} % | {over} |")


if __name__ == "__main__":
    main()
