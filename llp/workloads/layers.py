"""What several networks share: initialisation."""

from __future__ import annotations

from typing import Literal

from torch import nn


def he_initialised(model: nn.Module) -> nn.Module:
    """`model` with weights drawn for ReLU networks and zero biases; batch norm starts as identity.

    Convolutions: N(0, 2 / fan_out) in networks with batch norm, as torchvision's residual networks;
    N(0, 2 / fan_in) in those without, where fan_out would shrink the signal at every layer that
    gets wider (by 27/576 in VGG's first). Linear layers: N(0, 2 / fan_in), but the last, which
    feeds no ReLU, N(0, 1 / fan_in).
    Source: He et al., "Delving Deep into Rectifiers" (2015), section 2.2.
    """
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    normed = any(isinstance(module, nn.BatchNorm2d) for module in modules)
    mode: Literal["fan_in", "fan_out"] = "fan_out" if normed else "fan_in"
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            last = module is linears[-1]
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if last else "relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
