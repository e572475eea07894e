"""The experiment schema: everything a YAML file may say, checked once, then frozen and trusted.

Each section is owned by one room. A key that is not here is an error, and so is a hyperparameter
that nothing reads. Checks that need other files' knowledge (names in tables, which options a model
takes) live in `spec.checks`; this file is about shape, types and ranges.

Loaded from a file, a spec remembers where each key stood, so that a problem found later (when the
size of the dataset is known, say) still points to a line: `Spec.problem`.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, Protocol

from pydantic import Field, PrivateAttr, field_validator, model_validator

from llp.errors import Problem
from llp.spec.domains import Domain, Frozen, Number, Value, Whole, as_domain, wrong
from llp.spec.secrets import why_secret


class Locator(Protocol):
    """Knows where a dotted path stands in the file a spec was loaded from."""

    def problem(self, path: tuple[str | int, ...], message: str) -> Problem:
        """`message` about the value at `path`."""
        ...


class _Section(Frozen):
    pass


class DatasetSpec(_Section):
    """Which images, and how many are kept for validation. The test split is always separate."""

    name: str = Field(description="a row of `llp list datasets`, or my_package:load")
    root: str | None = Field(
        default=None, description="folder with the files; relative to where llp runs"
    )
    download: bool = Field(default=False, description="let torchvision download what is missing")
    validation_fraction: Number = Field(
        default=0.15, gt=0, lt=0.9, description="share of the training images kept for validation"
    )
    max_train_examples: Whole | None = Field(
        default=None, ge=1, description="use only this many training images, class-balanced"
    )
    max_test_examples: Whole | None = Field(
        default=None, ge=1, description="use only this many test images, class-balanced"
    )
    label_noise: Number = Field(
        default=0.0, ge=0, lt=1, description="share of the training labels replaced by wrong ones"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the dataset")


class ModelSpec(_Section):
    """Which network."""

    name: str = Field(description="a row of `llp list models`, or my_package:build_model")
    options: dict[str, Value] = Field(
        default_factory=dict, description="arguments of the model that are not searched"
    )


class TrainingSpec(_Section):
    """The training recipe. A search-space parameter of the same name overrides a value here."""

    optimizer: str = Field(default="sgd", description="a row of `llp list optimizers`")
    learning_rate: Number = Field(default=0.1, gt=0, description="the highest of the schedule")
    weight_decay: Number = Field(
        default=5e-4, ge=0, description="L2 penalty, or decoupled where the optimizer does that"
    )
    optimizer_options: dict[str, Value] = Field(
        default_factory=dict, description="options of the optimizer that are not searched"
    )
    schedule: str = Field(
        default="cosine", description="of the learning rate: a row of `llp list schedules`"
    )
    warmup_fraction: Number = Field(
        default=0.05, ge=0, lt=1, description="share of a job's steps with linear warm-up"
    )
    epochs: Whole = Field(default=20, ge=1, description="length of the full training")
    batch_size: Whole = Field(default=128, ge=1, description="images per optimizer step")
    augmentation: list[str] = Field(default_factory=list, description="of flip, crop, cutout")
    label_smoothing: Number = Field(
        default=0.0, ge=0, lt=1, description="share of the target spread over all classes"
    )
    gradient_clip: Number | None = Field(default=None, gt=0, description="largest gradient norm")
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="of autocast in the forward pass"
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    averaging: str = Field(
        default="none", description="judge an average of the weights: row of `llp list averagings`"
    )
    averaging_options: dict[str, Value] = Field(
        default_factory=dict, description="options of the averaging that are not searched"
    )
    best_weights: Literal["off", "keep", "use"] = Field(
        default="off",
        description="of a full training, from the epoch with the best validation accuracy: keep "
        "them in a file, or use them as its result instead of the last",
    )
    callbacks: list[dict[str, Any]] = Field(
        default_factory=list,
        description="what looks at a training between epochs: rows of `llp list callbacks` with "
        "options; the training is the same to the bit without them",
    )


class CollectionSpec(_Section):
    """A folder of finished studies that proposes the first configurations."""

    collection: str = Field(description="folder whose folders are studies, such as output.root")
    count: Whole = Field(
        default=5, ge=1, description="configurations to try first, chosen to do for all studies"
    )


class WarmStartSpec(_Section):
    """Earlier studies that a search learns from."""

    studies: list[str] = Field(
        default_factory=list,
        description="study folders, names under output.root, or mlflow:URI#STUDY",
    )
    meta: CollectionSpec | None = Field(
        default=None, description="first configurations from all studies in a folder"
    )
    num_configurations: Whole = Field(
        default=3, ge=0, description="best configurations of earlier studies to try first"
    )
    observations: bool = Field(
        default=True, description="tell tpe and gp all earlier results, not the best alone"
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="parameters of earlier studies that may be missing in this search space",
    )


class ProxySpec(_Section):
    """A first filter without training: the best of several candidates by a training-free proxy."""

    name: str = Field(description="a row of `llp list proxies`")
    candidates: Whole = Field(default=4, ge=2, description="configurations drawn for each trial")
    num_examples: Whole = Field(default=64, ge=4, description="training images it looks at")


class SearcherSpec(_Section):
    """Where new configurations come from."""

    name: str = Field(default="random", description="a row of `llp list searchers`")
    num_startup_trials: Whole = Field(
        default=10, ge=1, description="random configurations before tpe or gp takes over"
    )
    warm_start: WarmStartSpec | None = Field(
        default=None, description="earlier studies to learn from"
    )
    proxy: ProxySpec | None = Field(
        default=None, description="with random: a first filter without training"
    )


class Tier1Spec(_Section):
    """Probing: how many configurations, on which rungs, and who gets more budget."""

    scheduler: str = Field(default="asha", description="a row of `llp list schedulers`")
    scheduler_options: dict[str, Value] = Field(
        default_factory=dict, description="options of the scheduler: `llp list schedulers`"
    )
    num_trials: Whole = Field(default=32, ge=1, description="configurations probed")
    data_fractions: list[Number] = Field(
        default=[0.1, 0.3, 1.0],
        min_length=1,
        description="the rungs: share of the training images of each, rising",
    )
    epochs: Whole | list[Whole] | None = Field(
        default=None, description="per rung, or one for all; default: the full training's"
    )
    reduction_factor: Whole = Field(
        default=3, ge=2, description="one of this many goes up to the next rung"
    )
    promotion: Literal["cold", "warm"] = Field(
        default="cold", description="start a rung afresh, or from the weights of the one below"
    )
    warmup_fraction: Number | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="least share of a probe's steps with warm-up where the probe is shorter than "
        "the full training, whatever the recipe or the search space says; 0 or none: no minimum",
    )
    eager_promotion: bool = Field(
        default=False,
        description="promote before new trials start, on incomplete rungs, as the ASHA paper does",
    )
    stop_rules: list[dict[str, Any]] = Field(
        default=[{"name": "forecast"}], description="rows of `llp list stop_rules` with options"
    )
    search_rules: list[dict[str, Any]] = Field(
        default=[], description="what ends tier 1 early: rows of `llp list search_rules`"
    )
    audit_share: Number = Field(
        default=0.03,
        ge=0,
        le=0.5,
        description="share of the samples spent on probes that a forecast would have stopped, to "
        "see how often that is wrong; 0 for none",
    )
    report_every: Whole = Field(default=1, ge=1, description="epochs between reports of a job")
    max_failures: Whole = Field(
        default=2, ge=0, description="retries of a job that fails or is lost"
    )
    trial_seconds: Number | None = Field(
        default=None, gt=0, description="wall-clock limit of a job"
    )

    @field_validator("data_fractions")
    @classmethod
    def _fractions(cls, fractions: list[float]) -> list[float]:
        for k, fraction in enumerate(fractions):
            if fraction <= 0:
                raise wrong(f"{fraction:g} is not above 0 (fraction of the training set)", f"{k}")
            if fraction > 1:
                raise wrong(f"{fraction:g} is over 1 (fraction of the training set)", f"{k}")
        for k, (before, after) in enumerate(itertools.pairwise(fractions), start=1):
            if after < before:
                raise wrong(f"must not decrease: {before:g} is followed by {after:g}", f"{k}")
        return fractions

    @field_validator("epochs")
    @classmethod
    def _epochs(cls, epochs: int | list[int] | None) -> int | list[int] | None:
        for value in epochs if isinstance(epochs, list) else [epochs]:
            if value is not None and value < 1:
                raise wrong(f"a rung needs at least 1 epoch, not {value}")
        return epochs

    @model_validator(mode="after")
    def _ladder(self) -> Tier1Spec:
        if isinstance(self.epochs, list) and len(self.epochs) != len(self.data_fractions):
            raise wrong(
                f"epochs has {len(self.epochs)} entries for {len(self.data_fractions)} "
                "data_fractions; give one per rung, or one number for all",
                "epochs",
            )
        if len(self.data_fractions) < 2 and self.scheduler != "fifo":
            raise wrong(
                f"scheduler '{self.scheduler}' needs at least 2 rungs and there is 1; "
                "add a data fraction or use scheduler: fifo",
                "data_fractions",
                "scheduler",
            )
        return self


class Tier2Spec(_Section):
    """Landscape measurements of the survivors."""

    top_k: Whole = Field(default=6, ge=0, description="configurations measured; 0 turns tier 2 off")
    metrics: list[str] = Field(
        default=[
            "sam_sharpness",
            "asam_sharpness",
            "noise_sharpness",
            "noise_sigma",
            "gradient_norm",
            "hessian_eigenvalues",
            "hessian_trace",
            "adaptive_trace",
            "calibration_error",
            "mean_entropy",
            "confidence_gap",
        ],
        description="rows of `llp list metrics`",
    )
    refinements: list[str] = Field(
        default=["swa_gain"], description="of swa_gain, sam_gain, entropy_sgd_gain"
    )
    num_examples: Whole = Field(default=1024, ge=8, description="training images measured on")
    batch_size: Whole = Field(default=256, ge=1, description="images at once while measuring")
    num_eigenvalues: Whole = Field(default=3, ge=1, description="of the Hessian, largest first")
    num_probes: Whole = Field(default=8, ge=2, description="probe vectors of the trace estimate")
    num_draws: Whole = Field(default=8, ge=2, description="pairs of noise draws")
    budget: Number = Field(
        default=0.2,
        ge=0,
        description="cost of measuring as a share of the probe's samples, which picks the counts "
        "above; 0: no limit",
    )
    rho: Number = Field(default=0.05, gt=0, description="radius of SAM; ASAM uses 10 x rho")
    rise: Number = Field(default=0.1, gt=0, description="rise of the loss for noise_sigma")
    sigma: Number = Field(default=0.05, gt=0, description="relative noise of noise_sharpness")
    refinement_epochs: Whole = Field(
        default=2, ge=1, description="length of a refinement of a survivor"
    )
    tie_break: Literal["off", "earned"] = Field(
        default="off",
        description="settle ties at promotions by tier 2, where `calibration` has earned it",
    )
    calibration: str | None = Field(
        default=None, description="file of `llp calibrate --out`, for tie_break: earned"
    )


class ScoreSpec(_Section):
    """How both tiers become one number."""

    preset: Literal["calibrated", "validation", "llp", "weights"] = Field(
        default="calibrated", description="the formula: `llp list presets`, or weights"
    )
    weights: dict[str, Number] = Field(
        default_factory=dict, description="with preset: weights; column -> weight"
    )
    alpha: Number = Field(default=0.1, ge=0, description="of preset llp")

    @model_validator(mode="after")
    def _weights(self) -> ScoreSpec:
        if (self.preset == "weights") != bool(self.weights):
            raise wrong(
                "weights and preset: weights belong together; give both or neither",
                "weights",
                "preset",
            )
        return self


class VerificationSpec(_Section):
    """Full training of the best few; the test split is read once, at the end of each."""

    top_k: Whole = Field(default=3, ge=1, description="configurations trained in full")
    probability: Number | None = Field(
        default=None,
        gt=0,
        le=1,
        description="the fewest configurations that hold the best with this probability, 0.8 say, "
        "and at most top_k; default: top_k",
    )
    num_seeds: Whole = Field(default=2, ge=1, description="full trainings of each")
    epochs: Whole | None = Field(default=None, ge=1, description="default: training.epochs")
    corrupted: bool = Field(
        default=False,
        description="choose and judge by accuracy on corrupted images: `llp list corruptions`",
    )
    race: bool = Field(
        default=False,
        description="go on over common seeds, after num_seeds, until the order is settled",
    )
    max_seeds: Whole = Field(default=8, ge=2, description="with race: where it ends in any case")
    error_rate: Number = Field(
        default=0.05, gt=0, lt=0.5, description="with race: chance of a wrong order at most"
    )
    margin: Number | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="with race: difference in accuracy that counts as none; default: the standard "
        "error that the validation images leave",
    )

    @model_validator(mode="after")
    def _race(self) -> VerificationSpec:
        if self.race and self.max_seeds < self.num_seeds:
            raise wrong(
                f"max_seeds ({self.max_seeds}) is below num_seeds ({self.num_seeds})",
                "max_seeds",
                "num_seeds",
            )
        return self


class ResourcesSpec(_Section):
    """What a worker gets and how many run at once. Does not change results."""

    address: str | None = Field(
        default=None, description="Ray cluster; none starts Ray on this machine only"
    )
    num_cpus: Whole | None = Field(default=None, ge=1, description="of a local Ray; default: all")
    num_gpus: Whole | None = Field(default=None, ge=0, description="of a local Ray; default: all")
    cpus_per_trial: Number = Field(default=1, gt=0, description="fractions share a core")
    gpus_per_trial: Number = Field(default=0, ge=0, description="fractions share a GPU")
    max_concurrent: Whole | None = Field(default=None, ge=1, description="trials at once")


class TrackingSpec(_Section):
    """Where MLflow is. The ledger in the study folder is always written."""

    mlflow: bool = Field(default=True, description="show the study in MLflow")
    uri: str | None = Field(
        default=None, description="default: sqlite file mlflow.db in the output folder"
    )
    experiment: str | None = Field(default=None, description="default: llp/<name>")

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri and (why_secret(uri) or "@" in uri.partition("://")[2].split("/", 1)[0]):
            raise wrong(
                "credentials in a URL end up in logs; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if uri and (uri.startswith("file:") or "://" not in uri):
            raise wrong(
                f"MLflow no longer writes to plain folders ('{uri}'); "
                "use sqlite:///path/mlflow.db or http://host:port"
            )
        return uri


class OutputSpec(_Section):
    """Where study folders go."""

    root: str = Field(default="llp_studies", description="folder of the study folders")
    report: bool = Field(default=True, description="write the HTML page at the end")


class Spec(_Section):
    """One experiment."""

    version: Literal[1] = Field(default=1, description="of this format")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the study and its folder"
    )
    seed: Whole = Field(default=0, ge=0, lt=2**31, description="of everything that is random")
    dataset: DatasetSpec = Field(description="which images")
    model: ModelSpec = Field(description="which network")
    training: TrainingSpec = Field(default=TrainingSpec(), description="the recipe")
    search_space: dict[str, Domain] = Field(
        min_length=1, description="hyperparameter -> domain; a list is a choice, a value is fixed"
    )
    constraints: list[str] = Field(
        default_factory=list,
        description="conditions on several parameters: learning_rate * batch_size <= 64",
    )
    searcher: SearcherSpec = Field(default=SearcherSpec(), description="who suggests")
    tier1: Tier1Spec = Field(default=Tier1Spec(), description="probing on data fractions")
    tier2: Tier2Spec = Field(default=Tier2Spec(), description="landscape of the survivors")
    score: ScoreSpec = Field(default=ScoreSpec(), description="how both tiers are combined")
    verification: VerificationSpec = Field(
        default=VerificationSpec(), description="full training of the best"
    )
    objectives: list[Literal["error", "seconds", "samples", "parameters", "latency"]] = Field(
        default_factory=list,
        description="report which configurations no other one beats in all of these; tpe and gp "
        "look for those of error, seconds and parameters",
    )
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="CPUs and GPUs")
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="MLflow")
    output: OutputSpec = Field(default=OutputSpec(), description="study folders and the page")

    _source: Locator | None = PrivateAttr(default=None)

    @field_validator("objectives")
    @classmethod
    def _several(cls, names: list[str]) -> list[str]:
        if len(names) == 1:
            raise wrong("one objective has no front; name at least two, for example error, seconds")
        if len(set(names)) < len(names):
            raise wrong("an objective is listed twice")
        return names

    @field_validator("search_space", mode="before")
    @classmethod
    def _shorthand(cls, space: Any) -> Any:
        if isinstance(space, dict):
            return {name: as_domain(domain) for name, domain in space.items()}
        return space

    @model_validator(mode="after")
    def _counts(self) -> Spec:
        """A count or top_k that was not given shrinks with num_trials; a top_k given must fit.

        A count that was given and does not fit is refused in `checks`: studies began with such ones
        and must be read again.
        """
        num_trials, warm = self.tier1.num_trials, self.searcher.warm_start
        meta = warm.meta if warm is not None else None
        if warm and meta and "count" not in meta.model_fields_set and meta.count > num_trials:
            meta = meta.model_copy(update={"count": num_trials})
            warm = warm.model_copy(update={"meta": meta})
            self.__dict__["searcher"] = self.searcher.model_copy(update={"warm_start": warm})
        for section in ("tier2", "verification"):
            part = getattr(self, section)
            if part.top_k > num_trials:
                if "top_k" in part.model_fields_set:
                    raise wrong(
                        f"{section}.top_k ({part.top_k}) is over tier1.num_trials ({num_trials})",
                        f"{section}.top_k",
                        "tier1.num_trials",
                    )
                self.__dict__[section] = part.model_copy(update={"top_k": num_trials})
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both ask for the same, wherever they were loaded from."""
        return isinstance(other, Spec) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # holds dicts

    def problem(self, path: str, message: str) -> Problem:
        """`message` about the value at the dotted `path`, with its file and line where known.

        >>> str(Spec.model_construct().problem("tier1.num_trials", "must be at least 1"))
        'tier1.num_trials: must be at least 1'
        """
        if self._source is None:
            return Problem(message, path=path)
        return self._source.problem(
            tuple(int(part) if part.isdecimal() else part for part in path.split(".")), message
        )

    def rung_epochs(self) -> list[int]:
        """Epochs of each rung, in order."""
        epochs = self.tier1.epochs if self.tier1.epochs is not None else self.training.epochs
        return epochs if isinstance(epochs, list) else [epochs] * len(self.tier1.data_fractions)
