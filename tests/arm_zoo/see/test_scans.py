"""What is drawn of a scan, against its explicit matrix and against scans without the other directions."""

import pytest
import timm
import torch
from torch import Tensor

from arm_zoo.layers.order import scan_order
from arm_zoo.ops import scan_backend, selective_scan
from arm_zoo.ops.layout import ScanInputs, decay_rates
from arm_zoo.see.scans import ScanRecorder, attention_row, contributions

LENGTH, CHANNELS, STATES, RANK = 13, 5, 3, 2
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


def make_scan(shared: bool, mean: bool, plain: bool) -> ScanInputs:
    """A scan of a 3x4 grid with a class token; a plain one has whole step sizes as they are, and one direction."""
    count = 1 if plain else len(DIRECTIONS)
    rows = (count, 2, LENGTH)
    delta = torch.rand(*rows, CHANNELS) if plain else torch.randn(*rows, RANK)
    return ScanInputs(
        u=torch.randn(*(rows[1:] if shared else rows), CHANNELS),
        delta=delta,
        A=-torch.rand(count, CHANNELS, STATES),
        B=torch.randn(*rows, STATES),
        C=torch.randn(*rows, STATES),
        D=torch.randn(count, CHANNELS),
        delta_bias=None if plain else torch.randn(count, CHANNELS),
        delta_weight=None if plain else torch.randn(count, CHANNELS, RANK),
        delta_softplus=not plain,
        order=None if plain else scan_order(3, 4, DIRECTIONS, cls_index=6),
        mean=mean,
    )


def run(scan: ScanInputs) -> Tensor:
    options = (scan.delta_bias, scan.delta_softplus, scan.order, scan.delta_weight, scan.mean)
    with scan_backend("reference"):
        return selective_scan(*scan[:6], None, *options)


def explicit_matrix(scan: ScanInputs, k: int) -> Tensor:
    """Of direction k alone, what every token (columns) adds to every other (rows), by channel: (L, L, D)."""
    own = scan._make(field[k : k + 1] if isinstance(field, Tensor) else field for field in scan)
    columns = []
    for token in range(LENGTH):
        step = token if scan.order is None or scan.u.ndim == 3 else scan.order[k].tolist().index(token)
        impulse = torch.zeros(scan.u.shape if scan.u.ndim == 3 else (1, *scan.u.shape[1:]))
        impulse[..., step, :] = 1
        columns.append(run(own._replace(u=impulse, D=torch.zeros_like(own.D), mean=False))[0])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("shared, mean, plain", [(False, True, False), (True, False, False), (False, False, True)])
def test_attention_is_a_row_of_the_explicit_matrix(shared: bool, mean: bool, plain: bool) -> None:
    scan = make_scan(shared, mean, plain)
    matrices = torch.stack([explicit_matrix(scan, k) for k in range(len(scan.A))])
    rows = matrices.abs().mean(-1)
    expected = rows.mean(0) if mean else rows.sum(0)
    for token in range(LENGTH):
        torch.testing.assert_close(attention_row(scan, token), expected[token])
    assert plain == bool((expected.triu(1) == 0).all())  # one direction sees nothing after the token; four see all


@pytest.mark.parametrize("shared, mean", [(False, True), (True, False)])
def test_contributions_are_products_with_the_output(shared: bool, mean: bool) -> None:
    scan = make_scan(shared, mean, plain=False)
    whole = run(scan)[0]
    with scan_backend("torch"):
        parts = contributions(scan)
    torch.testing.assert_close(parts.sum(0), whole.square().sum(-1))
    for k, part in enumerate(parts):
        alone = torch.arange(len(parts)) == k  # the others are silenced where they would be read out
        output = run(scan._replace(C=scan.C * alone[:, None, None, None], D=scan.D * alone[:, None]))[0]
        torch.testing.assert_close(part, (output * whole).sum(-1))


@pytest.mark.parametrize("gradients, backend", [(False, "auto"), (False, "torch"), (True, "torch")])
def test_the_recorder_has_the_last_scan(gradients: bool, backend: str) -> None:
    model = timm.create_model("arm_pico_patch2_8").eval()
    for i, block in enumerate(model.blocks):
        torch.nn.init.constant_(block.mixer.A_log, float(i))
    with torch.set_grad_enabled(gradients), scan_backend(backend), ScanRecorder() as recorder:
        model.forward_intermediates(torch.randn(1, 1, 8, 8), indices=[1], stop_early=True)
    assert recorder.last is not None
    torch.testing.assert_close(recorder.last.A, decay_rates(model.blocks[1].mixer.A_log))
    assert recorder.last.shape == (4, 1, 17, 64) and recorder.last.order is model.order
