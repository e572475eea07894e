"""The `measure` job: a checkpoint in, one `FlatnessProfile` out.

A metric that fails, or whose number is not finite, becomes a `Measurement` of NaN with a note; it
never costs the other metrics, except that running out of memory is first tried again with smaller
batches. Measured is the plain validation-style loss in eval mode, in true
float32, on the first `tier2.num_examples` training examples of the nested order (fewer when the
rung had fewer), unaugmented.

How many examples, probe vectors and noise draws is what `budget.plan_measurement` chooses. Metrics
share gradients and Hessian products (see `context`); a `Measurement` carries what it added to the
cost and what it would have cost alone.

Cost: `JobEnd.samples_seen` is the examples that refinements trained on plus, for the measurements,
gradient equivalents times the examples measured on (`context.Spent`).
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from llp import registry
from llp.errors import EnvironmentProblem
from llp.flatness.budget import gradients_of_rest, plan_measurement
from llp.flatness.context import MetricContext, Spent
from llp.flatness.metrics import GAINS, measured_names
from llp.landscape import evaluation_state
from llp.protocols import Report
from llp.records import FlatnessProfile, Job, JobEnd, Measurement, Outcome
from llp.spec.schema import Spec, Tier2Spec
from llp.training import jobs, loop, rng
from llp.training.objective import JobObjective, TrainingObjective
from llp.training.python_objective import CallableObjective, ExampleBatches
from llp.workloads import ImageData
from llp.workloads.batches import fixed_batches
from llp.workloads.subsets import nested_order


def measure(
    context: MetricContext,
    metrics: Sequence[str],
    *,
    trial_id: str,
    device: str = "cpu",
    memory_must_do: bool = False,
) -> FlatnessProfile:
    """Every metric of `metrics` (rows of `registry.METRICS`) on the network in `context`.

    A metric whose cost does not fit into `context.allowed` any more is not begun, and the note of
    the profile names it.

    Args:
        context: What is measured, and where its cost is added up.
        metrics: In the order in which they run.
        trial_id: Whose profile it is.
        device: Name of the hardware, for the profile.
        memory_must_do: Whether running out of memory ends it all instead of costing one metric.

    Raises:
        SpecError: A name is not in the table; nothing is measured then.
        Exception: Memory ran out and `memory_must_do`, as the library at fault raised it.
    """
    started = time.perf_counter()
    functions = {name: registry.load("metrics", name) for name in metrics}
    context.wanted = tuple(metrics)
    measurements: list[Measurement] = []
    did: list[str] = []
    left_out: list[str] = []
    for number, (name, function) in enumerate(functions.items()):
        rest = list(functions)[number + 1 :]
        own = gradients_of_rest(context.options, did, [name])
        if name not in GAINS and context.spent.gradient_equivalents + own > context.allowed + 1e-9:
            left_out.append(name)
            continue
        did.append(name)
        context.to_come = gradients_of_rest(context.options, did, rest)
        begun, before = time.perf_counter(), dataclasses.replace(context.spent)
        try:
            with evaluation_state(context.model):
                found = [_checked(measurement) for measurement in function(context)]
        except Exception as error:  # one metric must not cost the others
            if memory_must_do and jobs.is_out_of_memory(error):
                raise
            found = _failed(context, name, error, time.perf_counter() - begun)
        measurements += _with_cost(context, found, before)
    return FlatnessProfile(
        trial_id=trial_id,
        measurements=tuple(measurements),
        seconds=time.perf_counter() - started,
        device=device,
        samples=float(context.spent.samples_seen(context.num_examples)),
        note="; ".join(filter(None, [context.note, _not_begun(left_out)])),
    )


def _not_begun(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"not begun, as the others left too little of the budget: {', '.join(names)}"


class MeasuringObjective(ABC):
    """Works on `measure` jobs with the networks and batches that a training objective prepares.

    Args:
        training: Makes the network of a job and loads its checkpoint.
        options: The `tier2` section.
        seed: Of the study.
    """

    def __init__(self, training: JobObjective, options: Tier2Spec, *, seed: int) -> None:
        self.training = training
        self.options = options
        self.seed = seed

    @abstractmethod
    def fixed(self, count: int, batch_size: int, device: torch.device) -> list[tuple[Any, Any]]:
        """The first `count` training examples of the nested order, unaugmented, in batches."""

    @property
    def loss_fn(self) -> loop.Criterion:
        """The loss whose landscape is measured."""
        return functional.cross_entropy

    def __call__(self, job: Job) -> Generator[Report, None, JobEnd]:
        """Yields one `FlatnessProfile` and returns the end; a checkpoint that cannot be read fails.

        When memory runs out at the full batch size, that is how the job ends, without a profile:
        it is worth another attempt with `job.micro_batch_divisor` times smaller batches. There, it
        costs only the metric that it happens to.

        Raises:
            EnvironmentProblem: A GPU was asked for and there is none.
            ValueError: The job is of another kind.
        """
        if job.kind != "measure":
            raise ValueError(f"{type(self).__name__} does not work on '{job.kind}' jobs")
        started = time.monotonic()
        device = (
            torch.device(self.training.device)
            if self.training.device
            else self.training.choose_device()
        )
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise EnvironmentProblem(f"measuring on '{device}' was asked for; CUDA sees no GPU")
            torch.cuda.reset_peak_memory_stats(device)
        if self.training.threads and torch.get_num_threads() != self.training.threads:
            torch.set_num_threads(self.training.threads)
        randomness = rng.capture(device)
        profile: FlatnessProfile | None = None
        outcome: Outcome = "completed"
        failure = ""
        context: MetricContext | None = None
        try:
            rng.seed_all(job.seed, device)
            context = self._context(job, device)
            profile = measure(
                context,
                [*context.options.metrics, *context.options.refinements],
                trial_id=job.trial.trial_id,
                device=jobs.device_name(device),
                memory_must_do=job.micro_batch_divisor == 1,
            )
        except Exception as error:  # noqa: BLE001  whatever goes wrong is this job's outcome
            outcome = "out_of_memory" if jobs.is_out_of_memory(error) else "failed"
            failure = "".join(traceback.format_exception(error))
        finally:
            rng.restore(randomness, device)
        samples_seen = context.spent.samples_seen(context.num_examples) if context else 0
        if outcome == "out_of_memory":
            context = None  # or the next attempt would find the memory still taken
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if profile is not None:
            yield profile
        return JobEnd(
            job_id=job.job_id,
            trial_id=job.trial.trial_id,
            outcome=outcome,
            failure=failure,
            samples_seen=samples_seen,
            seconds=time.monotonic() - started,
            peak_memory_bytes=jobs.peak_memory_bytes(device),
            device=jobs.device_name(device),
        )

    def _context(self, job: Job, device: torch.device) -> MetricContext:
        if job.start_from is None:
            raise ValueError(f"job {job.job_id} names no checkpoint to measure")
        probe = dataclasses.replace(job, kind="probe")

        def fresh() -> jobs.Setup:
            rng.seed_all(job.seed, device)
            return self.training.prepare(probe, device)

        setup = fresh()
        options = self.options
        if job.metrics:
            update = {"metrics": list(job.metrics), "refinements": []}
            options = options.model_copy(update=update)
        planned = plan_measurement(options, setup.rung)
        batch_size = max(1, planned.options.batch_size // job.micro_batch_divisor)
        return MetricContext(
            model=setup.model.float(),
            batches=self.fixed(planned.options.num_examples, batch_size, device),
            options=planned.options,
            note=planned.note,
            allowed=planned.gradients,
            seed=self.seed,
            fresh=fresh,
            loss_fn=self.loss_fn,
        )


class FlatnessObjective(MeasuringObjective):
    """Tier 2 of an experiment file.

    Args:
        spec: The experiment.
        data: Its images; the test split is dropped.
        folder: The study folder that checkpoints are read from.
        device: None: a GPU when `resources.gpus_per_trial` is above 0, else the CPU.
        threads: CPU threads torch may use in this process; None leaves that alone.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        data: ImageData,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        training = TrainingObjective(spec, data.without_test(), folder, device, threads=threads)
        super().__init__(training, training.spec.tier2, seed=training.spec.seed)
        self.data = training.data

    def fixed(self, count: int, batch_size: int, device: torch.device) -> list[tuple[Any, Any]]:
        """See `MeasuringObjective.fixed`."""
        order = nested_order(self.data.train.labels, seed=self.seed)
        return fixed_batches(
            self.data.train,
            order[:count],
            batch_size,
            mean=self.data.mean,
            std=self.data.std,
            device=device,
        )


