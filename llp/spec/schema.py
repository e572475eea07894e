"""The experiment schema: everything a YAML file may say, checked once, then frozen and trusted.

Each section is owned by one room. A key that is not here is an error, and so is a hyperparameter
that nothing reads. Checks that need other files' knowledge (names in tables, which options a model
takes) live in `spec.checks`; this file is about shape, types and ranges.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llp.records import HyperparameterValue
from llp.spec.domains import Domain, as_domain


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetSpec(_Section):
    """Which images, and how many are kept for validation. The test split is always separate."""

    name: str = Field(description="a row of `llp list datasets`, or my_package:load")
    root: str | None = Field(
        default=None, description="folder with the files; relative to where llp runs"
    )
    download: bool = Field(default=False, description="let torchvision download what is missing")
    validation_fraction: float = Field(default=0.15, gt=0, lt=0.9)
    max_train_examples: int | None = Field(
        default=None, ge=1, description="use only this many training images, class-balanced"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the dataset")


class ModelSpec(_Section):
    """Which network."""

    name: str = Field(description="a row of `llp list models`, or my_package:build_model")
    options: dict[str, HyperparameterValue] = Field(
        default_factory=dict, description="arguments of the model that are not searched"
    )


class TrainingSpec(_Section):
    """The training recipe. A search-space parameter of the same name overrides a value here."""

    optimizer: str = "sgd"
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    optimizer_options: dict[str, HyperparameterValue] = Field(default_factory=dict)
    schedule: str = "cosine"
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="share of a job's steps with linear warm-up"
    )
    epochs: int = Field(default=20, ge=1, description="length of the full training")
    batch_size: int = Field(default=128, ge=1)
    augmentation: list[str] = Field(default_factory=list, description="of flip, crop, cutout")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    gradient_clip: float | None = Field(default=None, gt=0, description="largest gradient norm")
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    compile: bool = Field(default=False, description="torch.compile the model")


class SearcherSpec(_Section):
    """Where new configurations come from."""

    name: str = "random"
    num_startup_trials: int = Field(
        default=10, ge=1, description="random configurations before tpe or gp takes over"
    )


class Tier1Spec(_Section):
    """Probing: how many configurations, on which rungs, and who gets more budget."""

    scheduler: str = "asha"
    num_trials: int = Field(default=32, ge=1)
    data_fractions: list[float] = Field(default=[0.1, 0.3, 1.0], min_length=1)
    epochs: int | list[int] | None = Field(
        default=None, description="per rung, or one for all; default: the full training's"
    )
    reduction_factor: int = Field(default=3, ge=2)
    promotion: Literal["cold", "warm"] = Field(
        default="cold", description="start a rung afresh, or from the weights of the one below"
    )
    stop_rules: list[dict[str, Any]] = Field(
        default=[{"name": "power_law"}], description="rows of `llp list stop_rules` with options"
    )
    report_every: int = Field(default=1, ge=1, description="epochs between reports of a job")
    max_failures: int = Field(default=2, ge=0, description="retries of a job that fails or is lost")
    trial_seconds: float | None = Field(default=None, gt=0, description="wall-clock limit of a job")

    @field_validator("data_fractions")
    @classmethod
    def _fractions(cls, fractions: list[float]) -> list[float]:
        for fraction in fractions:
            if fraction <= 0:
                raise ValueError(f"{fraction:g} is not above 0 (fraction of the training set)")
            if fraction > 1:
                raise ValueError(f"{fraction:g} is over 1 (fraction of the training set)")
        for before, after in zip(fractions, fractions[1:], strict=False):
            if after < before:
                raise ValueError(f"must not decrease: {before:g} is followed by {after:g}")
        return fractions

    @field_validator("epochs")
    @classmethod
    def _epochs(cls, epochs: int | list[int] | None) -> int | list[int] | None:
        for value in epochs if isinstance(epochs, list) else [epochs]:
            if value is not None and value < 1:
                raise ValueError(f"a rung needs at least 1 epoch, not {value}")
        return epochs

    @model_validator(mode="after")
    def _ladder(self) -> Tier1Spec:
        if isinstance(self.epochs, list) and len(self.epochs) != len(self.data_fractions):
            raise ValueError(
                f"epochs has {len(self.epochs)} entries for {len(self.data_fractions)} "
                "data_fractions; give one per rung, or one number for all"
            )
        if len(self.data_fractions) < 2 and self.scheduler != "fifo":
            raise ValueError(
                f"scheduler '{self.scheduler}' needs at least 2 rungs and there is 1; "
                "add a data fraction or use scheduler: fifo"
            )
        return self


class Tier2Spec(_Section):
    """Landscape measurements of the survivors."""

    top_k: int = Field(default=6, ge=0, description="configurations measured; 0 turns tier 2 off")
    metrics: list[str] = Field(
        default=[
            "sam_sharpness",
            "asam_sharpness",
            "noise_sharpness",
            "gradient_norm",
            "hessian_eigenvalues",
            "hessian_trace",
        ],
        description="rows of `llp list metrics`",
    )
    refinements: list[str] = Field(default=["swa_gain"], description="of swa_gain")
    num_examples: int = Field(default=1024, ge=8, description="training images measured on")
    batch_size: int = Field(default=256, ge=1)
    num_eigenvalues: int = Field(default=3, ge=1)
    num_probes: int = Field(default=8, ge=2, description="probe vectors of the trace estimate")
    rho: float = Field(default=0.05, gt=0, description="radius of SAM; ASAM uses 10 x rho")
    sigma: float = Field(default=0.05, gt=0, description="relative noise of noise_sharpness")
    refinement_epochs: int = Field(default=2, ge=1)


class ScoreSpec(_Section):
    """How both tiers become one number."""

    preset: Literal["calibrated", "validation", "llp", "weights"] = "calibrated"
    weights: dict[str, float] = Field(
        default_factory=dict, description="with preset: weights; column -> weight"
    )
    alpha: float = Field(default=0.1, ge=0, description="of preset llp")

    @model_validator(mode="after")
    def _weights(self) -> ScoreSpec:
        if (self.preset == "weights") != bool(self.weights):
            raise ValueError("weights and preset: weights belong together; give both or neither")
        return self


class VerificationSpec(_Section):
    """Full training of the best few; the test split is read once, at the end of each."""

    top_k: int = Field(default=3, ge=1)
    num_seeds: int = Field(default=2, ge=1)
    epochs: int | None = Field(default=None, ge=1, description="default: training.epochs")


class ResourcesSpec(_Section):
    """What a worker gets and how many run at once. Does not change results."""

    address: str | None = Field(
        default=None, description="Ray cluster; none starts Ray on this machine only"
    )
    num_cpus: int | None = Field(default=None, ge=1, description="of a local Ray; default: all")
    num_gpus: int | None = Field(default=None, ge=0, description="of a local Ray; default: all")
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float = Field(default=0, ge=0, description="fractions share a GPU")
    max_concurrent: int | None = Field(default=None, ge=1, description="trials at once")


class TrackingSpec(_Section):
    """Where MLflow is. The ledger in the study folder is always written."""

    mlflow: bool = True
    uri: str | None = Field(
        default=None, description="default: sqlite file mlflow.db in the output folder"
    )
    experiment: str | None = Field(default=None, description="default: llp/<name>")

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri and "://" in uri and "@" in uri.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError(
                "credentials in a URL end up in logs; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if uri and (uri.startswith("file:") or "://" not in uri):
            raise ValueError(
                f"MLflow no longer writes to plain folders ('{uri}'); "
                "use sqlite:///path/mlflow.db or http://host:port"
            )
        return uri


class OutputSpec(_Section):
    """Where study folders go."""

    root: str = "llp_studies"
    report: bool = True


class Spec(_Section):
    """One experiment."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    dataset: DatasetSpec
    model: ModelSpec
    training: TrainingSpec = TrainingSpec()
    search_space: dict[str, Domain] = Field(min_length=1)
    constraints: list[str] = Field(default_factory=list)
    searcher: SearcherSpec = SearcherSpec()
    tier1: Tier1Spec = Tier1Spec()
    tier2: Tier2Spec = Tier2Spec()
    score: ScoreSpec = ScoreSpec()
    verification: VerificationSpec = VerificationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    output: OutputSpec = OutputSpec()

    @field_validator("search_space", mode="before")
    @classmethod
    def _shorthand(cls, space: Any) -> Any:
        if isinstance(space, dict):
            return {name: as_domain(domain) for name, domain in space.items()}
        return space

    @model_validator(mode="after")
    def _counts(self) -> Spec:
        if self.verification.top_k > self.tier1.num_trials:
            raise ValueError(
                f"verification.top_k ({self.verification.top_k}) is over "
                f"tier1.num_trials ({self.tier1.num_trials})"
            )
        if self.tier2.top_k > self.tier1.num_trials:
            raise ValueError(
                f"tier2.top_k ({self.tier2.top_k}) is over "
                f"tier1.num_trials ({self.tier1.num_trials})"
            )
        return self

    def rung_epochs(self) -> list[int]:
        """Epochs of each rung, in order."""
        epochs = self.tier1.epochs if self.tier1.epochs is not None else self.training.epochs
        return epochs if isinstance(epochs, list) else [epochs] * len(self.tier1.data_fractions)
