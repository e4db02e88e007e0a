"""What would probably help next: read off the scores, the samples and the networks of a run, each with the figure it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from crfm_core.reporting.findings import Finding, gap_between, listed, number, points, span
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.settings import Recipe

NEXT = "What would probably help next?"
#: A generator reads its masks when its held-out loss with them is at most this share of that without.
MASKS_READ = 0.8
#: Points of mIoU by the judge by which samples may show their masks worse than real tiles show theirs.
WORSE_SAMPLES = 10.0
CLASSES_NAMED = 3  #: those that gain most


def masks_read(loss: float, loss_mask_ignored: float) -> bool:
    """Whether the loss on held-out tiles says that a generator draws by its masks."""
    return loss <= MASKS_READ * loss_mask_ignored


def next_steps(rows: pd.DataFrame, classes: Sequence[str], recipes: dict[str, Recipe], results: DatasetResults) -> Finding:
    """The levers that a run's own figures speak for, the one with a measured gain first. ``rows`` are a table's of one dataset and
    segmentor."""
    found = [*_of_labels(rows, classes, recipes), *_of_generator(results), *_of_critic(results), *_of_imagery(results)]
    if not found:
        return Finding(NEXT, "Nothing stands out: more seeds would narrow the intervals", "open")
    return Finding(NEXT, found[0][0], "open", [sentence for _, sentence in found])


def _of_labels(rows: pd.DataFrame, classes: Sequence[str], recipes: dict[str, Recipe]) -> list[tuple[str, str]]:
    """What labels would be worth, by the recipe that has more of them."""
    defined = rows[rows.mIoU.notna()]
    ceilings = defined[defined.recipe.map(lambda name: recipes[name].is_ceiling)]
    own = defined.drop(ceilings.index)
    if ceilings.empty or own.empty:
        return []
    ceiling, best = ceilings.loc[ceilings.mIoU.idxmax()], own.loc[own.mIoU.idxmax()]
    gap = gap_between(ceiling, best)
    one_seed = math.isnan(gap.low)
    if gap.mean <= 0 or not (one_seed or gap.low > 0):
        return [("More labels would add little", f"{ceiling.recipe} ({ceiling.real_tiles} labelled tiles) is not above {best.recipe}.")]
    ious = {name: ceiling[f"IoU:{name}"] - best[f"IoU:{name}"] for name in classes if f"IoU:{name}" in rows}
    most = sorted((name for name in ious if ious[name] > 0), key=lambda name: -ious[name])[:CLASSES_NAMED]
    where = f", most on {listed([f'{name} ({number(ious[name], True)})' for name in most])}" if most else ""
    headline = f"Labels: {points(gap.mean)} of mIoU are still to be had{f', most on {listed(most)}' if most else ''}"
    above = f"is {points(gap.mean)} above {best.recipe} ({'a single run' if one_seed else span(gap)}){where}"
    return [(headline, f"{ceiling.recipe}, with {ceiling.real_tiles} labelled tiles, {above}.")]


def _of_generator(results: DatasetResults) -> list[tuple[str, str]]:
    """Whether generators read their masks, and whether what they draw shows them."""
    found = []
    for control, seen in results.validation.items():
        if not masks_read(seen.loss, seen.loss_mask_ignored):
            found.append(
                (
                    "A generator that reads its masks",
                    f"{control} hardly reads its masks: on held-out tiles its loss is {seen.loss:.2f} with them and "
                    f"{seen.loss_mask_ignored:.2f} without. Train it longer, on unlabelled tiles with the critic's masks too, or from a "
                    "larger base.",
                )
            )
    held_out = results.reconstruction.held_out
    for pair, one in results.agreement.items() if held_out else ():
        real = held_out.judge.mIoU if held_out else 0.0
        if one.judge.mIoU < real - WORSE_SAMPLES:
            found.append(
                (
                    "Samples that show their masks",
                    f"By the judge, {results.name_of(pair)} samples show their masks at {number(one.judge.mIoU)} mIoU, real tiles theirs "
                    f"at {number(real)}: a longer training, a larger base or more correction would help.",
                )
            )
    return found


def _of_critic(results: DatasetResults) -> list[tuple[str, str]]:
    """Whether the critic is worth listening to."""
    held_out = results.reconstruction.held_out
    if held_out is None:
        return []
    critic, judge = held_out.critic, held_out.judge
    if critic.converged is False:
        gained = f"the last quarter of its training gained {points(critic.last_quarter or 0)}"
        return [("A better critic", f"The critic has not converged: {gained} of mIoU on held-out tiles. Train it longer.")]
    if critic.mIoU < judge.mIoU - WORSE_SAMPLES:
        scores = f"{number(critic.mIoU)} mIoU on held-out tiles, the judge {number(judge.mIoU)}"
        return [("A better critic", f"The critic scores {scores}: samples are steered, and tiles labelled, by its errors.")]
    return []


def _of_imagery(results: DatasetResults) -> list[tuple[str, str]]:
    """Whether there is imagery without labels."""
    if results.dataset.has_unlabelled:
        return []
    lacking = f"{results.dataset.name} names no unlabelled scenes (source.unlabelled), which need no labels"
    return [("Unlabelled imagery", f"{lacking}: a generator and pseudo-labels learn from them.")]
