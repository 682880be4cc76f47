"""Offline calibration: Hugging Face model in, OffQ checkpoint out. Never imports vLLM."""
