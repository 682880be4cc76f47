"""A kernel as it is launched on one GPU, to compile where there is none."""

from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction

from benchmarks.cross_compile import Compilation, Target, cross_compile


class Variant(NamedTuple):
    """A kernel as it is launched on one GPU."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    options: dict[str, Any]

    def compile(self, target: Target) -> Compilation:
        return cross_compile(
            self.kernel,
            self.signature,
            self.constants,
            target,
            self.divisible_by_16,
            **self.options,
        )
