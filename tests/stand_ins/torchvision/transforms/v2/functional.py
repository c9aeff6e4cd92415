"""The functions of both versions."""

from torchvision.transforms.functional import *  # noqa: F403
