"""One step's ragged batch, as vLLM describes it and as the kernels take it.

The kernels are causal. The tokens of Gemma 3's images are not, they see each other in both
directions: to the kernels, each is a request of its own, whose one new token stands where its image
ends.
"""

from dataclasses import dataclass, field
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
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_offq.kernels import backend


@dataclass
class Batch:
    """Requests, each with some new tokens at its end."""

    num_tokens: int
    """New tokens of all."""
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

    block_table: Tensor
    """Of the step's batch."""
    rows: list[int] = field(default_factory=list)
    """Places in the step's batch."""
    requests: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """How many tokens of the request there are up to the image's end."""
    after: list[int] = field(default_factory=list)
    """How many of the image come after this one."""
    _batches: dict[int | None, list[tuple[Tensor, Batch, int | None]]] = field(default_factory=dict)

    def batches(self, sliding_window: int | None) -> list[tuple[Tensor, Batch, int | None]]:
        """Tokens that have a window in common: rows [N], a batch of them, their window.

        A window begins as far before a token as it always does, so from the image's end it is
        longer. Layers with the same sliding window share them.
        """
        if sliding_window not in self._batches:
            self._batches[sliding_window] = self._cut(sliding_window)
        return self._batches[sliding_window]

    def _cut(self, sliding_window: int | None) -> list[tuple[Tensor, Batch, int | None]]:
        def window(token: int) -> int:
            longer = (sliding_window or self.ends[token]) + self.after[token]
            return 0 if self.ends[token] <= longer else longer

        found: list[tuple[Tensor, Batch, int | None]] = []
        device = self.block_table.device
        for size, group in groupby(sorted(range(len(self.rows)), key=window), window):
            chosen = list(group)
            rows, requests, ends = (
                torch.tensor([values[token] for token in chosen], device=device)
                for values in (self.rows, self.requests, self.ends)
            )
            starts = torch.arange(len(chosen) + 1, dtype=torch.int32, device=device)
            batch = Batch(len(chosen), 1, self.block_table[requests], starts, ends.int())
            found.append((rows, batch, size or None))
        return found


@dataclass
class OffQAttentionMetadata(AttentionMetadata):
    """One step's batch."""

    parts: list[Batch]
    """One after the other in the step's batch."""
    image_tokens: ImageTokens | None = None
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
        if backend().FEATURES.decodes_apart:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

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
        refuse_other_than_causal(common_attn_metadata)
        return OffQAttentionMetadata(
            parts=split(common_attn_metadata, self.reorder_batch_threshold),
            image_tokens=find_image_tokens(common_attn_metadata),
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> OffQAttentionMetadata:
        """In one part: how many requests decode changes from one replay to the next."""
        refuse_other_than_causal(common_attn_metadata)
        return OffQAttentionMetadata(split(common_attn_metadata, None))


def refuse_other_than_causal(common: CommonAttentionMetadata) -> None:
    """Raises: NotImplementedError, for the developer of a model that vLLM routes here."""
    if common.causal is not True:
        raise NotImplementedError("OffQ's 4-bit KV cache supports causal attention only")


def split(common: CommonAttentionMetadata, decode_threshold: int | None) -> list[Batch]:
    """The step's batch, those that decode apart from those with more new tokens than that.

    Programs share a long context only in a batch of few new tokens: a decode beside a prefill would
    read its context with one. vLLM has them in this order. decode_threshold: most new tokens of a
    decode; None: all in one.
    """
    tokens, table = common.num_actual_tokens, common.block_table_tensor
    starts, lengths = common.query_start_loc, common.seq_lens
    whole = Batch(tokens, common.max_query_len, table, starts, lengths)
    if decode_threshold is None:
        return [whole]
    decodes, prefills, decode_tokens, prefill_tokens = split_decodes_and_prefills(
        common, decode_threshold
    )
    if not (decodes and prefills):
        return [whole]
    return [
        Batch(
            decode_tokens,
            int(common.query_start_loc_cpu[: decodes + 1].diff().max()),
            table[:decodes],
            starts[: decodes + 1],
            lengths[:decodes],
        ),
        Batch(
            prefill_tokens,
            common.max_query_len,
            table[decodes:],
            starts[decodes:] - decode_tokens,
            lengths[decodes:],
        ),
    ]


def find_image_tokens(common: CommonAttentionMetadata) -> ImageTokens | None:
    """Those of a step, by vLLM's ranges of positions that see each other."""
    if not any((common.mm_req_doc_ranges or {}).values()):
        return None
    # Of requests in their prompt, where images are, this is no bound but the length itself.
    assert common.mm_req_doc_ranges is not None and common.seq_lens_cpu_upper_bound is not None
    lengths, starts = common.seq_lens_cpu_upper_bound.tolist(), common.query_start_loc_cpu.tolist()
    found = ImageTokens(common.block_table_tensor)
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
