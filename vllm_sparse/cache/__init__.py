"""The KV cache with page summaries: layout and vLLM spec."""
