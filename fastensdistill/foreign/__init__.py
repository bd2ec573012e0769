"""Files of weights that others wrote: read without running anything in them, and matched to a network's names."""
