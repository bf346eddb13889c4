"""Tell MLflow's failures apart: it does not answer, it fails, or it refuses for good. And know a name that it refuses.

TrackingError            it failed: the same call may work later
├── UnansweredError      nothing answers at its address
└── RefusedError         it will never take this: a name that it does not allow, a parameter that is changed
"""

from __future__ import annotations

import posixpath
import re

import requests

_SILENCE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")  # MLflow's codes
_REFUSED_UPLOADS = (400, 413, 422)  # HTTP statuses; others, such as 401 and 404, somebody can mend
_MAX_NAME_LENGTH = 250


class TrackingError(RuntimeError):
    """The tracking server failed or refused; the text names its URI and what was to be done."""


class UnansweredError(TrackingError):
    """Nothing answers at the server's address. What was sent may have arrived."""


class RefusedError(TrackingError):
    """The server answered that it does not take this, now or later."""


def kind_of(error: Exception) -> type[TrackingError]:
    """Return which TrackingError an exception of MLflow's client or of requests is."""
    response = getattr(error, "response", None)
    if response is not None:
        return RefusedError if response.status_code in _REFUSED_UPLOADS else TrackingError
    if any(isinstance(cause, _SILENCE) for cause in (error, error.__context__)):
        return UnansweredError
    return RefusedError if getattr(error, "error_code", None) in _REFUSALS else TrackingError


def reason_of(error: Exception) -> str:
    """Return in a line what went wrong."""
    if kind_of(error) is UnansweredError:
        return "it does not answer; `make up` starts a local server, tracking.uri names another"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def check_metric_name(name: str) -> None:
    """Raise ValueError if MLflow refuses a metric, parameter or tag of this name; the text says what is allowed.

    The rules are those of mlflow.utils.validation.

    >>> check_metric_name("reward/clip@b")
    Traceback (most recent call last):
    ValueError: MLflow takes no metric named 'reward/clip@b': only letters, digits and _ - . : / or space may be in it
    """
    if not name or re.fullmatch(r"[/\w.\- :]*", name) is None:
        wrong = "only letters, digits and _ - . : / or space may be in it"
    elif posixpath.normpath(name) != name or name.startswith(("..", "/")) or name == ".":
        wrong = "as a path it must be whole and relative: no / at its ends, no //, no . or .. between them"
    elif len(name) > _MAX_NAME_LENGTH:
        wrong = f"it has {len(name)} characters, and {_MAX_NAME_LENGTH} are allowed"
    else:
        return
    raise ValueError(f"MLflow takes no metric named {name!r}: {wrong}")
