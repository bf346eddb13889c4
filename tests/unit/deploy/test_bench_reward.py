"""What the memory of the reward service is measured with: requests as clients send them, enough to fill its stores."""

from __future__ import annotations

import itertools
from collections import Counter

from deploy.bench_reward.__main__ import WARM_UP
from deploy.bench_reward.memory import mixed_requests
from deploy.bench_reward.models import embedded
from deploy.bench_reward.servers import NUM_PROCESSES, STORED_ANSWER_BYTES
from services.contract import IDEMPOTENCY_KEY_HEADER, REWARDS_PATH, SCORE_PATH, RewardRequest

MODEL = embedded(is_quick=False)


def test_every_request_has_a_key_of_its_own_and_every_fourth_wants_a_gradient() -> None:
    requests = list(itertools.islice(mixed_requests(MODEL), 16))
    assert Counter(request.path for request in requests) == {SCORE_PATH: 12, REWARDS_PATH: 4}
    assert len({request.headers[IDEMPOTENCY_KEY_HEADER] for request in requests}) == 16
    for request in requests:
        if request.path == REWARDS_PATH:
            assert RewardRequest.from_bytes(request.body).with_gradient


def test_the_warm_up_fills_the_stores_of_answers() -> None:
    gradient_bytes = 3 * MODEL.size_px**2 * 4
    stored = WARM_UP[False] / 4 * gradient_bytes
    assert stored > 1.2 * NUM_PROCESSES * STORED_ANSWER_BYTES
