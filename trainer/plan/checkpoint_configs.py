"""Read the configs of a checkpoint, which say all sizes: of a folder, or of a published model that is kept here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.plan.flux import FluxConfig, play_flux
from trainer.plan.tape import Shape, Tape
from trainer.plan.text import play_clip_text, play_t5
from trainer.plan.training import Training
from trainer.plan.vae import VaeConfig, vae_parameters

_PUBLISHED = Path(__file__).parent / "published"  # by hub id; sizes from diffusers' documentation of FLUX.1-dev
_INDEX = "model_index.json"
PATCH = 2  # latents on a side of a token; as in model/packing.py


class PlanError(ValueError):
    """A run cannot be planned; the text names the key or argument and what to do."""


@dataclass(frozen=True)
class CheckpointConfigs:
    """What a checkpoint's config.json files say."""

    transformer: FluxConfig
    vae: VaeConfig
    t5: Mapping[str, Any]
    clip: Mapping[str, Any]

    @classmethod
    def find(cls, path: str, configs: Path | None = None) -> CheckpointConfigs:
        """Read those of model.path, or of the folder `configs` in its place. Raise PlanError if they are not here."""
        folder = configs or next((each for each in (Path(path), _PUBLISHED / path) if (each / _INDEX).is_file()), None)
        if folder is None or not (folder / _INDEX).is_file():
            known = sorted(str(each.parent.relative_to(_PUBLISHED)) for each in _PUBLISHED.glob(f"*/*/{_INDEX}"))
            raise PlanError(
                f"model.path {path} is no folder here, and no model whose configs are kept ({', '.join(known)}): "
                "give --configs FOLDER with its model_index.json and config.json files"
            )
        if (kind := _read(folder / _INDEX).get("_class_name")) != "FluxPipeline":
            raise PlanError(f"model.path {folder} holds a {kind}: only FluxPipeline can be planned")
        parts = [_read(folder / name / "config.json") for name in ("transformer", "vae", "text_encoder_2")]
        clip = _read(folder / "text_encoder" / "config.json")
        return cls(FluxConfig.of(parts[0]), VaeConfig.of(parts[1]), parts[2], clip)

    def token_grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return rows and columns of tokens. Raise PlanError for sizes that the model cannot make."""
        token_px = self.vae.scale * PATCH
        if height_px % token_px or width_px % token_px:
            raise PlanError(
                f"model.height_px {height_px} and model.width_px {width_px} must be multiples of {token_px}"
            )
        return height_px // token_px, width_px // token_px

    @cached_property
    def transformer_shapes(self) -> dict[str, Shape]:
        """The parameters of the transformer by name, without adapters, in the order of diffusers' module."""
        tape = Tape(Training.full())
        with tape.no_grad():
            play_flux(tape, self.transformer, 1, 1, 1, 1)
        return tape.parameters

    @cached_property
    def num_vae_parameters(self) -> int:
        return vae_parameters(self.vae)

    @cached_property
    def num_text_parameters(self) -> int:
        """The numbers of both text encoders."""
        tape = Tape(Training.frozen())
        with tape.no_grad():
            play_t5(tape, self.t5, 1, 1)
            with tape.scope("clip"):
                play_clip_text(tape, self.clip, 1)
        return tape.num_parameters


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"model.path: {file} cannot be read: {error}") from error
    return found
