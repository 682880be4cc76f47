"""Every Triton kernel in each form that serving launches, to compile for a GPU that is not here."""

from collections.abc import Iterator
from dataclasses import replace

from triton.runtime.jit import JITFunction

from benchmarks.cross_compile import Target
from benchmarks.gpu_attention_variants import attentions, stores
from benchmarks.gpu_variant import Variant
from vllm_offq.kernels.triton.add_splits import BLOCK as SPLITS_BLOCK
from vllm_offq.kernels.triton.add_splits import add_splits_kernel
from vllm_offq.kernels.triton.expert_gemm import expert_gemm_constants, expert_gemm_kernel
from vllm_offq.kernels.triton.expert_rows import (
    BLOCK,
    add_slots_kernel,
    sort_parameters_kernel,
)
from vllm_offq.kernels.triton.gemm import gemm_constants, gemm_kernel
from vllm_offq.kernels.triton.gemm_config import (
    CONFIGS,
    MAX_EXPERT_TOKENS,
    GemmConfig,
    block_k,
    expert_gemm_config,
)
from vllm_offq.kernels.triton.rms_norm_quantize import rms_norm_quantize_kernel, token_shape
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize_kernel, tile_shape
from vllm_offq.kernels.triton.silu_and_mul_quantize import silu_and_mul_quantize_kernel
from vllm_offq.kernels.triton.sort_slots import (
    MAX_BLOCK,
    TILES_OF_PROGRAM,
    cut_tiles_kernel,
    sort_slots_kernel,
)
from vllm_offq.kernels.triton.target import AMD, Gpu, nvidia

GOAL = GemmConfig(128, 128, num_warps=8, num_stages=2)
"""The tile by which kernels of this kind are compared, whether it is the best one or not."""


def gpu_of(target: Target) -> Gpu:
    """What the kernels see of a target."""
    if target.gpu.backend == "hip":
        return AMD
    return nvidia(divmod(int(target.gpu.arch), 10))


def variants(target: Target) -> Iterator[Variant]:
    """All that serving a model in bfloat16 launches."""
    yield from _gemms(gpu_of(target))
    yield from _expert_gemms(gpu_of(target))
    yield from _expert_rows()
    yield from _quantizations(gpu_of(target))
    yield from stores(gpu_of(target))
    yield from attentions(gpu_of(target))


def _gemms(gpu: Gpu) -> Iterator[Variant]:
    for tokens, tile in CONFIGS[gpu.tensor_core].items():
        config = replace(tile, split_k=8 if tokens == 16 else 1)
        up_to = "more" if tokens is None else str(tokens)
        for group_size, scale_per_group in (128, False), (128, True), (64, False), (32, True):
            scales = ", weight scales" if scale_per_group else ""
            name = f"gemm {up_to} tokens, groups of {group_size}{scales}"
            yield _gemm(name, gpu, config, group_size, scale_per_group)
    yield _gemm("gemm tile of 128 x 128", gpu, GOAL, 128, scale_per_group=False)
    wide = replace(GOAL, num_stages=3, wide=True)
    yield _gemm("gemm tile of 128 x 128, wide", gpu, wide, 128, scale_per_group=False)
    yield _addition()


