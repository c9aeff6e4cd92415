"""Triton's interpreter as the backend ``cpu`` that vLLM looks for on a CPU.

vLLM runs its Model Runner V2, which serves GPUs by default, where Triton works. With ``TRITON_INTERPRET=1`` it
does on any CPU, but vLLM asks whether Triton has a backend of that name, and no wheel of one is published.
"""

from setuptools import setup

setup(
    name="triton-interpreter",
    version="1.0",
    packages=["triton_interpreter"],
    entry_points={"triton.backends": ["cpu = triton_interpreter"]},
)
