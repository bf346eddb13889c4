"""Make the requests to both servers before the clock starts: the same pictures and pairs in each one's format."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import requests
from PIL import Image

from deploy.settings import ROOT
from services.contract import (
    IDEMPOTENCY_KEY_HEADER,
    MEDIA_TYPE,
    REWARDS_PATH,
    SCORE_PATH,
    PromptPair,
    RewardRequest,
    WeightedReward,
)
from services.lines import read_lines

PREFERENCE_SCALE = 0.1
_NUM_PICTURES, _NUM_PROMPTS = 8, 64


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One POST."""

    path: str
    body: bytes
    content_type: str
    idempotency_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        key = self.idempotency_key
        return {"content-type": self.content_type} | ({} if key is None else {IDEMPOTENCY_KEY_HEADER: key})


def pairs(num_lines: int) -> list[PromptPair]:
    """Return pairs of prompts of so many lines: with a control word, one has 8 tokens on average, six have 26."""
    lines = read_lines(ROOT / "deploy" / "tiny" / "prompts" / "train.txt")
    groups = [lines[start : start + num_lines] for start in range(0, _NUM_PROMPTS * num_lines, num_lines)]
    return [PromptPair(", ".join(group), "3D", "Flat") for group in groups]


def unseen_pairs(num_lines: int) -> Iterator[PromptPair]:
    """Yield pairs whose texts no server has seen."""
    for number, pair in zip(itertools.count(), itertools.cycle(pairs(num_lines))):
        yield PromptPair(f"{pair.prompt} {number}", "3D", "Flat")


def jpegs(size_px: int = 512) -> list[bytes]:
    """Return smooth random pictures, whose files are about as large as those of photographs."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(_NUM_PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (size_px // 8, size_px // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((size_px, size_px), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    return pictures


def to_service(reward: str, jpeg: bytes, pair: PromptPair) -> HttpRequest:
    """Return POST /v1/score as a form, which carries the file as it is; base64 in JSON costs both sides more."""
    fields = {
        "prompt": pair.prompt,
        "positive": pair.positive,
        "negative": pair.negative,
        "preference_scale": str(PREFERENCE_SCALE),
        "reward": reward,
    }
    files = {"image": ("picture.jpg", jpeg, "image/jpeg")}
    form = requests.Request("POST", "http://localhost", data=fields, files=files).prepare()
    assert isinstance(form.body, bytes)
    return HttpRequest(SCORE_PATH, form.body, str(form.headers["content-type"]))


def to_baseline(reward: str, jpeg: bytes, texts: Sequence[str]) -> HttpRequest:
    return HttpRequest(f"/{reward}", pickle.dumps({"images": [jpeg], "texts": list(texts)}), "application/octet-stream")


def binary(reward: str, pairs: Sequence[PromptPair], size_px: int, with_gradient: bool) -> HttpRequest:
    """Return POST /v1/rewards as the trainer sends it: a stacked float32 image for each pair."""
    images = np.random.default_rng(0).random((len(pairs), 3, size_px, size_px), dtype=np.float32)
    scales = (PREFERENCE_SCALE,) * len(pairs)
    request = RewardRequest(images, tuple(pairs), scales, (WeightedReward(reward),), with_gradient)
    return HttpRequest(REWARDS_PATH, request.to_bytes(), MEDIA_TYPE)
