"""Directions in weight space along which lines and planes are drawn.

Each function returns `Directions`: flat rows `[d, P]` in the order of `trainable(model)`, together
with how they were made. Random ones are Gaussian (uniform ones would all point into one orthant);
Hessian eigenvectors and the differences between checkpoints keep their lengths unless asked, since
normalising them filter by filter would turn them into other directions.

    from llp.landscape import directions
    directions.random(model, seed=1)                          # filter-normalised, orthogonal
    directions.hessian(model, landscape.top_eigenpairs(op, k=2))
    directions.between(model, checkpoint)

Directions are first masked, then normalised, then made orthogonal, group by group of the
normalisation, so that neither spoils the other: every filter of the second direction is orthogonal
to the same filter of the first one and has the length it should have. (Orthogonal only as a whole,
the plane would change when layers are rescaled.) A filter with a single entry cannot be turned;
`Directions.cosine` is what remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.normalization import (
    Normalization,
    groups,
    moving,
    normalized,
    ungrouped,
)
from llp.landscape.parameters import flatten, trainable
from llp.landscape.plain import Plain
from llp.landscape.spectrum import Eigenpairs

Weights = nn.Module | Mapping[str, Tensor] | Tensor
MAKERS = {
    "random": "model, seed=0",
    "hessian": "model, landscape.top_eigenpairs(operator, k=2)",
    "adam": "model, optimizer",
    "between": "model, checkpoint, another_checkpoint",
}
"""The functions that make directions, with what they need."""


@dataclass(frozen=True)
class Directions(Plain):
    """Directions through the weights of one model.

    Attributes:
        vectors: Rows `[d, P]`, in the parameters' dtype and on their device.
        labels: What each row is, for an axis.
        kind: Which function made them.
        normalization: `none`, `weight`, `filter`, `layer` or `model`.
        order: Norm used for it.
        norms: Euclidean length of each row.
        cosine: Largest absolute cosine between two rows; 0 for a single one.
        values: Numbers that belong to the rows, in order: eigenvalues, shares of the variance, or
            nothing.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    kind: str
    normalization: Normalization
    order: int
    norms: tuple[float, ...]
    cosine: float
    values: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors)


def make(
    model: nn.Module,
    vectors: Tensor,
    *,
    kind: str = "given",
    labels: Sequence[str] | None = None,
    values: Sequence[float] = (),
    normalization: Normalization = "none",
    order: int = 2,
    orthogonal: bool = False,
    exclude_normalization: bool = False,
    exclude_bias: bool = False,
    frozen: Sequence[str] = (),
) -> Directions:
    """Any rows `[d, P]` as directions of `model`.

    Args:
        model: Not changed.
        vectors: One row for each direction, in the order of `trainable(model)`.
        kind: Name of the kind.
        labels: One for each row.
        values: One number for each row, or none.
        normalization: Scales the rows are given, see `normalization`.
        order: Norm for it, 1 or 2.
        orthogonal: Make the rows orthogonal, keeping the first one.
        exclude_normalization: Set the entries of normalisation layers to zero.
        exclude_bias: Set the entries of biases to zero.
        frozen: Parameter or module names whose entries are set to zero.

    Raises:
        ValueError: Wrong shape, entries that are not finite, a row that is zero, or rows that are
            parallel and should be orthogonal.
    """
    parameters = trainable(model)
    size = sum(parameter.numel() for parameter in parameters)
    rows = vectors.detach().to(parameters[0])
    if rows.ndim != 2 or rows.shape[1] != size or not len(rows):
        raise ValueError(f"expected rows [d, {size}], not shape {tuple(vectors.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a direction has entries that are not finite")
    if exclude_normalization or exclude_bias or frozen:
        rows = rows * moving(
            model,
            exclude_normalization=exclude_normalization,
            exclude_bias=exclude_bias,
            frozen=frozen,
        )
    rows = torch.stack([normalized(model, row, normalization, order) for row in rows])
    if orthogonal:
        rows = _orthogonal(model, rows, normalization, order)
    norms = rows.double().norm(dim=1)
    for index, norm in enumerate(norms.tolist()):
        if norm == 0.0:
            raise ValueError(f"direction {index} is zero: everything it would move is left out")
    return Directions(
        vectors=rows.contiguous(),
        labels=tuple(labels or (f"direction {index + 1}" for index in range(len(rows)))),
        kind=kind,
        normalization=normalization,
        order=order,
        norms=tuple(norms.tolist()),
        cosine=_largest_cosine(rows),
        values=tuple(float(value) for value in values),
    )


