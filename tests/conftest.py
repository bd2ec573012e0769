"""What has to be set before PyTorch and Triton are imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # without a GPU the Triton kernels run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
