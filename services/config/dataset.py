"""Real images with captions in place of rollouts, as keys of a run file: where they are and where their latents go.

Offline Direct-Align: an image's latents are the anchor, its noise is drawn; inject, one step and recover stay as they
are (Shen et al., arXiv 2509.06942). The run's own `rollout` then gives the shift of the noise levels and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from services.config.objective import Frozen, Word


class DatasetConfig(Frozen):
    """Images (PNG, JPEG, WebP) and their captions, which are the prompts. `srpo encode RUN.yaml` must run before.

    Each image goes to the size of model.sizes whose shape is nearest, and is resized and cropped at the centre to it.
    """

    # A folder with NAME.txt beside each image NAME.png, .jpg, .jpeg or .webp; or a folder with a metadata.jsonl, which
    # has {"file_name": …, "text": …} for each image; or a .parquet file, or a folder of them, with the images' bytes.
    path: Path
    latents_path: Path  # a folder: `srpo encode` writes it, training reads it as it goes
    image_column: Word = "image"  # of parquet files: bytes, or {bytes, path} as Hugging Face's datasets writes them
    caption_column: Word = "text"  # of parquet files and of metadata.jsonl