def _addition() -> Variant:
    """Of the parts that decoding leaves."""
    types = {"partial_ptr": "*fp32", "weight_scale_ptr": "*fp16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("num_elements", "out_features"), "i32")
    constants = {
        "bias_ptr": None,
        "SCALE_PER_GROUP": False,
        "HAS_BIAS": False,
        "SPLIT_K": 8,
        "BLOCK": SPLITS_BLOCK,
    }
    divisible = ("num_elements", "out_features")
    return Variant("add_splits", add_splits_kernel, types, constants, divisible, {"num_warps": 4})


def _gemm(
    name: str, gpu: Gpu, config: GemmConfig, group_size: int, scale_per_group: bool
) -> Variant:
    config = replace(config, block_k=block_k(group_size))
    integers = ("num_tokens", "token_stride", "out_features", "half_channels")
    signature = {
        "codes_ptr": "*i8" if config.wide else "*u8",
        "scale_ptr": "*fp32",
        "offset_ptr": "*fp32",
        "weight_ptr": "*u8",
        "weight_scale_ptr": "*fp16",
        "weight_sums_ptr": "*i16",
        "y_ptr": "*bf16" if config.split_k == 1 else "*fp32",
        **dict.fromkeys((*integers, "num_groups", "steps_per_split"), "i32"),
    }
    constants = gemm_constants(gpu, config, group_size, scale_per_group, has_bias=False)
    return Variant(
        name,
        gemm_kernel,
        signature,
        {**constants, "bias_ptr": None},
        integers[1:],
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def _expert_gemms(gpu: Gpu) -> Iterator[Variant]:
    for tokens in 16, MAX_EXPERT_TOKENS:
        config = expert_gemm_config(gpu.tensor_core, tokens, 1, 128, bits=4)
        for top_k, scale_per_group in (8, False), (8, True), (0, False):
            scales = ", weight scales" if scale_per_group else ""
            name = f"expert_gemm, {tokens} tokens each{scales}{'' if top_k else ', down'}"
            gemm = _gemm(name, gpu, config, 128, scale_per_group)
            constants = expert_gemm_constants(gpu, config, 128, scale_per_group, top_k)
            names = [x for x in expert_gemm_kernel.arg_names if x not in constants]
            types = dict.fromkeys(names, "*i32") | gemm.signature | {"y_ptr": "*bf16"}
            integers = ("num_slots", "num_tiles", "num_experts", "place_stride")
            types |= dict.fromkeys(integers, "i32")
            signature = {x: types[x] for x in names}
            divisible = ("place_stride", "out_features", "half_channels")
            yield gemm._replace(
                kernel=expert_gemm_kernel,
                signature=signature,
                constants=constants,
                divisible_by_16=divisible,
            )


def _expert_rows() -> Iterator[Variant]:
    """Of 128 experts, 8 for each token."""
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "weights_ptr": "*fp32"}
    types |= {f"{x}{y}_ptr": "*fp32" for x in ("", "sorted_") for y in ("scale", "offset")}
    kernels: dict[JITFunction, dict[str, int]] = {
        sort_parameters_kernel: {"TOP_K": 8, "BLOCK": BLOCK},
        add_slots_kernel: {"TOP_K": 8, "BLOCK": BLOCK},
        sort_slots_kernel: {"BLOCK": MAX_BLOCK},
        cut_tiles_kernel: {"BLOCK_M": 16, "EXPERTS": 128, "TILES": TILES_OF_PROGRAM},
    }
    for kernel, constants in kernels.items():
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {x: types.get(x, "*i32" if x.endswith("_ptr") else "i32") for x in names}
        divisible = tuple({"channels", "token_stride", "place_stride"} & signature.keys())
        name = kernel.__name__.removesuffix("_kernel")
        yield Variant(name, kernel, signature, constants, divisible, {"num_warps": 4})


def _quantizations(gpu: Gpu) -> Iterator[Variant]:
    for hadamard, wide in (0, False), (0, True), (128, False):
        shape = tile_shape(128, hadamard, tokens=1024, element_size=2)
        settings = f"{', Hadamard' if hadamard else ''}{', wide' if wide else ''}"
        for kernel in rotate_quantize_kernel, silu_and_mul_quantize_kernel:
            yield _quantization(kernel, settings, gpu, hadamard, wide, *shape)
        for channels in HIDDEN_SIZES:
            shape = token_shape(channels // 128, 128, hadamard)
            name = f", {channels} channels{settings}"
            yield _quantization(rms_norm_quantize_kernel, name, gpu, hadamard, wide, *shape)


def _quantization(
    kernel: JITFunction,
    name: str,
    gpu: Gpu,
    hadamard: int,
    wide: bool,
    rows: int,
    half: int,
    num_warps: int,
) -> Variant:
    constants = {
        "GROUP_SIZE": 128,
        "HADAMARD": bool(hadamard),
        "SYMMETRIC": False,
        "BITS": 4,
        "WIDE": wide,
        "PTX": gpu.has_ptx,
        "ROWS": rows,
        "HALF": half,
    }
    types = {
        "codes_ptr": "*i8" if wide else "*u8",
        **dict.fromkeys(("scale_ptr", "offset_ptr"), "*fp32"),
        **dict.fromkeys(("range_to_scale", "rotation_norm", "epsilon"), "fp32"),
    }
    names = kernel.arg_names
    signature = {
        x: types.get(x, "*bf16" if x.endswith("_ptr") else "i32")
        for x in names
        if x not in constants
    }
    integers = {"x_stride", "residual_stride", "channels", "token_stride"}
    return Variant(
        kernel.__name__.removesuffix("_kernel") + name,
        kernel,
        signature,
        {x: value for x, value in constants.items() if x in names},
        tuple(integers & signature.keys()),
        {"num_warps": num_warps},
    )


HIDDEN_SIZES = 4096, 8192
"""Channels of a token, which a program of a norm holds."""
