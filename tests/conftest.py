"""Settings of every test.

Hypothesis draws the same examples on every machine and has no clock. Each worker computes on one
thread: workers run side by side, and small operators lose far more to threads that wait for one
another than they gain. TVM binds no thread to a core, also where a test calls it by itself:
workers would all be bound to the same one.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_BIND_THREADS", "0")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("pruna-ir", derandomize=True, deadline=None)
settings.load_profile("pruna-ir")
