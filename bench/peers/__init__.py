"""What the engines are measured against: the same step as competent users of PyTorch write it."""
