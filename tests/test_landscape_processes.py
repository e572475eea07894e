"""Curvature over several processes of `torch.distributed` (gloo), each with a share of the data.

A process of its own for each share, so that the test's own process keeps no group.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape

SHARES = ((0, 3), (3, 4), (4, 4))
"""Batches of each process: three, one that is smaller, none."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator).double(), torch.arange(size) % 3)
        for size in (6, 6, 5, 2)
    ]


def measured(batches: Any, group: Any = None) -> dict[str, Any]:
    op = landscape.hessian(network(), functional.cross_entropy, batches, process_group=group)
    vectors = torch.randn(op.shape[0], 4, generator=torch.Generator().manual_seed(2)).double()
    fisher = landscape.empirical_fisher(
        network(), functional.cross_entropy, batches, process_group=group
    )
    top = landscape.top_eigenpairs(op, k=3, tolerance=1e-8)
    return {
        "single": op @ vectors[:, 0],
        "block": op @ vectors,
        "gradient": op.hint(),
        "fisher": fisher @ vectors[:, 1],
        "values": top.values,
        "trace": torch.tensor(landscape.trace(op, num_probes=16).value),
        "examples": torch.tensor(op.num_examples),
    }


def serve(rank: int, folder: Path) -> None:
    """One process of the group."""
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(SHARES)
    )
    first, last = SHARES[rank]
    torch.save(measured(data()[first:last], distributed.group.WORLD), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_uneven_shares_of_several_processes_are_the_whole(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(SHARES))
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(said)
    expected = measured(data())
    for rank in range(len(SHARES)):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in expected.items():
            scale = value.double().abs().max()
            assert (found[name] - value).double().abs().max() <= 1e-6 * scale, (rank, name)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
