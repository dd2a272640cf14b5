"""Every test runs on one thread: two pytest workers share two cores, and results do not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("kvcluster", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("kvcluster")
