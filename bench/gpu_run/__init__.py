"""A quarter of an hour on a CUDA machine: is the engine right, how fast beside its peers, which launch is to blame.

``python -m bench.gpu_run`` (``__main__.py``) runs the stages listed in ``stages.py``, each in a process of its own
under a limit of its own, and every number is in one file the moment it exists (``record.py``).
"""

import time

BEGAN = time.monotonic()  # before PyTorch is imported, which can take half a minute from a cold disk
