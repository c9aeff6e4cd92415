"""The compiler that Triton's list of backends wants beside a driver."""

from triton.backends.nvidia import compiler as nvidia


class InterpreterCompiler(nvidia.CUDABackend):
    pass
