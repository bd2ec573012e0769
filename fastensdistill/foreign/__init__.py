"""Weight files written by other programs: read without running their code, and matched to a network's names."""
