"""Norms and activations into the OffQ linear that reads them, where vLLM compiles the model.

A pass over inductor's graph, in the place that vLLM keeps for passes of others: the input of a
linear is then not written and read again, and one kernel fewer is launched.
"""

import logging
import operator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor import pattern_matcher
from torch._inductor.pattern_matcher import Match, PatternExpr
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Argument
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import VllmConfig
from vllm.ir.ops import fused_add_rms_norm, rms_norm
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from vllm_offq.kernels import backend, ops

logger = logging.getLogger(__name__)


def fuse_inputs(vllm_config: VllmConfig) -> None:
    """Have vLLM run the pass when it compiles the model, if the kernels have the fused linears.

    To be called before that, so while the model is built; more calls change nothing. Where someone
    has put a pass of their own, that one stays, and the log says so.
    """
    options, key = vllm_config.compilation_config.inductor_compile_config, current_platform.pass_key
    if not backend().FEATURES.fused_inputs:
        return
    if not isinstance(options.setdefault(key, FuseInputsPass()), FuseInputsPass):
        _warn_of_other_pass(key)


@cache
def _warn_of_other_pass(key: str) -> None:
    logger.warning("OffQ fuses no norms and activations with linears: %s is already set", key)


class FuseInputsPass(InductorPass):
    """A norm or silu_and_mul, and the OffQ linear that alone reads it, become one operator."""

    def __call__(self, graph: Graph) -> None:
        fused = 0
        for linear in graph.find_nodes(op="call_function", target=ops.linear):
            x = linear.all_input_nodes[0]
            if len(x.users) == 1:
                fused += any(fuse(linear, x) for fuse in (_fuse_norm, _fuse_add_norm, _fuse_silu))
        logger.debug("OffQ fused the inputs of %d linears", fused)

    def uuid(self) -> str:
        """Of this pass and of the operators' arguments, for caches of compiled graphs."""
        return self.hash_source(*(Path(file).read_text() for file in (__file__, ops.__file__)))


def _fuse_norm(linear: Node, norm: Node) -> bool:
    if norm.target is not rms_norm.torch_op or not _is_plain(*norm.args):
        return False
    _replace(linear, ops.rms_norm_linear, *norm.args[:3])
    return True


def _fuse_add_norm(linear: Node, normalized: Node) -> bool:
    """Of a norm of the sum with the residual stream, which has other readers.

    The operator takes the place of the norm, before all of these.
    """
    if not _is_getitem(normalized, 0):
        return False
    norm = normalized.all_input_nodes[0]
    if norm.target is not fused_add_rms_norm.torch_op:
        return False
    if not _is_plain(norm.args[0], *norm.args[2:]):
        return False
    if not all(_is_getitem(node, 1) for node in norm.users if node is not normalized):
        return False
    if not all(node.op == "placeholder" for node in linear.all_input_nodes[1:]):
        return False
    with norm.graph.inserting_before(norm):
        inputs = *norm.args[:4], *linear.args[1:]
        fused = norm.graph.call_function(ops.fused_add_rms_norm_linear, inputs)
    fused.meta["val"] = linear.meta["val"], norm.meta["val"][1]
    normalized.meta["val"] = linear.meta["val"]
    norm.replace_all_uses_with(fused)
    linear.replace_all_uses_with(normalized)
    for node in linear, norm:
        node.graph.erase_node(node)
    return True


def _fuse_silu(linear: Node, activated: Node) -> bool:
    val = activated.meta["val"]
    match = _silu_and_mul(val.shape[-1], val.dim(), val.dtype).match(activated)
    if not isinstance(match, Match):
        return False
    x = match.kwargs["x"]
    if x.meta["val"].shape[-1] != 2 * val.shape[-1]:
        return False
    _replace(linear, ops.silu_and_mul_linear, x)
    return True


def _is_getitem(node: Node, index: int) -> bool:
    return node.target is operator.getitem and node.args[1:] == (index,)


def _is_plain(x: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
    """Whether it is a norm of all channels of x, with a weight for each."""
    if weight is None or variance_size is not None:
        return False
    return bool(weight.meta["val"].shape == x.meta["val"].shape[-1:])


def _replace(linear: Node, fused_linear: OpOverload, *inputs: Argument) -> None:
    """What nothing reads then is for inductor to remove."""
    with linear.graph.inserting_before(linear):
        fused = linear.graph.call_function(fused_linear, (*inputs, *linear.args[1:]))
    fused.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(fused)
    linear.graph.erase_node(linear)


@cache
@enable_fake_mode
def _silu_and_mul(channels: int, dim: int, dtype: torch.dtype) -> PatternExpr:
    """What vLLM's own activation becomes in a graph. channels and dim: of its result."""
    x = torch.empty(*[2] * (dim - 1), 2 * channels, dtype=dtype)
    traced = pattern_matcher.fwd_only(SiluAndMul.forward_native, [x])
    return pattern_matcher.fx_to_pattern(traced, argnames=["x"])
