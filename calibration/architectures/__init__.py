"""What calibration must know of each model family: one small table a family."""

from calibration.architectures.base import Architecture, Site
from calibration.architectures.gemma import GEMMA2, GEMMA3
from calibration.architectures.llama import LLAMA, MISTRAL
from calibration.architectures.mixtures import MIXTRAL, QWEN3_MOE
from calibration.architectures.olmo2 import OLMO2
from calibration.architectures.phi3 import PHI3
from calibration.architectures.qwen import QWEN2, QWEN3
from vllm_offq.architectures import supported_classes
from vllm_offq.errors import UserError

_TABLES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OLMO2, MIXTRAL, QWEN3_MOE)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in _TABLES
}


def find_architecture(names: list[str] | None) -> Architecture:
    """The table for a config's `architectures`.

    Raises: UserError listing the supported ones.
    """
    for name in names or []:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise UserError(
        f"architecture {', '.join(names or ['(none named)'])} is not supported; supported: "
        + supported_classes()
    )


__all__ = ["ARCHITECTURES", "Architecture", "Site", "find_architecture"]
