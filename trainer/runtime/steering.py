"""The helm of a running training: between steps worker 0 reads the run's tag, and all workers take what it asks for.

    steering.sync()                # on all workers, between two steps
    learner.follow(steering.config)

What cannot come into force is refused with a tag that says why; the training goes on with what was in force. So it does
where MLflow does not tell the tags; a record that it does not take ends the workers (record.py). What is in force is on
the MLflow run and in the checkpoints, and a restarted training takes up the later of the two; steps that it repeats may
see a tag that is newer than what they saw before.
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
from trainer.runtime.preflight import RefusedError, require_accepted

_READ_TIMEOUT_S = 5.0  # a step waits no longer for MLflow
_FILE = "steering.json"
_logger = logging.getLogger(__name__)

Log = Callable[[Callable[[Tracker], None]], None]


class Unanswered(SteeringError):
    """Whether it can come into force is not known yet: it is asked again before the next step."""


class LiveSteering:
    """What is in force, alike on all workers; only worker 0 has a `tracker` to read and a `log` to write to.

    `check` is called with the run as it would go on. It raises SteeringError if the reward service refuses that, and
    Unanswered if the service cannot be asked.
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
        self._inbox = _Inbox(tracker) if tracker else None
        self._refused: str | None = None  # the tag's text, so that what is refused is tried once
        self.in_force = last_in_force(tracker.tags()) if tracker else Steering()

    @property
    def config(self) -> RunConfig:
        """The run as it is in force."""
        return self.in_force.applied_to(self._run)

    def sync(self) -> None:
        """Take what the tag asks for; called on all workers between steps."""
        if self._inbox is not None and (tags := self._inbox.read()) is not None:
            self._take(tags)
        self.in_force = Steering.from_tag(_broadcast(self.in_force.to_tag(), self._device))

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(self.in_force.to_tag() + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take up a checkpoint's, unless the MLflow run knows of a later one."""
        kept = Steering.from_tag((folder / _FILE).read_text(encoding="utf-8"))
        self.in_force = max(self.in_force, kept, key=lambda each: each.version)

    def _take(self, tags: Mapping[str, str]) -> None:
        text = tags.get(TAG)
        try:
            asked = Steering.from_tag(text).after(self.in_force)
            if asked != self.in_force and text is not None and text == self._refused:
                return
            asked.check(self._run)
            if asked != self.in_force:
                self._check(asked.applied_to(self._run))
        except SteeringError as error:
            self._refuse(text, error, tags.get(ERROR_TAG))
            return
        self._refused = None
        if ERROR_TAG in tags:
            self._log(lambda tracker: tracker.clear_tag(ERROR_TAG))
        if asked != self.in_force:
            self.in_force = asked
            print(f"steered to {asked.told}", flush=True)
            self._log(lambda tracker: tracker.set_tag(version_tag(asked.version), asked.to_tag()))

    def _refuse(self, text: str | None, reason: SteeringError, shown: str | None) -> None:
        message = f"{reason}; {self.in_force.told} stays in force"
        if text != self._refused:
            print(f"refused {TAG}: {message}", flush=True)
        self._refused = None if isinstance(reason, Unanswered) else text
        if shown != message:
            self._log(lambda tracker: tracker.set_tag(ERROR_TAG, message))


def check_with_service(client: RewardClient, drawn: Sequence[LocatedPrompt], config: RunConfig) -> None:
    """Ask each reward about the longest prompts that training draws, under the run's words.

    Raises SteeringError where it does not take them, and Unanswered where the service fails.
    """
    try:
        require_accepted(client, config, drawn)
    except RefusedError as error:
        raise SteeringError(str(error)) from error
    except RewardError as error:
        raise Unanswered(f"the reward service could not be asked, and will be again: {error}") from error


class _Inbox:
    """The run's tags as MLflow has them now. A thread asks, so that a dead server costs one timeout, not one a step."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steering")
        self._late: Future[dict[str, str]] | None = None

    def read(self) -> dict[str, str] | None:
        """None, with a warning, where MLflow does not answer."""
        if self._late is not None and not self._late.done():
            return None
        self._late = self._pool.submit(self._tracker.tags)
        try:
            return self._late.result(_READ_TIMEOUT_S)
        except TimeoutError:
            _logger.warning("MLflow did not tell the run's tags in %g s: steering stays as it is", _READ_TIMEOUT_S)
        except TrackingError as error:
            _logger.warning("steering stays as it is: %s", error)
        return None


def _broadcast(text: str, device: torch.device) -> str:
    """Worker 0's text, on all workers."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()
