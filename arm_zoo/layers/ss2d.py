"""VMamba's mixer: a selective scan over a map of tokens in four directions, SS2D (https://arxiv.org/abs/2401.10166)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.layers.init import fill, step_bias
from arm_zoo.layers.order import scan_order
from arm_zoo.layers.sizes import Device
from arm_zoo.ops import selective_scan
from arm_zoo.ops.fused import convolve, layer_norm_of, run_linear
from arm_zoo.ops.layout import decay_rates

DIRECTIONS = ("row", "column", "row_reversed", "column_reversed")

torch.fx.wrap("decay_rates")  # these ask for shapes, types and devices, which are not known while a model is traced
torch.fx.wrap("selective_scan")


@torch.fx.wrap
@register_notrace_function
@torch.jit.ignore
def order_for(x: Tensor) -> Tensor:
    """The order table of a map (B, H, W, C)."""
    return scan_order(x.shape[1], x.shape[2], DIRECTIONS, device=x.device)


@register_notrace_module
class SS2D(nn.Module):
    """Depth-wise 3x3 convolution, then one scan with one state in each direction, summed; no gate."""

    def __init__(
        self,
        dim: int,
        expand: float = 1.0,  # inner width as a multiple of `dim`
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        directions, inner = len(DIRECTIONS), round(expand * dim)
        self.dt_rank = math.ceil(dim / 16)  # from the model's width, not the inner one
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.dt_rank + 2, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, inner, self.dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, inner, **dd))
        # flat over directions and channels, as in the official code: by their axes weight decay tells A_log from D
        self.A_log = nn.Parameter(torch.empty(directions * inner, 1, **dd))
        self.D = nn.Parameter(torch.empty(directions * inner, **dd))
        self.out_norm = norm_layer(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what layers do not: projections, step sizes, decays and skips of the scans."""
        for weight in (self.x_proj_weight, self.dt_proj_weight):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        fill(self.dt_proj_bias, step_bias(self.dt_proj_bias.shape, self.dt_proj_bias.device))
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Mix a map (B, H, W, dim) along the directions of the (K, H * W) order table."""
        if not torch.jit.is_scripting():
            u, norm = convolve(self.conv2d, run_linear(self.in_proj, x)), layer_norm_of(self.out_norm)
            y = self.scan(u.flatten(1, 2), order, norm).unflatten(1, x.shape[1:3])
            return run_linear(self.out_proj, self.out_norm(y) if norm is None else y)
        u = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # channels last in memory
        return self.out_proj(self.out_norm(self.scan(u.flatten(1, 2), order).unflatten(1, x.shape[1:3])))

    def scan(self, u: Tensor, order: Tensor, norm: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """The sum of all directions' scans of tokens (B, L, inner), or its layer norm by weight, bias and eps."""
        directions = self.x_proj_weight.shape[0]
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1))  # of tokens, so one product for all directions
        projected = projected.unflatten(-1, (directions, -1)).permute(2, 0, 1, 3)  # (K, B, L, rank + 2)
        delta, B, C = projected.split([self.dt_rank, 1, 1], dim=-1)
        A, D = decay_rates(self.A_log).unflatten(0, (directions, -1)), self.D.unflatten(0, (directions, -1))
        # TorchScript needs every argument: z=None (no gate), mean=False (sum)
        bias, weight = self.dt_proj_bias, self.dt_proj_weight
        return selective_scan(u, delta, A, B, C, D, None, bias, True, order, weight, False, norm)
