"""The CPU kernels, once for each instruction set that this processor has."""

from collections.abc import Iterator
from types import ModuleType

import pytest

from vllm_offq.kernels import cpu
from vllm_offq.kernels.cpu import library

ISAS = [] if library.why_not_usable() else list(library.usable_isas())


@pytest.fixture(scope="module", params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_OVERRIDE, request.param)
        library.isa.cache_clear()
        yield cpu
    library.isa.cache_clear()
