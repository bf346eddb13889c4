"""Serve rewards as people do today: Flask under gunicorn, a pickled list of JPEGs in, a pickle out, a forward each.

    gunicorn --workers 2 'deploy.bench_reward.baseline:make_app("fluent-clip=deploy/tiny/reward")'

Only for the comparison and only on loopback: unpickling a request runs whatever code its sender put into it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from flask import Flask, request
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel


def make_app(models: str) -> Flask:
    """Return the app. `models`: "name=folder,…". POST /name: {"images": [JPEG, …], "texts": […]} -> cosines."""
    torch.set_num_threads(1)
    loaded = {name: _Clip(folder) for name, folder in (each.split("=", 1) for each in models.split(","))}
    app = Flask("baseline")

    @app.get("/healthz")
    def health() -> str:
        return "alive"

    @app.post("/<name>")
    def similarities(name: str) -> bytes:
        fields = pickle.loads(request.get_data())
        return pickle.dumps(loaded[name].similarities(fields["images"], fields["texts"]))

    return app


class _Clip:
    def __init__(self, folder: str) -> None:
        self._model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._processor = CLIPImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def similarities(self, jpegs: list[bytes], texts: list[str]) -> list[list[float]]:
        images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in jpegs]
        pixels = self._processor(images=images, return_tensors="pt")
        tokens = self._tokenizer(texts, padding=True, return_tensors="pt")
        logits = self._model(**pixels, **tokens).logits_per_image
        cosines: list[list[float]] = (logits / self._model.logit_scale.exp()).tolist()
        return cosines
