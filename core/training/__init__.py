"""The machinery of model-driven steps: a model out of a checkpoint, one training loop, and the patch that it gives."""

from regraft.core.training.settings import SpamSettings, TrainSettings

__all__ = ["SpamSettings", "TrainSettings"]
