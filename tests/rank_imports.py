"""What the processes of the ``ranks`` fixture import, once for all of them."""

import hypothesis
import pytest
import torch
import torch.distributed.checkpoint

import moetrain.train.worker
from moetrain.train.adopted.experts import import_deepspeed

__all__ = ["hypothesis", "moetrain", "pytest", "torch"]

torch.set_num_threads(1)
import_deepspeed()
