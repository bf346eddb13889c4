"""On a CPU a transfer copies nothing that need not be copied; on CUDA it is pinned and gives the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reward_server.models.transfer import joined, to_cpu, to_device

CPU = torch.device("cpu")
DTYPES = [np.float32, np.float16, np.uint8]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def stacks_of(dtype: type[np.generic]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(255 * random.random((batch, 3, 5, 4))).astype(dtype) for batch in (2, 1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacks_are_joined_in_order_with_their_dtype(dtype: type[np.generic]) -> None:
    stacks = stacks_of(dtype)
    np.testing.assert_array_equal(joined(stacks, CPU).numpy(), np.concatenate(stacks))
    assert joined(stacks, CPU).numpy().dtype == dtype


def test_on_a_cpu_one_stack_is_shared_unless_it_may_not_be_written() -> None:
    (stack, *_) = stacks_of(np.float32)
    shared = joined([stack], CPU)
    assert shared.data_ptr() == stack.ctypes.data
    assert to_device(shared, CPU) is shared
    (back,) = to_cpu([shared])()
    assert back is shared
    stack.flags.writeable = False
    assert joined([stack], CPU).data_ptr() != stack.ctypes.data


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_copies_both_ways_are_pinned_and_lose_nothing(dtype: type[np.generic]) -> None:
    cuda, stacks = torch.device("cuda"), stacks_of(dtype)
    pinned = joined(stacks, cuda)
    assert pinned.is_pinned()
    on_device = [to_device(tensor, cuda) for tensor in (pinned, torch.from_numpy(stacks[0]))]  # from any memory
    both = to_cpu([tensor + tensor for tensor in on_device])()
    assert all(tensor.is_pinned() for tensor in both)
    for tensor, expected in zip(both, (np.concatenate(stacks), stacks[0]), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected + expected)


@NEEDS_CUDA
def test_on_cuda_memory_is_not_given_to_another_before_its_kernels_ran() -> None:
    """Many copies in and out, each behind work that takes longer than to ask for all of them."""
    cuda = torch.device("cuda")
    weights = torch.eye(4096, device=cuda)
    waits = []
    for value in range(20):
        rows = to_device(torch.full((4096, 64), float(value)), cuda)
        for _ in range(20):
            rows = weights @ rows
        waits.append(to_cpu([rows]))
        del rows
    for value, wait in enumerate(waits):
        (back,) = wait()
        assert back.eq(value).all()
