"""Know where DeepSpeed's optimizers keep this worker's part of each trained parameter, and what AdamW holds for it.

    shards = Shards(deepspeed_engine, trained, zero_stage)
    for name, shard in shards.items():
        shard.weights.mul_(0.5)  # float32, what AdamW moves
    shards.show()  # forward computes with them, in its own dtype, on every worker

| stage | master weights | split over the workers |
|---|---|---|
| 0 | the parameters themselves, whole on every worker | by us, as stage 1 does |
| 1, 2 | a float32 copy of a range of all parameters, laid end to end | each worker has one range |
| 3 | a float32 copy of a range of every parameter | the last range of a parameter is padded |

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py and runtime/bf16_optimizer.py (stage 1 in bfloat16).
Their objects come from engine.py; this file imports no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.model.fragments import MOMENTS


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A worker's range of a flattened parameter.

    The worker holds the numbers `held` at `offset` in `flat`, the float32 tensor that AdamW moves. Of these it saves
    and averages `own`: all, but in stage 0, where every worker holds everything.
    """

    parameter: nn.Parameter
    flat: Tensor
    offset: int
    held: range
    own: range

    def view(self, laid_out: Tensor, part: range) -> Tensor:
        """Return a part of `held` in a tensor that is laid out as `flat`: (len(part),)."""
        return laid_out.detach().view(-1).narrow(0, self.offset + part.start - self.held.start, len(part))

    @property
    def weights(self) -> Tensor:
        """The master weights `own`, (len(own),) float32."""
        return self.view(self.flat, self.own)

    @property
    def image(self) -> Tensor:
        """The numbers `own` of what forward computes with, (len(own),) in the policy's dtype."""
        if hasattr(self.parameter, "ds_tensor"):  # stage 3
            return self.parameter.ds_tensor.detach().narrow(0, 0, len(self.own))
        return self.parameter.detach().view(-1).narrow(0, self.own.start, len(self.own))

    @property
    def is_its_image(self) -> bool:
        """Whether master weights and image are the same numbers in memory."""
        return self.weights.data_ptr() == self.image.data_ptr()


class Shards:
    """This worker's shards of all trained parameters, and AdamW's state for them.

    Whoever reads or writes them holds `lock`, so that another thread may copy them at any time.
    """

    def __init__(self, deepspeed_engine: Any, trained: Mapping[str, nn.Parameter], zero_stage: int) -> None:
        self._optimizer, self._adam = deepspeed_engine.optimizer, deepspeed_engine.basic_optimizer
        self._parameters, self._zero_stage = list(trained.values()), zero_stage
        self.lock = Lock()
        self._aside: dict[str, Tensor] = {}  # the weights, where forward computes with other values in their place
        self.shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in trained.items()}
        found = zip(trained, self._find(), strict=True)
        self._by_name = {name: shard for name, shard in found if shard is not None and shard.held}

    def items(self) -> Iterable[tuple[str, Shard]]:
        """Return name and shard of each parameter of which this worker holds a part."""
        return self._by_name.items()

    def of(self, name: str) -> Shard | None:
        """Return the shard of a parameter, or None if this worker holds no part of it."""
        return self._by_name.get(name)

    @property
    def num_updates(self) -> int:
        """The updates that AdamW has made."""
        return max((int(state["step"]) for state in self._adam.state.values() if state), default=0)

    def moment(self, kind: str, shard: Shard, part: range) -> Tensor:
        """Return a part of an AdamW moment, (len(part),) float32; zeros if the parameter has had no gradient yet."""
        state = self._adam.state.get(shard.flat)
        return shard.view(state[kind], part) if state else torch.zeros(len(part))

    def begin(self, num_updates: int) -> None:
        """Let AdamW go on as after so many updates, with moments of zero that are to be filled."""
        for flat in self._flats():
            state = self._adam.state[flat]
            state["step"] = torch.tensor(float(num_updates))
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)

    def weights(self) -> dict[str, Tensor]:
        """Return the master weights of this worker's `own`, by name, whatever forward computes with."""
        return {name: self._aside.get(name, shard.weights) for name, shard in self.items()}

    def show(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Let forward compute with these values of each worker's `own`, by name, or else with the weights.

        All workers call this together.
        """
        weights = self.weights()
        hidden = [name for name, shard in self.items() if values is not None and shard.is_its_image]
        self._aside = {name: weights[name].clone() for name in hidden}
        for name, shard in self.items():
            shard.image.copy_((weights if values is None else values)[name])
        self._spread()

    def _spread(self) -> None:
        """Let every worker have all images whole."""
        if self._zero_stage == 0:
            for rank in range(dist.get_world_size()):
                for parameter, own in zip(self._parameters, self._cut(rank), strict=True):
                    if own:
                        dist.broadcast(parameter.detach().view(-1)[own.start : own.stop], src=rank)
        elif self._zero_stage == 3:
            self._optimizer.checkpoint_event_prologue()  # forget what is gathered,
            self._optimizer.checkpoint_event_epilogue()  # and gather the small parameters, which stay whole, anew
        else:
            for flat in getattr(self._optimizer, "bit16_groups_flat", None) or self._optimizer.bf16_groups_flat:
                dist.all_gather_into_tensor(flat, flat.chunk(dist.get_world_size())[dist.get_rank()])

    def _flats(self) -> list[Tensor]:
        if self._zero_stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return [flat for group in self._adam.param_groups for flat in group["params"]]

    def _find(self) -> list[Shard | None]:
        if self._zero_stage == 0:
            owned = self._cut(dist.get_rank())
            return [
                Shard(each, each, 0, range(each.numel()), own)
                for each, own in zip(self._parameters, owned, strict=True)
            ]
        return [self._of_range(each) if self._zero_stage < 3 else self._of_each(each) for each in self._parameters]

    def _of_range(self, parameter: Any) -> Shard | None:
        """Return the shard of a parameter in stages 1 and 2, where a worker may have no part of it."""
        if (place := parameter._hp_mapping) is None:
            return None
        (flat,) = self._adam.param_groups[place.param_group_index]["params"]
        start, length = place.lp_fragment_address.start, place.lp_fragment_address.numel
        own = range(start, start + length)
        return Shard(parameter, flat, place.hp_fragment_address.start, own, own)

    def _of_each(self, parameter: Any) -> Shard:
        """Return the shard of a parameter in stage 3."""
        zero = self._optimizer
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = length * dist.get_rank()
        own = range(start, min(start + length, parameter.ds_numel))  # without the padding
        return Shard(parameter, zero.fp32_partitioned_groups_flat[group], offset, own, own)

    def _cut(self, rank: int) -> list[range]:
        return cut([each.numel() for each in self._parameters], rank, dist.get_world_size())


def cut(sizes: Sequence[int], rank: int, num_workers: int) -> list[range]:
    """Return what a worker has of each parameter if all, laid end to end, are cut into equal parts.

    >>> cut([4, 6], 0, 2), cut([4, 6], 1, 2)
    ([range(0, 4), range(0, 1)], [range(4, 4), range(1, 6)])
    """
    total, offset, ranges = sum(sizes), 0, []
    first, last = total * rank // num_workers, total * (rank + 1) // num_workers
    for size in sizes:
        start, stop = (min(max(end - offset, 0), size) for end in (first, last))
        ranges.append(range(start, stop))
        offset += size
    return ranges
