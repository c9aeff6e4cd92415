"""Families of models that are served at long contexts: what of them runs sparse, and which tests show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Models whose attention layers are of the same kinds."""

    what: str
    models: str
    sparse: str
    """Which of their layers run sparse, or why none does."""
    tests: tuple[str, ...] = ()
    """``file[case]`` below ``tests/``, each of which starts a tiny model of the family."""


FULL, SOME, NONE = "all layers", "full-attention layers; the others are stock", "none"
FAMILIES = (
    Family("full attention",
        "Llama 3, Qwen 2.5 and 3, Qwen3-Coder, GLM-4.5 to 4.7, MiniMax-M2, Seed-OSS, Hy3, Ministral 3", FULL,
        ("test_models[qwen3]", "test_families[qwen3_moe]", "test_families[glm4_moe]", "test_families[minimax_m2]",
         "test_families[seed_oss]", "test_families[hy_v3]", "test_families[ministral3]")),
    Family("full attention, with images", "Qwen2.5-VL, Qwen3-VL", FULL,
        ("test_images[qwen2_5_vl]", "test_images[qwen3_vl]")),
    Family("sliding windows",
        "Command A, OLMo 3, EXAONE 4, Trinity, Laguna, Mellum 2, Step 3.5 and 3.7, Muse-Glimmer", SOME,
        ("test_families[cohere2]", "test_families[olmo3]", "test_families[exaone4]", "test_families[afmoe]",
         "test_families[laguna]", "test_families[mellum]", "test_families[step3p5]",
         "test_families[muse_glimmer]")),
    Family("loops over the same layers", "IQuest-Coder", "all layers; windows of later loops are stock",
        ("test_families[iquest_loop]",)),
    Family("gated delta nets", "Qwen3-Next, Qwen 3.5 to 3.8, Intern-S2", SOME,
        ("test_hybrids[qwen3_next]", "test_hybrid_offload[qwen3_next]", "test_families[qwen3_5]",
         "test_families[qwen3_5_moe]", "test_images[qwen3_5]", "test_families[interns2_preview]",
         "test_families[interns2_mobius]")),
    Family("Mamba", "Nemotron-H and Nano, Granite 4, Falcon-H1, Zamba 2, Jamba", SOME,
        ("test_families[nemotron_h]", "test_hybrids[granite4]", "test_hybrids[falcon_h1]",
         "test_hybrid_offload[granite4]", "test_hybrid_offload[falcon_h1]",
         "test_families[zamba2]", "test_gpu_models[granite4]", "test_gpu_models[jamba]")),
    Family("short convolutions", "LFM2", SOME,
        ("test_hybrids[lfm2]", "test_hybrid_offload[lfm2]", "test_families[lfm2_moe]", "test_gpu_models[lfm2]")),
    Family("sink logits", "gpt-oss", SOME, ("test_models[sinks]", "test_gpu_models[sinks]")),
    Family("soft caps", "Gemma 2", SOME, ("test_models[soft_cap]", "test_gpu_models[soft_cap]")),
    Family("Gemma 3",
        "TranslateGemma, too; tokens of images attend to later ones, and their prefill is dense", SOME,
        ("test_models[hybrid]", "test_images[gemma3]", "test_gpu_models[gemma3]")),
    Family("Gemma 3n", "E2B, E4B", f"{SOME}; those that read another layer's cache are dense",
        ("test_models[kv_sharing]",)),
    Family("Gemma 4", "with heads of 512, keys as values, shared caches",
        f"{SOME}; those that read a sparse layer's cache are dense",
        ("test_families[gemma4]", "test_families[gemma4_keys_as_values]", "test_families[gemma4_shared_caches]",
         "test_gpu_models[gemma4]")),
    Family("chunked-local attention", "Llama 4", SOME, ("test_model_kinds[llama4]",)),
    Family("K and V of different head sizes", "MiMo-V2", f"{NONE}: the model names a backend of its own",
        ("test_families[wider_keys]",)),
    Family("latent attention", "DeepSeek V3, Kimi K2, Mistral Large 3", f"{NONE}: vLLM's MLA layers are stock",
        ("test_families[latent]",)),
    Family("latent attention with a selector", "DeepSeek V3.2, GLM-5", f"{NONE}: vLLM's MLA layers are stock",
        ("test_families[deepseek_v32]", "test_families[glm5]")),
    Family("latent attention beside linear attention", "Ling 2.6, Kimi Linear, Kimi K3",
        f"{NONE}: vLLM's MLA layers are stock", ("test_families[ling]",)),
    Family("selectors of their own", "DeepSeek V4, Qwen4Exp",
        f"{NONE}: layers with a selector are of classes of their own",
        ("test_families[deepseek_v4]", "test_families[qwen4_exp]")),
    Family("selectors in most layers", "MiniMax-M3",
        "the first layers, which have no selector; the others are stock", ("test_families[minimax_m3]",)),
    Family("Step 5", "in vLLM 0.33", f"{NONE}: the model names backends of its own", ("test_families[step5]",)),
    Family("relative positions", "Inkling", f"{NONE}: layers are of a class of their own",
        ("test_families[inkling]",)),
    Family("Flint", "in vLLM 0.33", f"{NONE}: the model's code writes and reads pages of FlashInfer by itself",
        ("test_families[flint]",)),
)  # fmt: skip
