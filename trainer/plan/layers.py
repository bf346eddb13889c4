"""Play the operations of a network on a tape: what each makes, saves for the backward, and makes in the backward.

Found by torch's saved-tensor hooks and a log of its operations (torch 2.14); tests compare the sums with torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.plan.tape import FLOAT32_BYTES, Array, Grads, Storage, Tape


def linear(tape: Tape, name: str, x: Array, out_size: int, *, bias: bool = True) -> Array:
    """x @ W + b over the last dimension, plus its adapter if it has one: B(A(x))·scaling."""
    rank = tape.adapter_rank(name)
    out = _dense(tape, f"{name}.base_layer" if rank else name, x, out_size, bias=bias)
    if not rank:
        return out
    down = _dense(tape, f"{name}.lora_A.default", x, rank, bias=False, is_adapter=True)
    up = _dense(tape, f"{name}.lora_B.default", down, out_size, bias=False, is_adapter=True)
    del down
    return add(tape, out, times_number(tape, up))


def _dense(tape: Tape, name: str, x: Array, out_size: int, *, bias: bool, is_adapter: bool = False) -> Array:
    in_size, rows = x.shape[-1], x.numel // x.shape[-1]
    is_trained = tape.parameter(f"{name}.weight", (out_size, in_size), is_adapter=is_adapter)
    if bias:
        tape.parameter(f"{name}.bias", (out_size,))
    out = tape.new((*x.shape[:-1], out_size), x.itemsize)
    flops, itemsize, full_name = 2 * rows * in_size * out_size, x.itemsize, tape.full_name(name)
    has_edge, in_bytes, weight_bytes = x.edge is not None, x.nbytes, in_size * out_size * x.itemsize
    tape.work(flops, in_bytes + weight_bytes)

    def backward(grads: Grads) -> Grads:
        tape.work(
            flops * (has_edge + is_trained), (weight_bytes + rows * out_size * itemsize) * (has_edge + is_trained)
        )
        grad_x = tape.storage(in_bytes) if has_edge else None
        if is_trained:
            weight = tape.storage(weight_bytes)
            if bias:
                tape.take_gradient(f"{full_name}.bias", tape.storage(out_size * itemsize))
            tape.take_gradient(f"{full_name}.weight", weight)
        return [grad_x]

    tape.record([x], [out], [x] if is_trained else [], backward, is_trained=is_trained)
    return out


def _unary(tape: Tape, x: Array, *, saves: bool) -> Array:
    out = tape.new(x.shape, x.itemsize)
    num_bytes = x.nbytes
    tape.record([x], [out], [x] if saves else [], lambda grads: [tape.storage(num_bytes)])
    return out


def activation(tape: Tape, x: Array) -> Array:
    """GELU, SiLU and their kin; likewise clamp."""
    return _unary(tape, x, saves=True)


def times_number(tape: Tape, x: Array) -> Array:
    """x · a number, or x / a number."""
    return _unary(tape, x, saves=False)


def plus_number(tape: Tape, x: Array) -> Array:
    """x + a number."""
    out = tape.new(x.shape, x.itemsize)
    tape.record([x], [out], [], lambda grads: [grads[0]])
    return out


def layer_norm(tape: Tape, x: Array, name: str | None = None) -> Array:
    """A layer norm over the last dimension, with weight and bias if it has a name. It saves x, mean and deviation."""
    out = tape.new(x.shape, x.itemsize)
    is_trained = _affine(tape, name, x.shape[-1])
    rows = x.numel // x.shape[-1]
    mean, deviation = tape.new((rows,), FLOAT32_BYTES), tape.new((rows,), FLOAT32_BYTES)
    num_bytes = x.nbytes
    tape.record([x], [out], [x, mean, deviation], lambda grads: [tape.storage(num_bytes)], is_trained=is_trained)
    return out


def group_norm(tape: Tape, name: str, x: Array, num_groups: int) -> Array:
    """A group norm of (batch, channels, height, width). It saves x, mean and deviation."""
    out = tape.new(x.shape, x.itemsize)
    is_trained = _affine(tape, name, x.shape[1])
    sums = [tape.new((x.shape[0] * num_groups,), x.itemsize) for _ in range(2)]
    num_bytes = x.nbytes
    tape.record([x], [out], [x, *sums], lambda grads: [tape.storage(num_bytes)], is_trained=is_trained)
    return out


def _affine(tape: Tape, name: str | None, size: int) -> bool:
    if name is None:
        return False
    tape.parameter(f"{name}.bias", (size,))
    return tape.parameter(f"{name}.weight", (size,))


def rms_norm(tape: Tape, name: str, x: Array) -> Array:
    """An RMS norm over the last dimension. On a CPU it is six operations in float32, of which three save."""
    size, rows, full_name = x.shape[-1], x.numel // x.shape[-1], tape.full_name(f"{name}.weight")
    is_trained = tape.parameter(f"{name}.weight", (size,))
    deviation = tape.new((rows,), FLOAT32_BYTES)
    num_bytes, count, weight_bytes = x.nbytes, x.numel, size * x.itemsize
    if tape.is_gpu:
        out = tape.new(x.shape, x.itemsize)
        saved = [x, deviation]
    else:
        upcast = cast(tape, Array(x.shape, x.itemsize, x.storage), FLOAT32_BYTES)
        tape.new(x.shape, FLOAT32_BYTES)  # squared
        normed = tape.new(x.shape, FLOAT32_BYTES)
        out = cast(tape, tape.new(x.shape, FLOAT32_BYTES), x.itemsize)
        saved = [upcast, deviation, *([normed] if is_trained else [])]
        del upcast, normed

    def backward(grads: Grads) -> Grads:
        if is_trained:
            tape.storage(num_bytes)
            tape.take_gradient(full_name, tape.storage(weight_bytes))
        if not tape.is_gpu:
            held = [tape.storage(count * FLOAT32_BYTES) for _ in range(4)]
            del held
        return [tape.storage(num_bytes)]

    tape.record([x], [out], saved, backward, is_trained=is_trained)
    return out


def cast(tape: Tape, x: Array, itemsize: int) -> Array:
    """x in numbers of so many bytes; x itself if it has them."""
    if x.itemsize == itemsize:
        return x
    out = tape.new(x.shape, itemsize)
    num_bytes = x.nbytes
    tape.record([x], [out], [], lambda grads: [tape.storage(num_bytes)])
    return out


def multiply(tape: Tape, x: Array, factor: Array) -> Array:
    """x · factor, which is x's shape or smaller and is broadcast. Each is saved for the other's gradient."""
    out = tape.new(x.shape, x.itemsize)
    edges, sizes = (x.edge is not None, factor.edge is not None), (x.nbytes, factor.nbytes)

    def backward(grads: Grads) -> Grads:
        made: Grads = [tape.storage(sizes[0]) if edges[0] else None]
        if not edges[1]:
            return [*made, None]
        product = tape.storage(sizes[0])
        return [*made, product if sizes[0] == sizes[1] else tape.storage(sizes[1])]

    saved = [*([factor] if edges[0] else []), *([x] if edges[1] else [])]
    tape.record([x, factor], [out], saved, backward)
    return out


def add(tape: Tape, x: Array, y: Array) -> Array:
    """x + y, of which y may be smaller and is broadcast. It saves nothing."""
    out = tape.new(x.shape, x.itemsize)
    is_broadcast, has_edge, y_bytes = y.numel < x.numel, y.edge is not None, y.nbytes

    def backward(grads: Grads) -> Grads:
        grad = grads[0]
        return [grad, (tape.storage(y_bytes) if is_broadcast else grad) if has_edge else None]

    tape.record([x, y], [out], [], backward)
    return out


def concat(tape: Tape, parts: Sequence[Array], axis: int) -> Array:
    """The parts along an axis, in new memory. Their gradients are views."""
    shape = list(parts[0].shape)
    shape[axis] = sum(each.shape[axis] for each in parts)
    out = tape.new(tuple(shape), parts[0].itemsize)
    count = len(parts)
    tape.record(parts, [out], [], lambda grads: [grads[0]] * count)
    return out


def chunk(tape: Tape, x: Array, count: int, axis: int) -> list[Array]:
    """`count` equal parts of x, views of it. One gradient is made from all of theirs."""
    sizes = [x.shape[axis] // count] * count
    return split(tape, x, sizes, axis)


def split(tape: Tape, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    """Parts of x, views of it. One gradient is made from all of theirs."""
    parts = [Array((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.itemsize, x.storage) for size in sizes]
    num_bytes = x.nbytes
    tape.record([x], parts, [], lambda grads: [tape.storage(num_bytes)])
    return parts


def part(tape: Tape, x: Array, size: int, axis: int) -> Array:
    """A slice of x, a view of it. Its gradient is as large as x's."""
    out = Array((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.itemsize, x.storage)
    num_bytes = x.nbytes
    tape.record([x], [out], [], lambda grads: [tape.storage(num_bytes)])
    return out


def contiguous(tape: Tape, x: Array, *, is_already: bool) -> Array:
    """x in memory of its own, unless it lies in one piece already."""
    return x if is_already else _copied(tape, x)


def _copied(tape: Tape, x: Array) -> Array:
    out = tape.new(x.shape, x.itemsize)
    tape.record([x], [out], [], lambda grads: [grads[0]])
    return out


def attention(tape: Tape, query: Array, key: Array, value: Array) -> Array:
    """softmax(q·kᵀ)·v of (batch, tokens, heads, channels), as one kernel that recomputes its scores backward."""
    batch, tokens, heads, channels = query.shape
    out = tape.new(query.shape, query.itemsize)
    sums = tape.new((batch, heads, tokens), FLOAT32_BYTES)
    product = 2 * batch * heads * tokens * key.shape[1] * channels
    tape.work(2 * product, query.nbytes + key.nbytes + value.nbytes)
    sizes, needed = [each.nbytes for each in (query, key, value)], [query.edge, key.edge, value.edge]
    has_edge = [each is not None for each in needed]
    del needed

    def backward(grads: Grads) -> Grads:
        tape.work(5 * product, sum(sizes))
        made: list[Storage] = [tape.storage(size) for size in sizes]
        return [grad if wanted else None for grad, wanted in zip(made, has_edge, strict=True)]

    tape.record([query, key, value], [out], [query, key, value, out, sums], backward)
    return out


def conv(tape: Tape, name: str, x: Array, out_channels: int, size: int) -> Array:
    """A convolution of (batch, channels, height, width) that keeps height and width. It saves x, trained or not."""
    batch, in_channels, height, width = x.shape
    is_trained = tape.parameter(f"{name}.weight", (out_channels, in_channels, size, size))
    tape.parameter(f"{name}.bias", (out_channels,))
    out = tape.new((batch, out_channels, height, width), x.itemsize)
    flops = 2 * batch * out_channels * height * width * in_channels * size * size
    num_bytes, has_edge = x.nbytes, x.edge is not None
    tape.work(flops, num_bytes)

    def backward(grads: Grads) -> Grads:
        tape.work(flops * (has_edge + is_trained), num_bytes)
        grad_x = tape.storage(num_bytes) if has_edge else None
        if not tape.is_gpu:
            tape.storage(num_bytes)  # oneDNN's layout of the same
        return [grad_x]

    tape.record([x], [out], [x], backward, is_trained=is_trained)
    return out


def upsample(tape: Tape, x: Array, scale: int) -> Array:
    """x with each pixel repeated `scale` times in both directions."""
    batch, channels, height, width = x.shape
    out = tape.new((batch, channels, height * scale, width * scale), x.itemsize)
    num_bytes = x.nbytes
    tape.record([x], [out], [], lambda grads: [tape.storage(num_bytes)])
    return out
