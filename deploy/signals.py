"""Let SIGTERM and SIGHUP end a program as ctrl-C does, so that it stops what it has started."""

from __future__ import annotations

import signal
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def end_as_interrupted() -> None:
    """Let the first SIGTERM or SIGHUP raise KeyboardInterrupt in the main thread, and ignore later ones.

    Later ones would interrupt the clean-up, and they come: a closing terminal signals the shell and its children. A
    signal that is ignored, as under nohup, stays ignored.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: Any) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, _nothing)  # not SIG_IGN, which child processes would inherit
    raise KeyboardInterrupt


def _nothing(*_: Any) -> None:
    pass
