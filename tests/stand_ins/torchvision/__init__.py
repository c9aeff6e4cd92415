"""What transformers takes of torchvision to prepare an image, where that is not installed.

PyPI has builds of torchvision for CUDA alone, which do not load beside a CPU torch. Models that take images
cannot be built without it, nor can some whose code stands in one file with theirs.
"""

__version__ = "0.28.0"
