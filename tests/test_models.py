"""Networks: sizes of the published table, initialisation, BatchNorm's running variance, input sizes."""

import math

import pytest
import torch
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.evaluate.comparison import count_macs, count_parameters
from fastensdistill.models import create_model, image_size, takes_colour, torchvision_models
from fastensdistill.models.layers import BatchNorm2d, PadShortcut
from tests.compare import check_close
from tests.untyped import present, untyped


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet32", 470_004, 68.87),
        ("resnet32x2", 1_856_436, 269.41),
        ("resnet32x4", 7_380_276, 1066.87),
        ("wrn28_1", 375_348, 54.97),
        ("wrn28_4", 5_872_180, 845.62),
        ("wrn28_10", 36_536_884, 5243.39),
    ],
)
def test_sizes_are_the_published_ones(name, parameters, macs):
    model = create_model(name, 100)
    assert count_parameters(model) == parameters
    assert round(count_macs(model, (3, 32, 32)) / 1e6, 2) == macs


@pytest.mark.parametrize("name", ["preresnet", "resnet"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (9, 3), (28, 1), (64, 3)])
def test_any_image_size_and_channel_count_trains(name, size, channels):
    mean = (0.4,) * channels
    model = create_model(name, 7, mean=mean, std=mean, blocks=(1, 1, 1), in_planes=4)
    logits = model(torch.rand(2, channels, size, size))
    logits.square().sum().backward()
    assert logits.shape == (2, 7)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_initialisation_has_variance_two_over_fan_in_and_is_truncated():
    torch.manual_seed(0)
    model = create_model("wrn28_4", 100)
    untyped_model = untyped(model)
    for layer in (untyped_model.groups[1][2].conv1, untyped_model.classifier, untyped_model.groups[2][0].shortcut):
        std = math.sqrt(2 / layer.weight[0].numel())
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        # truncated at two standard deviations of the normal that was drawn from, 1/0.8796 of the wanted one
        assert layer.weight.abs().max().item() <= 2 * std / 0.8796 * 1.001
        assert layer.weight.abs().max().item() > 1.9 * std / 0.8796
    assert untyped_model.classifier.bias.abs().max() == 0


@pytest.mark.parametrize("momentum", [0.1, 0.37])
def test_running_variance_follows_the_biased_batch_variance(momentum):
    torch.manual_seed(0)
    ours = BatchNorm2d(3, momentum=momentum).double()
    theirs = nn.BatchNorm2d(3, momentum=momentum).double()
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(3):
        x = torch.randn(2, 3, 2, 3, dtype=torch.float64) * 2 + 1
        check_close("output", ours(x), theirs(x), 1e-14)
        mean = (1 - momentum) * mean + momentum * x.mean((0, 2, 3))
        variance = (1 - momentum) * variance + momentum * x.var((0, 2, 3), unbiased=False)
    check_close("running mean", present(ours.running_mean), mean, 1e-14)
    check_close("running variance", present(ours.running_var), variance, 1e-14)
    assert (
        present(ours.running_var) - present(theirs.running_var)
    ).abs().min() > 1e-3  # 12 values a batch: the two must differ
    assert int(present(ours.num_batches_tracked)) == 3
    ours.eval()
    before = present(ours.running_var).clone()
    ours(x)
    assert torch.equal(present(ours.running_var), before)


def test_pad_shortcut_strides_and_appends_zero_channels():
    x = torch.rand(1, 2, 5, 5)
    y = PadShortcut(2, 3)(x)
    check_close("kept", y[:, :2], x[:, :, ::2, ::2], 0.0)
    assert y.shape == (1, 5, 3, 3)
    assert y[:, 2:].abs().max() == 0


def test_images_are_normalised_inside():
    model = create_model("preresnet", 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), blocks=(1,), in_planes=4).eval()
    plain = create_model("preresnet", 4, mean=(0, 0, 0), std=(1, 1, 1), blocks=(1,), in_planes=4).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("normalize")}
    plain.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    check_close("logits", model(x), plain(by_hand), 1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("wrn28-4", {}, "did you mean 'wrn28_4'"),
        ("wrn28_4", {"num_classes": 1}, "num_classes=1"),
        ("wrn28_4", {"depth": 3}, "does not take"),
        ("resnet18", {"mean": (0.5,), "std": (0.5,)}, "3 channels"),
        ("wrn28_4", {"std": (0.5, 0.0, 0.5)}, "above 0"),
        ("wrn28_4", {"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)}, "divide them by 255"),
        ("wrn28_4", {"mean": 0.5, "std": 0.25}, "one of each per channel"),
        ("wrn28_4", {"num_classes": "10"}, "num_classes='10'"),
        ("efficientnet_b9", {}, "did you mean 'efficientnet_b"),
        ("fasterrcnn_resnet50_fpn", {}, "unknown model"),
        (nn.Linear, {}, "expected a name"),
    ],
)
def test_refusals(name, arguments, words):
    with pytest.raises(InputError, match=words):
        create_model(name, **{"num_classes": 10, **arguments})


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("shufflenet_v2_x0_5", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("googlenet", (0.5,) * 3, (0.5,) * 3),
        ("preresnet", (0.5,) * 3, (0.25,) * 3),
    ],
)
def test_the_normalisation_that_a_name_stands_for(name, mean, std):
    with torch.device("meta"):
        network = create_model(name, 4)
    assert untyped(network).spec.arguments == {"num_classes": 4, "mean": mean, "std": std}


def test_every_classifier_of_torchvision_is_a_models_name_and_returns_logits():
    names = torchvision_models()
    assert {"resnet101", "vgg16", "googlenet", "inception_v3", "efficientnet_b0", "convnext_tiny", "vit_b_16"} <= {
        *names
    }
    for name in ("inception_v3", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0"):
        with torch.device("meta"):
            network = create_model(name, 4).train()
            assert network(torch.zeros(2, 3, image_size(name), image_size(name))).shape == (2, 4), name
    assert [takes_colour(n) for n in ("vgg16", "resnet18", "wrn28_4", "timm/vgg16")] == [True, True, False, False]
    assert (image_size("inception_v3"), image_size("resnet101"), image_size("wrn28_4")) == (299, 224, 32)
