"""SIGTERM and SIGHUP end a program as ctrl-C does, so that it stops what it has started."""

from __future__ import annotations

import signal
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def end_as_interrupted() -> None:
    """From now on the first SIGTERM or SIGHUP raises KeyboardInterrupt in the main thread, and later ones do nothing.

    They would cut the clean-up short, and come: a closing terminal tells the shell and its children. A signal that is
    ignored stays so, as nohup wants it.
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
