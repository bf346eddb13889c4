"""HPS v2 and v2.1 (arXiv 2306.09341): open_clip's ViT-H-14 with the published checkpoint's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import normalize as standardize

from reward_server.models.precision import Precision
from reward_server.models.preprocess import as_float, fit_and_pad
from reward_server.models.protocol import check_length
from reward_server.models.transfer import to_device
from reward_server.models.views import ViewsArgs, embed_views
from reward_server.models.weights import (
    WeightsError,
    fill,
    find_file,
    frozen,
    load_state_dict,
    verified_checksum,
)


class Hpsv2Args(ViewsArgs):
    """A checkpoint file, local or xswu/HPSv2/HPS_v2.1_compressed.pt (v2.1) or xswu/HPSv2/HPS_v2_compressed.pt (v2)."""

    kind: Literal["hpsv2"]
    architecture: str = "ViT-H-14"  # any name that open_clip knows


class Hpsv2Reward:
    """The published score, a cosine, as a TwoTower; the image is prepared as the hpsv2 package does it."""

    def __init__(self, args: Hpsv2Args) -> None:
        import open_clip

        file = find_file(args.path)
        self.checksum = verified_checksum([file], args)
        checkpoint = load_state_dict(file)
        if "state_dict" not in checkpoint:
            raise WeightsError(f"{args.path} has no entry state_dict, so it is no HPS v2 checkpoint")
        model = open_clip.create_model(args.architecture, load_weights=False)
        fill(model, checkpoint["state_dict"], file)
        self.logit_scale: float | None = float(model.logit_scale.detach().exp())
        self._precision, self._crops = Precision(args), args.crops
        self._model = self._precision.place(frozen(model))
        self._tokenizer: Any = open_clip.get_tokenizer(args.architecture)
        self._size_px = int(model.visual.image_size[0])
        self._mean, self._std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
        self.max_text_tokens = int(self._tokenizer.context_length)

    def embed_image(self, images: Tensor) -> Tensor:
        crop_px = self._size_px, self._size_px
        images = to_device(images, self._precision.device)
        return embed_views(images, self._preprocess, self._encode, self._crops, crop_px)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._precision.run(self._model.encode_image, pixels)

    def _preprocess(self, images: Tensor) -> Tensor:
        return standardize(fit_and_pad(as_float(images), self._size_px), self._mean, self._std)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        for text in texts:  # the tokenizer cuts silently; two tokens more for start and end of text
            check_length(text, len(self._tokenizer.encode(text)) + 2, self.max_text_tokens)
        tokens = self._tokenizer(list(texts)).to(self._precision.device)
        return normalize(self._precision.run_text(lambda: self._model.encode_text(tokens)), dim=-1)
