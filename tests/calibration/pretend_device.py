"""Devices for tests on machines without any: tensors that say they are elsewhere.

Their values are in the CPU's memory all the same, and what is asked of them is computed there. What
a GPU would refuse is refused: an operation on tensors from two places. Importing this module
registers the devices for the whole process.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
# Asked for where activations are computed again, though nothing is computed in other dtypes.
torch.get_device_module("pretend").get_amp_supported_dtype = list
DEVICES = (torch.device("pretend:0"), torch.device("pretend:1"))
CROSSES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
"""What may be given tensors from two places."""
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Whose indices may be on the CPU."""
ATTENTION_KIND = "aten::_fused_sdp_choice"
PLAIN_ATTENTION = 0

computed: list[tuple[str, torch.device]] = []
"""Names of the operations on the devices, and where."""


class Elsewhere(Tensor):
    """A tensor on one of DEVICES."""

    here: Tensor

    @staticmethod
    def __new__(
        cls,
        here: Tensor,
        requires_grad: bool | None = None,
        *,
        there: torch.device = DEVICES[0],
    ) -> Tensor:
        if requires_grad is not None:  # accelerate makes a parameter like the one before
            return torch.nn.Parameter(here, requires_grad)
        found: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=there
        )
        found.here = here
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, *args, **(kwargs or {}))


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The fallback of every operation that a tensor of the devices takes part in."""
    schema = func._schema
    leaves = tree_leaves(args[:1] if schema.name in INDEXES else (args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # A single number is let through, as GPUs do.
    devices = {x.device for x in tensors if x.ndim or isinstance(x, Elsewhere)}
    if len(devices) > 1 and schema.name not in CROSSES:
        raise RuntimeError(f"{func} was given tensors of two devices")
    if schema.name == ATTENTION_KIND:
        return PLAIN_ATTENTION
    there = next((x.device for x in tensors if isinstance(x, Elsewhere)), None)
    if there is not None:
        computed.append((schema.name, there))
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        there = asked if asked.type == DEVICES[0].type else None
        kwargs = kwargs | {"device": torch.device("cpu") if there else asked}
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if schema.is_mutable:
        return kwargs.get("out", args[0])
    return tree_map(partial(_there, there), result) if there else result


def _here(x: Any) -> Any:
    return x.here if isinstance(x, Elsewhere) else x


def _there(device: torch.device, x: Any) -> Any:
    return Elsewhere(x, there=device) if isinstance(x, Tensor) else x


_library = torch.library.Library("_", "IMPL")
_library.fallback(_compute, "PrivateUse1")


class FromNumbers(TorchFunctionMode):
    """While it is entered `torch.tensor` can make tensors of the devices, too."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)
