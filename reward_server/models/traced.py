"""Record a forward once and run it without Python: the same numbers, and the interpreter is free for other requests.

For a small image tower on a CPU, Python between the operations takes a third of the time of one image, and holds the
lock that decoding and HTTP need. TorchScript's trace is deprecated, but torch has no other way to run eager kernels as
they are: torch.export's modules run in Python again, torch.compile needs a compiler and gives other numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reward_server.models.weights import WeightsError

_RECORDED, _OTHER = 2, 1  # images; few, for a large model takes seconds for each


class _Forward(nn.Module):
    """A function of a model as a module, so that the recording owns the model's weights."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._forward_of_images = forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward_of_images(images)


def traced(model: nn.Module, forward: Callable[[Tensor], Tensor], image_shape: Sequence[int]) -> nn.Module:
    """Record `forward`, (batch, *image_shape) -> (batch, …) of any batch, for inference; `model` has all its weights.

    Raise WeightsError if the model does not take such images in any number, or if the recording differs.
    """
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.rand(number, *image_shape, generator=generator) for number in (_RECORDED, _OTHER))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation, and each shape that is now fixed; checked below
        try:
            recorded = torch.jit.trace(_Forward(model, forward), images, check_trace=False)
            again, expected = recorded(others), forward(others)
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"cannot record a forward of images {tuple(image_shape)}: {error}") from error
    # NaN in weights is reported when it makes a reward, with the image's index
    if again.shape != expected.shape or not torch.allclose(again, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise WeightsError("the recorded forward differs from the model's on a batch of another size")
    return recorded
