"""Kernels run under Triton's interpreter where there is no GPU. It has to be on before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
