"""Looking at something again and again while a `with` block goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(look: Callable[[], None], period: float) -> Iterator[None]:
    """Call `look` at once and then every `period` seconds, in a thread of its own."""
    finished = threading.Event()

    def keep_looking() -> None:
        look()
        while not finished.wait(period):
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