class CallableFlatnessObjective(MeasuringObjective):
    """Tier 2 of a search given as Python functions; the loss is the user's criterion."""

    def __init__(self, training: CallableObjective, options: Tier2Spec | None = None) -> None:
        super().__init__(training, options or Tier2Spec(), seed=training.seed)
        self._callable = training

    @property
    def loss_fn(self) -> loop.Criterion:
        """The user's criterion."""
        return self._callable.criterion

    def fixed(self, count: int, batch_size: int, device: torch.device) -> list[tuple[Any, Any]]:
        """See `MeasuringObjective.fixed`."""
        train, order = self._callable._splits()[0], self._callable._order()
        batches = ExampleBatches(train, order[:count], batch_size=batch_size, device=device)
        return list(batches.epoch(0))


def _with_cost(
    context: MetricContext, found: list[Measurement], before: Spent
) -> list[Measurement]:
    """`found` with what they added to the cost since `before`, in equal parts."""
    spent, num = context.spent, context.num_examples
    trained = spent.training_examples - before.training_examples
    own = trained + num * (spent.gradient_equivalents - before.gradient_equivalents)
    alone = trained + num * (spent.alone - before.alone)
    parts = max(1, len(found))
    return [
        dataclasses.replace(each, samples=own / parts, samples_alone=alone / parts)
        for each in found
    ]


def _checked(measurement: Measurement) -> Measurement:
    if math.isfinite(measurement.value):
        return measurement
    note = f"not finite ({measurement.value}); {measurement.note}".rstrip("; ")
    return dataclasses.replace(measurement, value=math.nan, standard_error=math.nan, note=note)


def _failed(
    context: MetricContext, name: str, error: Exception, seconds: float
) -> list[Measurement]:
    names = measured_names(name, context.options)
    message = str(error).strip().splitlines()
    return [
        Measurement(
            name=measured,
            value=math.nan,
            standard_error=math.nan,
            higher_is_better=None,
            num_examples=context.num_examples,
            seconds=seconds / len(names),
            note=f"failed: {type(error).__name__}: {message[0] if message else ''}".rstrip(": "),
        )
        for measured in names
    ]
