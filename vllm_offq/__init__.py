"""OffQ: 4-bit weights, activations and KV cache for vLLM.

Importing this package is light: neither torch nor vLLM is loaded before register().
"""

__version__ = "0.1.0"


def register() -> None:
    """Make vLLM know the quantization method `offq`; vLLM calls it in each of its processes.

    Raises: RuntimeError if this vLLM is not one the plugin was built for.
    """
    from vllm_offq.seams import check_seams

    check_seams()

    import logging

    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_offq.config import OffQConfig

    # vLLM configures its own logger only; ours speaks through it.
    logging.getLogger("vllm_offq").parent = logging.getLogger("vllm")
    register_quantization_config("offq")(OffQConfig)
