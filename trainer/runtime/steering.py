"""Steer a running training: between steps worker 0 reads a tag of the MLflow run, and all workers apply it.

    steering.sync(step)            # on all workers, between two steps
    learner.follow(steering.config)

A tag that cannot be applied is refused: another tag says why, and the training goes on as it was. It also goes on as it
was while MLflow does not return the tags. The version in force is recorded with every step. A run that goes on from a
checkpoint repeats steps under the versions that they had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from services.clients.reward import RewardClient, RewardError
from services.clients.spool import Spool
from services.clients.tracking_errors import TrackingError
from services.config.run import RunConfig
from services.config.steering import ERROR_TAG, TAG, Steering, SteeringError, version_tag
from trainer.data.prompt_files import LocatedPrompt
from trainer.runtime.accepted_prompts import RefusedError, require_accepted
from trainer.runtime.agreement import text_of_worker_0

_READ_TIMEOUT_S = 5.0  # a step waits no longer for MLflow
_logger = logging.getLogger(__name__)


class UnansweredError(SteeringError):
    """Raised if the reward service cannot be reached for the check. It is repeated before the next step."""


class LiveSteering:
    """The steering in force, the same on all workers. Only worker 0 has the run's `record` and `read_tags`.

    `check` is called with the run as it would go on. It raises SteeringError if the reward service refuses that, and
    UnansweredError if the service cannot be reached. `read_tags` returns the MLflow run's tags or raises TrackingError.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        record: Spool | None,
        read_tags: Callable[[], Mapping[str, str]] | None,
        check: Callable[[RunConfig], None],
    ) -> None:
        self._run, self._device, self._record, self._check = config, device, record, check
        self._tags = _TagReader(read_tags) if read_tags else None
        self._refused: str | None = None  # the tag's text, so that a refused tag is tried only once
        self.in_force = Steering()

    @property
    def config(self) -> RunConfig:
        """Return the run's configuration with the steering in force."""
        return self.in_force.applied_to(self._run)

    def sync(self, step: int) -> None:
        """Apply the tag, if it has changed; before a repeated step, what was in force then. All workers call this."""
        if self._record is not None and (recorded := self._recorded(self._record, step + 1)) is not None:
            self.in_force = recorded
        elif self._tags is not None and (tags := self._tags.read()) is not None:
            self._apply(tags)
        self.in_force = Steering.from_tag(text_of_worker_0(self.in_force.to_tag(), self._device))

    def restore(self, text: str) -> None:
        """Take a checkpoint's steering, as to_tag wrote it."""
        self.in_force = Steering.from_tag(text)

    @property
    def _written(self) -> Spool:
        assert self._record is not None, "only worker 0 reads tags"
        return self._record

    def _recorded(self, record: Spool, step: int) -> Steering | None:
        """Return what was in force in the step that ended as `step`, if that is recorded."""
        metrics = record.recorded("step", step)
        if metrics is None:
            return None
        version = int(metrics["steering_version"])
        return Steering.from_tag(record.tag(version_tag(version))) if version else Steering()

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
            self._written.clear_tag(ERROR_TAG)
        if requested != self.in_force:
            self.in_force = requested
            print(f"steered to {requested.summary}", flush=True)
            self._written.set_tag(version_tag(requested.version), requested.to_tag())

    def _refuse(self, text: str | None, reason: SteeringError, current_message: str | None) -> None:
        message = f"{reason}; {self.in_force.summary} stays in force"
        if text != self._refused:
            print(f"refused {TAG}: {message}", flush=True)
        self._refused = None if isinstance(reason, UnansweredError) else text
        if current_message != message:
            self._written.set_tag(ERROR_TAG, message)


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

    def __init__(self, read_tags: Callable[[], Mapping[str, str]]) -> None:
        self._read_tags = read_tags
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steering")
        self._pending: Future[Mapping[str, str]] | None = None

    def read(self) -> Mapping[str, str] | None:
        """Return the tags as they are now, or None, with a warning, if MLflow does not answer."""
        if self._pending is not None and not self._pending.done():
            return None
        self._pending = self._pool.submit(self._read_tags)
        try:
            return self._pending.result(_READ_TIMEOUT_S)
        except TimeoutError:
            _logger.warning("MLflow did not return the run's tags in %g s: steering stays as it is", _READ_TIMEOUT_S)
        except TrackingError as error:
            _logger.warning("steering stays as it is: %s", error)
        return None
