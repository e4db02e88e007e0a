"""Forms of the correction side by side, from the files of :mod:`crfm_core.sampling.comparison`: what they scored, and what that says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from crfm_core import DataError
from crfm_core.reporting.findings import Finding, number, points, said, span
from crfm_core.reporting.measurements import OfBoth, Score, Who, read_model
from crfm_core.reporting.tables import Difference, mean_sd, paired_difference
from crfm_core.settings import PLAIN, Preset


class SeedScores(OfBoth):
    """What critic and judge saw in the samples of one seed."""

    seed: int
    critic_loss: Score


class Form(BaseModel):
    """One form of the correction with one number of corrected steps."""

    steps: int
    seeds: Annotated[list[SeedScores], Field(min_length=1)]
    seconds_per_image: Annotated[float, Field(gt=0)]
    corrections: float
    raised: Score
    gradient_ratio: Score
    clamp_ratio: Score
    by_step: list[dict[str, float | None]]
    notes: dict[str, int]

    def column(self, who: Who, score: Literal["OA", "mIoU"] = "mIoU") -> list[float]:
        """A score of every seed."""
        return [getattr(getattr(one, who), score) for one in self.seeds]


class ComparisonFile(BaseModel):
    """One file of the comparison."""

    preset: Preset | Literal["plain"]
    masks: int
    num_steps: int
    forms: Annotated[list[Form], Field(min_length=1)]


@dataclass(frozen=True)
class FormRow:
    """A form beside plain sampling of the same masks from the same noise. Gains are differences in mIoU, of plain itself 0."""

    preset: str
    form: Form
    slower: float
    gain: Difference  #: by the judge
    critic_gain: Difference
    critic_ahead: Difference  #: the critic's gain minus the judge's

    @property
    def name(self) -> str:
        return f"{self.preset} with {self.form.steps} corrected step{'s' if self.form.steps > 1 else ''}"

    @property
    def critic_loss(self) -> tuple[float, float]:
        return mean_sd([one.critic_loss for one in self.form.seeds])

    def spread(self, who: Who, score: Literal["OA", "mIoU"]) -> tuple[float, float]:
        """Mean and standard deviation over seeds."""
        return mean_sd(self.form.column(who, score))


@dataclass(frozen=True)
class FormComparison:
    """The rows of a comparison, plain sampling first, and what all of them share."""

    rows: list[FormRow]
    masks: int
    num_steps: int
    seeds: list[int]

    @property
    def presets(self) -> list[str]:
        """In the order of the files; "plain" is the first."""
        return list(dict.fromkeys(row.preset for row in self.rows))

    def of(self, preset: str) -> list[FormRow]:
        return [row for row in self.rows if row.preset == preset]


def read_comparison(paths: list[Path]) -> FormComparison:
    """Read the files of one dataset's comparison, PRESET.json each, "plain" among them.

    Raises DataError naming the file that is missing, lacks something, or is of other masks, steps or seeds than plain's.
    """
    found = {path: read_model(path, ComparisonFile) for path in paths}
    plain_path = next((path for path, measured in found.items() if measured.preset == PLAIN), None)
    if plain_path is None:
        raise DataError(f"{paths[0].with_name(PLAIN)}.json: not among the files of the comparison; what all forms are compared with")
    plain = found.pop(plain_path)
    baseline = plain.forms[0]
    rows, shared = [_row(PLAIN, baseline, baseline)], _shared(plain, baseline)
    for path, measured in found.items():
        if any(_shared(measured, form) != shared for form in measured.forms):
            raise DataError(f"{path}: other masks, steps or seeds than {plain_path}; delete both and run the workflow again")
        rows += [_row(measured.preset, form, baseline) for form in measured.forms]
    return FormComparison(rows, plain.masks, plain.num_steps, [one.seed for one in baseline.seeds])


def _shared(measured: ComparisonFile, form: Form) -> tuple[int, int, list[int]]:
    return measured.masks, measured.num_steps, [one.seed for one in form.seeds]


def _row(preset: str, form: Form, plain: Form) -> FormRow:
    judge, critic = ([a - b for a, b in zip(form.column(who), plain.column(who), strict=True)] for who in ("judge", "critic"))
    none = [0.0] * len(judge)
    gains = (paired_difference(judge, none), paired_difference(critic, none), paired_difference(critic, judge))
    return FormRow(preset, form, form.seconds_per_image / plain.seconds_per_image, *gains)


def best_form(comparison: FormComparison) -> Finding:
    """Which form the judge likes best, and whether that is more than noise and more than the critic's own taste."""
    plain, *rows = comparison.rows
    level = number(plain.spread("judge", "mIoU")[0])
    question = "Which form of the correction makes samples show their masks best?"
    rows = [row for row in rows if not math.isnan(row.gain.mean)]
    if not rows:
        return Finding(question, "Open: no form has a defined mIoU by the judge", "open")
    best = max(rows, key=lambda row: row.gain.mean)
    if best.gain.mean > 0:
        mean = number(best.spread("judge", "mIoU")[0])
        headline = f"{best.name} has the highest mIoU by the judge, {mean}: against plain sampling ({level}) it {said(best.gain)}"
    else:
        headline = f"No form has a higher mIoU by the judge than plain sampling ({level}): the closest, {best.name}, {said(best.gain)}"
    tone = {"higher": "good", "lower": "bad"}.get(best.gain.verdict, "open")
    return Finding(question, headline, tone, [*_of_critic(best), *_of_others(best, rows)])


def _of_critic(best: FormRow) -> list[str]:
    ahead = best.critic_ahead
    if math.isnan(ahead.mean):
        return []
    own = f"By the guiding critic the same samples change by {number(best.critic_gain.mean, True)} points"
    if ahead.verdict == "higher":
        return [f"{own}, {points(ahead.mean)} more than by the judge ({span(ahead)}): the samples were optimised against it."]
    return [f"{own}; the judge sees the same change within noise." if ahead.verdict == "within noise" else f"{own}."]


def _of_others(best: FormRow, rows: list[FormRow]) -> list[str]:
    """The forms that these seeds cannot tell from the best, by pairs of the same seed."""
    ours = best.form.column("judge")
    others = [row for row in rows if row is not best]
    if not others or len(ours) < 2:
        return []
    alike = [row.name for row in others if paired_difference(ours, row.form.column("judge")).verdict == "within noise"]
    return [f"Within noise of it: {', '.join(alike)}." if alike else "Every other form is below it by more than noise."]
