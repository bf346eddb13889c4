"""Steer a running training: between steps worker 0 reads a tag of the MLflow run, and all workers apply it.

    steering.sync()                # on all workers, between two steps
    learner.follow(steering.config)

A tag that cannot be applied is refused: another tag says why, and the training goes on as it was. It also goes on as it
was if MLflow does not return the tags. But a failing write to MLflow ends the workers (recorder.py). The steering in
force is stored on the MLflow run and in the checkpoints, and a restarted training takes the later of the two. The steps
that it repeats may see a newer tag than they saw before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from services.clients.reward import RewardClient, RewardError
from services.clients.tracking import Tracker, TrackingError
from services.config.run import RunConfig
from services.config.steering import ERROR_TAG, TAG, Steering, SteeringError, last_in_force, version_tag
from trainer.data.prompt_files import LocatedPrompt
from trainer.runtime.accepted_prompts import RefusedError, require_accepted

_READ_TIMEOUT_S = 5.0  # a step waits no longer for MLflow
_FILE = "steering.json"
_logger = logging.getLogger(__name__)

Log = Callable[[Callable[[Tracker], None]], None]


class UnansweredError(SteeringError):
    """Raised if the reward service cannot be reached for the check. It is repeated before the next step."""


class LiveSteering:
    """The steering in force, the same on all workers. Only worker 0 has a `tracker` to read from and writes with `log`.

    `check` is called with the run as it would go on. It raises SteeringError if the reward service refuses that, and
    UnansweredError if the service cannot be reached.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        tracker: Tracker | None,
        log: Log,
        check: Callable[[RunConfig], None],
    ) -> None:
        self._run, self._device, self._log, self._check = config, device, log, check
        self._tags = _TagReader(tracker) if tracker else None
        self._refused: str | None = None  # the tag's text, so that a refused tag is tried only once
        self.in_force = last_in_force(tracker.tags()) if tracker else Steering()

    @property
    def config(self) -> RunConfig:
        """Return the run's configuration with the steering in force."""
        return self.in_force.applied_to(self._run)

    def sync(self) -> None:
        """Apply the tag, if it has changed. All workers call this together, between steps."""
        if self._tags is not None and (tags := self._tags.read()) is not None:
            self._apply(tags)
        self.in_force = Steering.from_tag(_broadcast(self.in_force.to_tag(), self._device))

    def save(self, folder: Path) -> None:
        """Write the steering in force into a checkpoint's folder."""
        (folder / _FILE).write_text(self.in_force.to_tag() + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take a checkpoint's steering, unless the MLflow run has a later one."""
        saved = Steering.from_tag((folder / _FILE).read_text(encoding="utf-8"))
        self.in_force = max(self.in_force, saved, key=lambda each: each.version)

    def _apply(self, tags: Mapping[str, str]) -> None:
        text = tags.get(TAG)
        try:
            requested = Steering.from_tag(text).after(self.in_force)
            if requested != self.in_force and text is not None and text == self._refused:
                return
            requested.check(self._run)
            if requested != self.in_force:
                self._check(requested.applied_to(self._run))
        except SteeringError as error:
            self._refuse(text, error, tags.get(ERROR_TAG))
            return
        self._refused = None
        if ERROR_TAG in tags:
            self._log(lambda tracker: tracker.clear_tag(ERROR_TAG))
        if requested != self.in_force:
            self.in_force = requested
            print(f"steered to {requested.summary}", flush=True)
            self._log(lambda tracker: tracker.set_tag(version_tag(requested.version), requested.to_tag()))

    def _refuse(self, text: str | None, reason: SteeringError, current_message: str | None) -> None:
        message = f"{reason}; {self.in_force.summary} stays in force"
        if text != self._refused:
            print(f"refused {TAG}: {message}", flush=True)
        self._refused = None if isinstance(reason, UnansweredError) else text
        if current_message != message:
            self._log(lambda tracker: tracker.set_tag(ERROR_TAG, message))


def check_with_service(client: RewardClient, drawn: Sequence[LocatedPrompt], config: RunConfig) -> None:
    """Check that each reward accepts the longest prompts that training draws, under the run's words.

    Raises SteeringError where it does not take them, and UnansweredError where the service fails.
    """
    try:
        require_accepted(client, config, drawn)
    except RefusedError as error:
        raise SteeringError(str(error)) from error
    except RewardError as error:
        raise UnansweredError(f"the reward service does not answer, and the check will be repeated: {error}") from error


class _TagReader:
    """Reads the run's tags in a thread, so that a silent server delays one step for each request, not every step."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steering")
        self._pending: Future[dict[str, str]] | None = None

    def read(self) -> dict[str, str] | None:
        """Return the tags as they are now, or None, with a warning, if MLflow does not answer."""
        if self._pending is not None and not self._pending.done():
            return None
        self._pending = self._pool.submit(self._tracker.tags)
        try:
            return self._pending.result(_READ_TIMEOUT_S)
        except TimeoutError:
            _logger.warning("MLflow did not return the run's tags in %g s: steering stays as it is", _READ_TIMEOUT_S)
        except TrackingError as error:
            _logger.warning("steering stays as it is: %s", error)
        return None


def _broadcast(text: str, device: torch.device) -> str:
    """Return worker 0's text on all workers."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()
