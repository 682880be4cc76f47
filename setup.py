"""Compiles the CPU kernels: one plain shared library, which vllm_offq.kernels.cpu loads by ctypes.

Where that fails, the project installs all the same, without it. All else is in pyproject.toml.
"""

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from shutil import which

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "vllm_offq.kernels.cpu"
SOURCES = Path(*PACKAGE.split("."), "src")
JOBS = 2
OLDEST_GCC = 11

# No contraction: kernels round where the reference does.
FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden -Wall -Wextra"
)
AVX2 = "-mavx2 -mfma -mf16c"
# GCC 12 takes variables of its own header for uninitialized.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-uninitialized -Wno-maybe-uninitialized"
# By architecture: a source file for each instruction set, and what it alone is compiled with. The
# longest compilation comes first.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512_vnni": f"{AVX2} {AVX512} -mavx512vnni",
        "avx2": AVX2,
        "avx_vnni": f"{AVX2} -mavxvnni",
    },
    "aarch64": {"neon_dotprod": "-march=armv8.2-a+dotprod"},
}


def run(*command: str | Path) -> str:
    """What a command prints. Raises: CompileError, in one sentence."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(next((line for line in lines if "error" in line), lines[-1]))
    return done.stdout


def find_compiler() -> tuple[list[str], str]:
    """The compiler's command, and the architecture that it compiles for."""
    name = os.environ.get("CXX") or which("g++") or which("c++")
    if not name:
        raise CompileError("no C++ compiler found (on Debian and Ubuntu: apt install g++)")
    command = shlex.split(name)
    macros = run(*command, "-dM", "-E", "-x", "c++", os.devnull)
    gcc = re.search(r"#define __GNUC__ (\d+)", macros)
    # Clang calls itself GCC 4, and would bring an OpenMP runtime other than PyTorch's.
    if not gcc or int(gcc[1]) < OLDEST_GCC:
        raise CompileError(f"{name} is not GCC {OLDEST_GCC} or newer; set CXX to one that is")
    for architecture in INSTRUCTION_SETS:
        if f"#define __{architecture}__ " in macros:
            return command, architecture
    raise CompileError("there are none for this processor architecture")


class BuildKernels(build_ext):
    """Compiles by hand: every source file has flags of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        outputs = [*self.get_outputs(), *self.get_output_mapping().values()]
        try:
            super().run()
        except CompileError as error:
            self.warn(
                f"OffQ's CPU kernels were not built ({error}): the slower Python ones will be used"
            )
            self.leave_out(outputs)

    def leave_out(self, outputs: list[str]) -> None:
        for path in outputs:  # what an earlier build left there does not fit these sources
            Path(path).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel:
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        compiler, architecture = find_compiler()
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        library = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp, ext.name)
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str, flags: str) -> Path:
            target = objects / f"{name}.o"
            source = SOURCES / f"{name}.cpp"
            run(*compiler, *FLAGS, *extra, *shlex.split(flags), "-c", source, "-o", target)
            return target

        text = b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))
        names_sources = f"-DOFFQ_SOURCES={sha256(text).hexdigest()}"
        files = {**INSTRUCTION_SETS[architecture], "api": names_sources}
        with ThreadPoolExecutor(JOBS) as pool:
            compiled = list(pool.map(compile_one, files, files.values()))
        run(*compiler, "-shared", "-fopenmp", *extra, *compiled, "-o", library)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"{PACKAGE}.libvllm_offq_cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
