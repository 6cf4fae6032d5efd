"""Where the output of a selective scan comes from: which directions and which tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from arm_zoo.ops import selective_scan
from arm_zoo.ops.layout import ScanInputs

_LOG = torch.ops.arm_zoo.selective_scan_log
_OPERATORS = (torch.ops.arm_zoo.selective_scan, torch.ops.arm_zoo.selective_scan_norm, _LOG)


class ScanRecorder(TorchFunctionMode):
    """A context that keeps the inputs of the last scan that ran inside it.

    The backend must run the scan as an operator of its own, as "torch" does. The reference has no operators, and
    backends with kernels of their own have one for the whole mixer when gradients are needed.
    """

    last: ScanInputs | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS:
            given = ScanInputs(*args[: len(ScanInputs._fields) - 1])
            self.last = given._replace(log_rates=func is _LOG).with_rates()
        return func(*args, **(kwargs or {}))


def contributions(scan: ScanInputs) -> Tensor:
    """What each direction contributes to the merged output of every token, (directions, length) in token order.

    Let y = y_1 + ... + y_K be a token's merged output over the channels, before the norm and the gate, where y_k is
    what direction k adds to it: its output, skip D u included, and divided by K where directions are averaged. The
    contribution is the inner product of y_k and y. A token's contributions add up to the squared length of y, so that
    divided by it they are shares of 1; a negative one says that the direction works against the sum of all.
    """
    scan = scan.in_scan_order()
    outputs = []
    for k in range(len(scan.A)):
        own = ScanInputs._make(field[k : k + 1] if isinstance(field, Tensor) else field for field in scan)
        y = selective_scan(*own[:6], None, own.delta_bias, own.delta_softplus, own.order, own.delta_weight)
        outputs.append(y[0].float() * scan.share)  # (L, D) of the first image
    merged = torch.stack(outputs).sum(0)
    return torch.stack([(y * merged).sum(-1) for y in outputs])


def attention_row(scan: ScanInputs, token: int) -> Tensor:
    """How much of every token the scan lets through to one token, as in a row of attention: (length) in token order.

    Unrolled, the recurrence of direction k in channel c is y_t = sum over s <= t of alpha[t, s] u_s, plus D u_t, with
    alpha[t, s] = sum over states n of C_t[n] B_s[n] d_s exp(A[c, n] (d_{s+1} + ... + d_t)), where d is the step size.
    A direction's row is the mean over channels of |alpha[t, s]|, with 0 for tokens that it visits after t; rows are
    merged as the directions' outputs are, by their mean in ARM and Vim and by their sum in VMamba. The skip D, the
    gate and what lies around the scan are left out. Memory is linear in the length, as only row t is computed.
    """
    scan = scan.in_scan_order().with_whole_steps()
    merged = scan.u.new_zeros(scan.shape[2], dtype=torch.float32)
    for k, A in enumerate(scan.A.float()):
        tokens = torch.arange(len(merged), device=A.device) if scan.order is None else scan.order[k]
        end = int((tokens == token).nonzero()) + 1
        delta, B, C = (sequence[k, 0, :end].float() for sequence in (scan.delta, scan.B, scan.C))  # (end, D or N)
        delta = delta if scan.delta_bias is None else delta + scan.delta_bias[k].float()
        steps = F.softplus(delta) if scan.delta_softplus else delta
        since = steps.flip(0).cumsum(0).flip(0) - steps  # (end, D): d_{s+1} + ... + d_t
        weights = sum(C[-1, n] * B[:, n, None] * torch.exp(A[:, n] * since) for n in range(A.shape[1])) * steps
        merged[tokens[:end]] += scan.share * weights.abs().mean(-1)
    return merged
