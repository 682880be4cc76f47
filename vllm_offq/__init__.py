"""OffQ: 4-bit weights, activations and KV cache for vLLM.

Importing this package is light: neither torch nor vLLM is loaded before register().
"""

__version__ = "0.1.0"
