"""Commands, requests and links of README and docs are real: the program each is for takes them.

docs/operate.md's commands have a test of their own.
"""

import json
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import typer

from calibration.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = ["README.md", "docs/extend.md", "docs/quantize.md", "docs/serve.md"]
ANSWER = "An answer."


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(page: str = "README.md") -> list[list[str]]:
    """Every command of the bash blocks; a quoted argument may span lines."""
    found = []
    for block in blocks("bash", page):
        without_comments = re.sub(r" +# .*", "", block)  # shlex would drop their line ends, too
        words = shlex.shlex(without_comments, posix=True, punctuation_chars="\n")
        words.whitespace_split, words.whitespace = True, " "
        lines = groupby(words, key=lambda word: word.strip("\n") == "")
        found += [list(line) for is_end, line in lines if not is_end]
    # A variable may be set for one command, as VLLM_CPU_KVCACHE_SPACE is.
    return [list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), line)) for line in found]


def served_models() -> set[str]:
    return {command[2] for command in commands() if command[:2] == ["vllm", "serve"]}


def check_offq(name: str, *arguments: str) -> None:
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, list(arguments))  # parses and does not run


def check_vllm(*arguments: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for command in serve.cmd_init():
        command.subparser_init(subparsers)
    parser.parse_args(list(arguments))


def check_make(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check_curl(url: str, *options: str) -> None:
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.keys() == {"-H", "-d"}
    assert given["-H"] == "Content-Type: application/json"
    check_request(url, json.loads(given["-d"]))


def check_python(flag: str, module: str, *arguments: str) -> None:
    assert flag == "-m"
    if module == "pytest":
        files = [argument.partition("::")[0] for argument in arguments if "/" in argument]
        assert files
        assert all((ROOT / file).exists() for file in files)
    elif module.startswith("serving."):
        import_module(module).parser().parse_args(arguments)
    else:
        assert find_spec(module), module


def check_source(script: str) -> None:
    assert script == ".venv/bin/activate"


def check_request(url: str, body: dict[str, Any]) -> None:
    """Whether the server of this page's `vllm serve` would take the request."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    address = urlsplit(url)
    assert (address.netloc, address.path) == ("localhost:8000", "/v1/chat/completions")
    assert body["model"] in served_models()
    unknown = body.keys() - ChatCompletionRequest.model_fields.keys()  # vLLM ignores them
    assert not unknown
    ChatCompletionRequest.model_validate(body)


CHECKS = {
    "curl": check_curl,
    "make": check_make,
    "offq": check_offq,
    "python": check_python,
    "source": check_source,
    "vllm": check_vllm,
}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=f"{page} {' '.join(command[:3])}")
        for page in WITH_COMMANDS
        for command in commands(page)
    ],
)
def test_command_is_taken_by_its_program(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # of the files that they name
    CHECKS[command[0]](*command[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_is_left_out(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    assert bool(commands(name)) == (name in [*WITH_COMMANDS, "docs/operate.md"])


def test_every_step_is_shown() -> None:
    shown = {tuple(command[:2]) for command in commands()}
    assert shown >= {
        ("make", "demo"),
        ("make", "test"),
        ("offq", "quantize"),
        ("offq", "eval"),
        ("offq", "inspect"),
        ("vllm", "serve"),
    }


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        check_request(str(request.url), json.loads(request.content))
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        about = {"id": "1", "created": 0, "model": "my-model", "object": "chat.completion"}
        return httpx.Response(200, json=about | {"choices": [choice]})

    class Client(openai.OpenAI):
        def __init__(self, **options: Any) -> None:
            transport = httpx.MockTransport(reply)
            super().__init__(**options, http_client=httpx.Client(transport=transport))

    monkeypatch.setattr(openai, "OpenAI", Client)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
