"""An LLM with workers in processes of their own; prints its tokens and what each worker counted.

``python run_parallel.py REQUEST``: JSON with the ``model``, the ``lengths`` of the prompts, whether to
start ``ray``, and the arguments of ``LLM`` beyond those of all tiny engines.
"""

from __future__ import annotations

import json
import sys

import logical_gpus
from tiny_engine import ENGINE, prompts, tokens


class Inspector:
    """Methods that vLLM adds to each worker."""

    def heads(self) -> dict:
        """KV heads of the layers, and how much of the attention each query head of sparse ones keeps."""
        layers = self.model_runner.vllm_config.compilation_config.static_forward_context
        impls = [layer.impl for layer in layers.values()]
        prefills = [impl.prefill for impl in impls if impl.is_sparse]
        return {
            "kv_heads": [impl.num_kv_heads for impl in impls],
            "top_ps": [each.policy.patterns.top_p.tolist() for each in prefills if each is not None],
        }


def main(request: dict) -> None:
    assert not any(name.startswith("vllm_sparse.backend") for name in sys.modules)
    if request["ray"]:
        logical_gpus.start()
    from vllm import LLM

    settings = {"block_size": 32, "worker_extension_cls": "run_parallel.Inspector", **ENGINE, **request["llm"]}
    llm = LLM(request["model"], attention_backend="sparse", **settings)
    answer = tokens(llm, prompts(request["lengths"]))
    workers = zip(llm.collective_rpc("sparse_metrics"), llm.collective_rpc("heads"), strict=True)
    print("RESULT", json.dumps([answer, [counts | heads for counts, heads in workers]]), flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ in ("__main__", "__mp_main__"):  # the second: the engine's process, which is spawned
    request = json.loads(sys.argv[1])
    if request["ray"]:
        logical_gpus.give_cpu_a_ray_device()
if __name__ == "__main__":
    main(request)
