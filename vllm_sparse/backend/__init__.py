"""The vLLM side: the four classes of an attention backend, and what differs between releases."""
