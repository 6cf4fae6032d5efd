"""The attentive head against its formula, and what it can tell that an average cannot."""

import torch

from arm_zoo.heads.attentive import AttentiveClassifier


def test_one_query_by_the_formula() -> None:
    torch.manual_seed(0)
    head = AttentiveClassifier(24, 5).eval()
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    patches = torch.randn(3, 7, 24)
    normed = (patches - head.norm.running_mean) / (head.norm.running_var + 1e-6).sqrt()
    parts = []
    for part in range(12):  # heads, of two columns each
        columns = slice(2 * part, 2 * part + 2)
        keys, values = (normed @ layer.weight[columns].T for layer in (head.key, head.value))
        weights = (keys @ head.query[0, 0, columns] / 2**0.5).softmax(dim=1)
        parts.append((weights[..., None] * values).sum(dim=1))
    assert torch.allclose(head(patches), torch.cat(parts, dim=1) @ head.head.weight.T, atol=1e-5)


def test_what_it_has() -> None:
    head = AttentiveClassifier(64, 10)
    assert head.num_heads == 8  # the most that divide 64, up to 12
    assert {name for name, _ in head.named_parameters()} == {"query", "key.weight", "value.weight", "head.weight"}
    patches = torch.randn(2, 9, 64)
    assert torch.allclose(head(patches), head(patches[:, torch.randperm(9)]), atol=1e-5)  # a set of patches
