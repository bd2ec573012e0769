"""Distillation inside your own training loop, in two ways; about fifteen seconds on a CPU.

    python examples/own_loop.py [--epochs 6]

1. ``ReferenceStep`` is one whole step of the method: perturb, distil, update. ``FusedStep`` takes its place on a GPU.
2. With your own optimiser and schedule, ``distillation_loss`` gives the loss and ``diversity_seed``, from the same
   logits, the gradients of TDiv - SDiv. Here each batch is used twice: as it is, and perturbed by what its first use
   found out.
"""

import argparse

import torch

import fastensdistill as fed


def network() -> torch.nn.Module:
    return fed.create_model("preresnet", 10, mean=(0.3,), std=(0.35,), blocks=(1, 1), in_planes=8)  # one grey channel


def batches(split: fed.Split, size: int = 25):
    """Images (B, 1, 8, 8) in [0, 1] and labels (B,), in a new order at every call."""
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255
    for index in torch.randperm(len(split)).split(size):
        yield images[index], torch.from_numpy(split.labels)[index]


def with_the_step(student: fed.LatentBE, teachers: fed.Teachers, data: fed.Dataset, epochs: int) -> None:
    step = fed.ReferenceStep(student, teachers, fed.DistillConfig(learning_rate=0.05), num_classes=10)
    for epoch in range(epochs):
        step.set_learning_rate(0.05 * (1 - epoch / epochs))
        for images, labels in batches(data.train):
            scalars = step(images, labels)
        print(f"  epoch {epoch + 1}: loss {scalars['loss']:.3f}, tdiv {scalars['tdiv']:.3f}")


def with_your_optimiser(student: fed.LatentBE, teachers: fed.Teachers, data: fed.Dataset, epochs: int) -> None:
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)

    def update(loss: torch.Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    for epoch in range(epochs):
        for images, labels in batches(data.train):
            pair = torch.randperm(len(teachers))[:2]
            x = images.requires_grad_()
            teacher_logits, branch_logits = teachers(x), student(x)  # (M, B, classes), (K, B, classes)
            loss, *_ = fed.distillation_loss(teacher_logits.detach(), branch_logits, labels, temperature=4.0, alpha=1.0)
            tdiv, sdiv, *grads = fed.diversity_seed(teacher_logits[pair].detach(), branch_logits[pair].detach())
            outputs = [teacher_logits[pair[0]], branch_logits[pair[0]]]
            (g,) = torch.autograd.grad(outputs, x, grads, retain_graph=True)
            update(loss)
            length = g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            perturbed = (images.detach() + images[0].numel() ** 0.5 / 255 * g / length).clamp(0, 1)
            targets = teachers(perturbed).detach()
            update(fed.distillation_loss(targets, student(perturbed), labels, temperature=4.0, alpha=1.0)[0])
        print(f"  epoch {epoch + 1}: loss {loss:.3f}, tdiv {tdiv:.3f}, sdiv {sdiv:.3f}")


def main(epochs: int) -> None:
    torch.manual_seed(0)
    data = fed.load_dataset("digits")
    networks = [network() for _ in range(2)]
    config = fed.TeachConfig(members=2, epochs=2 * epochs, batch_size=25, device="cpu")
    teachers = fed.Teachers(fed.TeachTrainer(networks, data, config, quiet=True).fit().networks)
    for loop in (with_the_step, with_your_optimiser):
        print(loop.__name__)
        student = fed.LatentBE(network(), branches=2)
        loop(student, teachers, data, epochs)
        p = fed.predict(student.average(), data.test).mean(0)
        print(f"  test accuracy {fed.evaluate.accuracy(p, torch.from_numpy(data.test.labels)):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    main(parser.parse_args().epochs)
