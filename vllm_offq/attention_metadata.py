"""One step's ragged batch, as vLLM describes it and as the kernels take it.

The kernels are causal. The tokens of Gemma 3's images are not, they see each other in both
directions: to the kernels, each is a request of its own, whose one new token stands where its image
ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_offq.kernels import backend


@dataclass
class Batch:
    """Requests, each with some new tokens at its end."""

    max_query_len: int
    """No request has more new tokens."""
    block_table: Tensor
    """[requests, blocks] int32."""
    query_start_loc: Tensor
    """[requests + 1] int32."""
    seq_lens: Tensor
    """[requests] int32."""


@dataclass
class ImageTokens:
    """Tokens that see those of their image that come after them."""

    rows: list[int]
    """Places in the step's batch."""
    requests: list[int]
    ends: list[int]
    """How many tokens of the request there are up to the image's end."""
    after: list[int]
    """How many of the image come after this one."""

    def batches(
        self, block_table: Tensor, sliding_window: int | None
    ) -> Iterator[tuple[Tensor, Batch, int | None]]:
        """Tokens that have a window in common: rows [N], a batch of them, their window.

        block_table: of the step's batch. A window begins as far before a token as it always does,
        so from the image's end it is longer.
        """

        def window(token: int) -> int:
            longer = (sliding_window or self.ends[token]) + self.after[token]
            return 0 if self.ends[token] <= longer else longer

        tokens = sorted(range(len(self.rows)), key=window)
        device = block_table.device
        for size, group in groupby(tokens, window):
            chosen = list(group)
            rows, requests, ends = (
                torch.tensor([values[token] for token in chosen], device=device)
                for values in (self.rows, self.requests, self.ends)
            )
            starts = torch.arange(len(chosen) + 1, dtype=torch.int32, device=device)
            yield rows, Batch(1, block_table[requests], starts, ends.int()), size or None


@dataclass
class OffQAttentionMetadata(Batch, AttentionMetadata):
    """One step's batch."""

    num_tokens: int
    image_tokens: ImageTokens | None
    """None: all tokens see only what is before them."""


class OffQAttentionMetadataBuilder(AttentionMetadataBuilder[OffQAttentionMetadata]):
    """Keeps what the kernels need of vLLM's batch description."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: object
    ) -> AttentionCGSupport:
        """Any batch, if the kernels never wait for the GPU to see what a tensor holds.

        Where images see both ways, only batches without one.
        """
        if not backend().FEATURES.cuda_graphs:
            return AttentionCGSupport.NEVER
        if vllm_config.model_config.is_mm_prefix_lm:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.ALWAYS

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> OffQAttentionMetadata:
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("OffQ's 4-bit KV cache supports causal attention only")
        return OffQAttentionMetadata(
            num_tokens=common_attn_metadata.num_actual_tokens,
            max_query_len=common_attn_metadata.max_query_len,
            block_table=common_attn_metadata.block_table_tensor,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            image_tokens=find_image_tokens(common_attn_metadata),
        )


def find_image_tokens(common: CommonAttentionMetadata) -> ImageTokens | None:
    """Those of a step, by vLLM's ranges of positions that see each other."""
    if not any((common.mm_req_doc_ranges or {}).values()):
        return None
    # Of requests in their prompt, where images are, this is no bound but the length itself.
    assert common.mm_req_doc_ranges is not None and common.seq_lens_cpu_upper_bound is not None
    lengths, starts = common.seq_lens_cpu_upper_bound.tolist(), common.query_start_loc_cpu.tolist()
    found = ImageTokens([], [], [], [])
    for request, ranges in common.mm_req_doc_ranges.items():
        length = lengths[request]
        first = length - (starts[request + 1] - starts[request])
        for start, last in ranges:
            end = min(last + 1, length)
            for position in range(max(start, first), end - 1):
                found.rows.append(starts[request] + position - first)
                found.requests.append(request)
                found.ends.append(end)
                found.after.append(end - 1 - position)
    return found if found.rows else None
