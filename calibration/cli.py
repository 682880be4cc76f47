"""The command `offq`."""

import sys

import typer

from vllm_offq.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 4-bit weights, activations and KV cache (OffQ).",
)


def main() -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"offq: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
