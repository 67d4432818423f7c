"""What an ablation compares, and what it asks of the comparison before there is a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from star_trainer.config import ConfigError, Section, read_section
from star_trainer.studies.arms import Arm


class Comparison(Section):
    """A question that was asked before the runs: the mean of one arm less another's."""

    question: str
    arm: str
    against: str


class PlanFile(Section):
    """A plan as a YAML file has it; what is not said is as on the command line."""

    config: str = Field(description="a preset or a YAML file, whose settings all arms share")
    settings: list[str] = Field([], description="key=value, further ones that they share")
    arms: dict[str, str] = Field(min_length=1, description="by name, the settings in which an arm differs")
    baseline: str
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    comparisons: list[Comparison] = []
    first_iteration: int = Field(1, ge=1, description="from which on training rewards count in the comparisons")

    @model_validator(mode="after")
    def _check_names(self) -> PlanFile:
        for key, name in (
            ("baseline", self.baseline),
            *(("comparisons", name) for entry in self.comparisons for name in (entry.arm, entry.against)),
        ):
            if name not in self.arms:
                raise ValueError(f"{key}: expected one of the arms {', '.join(self.arms)}, got {name!r}")
        return self


@dataclass(frozen=True)
class Plan:
    """Arms that share the settings of `config`, the seeds of each, and what is asked of them."""

    config: str
    overrides: tuple[str, ...]
    arms: list[Arm]
    seeds: list[int]
    baseline: str
    comparisons: Sequence[Comparison] = ()
    first_iteration: int = 1


def read_plan(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan in a YAML file, with further overrides that all arms share.

    Raises:
        ConfigError: a file that is no plan; the message names the key and the line.
    """
    file = read_section(PlanFile, path)
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"{path}: seeds: expected each once, got {file.seeds}")
    arms = [Arm.named(name, settings, f"{path}: arms") for name, settings in file.arms.items()]
    shared = (*file.settings, *overrides)
    return Plan(file.config, shared, arms, file.seeds, file.baseline, file.comparisons, file.first_iteration)
