"""Write judges of random weights: the real classes, in the format of deploy/tiny/judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from trainer.evaluation.frechet import gaussian_of

_SIZES = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


def make_tiny_judges(folder: Path, styles: Sequence[str], subjects: Sequence[str], real: Tensor) -> Path:
    """Write a folder of judges and return it.

    real: (num_subjects, 3, size, size) uint8, the first style's real pictures. Each further style's mean lies one unit
    farther away.
    """
    torch.manual_seed(0)
    labels = dict(enumerate(styles))
    sizes = _SIZES | {"image_size": real.shape[2]}
    config = ResNetConfig(**sizes, id2label=labels, label2id={name: index for index, name in labels.items()})
    style, subject = ResNetForImageClassification(config).eval(), ResNetModel(ResNetConfig(**sizes)).eval()
    style.half().save_pretrained(folder / "style")
    subject.half().save_pretrained(folder / "subject")
    style, subject = style.float(), subject.float()
    with torch.no_grad():
        pixels = real.float() / 127.5 - 1
        mean, covariance = gaussian_of(style.resnet(pixels).pooler_output.flatten(1))
        reference = {"subject.embeddings": subject(pixels).pooler_output.flatten(1).half()}
    for distance, name in labels.items():
        reference |= {f"style.{name}.mean": mean + distance, f"style.{name}.covariance": covariance.clone()}
    save_file(reference, folder / "reference.safetensors", metadata={"subjects": json.dumps(list(subjects))})
    return folder
