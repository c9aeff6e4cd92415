"""Ray on a CPU: GPUs that exist in ray's books only, one for each worker process.

vLLM's CPU platform names no kind of device that ray could count, so vLLM refuses ray on it.
``python logical_gpus.py serve MODEL ...`` is ``vllm serve MODEL ...`` beside such a cluster.
"""

from __future__ import annotations

import os
from pathlib import Path

GPUS = 2


def give_cpu_a_ray_device() -> None:
    """For every process that asks the platform; ray's own workers run it before anything else."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def start() -> None:
    """Start a cluster of one node that ends with this process, and tell vLLM's processes of it."""
    import ray

    runtime = {
        "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},
        "worker_process_setup_hook": "logical_gpus.give_cpu_a_ray_device",
    }
    cluster = ray.init("local", num_cpus=GPUS, num_gpus=GPUS, include_dashboard=False, runtime_env=runtime)
    os.environ["RAY_ADDRESS"] = cluster.address_info["gcs_address"]


if __name__ in ("__main__", "__mp_main__"):  # the second: in the engine's process, which is spawned
    give_cpu_a_ray_device()
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    start()
    main()
