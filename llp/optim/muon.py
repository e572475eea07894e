"""Muon for the hidden matrices of a network, AdamW for everything else, as one optimizer.

Muon steps along the momentum of the gradient with its singular values set to about 1, by five
Newton-Schulz iterations (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural
networks"). The update is that of `torch.optim.Muon`, which takes matrices only, with all matrices
of one shape in one batch (`BatchedMuon`): on a GPU their launches are what a step costs. Here a
convolution is the matrix `[out, everything else]`, and what is no hidden matrix goes to AdamW, as
Jordan et al. advise: vectors (biases, normalisation), and the output layer, which is the last
matrix in the order of the parameters. A parameter group with `use_muon: True` or `False` decides
for itself.

Steps of Muon are scaled by `.2 sqrt(max(rows, columns))`, so that they are as long as those of
AdamW and both share one learning rate and one weight decay (Liu et al., 2025, "Muon is Scalable for
LLM Training", section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from llp.optim import Parameters
from llp.optim.wrapper import as_matrix, attributes

SCALE, SCALE_FACTOR = "match_rms_adamw", 0.2


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, options and state included, with the matrices of one shape in one batch.

    The numbers are torch's up to the order of sums in bfloat16, in which the iterations are made.
    Steps are scaled as AdamW's (`adjust_lr_fn="match_rms_adamw"`), and in no other way.

    Raises:
        ValueError: Another `adjust_lr_fn`, or what `torch.optim.Muon` refuses.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        if options.setdefault("adjust_lr_fn", SCALE) != SCALE:
            raise ValueError(f"adjust_lr_fn must be {SCALE!r}, not {options['adjust_lr_fn']!r}")
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see `torch.optim.Optimizer`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            means = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            moves: Sequence[Tensor] = means
            if group["nesterov"]:
                moves = torch._foreach_lerp(gradients, means, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for numbers in _by_shape(moves):
                rows, columns = moves[numbers[0]].shape
                units = near_orthogonal(
                    torch.stack([moves[k] for k in numbers]),
                    coefficients=group["ns_coefficients"],
                    steps=group["ns_steps"],
                    epsilon=group["eps"],
                )
                torch._foreach_add_(
                    [weights[k] for k in numbers],
                    units.to(weights[numbers[0]].dtype).unbind(0),
                    alpha=-group["lr"] * SCALE_FACTOR * math.sqrt(max(rows, columns)),
                )
        return loss


def _by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of those that can be stacked."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, tensor in enumerate(tensors):
        found.setdefault((tensor.shape, tensor.device, tensor.dtype), []).append(number)
    return list(found.values())


def near_orthogonal(
    matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """`matrices` `[count, rows, columns]` with their singular values brought to about 1.

    The quintic Newton-Schulz iteration of Jordan et al., in bfloat16: singular values end between
    about .5 and 1.5 rather than at 1, as in `torch.optim.Muon`.

    Args:
        matrices: Each is scaled by its own norm first.
        coefficients: Of `X`, `(X X^T) X` and `(X X^T)^2 X`.
        steps: Iterations.
        epsilon: Least norm that is divided by.
    """
    a, b, c = coefficients
    found = matrices.to(torch.bfloat16)
    turned = matrices.shape[1] > matrices.shape[2]
    if turned:
        found = found.mT
    found = found / torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        square = torch.bmm(found, found.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        found = torch.baddbmm(found, polynomial, found, beta=a)
    return found.mT if turned else found


class MuonAdamW(Optimizer):
    """`BatchedMuon` on matrices and `torch.optim.AdamW` on the rest.

    Args:
        groups: Parameters, or groups of them; `lr`, `weight_decay` and `use_muon` may be set in
            each.
        learning_rate: Of both.
        weight_decay: Decoupled, of both.
        momentum: Of Muon, in [0, 1).
        nesterov: Of Muon.
        newton_schulz_steps: Of Muon, 1 to 99.
        betas: Of AdamW.
        epsilon: Of AdamW.
    """

    def __init__(
        self,
        groups: Any,
        *,
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "weight_decay": weight_decay})
        shapes = [p.ndim for group in self.param_groups for p in group["params"]]
        matrices = [k for k, ndim in enumerate(shapes) if ndim >= 2]
        head = matrices[-1] if len(matrices) > 1 else None
        number = 0
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []  # a weight and its matrix
        muon_groups, adamw_groups = [], []
        for group in self.param_groups:
            wanted = group.get("use_muon")
            faces, rest = [], []
            for parameter in group["params"]:
                hidden = number != head if wanted is None else bool(wanted)
                if parameter.ndim >= 2 and hidden:
                    face = nn.Parameter(as_matrix(parameter.detach()))
                    self._pairs.append((parameter, face))
                    faces.append(face)
                else:
                    rest.append(parameter)
                number += 1
            shared = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            muon_groups.append({"params": faces, **shared})
            adamw_groups.append({"params": rest, **shared})
        self.muon = BatchedMuon(
            muon_groups,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=newton_schulz_steps,
        )
        self.adamw = AdamW(
            adamw_groups, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=epsilon
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in (self.muon, self.adamw):
            for group, own in zip(self.param_groups, inner.param_groups, strict=True):
                own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
        for parameter, face in self._pairs:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError("Muon does not take sparse gradients")
            # Again every time: the weight may have been moved to another device or layout.
            face.data = as_matrix(parameter.detach())
            face.grad = None if parameter.grad is None else _as_laid_out(parameter.grad, parameter)
        self.muon.step()
        self.adamw.step()
        for _, face in self._pairs:
            face.grad = None
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`."""
        return attributes(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; not possible after the constructor."""
        if "muon" in self.__dict__:
            raise NotImplementedError("give Muon all parameter groups when it is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups, and the states of both under `muon` and `adamw`."""
        return {
            **super().state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned.

        Raises:
            ValueError: It is of other parameters, or of another kind of optimizer.
        """
        if not {"muon", "adamw"} <= set(state_dict):
            raise ValueError("the state is not of Muon: it has no 'muon' and 'adamw'")
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def _as_laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient as a matrix whose columns are ordered as those of the weight's matrix."""
    if gradient.stride() == parameter.stride():
        return as_matrix(gradient)
    return as_matrix(torch.empty_like(parameter).copy_(gradient))


def muon(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Optimizer:
    """Muon on hidden matrices, AdamW on the rest, one learning rate for both.

    Args:
        parameters: See `build`; a group may say `use_muon`.
        learning_rate: As for AdamW; .01 and below.
        weight_decay: Decoupled, at least 0.
        momentum: Of Muon, in [0, 1).
        nesterov: Of Muon.
        newton_schulz_steps: Of Muon, 1 to 99.
        beta1: Of AdamW, in [0, 1).
        beta2: Of AdamW, in [0, 1).
        epsilon: Of AdamW, above 0.

    Raises:
        ValueError: A value out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum!r}")
    if not 1 <= newton_schulz_steps < 100:
        raise ValueError(f"newton_schulz_steps must be in [1, 99], not {newton_schulz_steps!r}")
    return MuonAdamW(
        parameters,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        newton_schulz_steps=newton_schulz_steps,
        betas=(beta1, beta2),
        epsilon=epsilon,
    )
