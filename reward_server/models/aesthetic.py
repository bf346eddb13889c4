"""Aesthetic Predictor v2.5: how good an image looks, from about 1 to 10, whatever the prompt (image-only)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from reward_server.models.precision import Precision, PrecisionArgs
from reward_server.models.preprocess import ResizeAndCrop
from reward_server.models.weights import (
    fill,
    find_file,
    find_folder,
    from_pretrained,
    frozen,
    load_state_dict,
    verified_checksum,
    weight_files,
)


class AestheticArgs(PrecisionArgs):
    """`path`: the published head, aesthetic_predictor_v2_5.pth (github.com/discus0434/aesthetic-predictor-v2-5).

    `backbone`: the SigLIP under it, a folder or a hub id. `checksum` is of its weights and then the head's. `dtype` is
    the backbone's; the head has a million weights and stays float32.
    """

    kind: Literal["aesthetic"]
    backbone: str = "google/siglip-so400m-patch14-384"


class AestheticReward:
    """An ImageOnly: SigLIP's pooled image embedding at length one, through the published head."""

    logit_scale: float | None = None  # trained on ratings, not on choices

    def __init__(self, args: AestheticArgs) -> None:
        from transformers import SiglipImageProcessor, SiglipVisionModel

        head_file, folder = find_file(args.path), find_folder(args.backbone)
        self.checksum = verified_checksum([*weight_files(folder), head_file], args)
        self._precision = Precision(args)
        self._backbone = self._precision.place(from_pretrained(SiglipVisionModel, folder))
        head = _Head(self._backbone.config.hidden_size)
        fill(head, load_state_dict(head_file), head_file)
        self._head = frozen(head).to(self._precision.device)
        self._preprocess = ResizeAndCrop.of_processor(SiglipImageProcessor.from_pretrained(folder))

    def score_image(self, images: Tensor) -> Tensor:
        embeds = self._precision.run(
            lambda pixels: self._backbone(pixel_values=pixels).pooler_output, self._preprocess(images)
        )
        scores: Tensor = self._head(normalize(embeds, dim=-1)).squeeze(dim=-1)
        return scores

    def shrink(self, images: Tensor) -> Tensor:
        return self._preprocess.shrink(images)


class _Head(nn.Module):
    """Five linear layers with only the training's dropout between them, named as in the published file."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        widths = [embedding, 1024, 128, 64, 16, 1]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.Dropout()]
        self.scoring_head = nn.Sequential(*layers[:-1])

    def forward(self, embeds: Tensor) -> Tensor:
        scores: Tensor = self.scoring_head(embeds)
        return scores
