"""What is asked of the servers: the same pictures and pairs in each one's own format, made before the clock runs."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deploy.settings import ROOT
from services.contract import MEDIA_TYPE, REWARDS_PATH, SCORE_PATH, PromptPair, RewardRequest, WeightedReward

PREFERENCE_SCALE = 0.1
_BOUNDARY = "reward-bench"
_NUM_PICTURES, _NUM_PROMPTS = 8, 64


@dataclass(frozen=True, slots=True)
class Question:
    """One POST."""

    path: str
    body: bytes
    content_type: str


def pairs() -> list[PromptPair]:
    lines = (ROOT / "deploy" / "tiny" / "prompts" / "train.txt").read_text(encoding="utf-8").splitlines()
    return [PromptPair(prompt, "3D", "Flat") for prompt in lines[:_NUM_PROMPTS]]


def unseen_pairs() -> Iterator[PromptPair]:
    """Pairs whose texts no server has seen."""
    for number, pair in zip(itertools.count(), itertools.cycle(pairs())):
        yield PromptPair(f"{pair.prompt} {number}", "3D", "Flat")


def jpegs(size_px: int = 512) -> list[bytes]:
    """Smooth random pictures, about as large as photographs of their size."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(_NUM_PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (size_px // 8, size_px // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((size_px, size_px), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    return pictures


def to_service(reward: str, jpeg: bytes, pair: PromptPair) -> Question:
    """POST /v1/score as a form, as curl would send it."""
    fields = {
        "prompt": pair.prompt,
        "positive": pair.positive,
        "negative": pair.negative,
        "preference_scale": str(PREFERENCE_SCALE),
        "reward": reward,
    }
    head = "".join(_part(f'name="{name}"') + f"{value}\r\n" for name, value in fields.items())
    file = _part('name="image"; filename="picture.jpg"', "image/jpeg")
    body = (head + file).encode() + jpeg + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return Question(SCORE_PATH, body, f"multipart/form-data; boundary={_BOUNDARY}")


def _part(disposition: str, content_type: str = "") -> str:
    kind = f"\r\ncontent-type: {content_type}" if content_type else ""
    return f"--{_BOUNDARY}\r\ncontent-disposition: form-data; {disposition}{kind}\r\n\r\n"


def to_baseline(reward: str, jpeg: bytes, texts: Sequence[str]) -> Question:
    return Question(f"/{reward}", pickle.dumps({"images": [jpeg], "texts": list(texts)}), "application/octet-stream")


def binary(reward: str, batch: int, size_px: int, with_gradient: bool) -> Question:
    """POST /v1/rewards as the trainer sends it: stacked float32."""
    images = np.random.default_rng(0).random((batch, 3, size_px, size_px), dtype=np.float32)
    scales = (PREFERENCE_SCALE,) * batch
    request = RewardRequest(images, tuple(pairs()[:batch]), scales, (WeightedReward(reward),), with_gradient)
    return Question(REWARDS_PATH, request.to_bytes(), MEDIA_TYPE)
