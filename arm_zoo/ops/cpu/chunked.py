"""The `torch` backend: convolution and selective scan in plain PyTorch, laid out for speed, on any device.

A step's state is (directions, images, d_state, channels), so that products per channel or state are contiguous. Time
is cut into chunks of a few large operations; only the recurrence runs step by step, on arrays that fit the cache.
"""

import math
import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops.layout import CHUNK, ScanInputs, Tensors, empty_states, in_order, is_per_image, state_dtype

_LOG2E = math.log2(math.e)
_WORK_ELEMENTS = 2**20  # of one work array: 4 MB in float32, about the cache that two CPU cores share
_kept = threading.local()


def _softplus(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.softplus(x)
    # F.softplus costs as much as the scan on the CPU; vectorised, log1p(y) = 2 atanh(y / (2 + y)) with y = exp(-|x|).
    y = x.abs().mul_(-_LOG2E).exp2_()
    y.div_(y + 2).atanh_()
    return torch.add(x.relu(), y, alpha=2)


def _work_arrays(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Three uninitialised arrays of at least `size` elements, (3, size)."""
    if device.type != "cpu":
        return torch.empty(3, size, dtype=dtype, device=device)
    # kept per thread: mapping freed pages again at every call costs more than the scan of a small model
    kept: dict[torch.dtype, Tensor] = _kept.__dict__.setdefault("arrays", {})
    if dtype not in kept or kept[dtype].shape[1] < size:
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside it
            kept[dtype] = torch.empty(3, size, dtype=dtype)
    return kept[dtype]


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _Scan:
    """The inputs of one scan, cut into blocks of images and chunks of steps on demand, and its work arrays."""

    def __init__(self, inputs: ScanInputs, least_steps: int) -> None:
        u, self.delta, A, _, _, D, delta_bias, _, self.delta_softplus, *_ = inputs
        directions, batch, length, channels = inputs.shape
        self.rows, self.directions = inputs.rows, torch.arange(directions, device=u.device)[:, None]
        self.dtype = state_dtype(u.dtype)
        self.A = A.to(self.dtype).transpose(1, 2)[:, None].contiguous()  # (K, D, S) -> (K, 1, S, D)
        self.A_log2 = self.A * _LOG2E  # exp2 takes a third of the time of exp on the CPU
        self.D = D.to(self.dtype)[:, None]
        self.delta_bias = 0.0 if delta_bias is None else delta_bias.to(self.dtype)[:, None]
        # as many images as fit at a chunk of `least_steps`, then as many steps as fit with them
        image = directions * A.shape[-1] * channels
        block, steps = max(1, min(batch, _WORK_ELEMENTS // (least_steps * image))), least_steps
        while steps < CHUNK and 2 * steps * block * image <= _WORK_ELEMENTS:
            steps *= 2
        self.blocks, self.times = _slices(batch, block), _slices(length, steps)
        self._work = _work_arrays(min(steps, length) * block * image, self.dtype, u.device)

    def zero_state(self, block: slice) -> Tensor:
        directions, _, d_state, channels = self.A.shape
        return self.A.new_zeros(directions, block.stop - block.start, d_state, channels)

    def work(self, which: int, state: Tensor, time: slice) -> Tensor:
        """An uninitialised (steps, K, images, S, D) array; three of them can be held at a time."""
        steps = time.stop - time.start
        return self._work[which][: steps * state.numel()].view(steps, *state.shape)

    def _at(self, block: slice, time: slice) -> tuple[slice | Tensor, ...]:
        """The index of a chunk's rows (K, steps, images, C) in sequences (K, L, B, C)."""
        if self.rows is None:
            return slice(None), time, block
        return self.directions, self.rows[:, time], block

    def cut(self, sequence: Tensor, block: slice, time: slice) -> Tensor:
        """(K, B, L, C) -> (steps, K, images, C) in the dtype of the state."""
        return sequence.transpose(1, 2)[self._at(block, time)].transpose(0, 1).to(self.dtype)

    def put(self, sequence: Tensor, block: slice, time: slice, part: Tensor) -> None:
        """The reverse of `cut`."""
        sequence.transpose(1, 2)[self._at(block, time)] = part.transpose(0, 1).to(sequence.dtype)

    def step_size(self, block: slice, time: slice) -> tuple[Tensor, Tensor]:
        raw = self.cut(self.delta, block, time) + self.delta_bias
        return (_softplus(raw) if self.delta_softplus else raw), raw

    def recur(self, state: Tensor, delta: Tensor, u: Tensor, B: Tensor, time: slice) -> tuple[Tensor, Tensor]:
        """Decays and states after every step of a chunk, from the state before it; both in work arrays 0 and 1."""
        decay, states = self.work(0, state, time), self.work(1, state, time)
        torch.mul(delta[..., None, :], self.A_log2, out=decay).exp2_()
        torch.mul((delta * u)[..., None, :], B[..., None], out=states)
        for after, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
            state = after.addcmul_(factor, state)
        return decay, states


def _rows(matrix: Tensor) -> Tensor:
    """(..., n, m) -> (rows, n, m), for the batched matrix products."""
    return matrix.reshape(-1, *matrix.shape[-2:])


def _sum_states(x: Tensor) -> Tensor:
    """(..., S, D) -> (..., D), destroying x: halves are added to each other, three times as fast as `sum` here."""
    while (states := x.shape[-2]) > 1:
        half = states // 2
        x[..., :half, :] += x[..., states - half :, :]
        x = x[..., : states - half, :]
    return x[..., 0, :]


def _to_tokens(sequences: Tensor, order: Tensor | None) -> Tensor:
    """(L, K, ...) in scan order -> in token order, read through the inverse tables: every run gives the same bits."""
    if order is None:
        return sequences
    if is_per_image(order):
        return torch.take_along_dim(sequences, order.argsort(dim=-1).permute(2, 1, 0)[..., None], dim=0)
    directions, length = order.shape
    rows = order.argsort(dim=1).t() * directions + torch.arange(directions, device=order.device)
    return sequences.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (length, directions))


def _of_block(order: Tensor | None, block: slice) -> Tensor | None:
    """The table of a block of images."""
    return order[block] if is_per_image(order) else order


def selective_scan(inputs: ScanInputs, save_states: bool, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `arm_zoo.ops.selective_scan`: its output, gated only where no states are saved, and the saved states."""
    inputs = inputs.with_whole_steps()
    u, order = inputs.u.expand(inputs.shape), inputs.order
    # blocks of many images and short chunks: few, large operations, above all in the recurrence
    scan = _Scan(inputs, least_steps=2)
    directions, batch, length, channels = u.shape
    y = u.new_empty(batch, length, channels)
    saved = empty_states(u, inputs.A, scan.dtype, save=save_states)
    for block in scan.blocks:
        state = scan.zero_state(block)
        outputs = scan.A.new_empty(length, directions, block.stop - block.start, channels)
        for time in scan.times:
            if save_states and time.start % CHUNK == 0:
                saved[:, block, time.start // CHUNK] = state
            u_t = scan.cut(u, block, time)
            delta_t, _ = scan.step_size(block, time)
            _, states = scan.recur(state, delta_t, u_t, scan.cut(inputs.B, block, time), time)
            readout = _rows(scan.cut(inputs.C, block, time)[..., None, :])
            # y = C h + D u, one (1, S) x (S, D) product per step, direction and image
            out = _rows(outputs[time][..., None, :])
            torch.baddbmm(_rows((u_t * scan.D)[..., None, :]), readout, _rows(states), out=out)
            state = states[-1].clone()
        tokens = _to_tokens(outputs, _of_block(order, block))
        merged = (tokens.mean(1) if inputs.mean else tokens.sum(1)).transpose(0, 1)
        y[block] = merged if gate is None else merged * F.silu(gate[block])
    return y, saved


def selective_scan_backward(grad: Tensor, inputs: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D, delta_bias; a state's is g_t = C_t grad_t + exp(d_{t+1} A) g_{t+1}."""
    scan = _Scan(inputs, least_steps=CHUNK)
    u, delta, _, B, C, _, _, _, delta_softplus, order, *_ = inputs
    directions, u = len(inputs.A), u.expand(inputs.shape)
    grad_u, grad_delta, grad_B, grad_C = (t.new_empty(t.shape) for t in (u, delta, B, C))
    grad_A, grad_D, grad_bias = torch.zeros_like(scan.A), torch.zeros_like(scan.D), torch.zeros_like(scan.D)
    for block in scan.blocks:
        carry = scan.zero_state(block)
        grad_exponent = torch.zeros_like(carry)  # times delta: each image's share of the gradient of A
        grad_y = grad[block].to(scan.dtype) * inputs.share
        # (images, L, D) -> (K, images, L, D) in scan order
        grad_y = in_order(grad_y[None], _of_block(order, block)).expand(directions, -1, -1, -1)
        for chunk, time in reversed(list(enumerate(scan.times))):
            start = saved[:, block, chunk]
            u_t, B_t, C_t = (scan.cut(t, block, time) for t in (u, B, C))
            delta_t, raw_delta = scan.step_size(block, time)
            y_t = grad_y[:, :, time].permute(2, 0, 1, 3)
            decay, states = scan.recur(start, delta_t, u_t, B_t, time)

            grad_states = scan.work(2, start, time)
            torch.mul(y_t[..., None, :], C_t[..., None], out=grad_states)
            grad_states[-1] += carry
            for t in range(len(decay) - 1, 0, -1):
                grad_states[t - 1].addcmul_(decay[t], grad_states[t])

            columns = y_t[..., None]
            scan.put(grad_C, block, time, torch.bmm(_rows(states), _rows(columns)).view(C_t.shape))
            columns = (delta_t * u_t)[..., None]
            scan.put(grad_B, block, time, torch.bmm(_rows(grad_states), _rows(columns)).view(B_t.shape))
            into_state = torch.bmm(_rows(B_t[..., None, :]), _rows(grad_states)).view(u_t.shape)  # sum over S of B g
            scan.put(grad_u, block, time, into_state * delta_t + y_t * scan.D)
            grad_D += (y_t * u_t).sum((0, 2))[:, None]

            # of delta A: g_t a_t h_{t-1}
            exponent = grad_states.mul_(decay)
            carry = exponent[0].clone()
            exponent[1:].mul_(states[:-1])
            exponent[0].mul_(start)
            for step, size in zip(exponent.unbind(0), delta_t.unbind(0), strict=True):
                grad_exponent.addcmul_(step, size[..., None, :])
            grad_delta_t = into_state * u_t + _sum_states(exponent.mul_(scan.A))
            if delta_softplus:
                grad_delta_t *= torch.sigmoid(raw_delta).masked_fill_(raw_delta > 20, 1.0)  # as F.softplus is there
            scan.put(grad_delta, block, time, grad_delta_t)
            grad_bias += grad_delta_t.sum((0, 2))[:, None]
        grad_A += grad_exponent.sum(1, keepdim=True)
    grad_A = grad_A[:, 0].transpose(1, 2).contiguous()
    grad_u = grad_u if inputs.u.ndim == 4 else grad_u.sum(0)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D[:, 0].contiguous(), grad_bias[:, 0].contiguous()


def _gather_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensors:
    """The depthwise convolution before its SiLU, with its input (B, K * D, taps - 1 + L, 1), weight and bias."""
    (directions, channels, taps), (batch, length, _) = weight.shape, x.shape
    dtype = state_dtype(x.dtype)
    steps = torch.arange(length, device=x.device).expand(directions, -1) if order is None else order
    steps = F.pad(steps, (taps - 1, 0), value=length)  # the token after the last one is the zero padding
    x = F.pad(x.to(dtype), (0, 0, 0, 1))
    if is_per_image(steps):  # the images' tokens as rows of one table
        first = torch.arange(batch, device=x.device)[:, None, None] * (length + 1)
        x = x.flatten(0, 1).index_select(0, (first + steps.transpose(1, 2)).flatten())
    else:
        x = x.index_select(1, steps.t().flatten())
    x = x.view(batch, taps - 1 + length, 1, directions * channels).permute(0, 3, 1, 2)  # channels innermost: faster
    weight, bias = weight.to(dtype).reshape(-1, 1, taps, 1), bias.to(dtype).flatten()
    return F.conv2d(x, weight, bias, groups=directions * channels), x, weight, bias


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See `arm_zoo.ops.causal_conv`. The result is (K, B, L, D) with (K, D) innermost in memory."""
    directions, channels, _ = weight.shape
    out = F.silu(_gather_conv(x, weight, bias, order)[0], inplace=True).to(x.dtype)
    out = out.permute(0, 2, 3, 1).contiguous()  # (B, K * D, L, 1) -> (B, L, 1, K * D), no copy: channels are innermost
    return out.view(*x.shape[:2], directions, channels).permute(2, 0, 1, 3)


def causal_conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensors:
    """Gradients of x, weight and bias, given that of the output (K, B, L, D); the pre-activation is recomputed."""
    directions, channels, taps = weight.shape
    before, padded, conv_weight, conv_bias = _gather_conv(x, weight, bias, order)
    grad = grad.to(before.dtype).permute(1, 2, 0, 3).reshape(*x.shape[:2], 1, directions * channels)
    grad = grad.permute(0, 3, 1, 2)
    slope, groups = torch.sigmoid(before), len(conv_bias)
    grad = grad * slope * (1 + before * (1 - slope))  # derivative of SiLU
    strides = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "output_padding": [0, 0]}
    grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, padded, conv_weight, [groups], transposed=False, groups=groups, output_mask=[True] * 3, **strides
    )
    # (B, K * D, taps - 1 + L, 1) -> (L, K, B, D): every direction's gradient at every step
    grad_steps = grad_padded[:, :, taps - 1 :, 0].permute(2, 1, 0).unflatten(1, (directions, channels)).transpose(2, 3)
    grad_x = _to_tokens(grad_steps, order).sum(1).transpose(0, 1).to(x.dtype).contiguous()
    return grad_x, grad_weight.view_as(weight).to(weight.dtype), grad_bias.view_as(bias).to(bias.dtype)
