"""Plain distillation, LatentBE, and LatentBE with TDiv - SDiv perturbations, compared on scikit-learn's digits.

    python examples/compare_baselines.py [--epochs 12] [--seeds 1]

The table is Markdown. One seed and a short run show how it is done, not which method is better: `make demo` is the same
comparison with four teachers, five seeds and a report, and takes a few minutes.
"""

import argparse
from statistics import mean
from typing import Any

import torch

import fastensdistill as fed

METHODS = {
    "KD": ("single", "none"),
    "LatentBE": ("latent-be", "none"),
    "LatentBE + TDiv-SDiv": ("latent-be", "tdiv-sdiv"),
}
STUDENTS = {"single": lambda network, branches: fed.Single(network), "latent-be": fed.LatentBE}


def network(data: fed.Dataset, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return fed.create_model("preresnet", data.num_classes, mean=data.mean, std=data.std, blocks=(1, 1), in_planes=12)


def measure(member: torch.nn.Module, data: fed.Dataset) -> fed.evaluate.Metrics:
    test, validation = fed.predict(member, data.test), fed.predict(member, data.validation)
    labels, validation_labels = torch.from_numpy(data.test.labels), torch.from_numpy(data.validation.labels)
    return fed.evaluate.evaluate(test, labels, validation, validation_labels)


def row(name: str, found: list[fed.evaluate.Metrics]) -> str:
    values = (mean(getattr(m, key) for m in found) for key in ("accuracy", "nll", "ece", "cnll"))
    accuracy, *others = values
    return f"| {name} | {len(found)} | {100 * accuracy:.2f} | " + " | ".join(f"{v:.3f}" for v in others) + " |"


def main(epochs: int, seeds: int, members: int = 2) -> None:
    data = fed.load_dataset("digits")
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": 25, "learning_rate": 0.1, "device": "cpu"}
    networks = [network(data, 100 + i) for i in range(members)]
    fed.TeachTrainer(networks, data, fed.TeachConfig(members=members, **recipe), quiet=True).fit()
    teachers = fed.Teachers(networks)

    print("| | runs | ACC % | NLL | ECE | cNLL |\n|---|---|---|---|---|---|")
    print(row("teachers, each", [measure(teacher, data) for teacher in networks]))
    print(row(f"ensemble of {members}", [measure(teachers, data)]))
    for name, (kind, perturbation) in METHODS.items():
        found = []
        for seed in range(seeds):
            student = STUDENTS[kind](network(data, seed), members)
            config = fed.DistillConfig(student=kind, perturbation=perturbation, seed=seed, **recipe)
            fed.DistillTrainer(student, teachers, data, config, quiet=True).fit()
            found.append(measure(student.deployed(), data))
        print(row(name, found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.seeds)
