"""A checkpoint is whole and unaltered, or it is an error; it never runs code."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llp.errors import CheckpointError, EnvironmentProblem
from llp.records import CheckpointRef
from llp.training import checkpoint, rng


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 20, generator=generator)).sum().backward()
    optimizer.step()
    return {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": rng.capture(torch.device("cpu")),
        "epoch": 3,
        "points": [{"loss": 0.5, "name": "x", "none": None}],
    }


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = state()
    reference = checkpoint.save("checkpoints/t000-r1.pt", saved, root=tmp_path)
    content = (tmp_path / "checkpoints" / "t000-r1.pt").read_bytes()
    assert reference == CheckpointRef("checkpoints/t000-r1.pt", hashlib.sha256(content).hexdigest())
    loaded = checkpoint.load_ref(reference, root=tmp_path)
    assert loaded["epoch"] == 3
    assert loaded["points"] == saved["points"]
    assert all(torch.equal(loaded["model"][k], saved["model"][k]) for k in saved["model"])
    optimizer = torch.optim.AdamW(nn.Linear(20, 20).parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.state_dict()["param_groups"] == saved["optimizer"]["param_groups"]
    assert os.listdir(tmp_path / "checkpoints") == ["t000-r1.pt"]


def test_truncation_is_found_at_every_offset(tmp_path: Path) -> None:
    reference = checkpoint.save("a.pt", state(), root=tmp_path)
    path = tmp_path / "a.pt"
    content = path.read_bytes()
    offsets = [0, 1, 10, *np.linspace(20, len(content) - 1, 97).astype(int)]
    for offset in offsets:
        path.write_bytes(content[:offset])
        with pytest.raises(CheckpointError):
            checkpoint.load_ref(reference, root=tmp_path)
    # Without a digest to compare with, torch still refuses what is not a whole file.
    for offset in offsets[:-1:10]:
        path.write_bytes(content[:offset])
        with pytest.raises(CheckpointError, match="cannot be read as plain"):
            checkpoint.load(path)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    reference = checkpoint.save("a.pt", state(), root=tmp_path)
    path = tmp_path / "a.pt"
    content = path.read_bytes()
    for offset in np.linspace(0, len(content) - 1, 100).astype(int):
        flipped = bytearray(content)
        flipped[offset] ^= 0x10
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match="damaged or was replaced"):
            checkpoint.load_ref(reference, root=tmp_path)


def test_a_sealed_file_notices_truncation_and_flips_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "job.partial.pt"
    checkpoint.save_sealed(path, state())
    assert checkpoint.load_sealed(path)["epoch"] == 3
    content = path.read_bytes()
    for offset in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:offset])
        with pytest.raises(CheckpointError):
            checkpoint.load_sealed(path)
        flipped = bytearray(content)
        flipped[offset] ^= 0x01
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError):
            checkpoint.load_sealed(path)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "ran"))


@pytest.mark.parametrize("form", ["pickle", "torch", "nested"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil(target), protocol=2))
    else:
        torch.save(Evil(target) if form == "torch" else {"model": [Evil(target)]}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        checkpoint.load(path, digest)
    assert not target.exists()


def test_a_missing_file_a_folder_and_a_bare_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        checkpoint.load(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)
    torch.save(torch.ones(2), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
        checkpoint.load(tmp_path / "bare.pt")


def test_a_reference_may_not_leave_the_study_folder(tmp_path: Path) -> None:
    checkpoint.save("a.pt", {"x": 1}, root=tmp_path)
    (tmp_path / "study").mkdir()
    with pytest.raises(CheckpointError, match="outside the study folder"):
        checkpoint.load_ref(CheckpointRef("../a.pt", "0" * 64), root=tmp_path / "study")


def test_a_full_disk_is_an_environment_problem_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = checkpoint.save("a.pt", {"x": 1}, root=tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: .* bytes for .*a\.pt"):
        checkpoint.save("a.pt", {"x": 2}, root=tmp_path)
    assert checkpoint.load_ref(reference, root=tmp_path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_write_that_stops_half_way_leaves_no_trace(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(EnvironmentProblem, match=r"cannot write .*big\.pt"):
            checkpoint.save("big.pt", {"x": torch.ones(100_000)}, root=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_the_file_is_durable_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def spy_replace(source: Any, target: Any) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    checkpoint.save("a.pt", {"x": 1}, root=tmp_path)
    assert calls == ["file", "rename", "folder"]


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    device = torch.device("cpu")

    def draw() -> list[float]:
        return [
            float(torch.rand(())),
            random.gauss(0, 1),
            float(np.random.standard_normal()),
            float(np.random.random()),
        ]

    rng.seed_all(7, device)
    draw()
    checkpoint.save_sealed(tmp_path / "r.pt", rng.capture(device))
    expected = [draw() for _ in range(3)]
    rng.seed_all(8, device)
    rng.restore(checkpoint.load_sealed(tmp_path / "r.pt"), device)
    assert [draw() for _ in range(3)] == expected
