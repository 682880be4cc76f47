"""How the tools of this folder end: with their servers, and mistakes in one sentence."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from serving.server import ServerError
from vllm_offq.errors import UserError

WIDTH = 120


def wide_console() -> Console:
    """For tables: as wide as the terminal, and in a file as wide as they need."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


@contextmanager
def command(name: str) -> Iterator[None]:
    """Around all that a tool does. Exit code 2 after a mistake, 130 after Ctrl-C."""
    # Servers end with the tool.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except (UserError, ServerError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
