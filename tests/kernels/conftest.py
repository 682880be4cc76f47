"""The CPU kernels: those in C++ for each instruction set of this processor, and numba's."""

from collections.abc import Iterator
from types import ModuleType

import pytest

from vllm_offq.kernels import cpu
from vllm_offq.kernels.cpu import library

ISAS = [] if library.why_not_usable() else list(library.usable_isas())


@pytest.fixture(scope="module", params=[*ISAS, "numba"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param == "numba":
        from vllm_offq.kernels import numba  # not before it is wanted: it compiles then

        yield numba
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_OVERRIDE, request.param)
        library.isa.cache_clear()
        yield cpu
    library.isa.cache_clear()
