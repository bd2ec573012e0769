"""Networks of your own class, with your own normalisation, loaded from your own checkpoints; seconds on a CPU.

    python examples/own_networks.py [--epochs 8]

Two small convolutional networks are trained by a plain PyTorch loop and saved as state dicts, as any other program
would leave them. They are then loaded as teachers, distilled into one network of the same class, and exported.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import fastensdistill as fed


class SmallNet(nn.Module):
    """Normalises its input itself, so that it takes pixels in [0, 1] as every network here does."""

    centre: torch.Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor(0.3))
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(3 * (x - self.centre)).mean((2, 3)))


def train(network: nn.Module, data: fed.Dataset, epochs: int) -> None:
    """Stands for your own training program."""
    images, labels = torch.from_numpy(data.train.images).permute(0, 3, 1, 2) / 255, torch.from_numpy(data.train.labels)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(25):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimiser.step()


def report(name: str, network: nn.Module, data: fed.Dataset) -> None:
    """Metrics on the test images, with the temperature fitted on the validation images."""
    p, q = fed.predict(network, data.test), fed.predict(network, data.validation)
    found = fed.evaluate.evaluate(p, torch.from_numpy(data.test.labels), q, torch.from_numpy(data.validation.labels))
    print(f"{name:10} accuracy {100 * found.accuracy:.2f} %  NLL {found.nll:.3f}  calibrated NLL {found.cnll:.3f}")


def main(epochs: int, folder: Path) -> None:
    data = fed.load_dataset("digits")
    files = [folder / f"mine-{seed}.pt" for seed in range(2)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        network = SmallNet()
        train(network, data, epochs)
        torch.save(network.state_dict(), file)

    teachers = fed.load_teachers(SmallNet(), files)  # copies of the module, one filled from each file
    student = fed.LatentBE(SmallNet(), branches=len(teachers))
    config = fed.DistillConfig(epochs=2 * epochs, batch_size=25, learning_rate=0.05, device="cpu")
    fed.DistillTrainer(student, teachers, data, config, out=folder / "run", quiet=True).fit()
    report("teachers", teachers, data)
    report("student", student.average(), data)

    images = torch.from_numpy(data.test.images[:16]).permute(0, 3, 1, 2) / 255
    for exported in fed.export_network(student.average(), folder, images=images, formats=["safetensors", "torch"]):
        print(f"exported {exported.path.name}: logits differ by {exported.error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args().epochs, Path(folder))
