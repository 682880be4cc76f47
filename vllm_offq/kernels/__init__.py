"""Arithmetic of OffQ. Knows tensors, not vLLM."""
