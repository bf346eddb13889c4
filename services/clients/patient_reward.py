"""The reward client of a training: it goes on asking a service that has gone away, says so, and gives up in the end.

    client = PatientRewardClient(config.reward_service, beat=heartbeat.beat)
    response = client.score(request)  # without an answer for patience_minutes: the RewardError of the last attempt

It asks as RewardClient does, with the same waits and one Idempotency-Key for all attempts of a request. Only the number
of attempts has no limit but time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from services.clients.reward import RewardClient
from services.clients.reward_exchange import Answer, Exchange, NoAnswer, Result
from services.config.rewards import RewardServiceConfig


class PatientRewardClient(RewardClient):
    """A RewardClient that waits up to reward_service.patience_minutes in each of its methods.

    `tell` gets a line every `remind_s` of an outage and one at its end. `beat` is called before each attempt, so that a
    watcher sees that the caller lives; between two attempts are timeout_s and 15 s at most.
    """

    def __init__(
        self,
        service: RewardServiceConfig,
        *,
        beat: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda line: print(line, flush=True),
        remind_s: float = 30.0,
    ) -> None:
        patience_s = service.patience_minutes * 60
        super().__init__(service.url, timeout_s=service.timeout_s, max_attempts=sys.maxsize, patience_s=patience_s)
        self._patience_minutes = service.patience_minutes
        self._beat, self._tell, self._remind_s = beat, tell, remind_s

    def _run(self, exchange: Exchange[Result]) -> Result:
        return super()._run(self._watched(exchange))

    def _watched(self, exchange: Exchange[Result]) -> Exchange[Result]:
        """Carry the calls and outcomes of an exchange, and tell of an outage from its first failed attempt on."""
        began, cause, is_told = time.monotonic(), "", False

        def remind() -> None:
            nonlocal is_told
            is_told = True
            self._tell(
                f"reward service at {self.url} has not answered for {time.monotonic() - began:.0f} s ({cause}); "
                f"the run waits up to {self._patience_minutes:g} minutes (reward_service.patience_minutes)"
            )

        call = next(exchange)
        with ExitStack() as stack:
            while True:
                self._beat()
                outcome = yield call
                try:
                    call = exchange.send(outcome)
                except StopIteration as end:
                    stack.close()
                    if is_told:
                        self._tell(f"reward service at {self.url} answers again after {time.monotonic() - began:.0f} s")
                    return end.value
                if not cause:
                    stack.enter_context(_repeated(remind, began, self._remind_s))
                cause = _cause(outcome)


def _cause(outcome: Answer | NoAnswer) -> str:
    return outcome.cause if isinstance(outcome, NoAnswer) else f"HTTP {outcome.status}"


@contextmanager
def _repeated(act: Callable[[], None], began: float, every_s: float) -> Iterator[None]:
    """Within the context, call `act` every `every_s` after `began`, also while a request is in flight."""
    is_over = threading.Event()

    def repeat() -> None:
        wait_s = max(0.0, began + every_s - time.monotonic())
        while not is_over.wait(wait_s):
            act()
            wait_s = every_s

    thread = threading.Thread(target=repeat, name="reward_outage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
