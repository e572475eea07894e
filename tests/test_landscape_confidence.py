"""Confidence of a classifier against numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llp import landscape


class Fixed(nn.Module):
    """Gives its inputs, which are logarithms of probabilities, back as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def answers(sure: float, num_right: int, num_wrong: int) -> tuple[Tensor, Tensor]:
    """Examples of two classes that are all answered with one confidence."""
    logits = torch.tensor([[sure, 1 - sure]]).log().expand(num_right + num_wrong, 2)
    return logits, torch.tensor([0] * num_right + [1] * num_wrong)


def test_confidence_of_two_bins_by_hand() -> None:
    batches = [answers(0.85, 7, 3), answers(0.65, 6, 4)]  # too sure by .15 and by .05
    found = landscape.confidence(Fixed(), batches, num_bins=10)
    assert found.accuracy == pytest.approx(0.65)
    assert found.mean_confidence == pytest.approx(0.75)
    assert found.calibration_error == pytest.approx(0.1, abs=1e-7)
    assert found.confidence_gap == pytest.approx(0.1)
    entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.85, 0.65)]
    assert found.mean_entropy == pytest.approx(sum(entropy) / 2)
    deviations = [(0.85 - 1, 7), (0.85, 3), (0.65 - 1, 6), (0.65, 4)]
    variance = sum(n * (d - 0.1) ** 2 for d, n in deviations) / 19
    assert found.confidence_gap_standard_error == pytest.approx(math.sqrt(variance / 20))
    assert found.bin_count.sum() == found.num_examples == 20
    assert found.bin_accuracy[8] == pytest.approx(0.7)
    assert found.bin_confidence[8] == pytest.approx(0.85)
    assert math.isnan(found.bin_accuracy[0])


def test_confidence_leaves_the_network_alone_and_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, labels = torch.randn(30, 4), torch.arange(30) % 3
    whole = landscape.confidence(model, [(inputs, labels)])
    parts = landscape.confidence(model, list(zip(inputs.split(7), labels.split(7), strict=True)))
    assert parts.calibration_error == pytest.approx(whole.calibration_error, abs=1e-6)
    assert parts.mean_entropy == pytest.approx(whole.mean_entropy, abs=1e-6)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_confidence_needs_class_labels() -> None:
    with pytest.raises(ValueError, match=r"outputs \[N, classes\] and labels \[N\]"):
        landscape.confidence(Fixed(), [(torch.randn(4, 2), torch.randn(4, 2))])
