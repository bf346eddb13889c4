"""Play a network on shapes: count its parameters, FLOPs and bytes moved, and follow what memory is alive. Pure.

    tape = Tape(Training.full())
    out = flux_forward(tape, config, inputs)  # forward, written as diffusers writes it
    tape.backward(out)
    tape.peak_bytes, tape.flops, tape.parameters

An Array is a tensor without numbers. It holds its Storage, and so does whatever saves it for the backward: a storage is
alive as long as Python refers to it, as torch's are, so that the peak is found and not estimated. layers.py has the
operations. FLOPs are counted as torch's flop counter does: matrix products, convolutions and attention.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from trainer.plan.training import Training

FLOAT32_BYTES = 4
Shape = tuple[int, ...]
Grads = list["Storage | None"]


class Storage:
    """Bytes that are alive on a tape until nothing refers to this object."""

    __slots__ = ("__weakref__", "_tape", "bytes")

    def __init__(self, tape: Tape, num_bytes: int) -> None:
        self._tape, self.bytes = tape, num_bytes
        tape.live_bytes += num_bytes
        tape.peak_bytes = max(tape.peak_bytes, tape.live_bytes)

    def __del__(self) -> None:
        self._tape.live_bytes -= self.bytes


class Node:
    """An operation to go backward through. edges: the node and output that made each input, None without gradient."""

    __slots__ = ("backward", "edges", "num_outputs", "saved", "sequence")

    def __init__(self, sequence: int, edges: Sequence[Edge | None], num_outputs: int) -> None:
        self.sequence, self.edges, self.num_outputs = sequence, tuple(edges), num_outputs
        self.saved: tuple[object, ...] = ()
        self.backward: Callable[[Grads], Grads] | None = None  # gradients of outputs -> of inputs


Edge = tuple[Node, int]


@dataclass(slots=True)
class Array:
    """A tensor without numbers: its shape, the bytes of a number, its storage, and what made it."""

    shape: Shape
    itemsize: int
    storage: Storage
    edge: Edge | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def view(self, *shape: int) -> Array:
        """Return the same numbers in another shape, in the same memory."""
        assert prod(shape) == self.numel, f"{self.shape} is no {shape}"
        return Array(shape, self.itemsize, self.storage, self.edge)


@dataclass(slots=True)
class Tape:
    """What has been played. keeps_gradients: gradients of parameters stay alive, as in plain torch; an engine takes
    each away as it comes. is_gpu: RMS norms are one kernel, and convolutions need no copy in another layout.
    """

    training: Training
    keeps_gradients: bool = True
    is_gpu: bool = False
    parameters: dict[str, Shape] = field(default_factory=dict)
    trained: dict[str, Shape] = field(default_factory=dict)
    live_bytes: int = 0
    peak_bytes: int = 0
    flops: int = 0
    moved_bytes: int = 0
    _sequence: int = 0
    _prefix: str = ""
    _has_grad: bool = True
    _discards: bool = False
    _num_new: int = 0
    _num_new_at_last_save: int = 0
    _end: int | None = None
    _gradients: dict[str, Storage] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(map(prod, self.parameters.values()))

    def new(self, shape: Shape, itemsize: int) -> Array:
        """Return a new array that no gradient flows into."""
        self._num_new += 1
        num_bytes = 0 if self._is_past_the_end else prod(shape) * itemsize
        self.moved_bytes += num_bytes
        return Array(shape, itemsize, Storage(self, num_bytes))

    def work(self, flops: int, moved_bytes: int) -> None:
        """Count the FLOPs of an operation, and what it reads."""
        if not self._is_past_the_end:
            self.flops += flops
            self.moved_bytes += moved_bytes

    @property
    def _is_past_the_end(self) -> bool:
        """Whether all is made that the backward of a checkpoint needs: torch plays no further."""
        return self._end is not None and self._num_new > self._end

    def storage(self, num_bytes: int) -> Storage:
        """Return new memory, as of a gradient."""
        self.moved_bytes += num_bytes
        return Storage(self, num_bytes)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put a name before those of parameters within the context."""
        before, self._prefix = self._prefix, f"{self._prefix}{name}."
        yield
        self._prefix = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self._has_grad = self._has_grad, False
        yield
        self._has_grad = before

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Let parameters within the context have this name before theirs, and none of them be trained."""
        before, self.training = self.training, Training.frozen()
        with self.scope(name):
            yield
        self.training = before

    def parameter(self, name: str, shape: Shape, *, is_adapter: bool = False) -> bool:
        """Note a parameter, and return whether it is trained now."""
        name = self._prefix + name
        self.parameters[name] = shape
        if is_trained := is_adapter or self.training.trains_all:
            self.trained[name] = shape
        return is_trained and self._has_grad

    def adapter_rank(self, layer: str) -> int:
        return self.training.rank_of(self._prefix + layer)

    def take_gradient(self, name: str, gradient: Storage) -> None:
        """Add the gradient of a parameter to what there is of it."""
        if self.keeps_gradients and name not in self._gradients:
            self._gradients[name] = gradient

    def full_name(self, name: str) -> str:
        return self._prefix + name

    def record(
        self,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        saved: Sequence[Array],
        backward: Callable[[Grads], Grads],
        *,
        is_trained: bool = False,
    ) -> None:
        """Let outputs be made from inputs: `saved` stay alive until `backward` has run."""
        edges = [each.edge for each in inputs]
        if not self._has_grad or not (is_trained or any(edges)):
            return
        if saved:  # an operation that saves its inputs alone is not played for the backward of a checkpoint
            own = {id(each.storage) for each in inputs}
            makes_saved = any(id(each.storage) not in own for each in saved)
            self._num_new_at_last_save = self._num_new - (0 if makes_saved else len(outputs))
            if self._discards:
                saved = ()
        self._sequence += 1
        node = Node(self._sequence, edges, len(outputs))
        node.saved = tuple(each.storage for each in saved)
        node.backward = backward
        for index, output in enumerate(outputs):
            output.edge = (node, index)

    def leaf(self, like: Array) -> Array:
        """Return the same memory as the beginning of a graph of its own, where gradients are collected."""
        return Array(like.shape, like.itemsize, like.storage, (Node(0, (), 1), 0))

    def checkpoint(self, run: Callable[..., tuple[Array, ...]], *inputs: Array) -> tuple[Array, ...]:
        """Play `run` on the inputs; keep nothing but these for the backward, which plays it again."""
        if not self._has_grad:
            return run(*inputs)
        prefix, training, edged = self._prefix, self.training, [each.edge is not None for each in inputs]
        kept = [Array(each.shape, each.itemsize, each.storage) for each in inputs]
        started, self._discards = self._num_new, True
        outputs = run(*(self.leaf(each) if has_edge else each for each, has_edge in zip(kept, edged, strict=True)))
        self._discards = False
        num_needed = self._num_new_at_last_save - started
        for each in outputs:
            each.edge = None

        def backward(grads: Grads) -> Grads:
            before, self._prefix, self.training = (self._prefix, self.training), prefix, training
            again = [self.leaf(each) if has_edge else each for each, has_edge in zip(kept, edged, strict=True)]
            self._end = self._num_new + num_needed
            made = run(*again)
            self._end = None
            edges = [each.edge for each in made]
            del made
            leaves = self._go_back(edges, grads)
            self._prefix, self.training = before
            return [leaves.get(id(each.edge[0])) if each.edge else None for each in again]

        self.record(inputs, outputs, (), backward, is_trained=True)
        return outputs

    def backward(self, array: Array) -> None:
        """Play the backward from an array, which the caller should not hold any longer than torch's would."""
        self._go_back([array.edge], [self.storage(array.nbytes)])

    def _go_back(self, edges: Sequence[Edge | None], grads: Grads) -> dict[int, Storage]:
        """Run nodes from the last to the first. Return what reached the leaves, by the id of their node."""
        waiting = _Waiting(self)
        waiting.give(edges, grads)
        del edges
        leaves: dict[int, Storage] = {}
        while waiting:
            node, gradients = waiting.take_last()
            if node.backward is None:
                if gradients[0] is not None:
                    leaves[id(node)] = gradients[0]
                continue
            made, targets = node.backward(gradients), node.edges
            node.saved, node.backward, node.edges = (), None, ()
            del node, gradients
            waiting.give(targets, made)
        return leaves


class _Waiting:
    """Nodes that have gradients and have not run; the last one made runs first, as in torch."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._nodes: dict[int, tuple[Node, Grads]] = {}
        self._order: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._order)

    def give(self, edges: Sequence[Edge | None], grads: Grads) -> None:
        """Add gradients to what their nodes have, and empty the list, so that it keeps none alive."""
        while grads:
            edge, grad = edges[len(grads) - 1], grads.pop()
            if edge is None or grad is None:
                continue
            node, output = edge
            if id(node) not in self._nodes:
                self._nodes[id(node)] = node, [None] * node.num_outputs
                heapq.heappush(self._order, (-node.sequence, id(node)))
            before = self._nodes[id(node)][1]
            before[output] = grad if before[output] is None else self._tape.storage(grad.bytes)

    def take_last(self) -> tuple[Node, Grads]:
        _, key = heapq.heappop(self._order)
        return self._nodes.pop(key)
