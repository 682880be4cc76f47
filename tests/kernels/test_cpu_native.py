"""The CPU kernels as a library: its C++ tests, how it is built and packaged, what it loads."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vllm_offq.kernels.cpu import library

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).with_name("cpu")
PACKAGE = Path("vllm_offq", "kernels", "cpu")
SOURCES = ROOT / PACKAGE / "src"
LIBRARY = PACKAGE / library.LIBRARY.name
NOT_BUILT = r"OffQ's CPU kernels were not built \({}.*\): the slower Python ones will be used"

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="install g++ to run this")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    # vLLM, once imported, preloads libraries into all later processes; sanitizers refuse that.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=inherited | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}"
    return done.stdout


def run_tests(folder: Path, compiler: str, flags: str, *emulator: str) -> None:
    """Builds library and tests with these flags, and runs the tests."""
    build = ("setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "tmp")
    output = run(sys.executable, *build, CXX=compiler, CXXFLAGS=flags)
    built, program = folder / LIBRARY, folder / "test_kernels"
    assert built.exists(), output
    options = ("-std=c++17", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", *flags.split())
    files = (*TESTS.glob("*.cpp"), built, f"-Wl,-rpath,{built.parent}")
    run(compiler, *options, f"-I{SOURCES}", *files, "-o", program)
    # Fresh memory is NaN, and too large a request for it is no error of its own.
    settings = "allocator_may_return_null=1:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    output = run(*emulator, program, ASAN_OPTIONS=settings, OMP_WAIT_POLICY="passive")
    assert ": tested" in output


@pytest.mark.slow
@needs_compiler
def test_under_sanitizers(tmp_path: Path) -> None:
    sanitizers = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    run_tests(tmp_path, "g++", sanitizers)


@pytest.mark.slow
def test_on_an_emulated_aarch64(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not (shutil.which(compiler) and shutil.which(emulator)):
        pytest.skip("install g++-aarch64-linux-gnu and qemu-user to run this")
    run_tests(tmp_path, compiler, "-O3", emulator, "-L", "/usr/aarch64-linux-gnu")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy to build in, with nothing built."""
    copy = tmp_path / "project"
    for package in ("vllm_offq", "calibration"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def build_wheel(source: Path, folder: Path, compiler: str, flags: str = "") -> tuple[Path, str]:
    """The wheel, and what its build said."""
    options = ("-v", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder)
    command = (sys.executable, "-m", "pip", "wheel", *options, source)
    output = run(*command, CXX=compiler, CXXFLAGS=flags)
    (wheel,) = folder.glob("*.whl")
    return wheel, output


@pytest.mark.slow
@needs_compiler
def test_wheel_from_the_source_distribution(project: Path, tmp_path: Path) -> None:
    build_sdist = "import setuptools.build_meta as build; build.build_sdist('dist')"
    run(sys.executable, "-c", build_sdist, cwd=project)
    (source,) = (project / "dist").iterdir()
    wheel, _ = build_wheel(source, tmp_path / "wheels", "g++", "-O0")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert str(LIBRARY) in names
    assert not [name for name in names if Path(name).suffix in (".cpp", ".h")]
    load = "from vllm_offq.kernels.cpu.library import *; print(LIBRARY, why_not_usable())"
    installed = tmp_path / "installed"
    output = run(sys.executable, "-c", load, cwd=installed, PYTHONPATH=str(installed))
    assert output.strip() == f"{installed / LIBRARY} {library.why_not_usable()}"


def test_wheel_without_a_compiler(project: Path, tmp_path: Path) -> None:
    wheel, output = build_wheel(project, tmp_path / "wheels", "/nonexistent")
    assert re.search(NOT_BUILT.format("/nonexistent: No such file"), output)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


IS_GCC_12 = "printf '#define __GNUC__ 12\\n#define __x86_64__ 1\\n'"
FAILS_LATER = f'case "$*" in *-dM*) {IS_GCC_12} ;; *) echo "x.h:1: error: no" >&2; exit 1 ;; esac'


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("exit 3", "exit code 3"),
        ("echo '#define __GNUC__ 10'", ".* is not GCC 11 or newer"),
        ("echo '#define __GNUC__ 12'", "there are none for this processor architecture"),
        (FAILS_LATER, "x.h:1: error: no"),
    ],
    ids=["broken", "too old", "another architecture", "an error"],
)
def test_a_compiler_that_fails(project: Path, compiler: str, why: str) -> None:
    """It is said why, and no library of another build stays."""
    script = project / "compiler"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    (project / LIBRARY).touch()
    output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, CXX=str(script))
    assert re.search(NOT_BUILT.format(why), output)
    assert not (project / LIBRARY).exists()


needs_library = pytest.mark.skipif(bool(library.why_not_usable()), reason="nothing was built")


@needs_library
def test_a_library_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    library.is_outdated.cache_clear()
    assert library.why_not_usable() == (
        "were built from other sources than these; install vllm-offq again"
    )
    library.is_outdated.cache_clear()


CALL_BOTH = """
import torch
from vllm_offq.kernels import cpu

torch.set_num_threads(2)
torch.ones(500, 500) @ torch.ones(500, 500)
weight = cpu.prepare_weight(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1).half(), 64)
cpu.linear(torch.ones(3, 64), weight, None, 16, 64, 0, 1.0, False)
print(open("/proc/self/maps").read())
"""


@needs_library
def test_the_library_shares_the_openmp_runtime_of_torch() -> None:
    maps = run(sys.executable, "-c", CALL_BOTH)
    assert str(library.LIBRARY) in maps
    assert len(set(re.findall(r"/\S*/lib(?:gomp|i?omp\d?)\b\S*", maps))) == 1
