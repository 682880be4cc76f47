"""Every seam exists in every vLLM that is supported: by the sources, which need no installation."""

import ast
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

import vllm_offq
from vllm_offq.seams import SEAMS, SUPPORTED_VLLM

VERSIONS = ["0.32.0", "0.33.0"]


@pytest.fixture(scope="module", params=VERSIONS)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> griffe.Module:
    """The parsed package, without its models, which are half of it."""
    folder = tmp_path_factory.mktemp("source")
    version = f"vllm=={request.param}"
    command = [sys.executable, "-m", "unearth", "--no-binary", "--download", folder, version]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"the sources of {version} cannot be downloaded here")
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, members=modules(tar), filter="data")
    (package,) = folder.glob("*/vllm")
    loaded = griffe.load(
        "vllm", search_paths=[package.parent], allow_inspection=False, try_relative_path=False
    )
    assert isinstance(loaded, griffe.Module)
    return loaded


def modules(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        path = Path(member.name)
        if path.suffix == ".py" and path.parts[1] == "vllm" and "models" not in path.parts:
            yield member


def test_the_versions_are_those_supported() -> None:
    assert f">={VERSIONS[0].removesuffix('.0')},<0.34" == SUPPORTED_VLLM


def test_nothing_is_imported_from_vllm_that_is_no_seam() -> None:
    """Of what vLLM loads: evaluate.py is a program of its own."""
    known = {(module, name.partition(".")[0]) for module, names in SEAMS.items() for name in names}
    known.add(("vllm.platforms", "current_platform"))  # of a class in vllm.platforms.interface
    imported = {
        (node.module, alias.name)
        for path in Path(vllm_offq.__file__).parent.rglob("*.py")
        if path.name != "evaluate.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm"
        for alias in node.names
    }
    assert imported and not imported - known


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        pytest.param(f"{module}.{name}", parameters, id=name)
        for module, names in SEAMS.items()
        for name, parameters in names.items()
    ],
)
def test_the_seam_is_there(source: griffe.Module, path: str, parameters: set[str]) -> None:
    seam = source[path.removeprefix("vllm.")]
    target = seam.final_target if isinstance(seam, griffe.Alias) else seam
    assert parameters <= {parameter.name for parameter in target.parameters}
