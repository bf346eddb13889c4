"""Play what a worker computes in a step: a forward of a rollout, a branch with its backward, the decoding of images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from trainer.plan.checkpoint_configs import PATCH
from trainer.plan.flux import FluxConfig, play_flux
from trainer.plan.layers import activation, add, cast, contiguous, multiply, plus_number, times_number
from trainer.plan.tape import FLOAT32_BYTES, Array, Shape, Tape
from trainer.plan.training import Training
from trainer.plan.vae import VaeConfig, play_decoder


@dataclass(frozen=True, slots=True)
class Played:
    """What a phase takes on one worker: FLOPs, bytes moved in its memory, and the most alive beside the weights."""

    flops: int
    moved_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a forward is made of: images, rows and columns of tokens, text tokens, bytes of a number.

    is_gpu says whose kernels it runs.
    """

    batch: int
    grid: tuple[int, int]
    num_text: int
    itemsize: int
    vae_itemsize: int
    is_gpu: bool

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch: its forward, of transformer and decoder each, and its backward. peak_bytes is of the whole."""

    transformer: Played
    decoder: Played
    backward: Played
    trained: tuple[tuple[str, Shape], ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.transformer.peak_bytes, self.decoder.peak_bytes, self.backward.peak_bytes)


@lru_cache(maxsize=64)
def play_forward(flux: FluxConfig, sizes: Sizes) -> Played:
    """Play a forward without gradient, as a rollout and an evaluation make it."""
    tape = Tape(Training.frozen(), is_gpu=sizes.is_gpu)
    with tape.no_grad():
        held = [tape.new((sizes.batch, sizes.num_tokens, flux.in_channels), FLOAT32_BYTES) for _ in range(2)]
        play_flux(tape, flux, sizes.batch, sizes.num_tokens, sizes.num_text, sizes.itemsize)
    del held
    return Played(tape.flops, tape.moved_bytes, tape.peak_bytes)


@lru_cache(maxsize=64)
def play_decoding(vae: VaeConfig, sizes: Sizes) -> Played:
    """Play the decoding of a batch without gradient."""
    tape = Tape(Training.frozen())
    with tape.no_grad():
        _decode(tape, vae, sizes, tape.new(_latents(vae, sizes), FLOAT32_BYTES), checkpointing=False)
    return Played(tape.flops, tape.moved_bytes, tape.peak_bytes)


@lru_cache(maxsize=64)
def play_branch(
    flux: FluxConfig,
    vae: VaeConfig,
    sizes: Sizes,
    training: Training,
    checkpointing: int,
    *,
    decodes: bool = True,
    keeps_gradients: bool = False,
) -> Branch:
    """Play Direct-Align's branch, forward and backward. Without `decodes` the loss is of the latents, as GRPO's."""
    tape = Tape(training, keeps_gradients, is_gpu=sizes.is_gpu)
    held = [tape.new((sizes.batch, sizes.num_tokens, flux.in_channels), FLOAT32_BYTES) for _ in range(2)]
    recovered = _recovered(tape, flux, sizes, checkpointing)
    transformer = Played(tape.flops, tape.moved_bytes, tape.peak_bytes)
    trained = tuple(tape.trained.items())
    loss = recovered
    if decodes:
        with tape.frozen("vae"):
            images = _decode(tape, vae, sizes, recovered, checkpointing=checkpointing > 0)
        loss = multiply(tape, images, tape.new(images.shape, FLOAT32_BYTES))  # the reward's gradient
        del images
    del recovered
    decoder = Played(tape.flops - transformer.flops, tape.moved_bytes - transformer.moved_bytes, tape.peak_bytes)
    before = tape.flops, tape.moved_bytes
    tape.backward(loss)
    del loss, held
    backward = Played(tape.flops - before[0], tape.moved_bytes - before[1], tape.peak_bytes)
    return Branch(transformer, decoder, backward, trained)


def _latents(vae: VaeConfig, sizes: Sizes) -> Shape:
    return sizes.batch, sizes.num_tokens, vae.latent_channels * PATCH**2


def _recovered(tape: Tape, flux: FluxConfig, sizes: Sizes, checkpointing: int) -> Array:
    """The one step with gradient and the recovery, in float32 but for the transformer."""
    noisy = tape.new((sizes.batch, sizes.num_tokens, flux.in_channels), FLOAT32_BYTES)
    velocity = play_flux(tape, flux, sizes.batch, sizes.num_tokens, sizes.num_text, sizes.itemsize, checkpointing)
    velocity = cast(tape, velocity, FLOAT32_BYTES)
    stepped = add(tape, times_number(tape, velocity), noisy)
    return times_number(tape, plus_number(tape, stepped))


def _decode(tape: Tape, vae: VaeConfig, sizes: Sizes, latents: Array, *, checkpointing: bool) -> Array:
    rows, columns = (side * PATCH for side in sizes.grid)
    unpacked = contiguous(tape, latents, is_already=False).view(sizes.batch, vae.latent_channels, rows, columns)
    unpacked = plus_number(tape, times_number(tape, unpacked))
    decoded = play_decoder(tape, vae, cast(tape, unpacked, sizes.vae_itemsize), checkpointing=checkpointing)
    images = plus_number(tape, times_number(tape, cast(tape, decoded, FLOAT32_BYTES)))
    return activation(tape, images)  # clamp
