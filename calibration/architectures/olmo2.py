"""OLMo 2: attention and MLP read the residual stream without a norm, what they add is normed.

Its norms of queries and keys span all heads, before the rotary embedding: they stay as they are.
"""

from calibration.architectures.base import Architecture
from vllm_offq.architectures import LAYOUTS

OLMO2 = Architecture(
    LAYOUTS["Olmo2ForCausalLM"],
    attention_norm=None,
    mlp_norm=None,
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
