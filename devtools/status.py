"""One line that says what is going on: rewritten in place on a terminal, repeated now and then in a log."""

import shutil
import sys
import time
from typing import TextIO


LOG_PERIOD_SECONDS = 20


class StatusLine:
    """Shows the latest of many messages: on a terminal each replaces the one before; in a log, a few are kept."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._shown_at = 0.0
        self._width = 0

    def update(self, text: str) -> None:
        """Show `text` as what is happening now."""
        now = time.monotonic()
        if self.live and now - self._shown_at > 0.1:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text + " " * (self._width - len(text)))
            self._width = len(text)
            self._shown_at = now
        elif not self.live and now - self._shown_at > LOG_PERIOD_SECONDS:
            self._write(text + "\n")
            self._shown_at = now

    def line(self, text: str) -> None:
        """Print `text` on a line that stays."""
        self._write(("\r" + " " * self._width + "\r" if self._width else "") + text + "\n")
        self._width = 0
        self._shown_at = time.monotonic()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
