"""A sound transformation in a module that imports torch at its top."""

import torch

from tests.core.testing.broken import Sound


class Heavy(Sound):
    name, dtype = "toy-heavy", torch.float32
