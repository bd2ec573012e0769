"""How far BatchNorm's running estimates move when a step takes its batch in several parts."""


def part_momentum(momentum: float, parts: int) -> float:
    """BatchNorm's momentum of each of ``parts`` updates in a row that together keep 1 − momentum of the old value."""
    return momentum if parts == 1 else 1 - (1 - momentum) ** (1 / parts)
