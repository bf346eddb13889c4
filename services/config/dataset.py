"""The section `dataset` of a run file, real images with captions in place of rollouts, and where such images lie.

Offline Direct-Align: an image's latents are the anchor and its noise is drawn; inject, one step and recover stay as
they are (Shen et al., arXiv 2509.06942). The run's own `rollout` then gives the shift of the noise levels only.
"""

from __future__ import annotations

from pathlib import Path

from services.config.fields import Frozen, Word


class CaptionedConfig(Frozen):
    """Real images (PNG, JPEG, WebP) with captions."""

    path: Path
    """A folder with NAME.txt beside each image NAME.png, .jpg, .jpeg or .webp; or a folder with a metadata.jsonl, which
    has {"file_name": …, "text": …} for each image; or a .parquet file, or a folder of them, with the images' bytes."""

    image_column: Word = "image"
    """The column of images in parquet files: bytes, or {bytes, path} as Hugging Face's datasets writes them."""

    caption_column: Word = "text"
    """The column of captions in parquet files and in metadata.jsonl."""


class DatasetConfig(CaptionedConfig):
    """Offline training: real images (PNG, JPEG, WebP) are the anchors, and nothing is rolled out in training. Their
    captions are the prompts. Run `srpo encode-images RUN.yaml` first.

    Each image goes to the size of `model.sizes` whose shape is nearest; it is resized and cropped to it at the center.
    """

    latents_path: Path
    """The folder of latents that `srpo encode-images` writes and training reads as it goes."""