def taken(
    model: nn.Module, given: Directions | Sequence[Tensor] | Tensor | str | None, count: int = 2
) -> Directions:
    """What a caller may give as directions, as `Directions`.

    Args:
        model: Not changed.
        given: Directions; flat vectors `[P]` or a tensor `[d, P]`, which are taken as they are; the
            name of a function here; or None for random ones.
        count: Random directions wanted.

    Raises:
        ValueError: An unknown name, one that needs more than a model, or vectors that do not fit.
        TypeError: Something else.
    """
    if isinstance(given, Directions):
        return given
    if given is None or (isinstance(given, str) and given == "random"):
        return random(model, count)
    if isinstance(given, str):
        if given in MAKERS:
            raise ValueError(f"give the directions as directions.{given}({MAKERS[given]})")
        raise ValueError(f"no directions are called {given!r}; there are {', '.join(MAKERS)}")
    if isinstance(given, Tensor):
        return make(model, given[None] if given.ndim == 1 else given)
    try:
        rows = [torch.as_tensor(row) for row in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"directions are Directions, flat vectors or a name, not {type(given).__name__}"
        ) from error
    for row in rows:
        weights_of(model, row)
    if not rows:
        raise ValueError("no direction was given")
    return make(model, torch.stack([row.to(trainable(model)[0]) for row in rows]))


