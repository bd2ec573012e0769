"""Students with some of their parameters frozen: which, by case."""

FROZEN = {
    "stem": ("latent-be", lambda name: "stem" in name),
    "weights, factors trained": ("latent-be", lambda name: name.endswith(".layer.weight")),
    "one side's factors": ("latent-be", lambda name: name.endswith("delta_r")),
    "scale and shift": ("latent-be", lambda name: "bn" in name),
    "all but the classifier": ("single", lambda name: "classifier" not in name),
    "a bias alone": ("single", lambda name: name.endswith("classifier.bias")),
    "one head of two": ("hydra", lambda name: "heads.1" in name),
    "the body of the heads": ("hydra", lambda name: "heads" not in name),
}


def frozen(module, chosen):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not chosen(name))
    assert 0 < sum(p.requires_grad for p in module.parameters()) < len(list(module.parameters()))
    return module