def random(
    model: nn.Module,
    count: int = 2,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    normalization: Normalization = "filter",
    order: int = 2,
    orthogonal: bool = True,
    exclude_normalization: bool = True,
    exclude_bias: bool = True,
    frozen: Sequence[str] = (),
) -> Directions:
    """`count` Gaussian directions, filter-normalised as in Li et al. 2018, section 4.

    They come from a generator of their own (on the CPU, seeded with `seed` unless given), so the
    same seed gives the same directions on every device, and the global random state is not touched.

    >>> model = nn.Linear(300, 1)
    >>> length = float(model.weight.detach().norm())
    >>> [round(norm / length, 6) for norm in random(model).norms]
    [1.0, 1.0]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    generator = generator or torch.Generator().manual_seed(seed)
    size = sum(parameter.numel() for parameter in trainable(model))
    return make(
        model,
        torch.randn(count, size, generator=generator),
        kind="random",
        labels=[f"random {index + 1}" for index in range(count)],
        normalization=normalization,
        order=order,
        orthogonal=orthogonal,
        exclude_normalization=exclude_normalization,
        exclude_bias=exclude_bias,
        frozen=frozen,
    )


def hessian(
    model: nn.Module,
    pairs: Eigenpairs | Sequence[Eigenpairs],
    *,
    signed: bool = False,
    count: int = 2,
    **options: Any,
) -> Directions:
    """Eigenvectors of the Hessian as unit directions, so that f''(0) along one is its eigenvalue.

    Args:
        model: Not changed.
        pairs: What `top_eigenpairs` found, or several results that are put together (both ends).
        signed: Take the most positive and the most negative eigenvalue instead of the `count`
            largest by size.
        count: Directions wanted, when not signed.
        **options: As for `make`. Normalising them gives up the meaning of the eigenvalue.

    Raises:
        ValueError: Fewer pairs than wanted; with `signed`, no positive or no negative eigenvalue.
    """
    found = [pairs] if isinstance(pairs, Eigenpairs) else list(pairs)
    values = torch.cat([each.values for each in found]).double()
    vectors = torch.cat([each.vectors.T for each in found])
    if signed:
        highest, lowest = int(values.argmax()), int(values.argmin())
        if not (values[highest] > 0 > values[lowest]):
            raise ValueError(
                "signed directions need a positive and a negative eigenvalue; found from "
                f"{float(values[lowest]):g} to {float(values[highest]):g} "
                "(ask top_eigenpairs for 'largest' and for 'smallest')"
            )
        chosen = [highest, lowest]
    else:
        chosen = _distinct(values, vectors, count)
    return make(
        model,
        torch.stack([vectors[index] / vectors[index].norm() for index in chosen]),
        kind="hessian_signed" if signed else "hessian",
        labels=[f"eigenvector of {float(values[index]):.3g}" for index in chosen],
        values=[float(values[index]) for index in chosen],
        **options,
    )


def adam(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    axes: Sequence[str] = ("exp_avg", "exp_avg_sq"),
    **options: Any,
) -> Directions:
    """The moments that an Adam-like optimizer keeps, as unit directions.

    Args:
        model: Not changed.
        optimizer: It has made at least one step with the model's parameters.
        axes: `exp_avg` (first moment), `exp_avg_sq` (second) or `update` (first moment over the
            root of the second, bias-corrected, downhill).
        **options: As for `make`.

    Raises:
        ValueError: The optimizer keeps no such moment for some parameter, or an unknown axis.
    """
    return make(
        model,
        torch.stack([_moment(model, optimizer, axis) for axis in axes]),
        kind="adam",
        labels=list(axes),
        **options,
    )


def between(model: nn.Module, *others: Weights, **options: Any) -> Directions:
    """From the model's weights to those of each other checkpoint: coordinate 1 is arriving there.

    Args:
        model: The origin.
        *others: Models of the same shape, state dicts, or flat vectors `[P]`.
        **options: As for `make`.
    """
    origin = flatten(trainable(model))
    rows = [weights_of(model, other).to(origin) - origin for other in others]
    labels = [f"to checkpoint {index + 1}" for index in range(len(rows))]
    return make(model, torch.stack(rows), kind="between", labels=labels, **options)


def weights_of(model: nn.Module, other: Weights) -> Tensor:
    """The entries of `other` that belong to the trainable parameters of `model`, flat `[P]`.

    Raises:
        ValueError: A parameter is missing or has another shape.
    """
    if isinstance(other, Tensor):
        size = sum(parameter.numel() for parameter in trainable(model))
        if other.shape != (size,):
            raise ValueError(f"expected a flat vector [{size}], not shape {tuple(other.shape)}")
        return other.detach()
    given = dict(other.named_parameters()) if isinstance(other, nn.Module) else other
    parts = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = given.get(name)
            if part is None or part.shape != parameter.shape:
                what = "is missing" if part is None else f"has shape {tuple(part.shape)}"
                raise ValueError(
                    f"{name} {what} in the other checkpoint; expected {tuple(parameter.shape)}"
                )
            parts.append(part.to(parameter.device))
    return flatten(parts)


def _moment(model: nn.Module, optimizer: torch.optim.Optimizer, axis: str) -> Tensor:
    if axis not in ("exp_avg", "exp_avg_sq", "update"):
        raise ValueError(f"axes are exp_avg, exp_avg_sq and update, not {axis!r}")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parts = []
    for parameter in trainable(model):
        state = optimizer.state.get(parameter, {})
        needed = ("exp_avg", "exp_avg_sq", "step") if axis == "update" else (axis,)
        for key in needed:
            if key not in state:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps no {key} for a parameter of shape "
                    f"{tuple(parameter.shape)}; use an Adam-like optimizer that has made a step"
                )
        if axis == "update":
            group, step = groups[parameter], float(state["step"])
            first = state["exp_avg"] / (1 - group["betas"][0] ** step)
            second = state["exp_avg_sq"] / (1 - group["betas"][1] ** step)
            parts.append(-first / (second.sqrt() + group["eps"]))
        else:
            parts.append(state[axis])
    vector = flatten(parts)
    norm = vector.norm()
    return vector / norm if float(norm) > 0 else vector


def _distinct(values: Tensor, vectors: Tensor, count: int) -> list[int]:
    """Indices of the largest by size; the same pair found from both ends counts once."""
    chosen: list[int] = []
    for index in values.abs().argsort(descending=True).tolist():
        if all(abs(float(vectors[index] @ vectors[other])) < 0.5 for other in chosen):
            chosen.append(index)
        if len(chosen) == count:
            return chosen
    raise ValueError(f"{count} eigenpairs are needed, {len(chosen)} different ones were given")


def _orthogonal(model: nn.Module, rows: Tensor, normalization: Normalization, order: int) -> Tensor:
    """Gram-Schmidt within each group of the normalisation, then the groups' norms again.

    A group in which nothing would be left stays as it is.
    """
    done = [[part.double() for part in groups(model, rows[0], normalization)]]
    for row in rows[1:]:
        parts = [part.double() for part in groups(model, row, normalization)]
        for index, part in enumerate(parts):
            before = part.norm(dim=1, keepdim=True)
            turned = part
            for _ in range(2):  # twice is enough for rounding errors
                for other in done:
                    axis = other[index]
                    length = (axis**2).sum(1, keepdim=True)
                    overlap = (turned * axis).sum(1, keepdim=True)
                    turned = turned - torch.where(length > 0, overlap / length, 0.0) * axis
            after = turned.norm(dim=1, keepdim=True)
            parts[index] = torch.where(
                after > 1e-6 * before, turned * (before / after.clamp_min(1e-300)), part
            )
        done.append(parts)
    found = torch.stack([ungrouped(model, parts, normalization) for parts in done]).to(rows)
    if normalization in ("filter", "layer", "model"):
        found = torch.stack([normalized(model, row, normalization, order) for row in found])
    if _largest_cosine(found) > 0.999:
        raise ValueError("two directions are parallel and cannot be made orthogonal")
    return found


def _largest_cosine(rows: Tensor) -> float:
    if len(rows) < 2:
        return 0.0
    wide = rows.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0.0)
    return float(cosines.max())
