"""Keep the synthetic images that agree best with their masks, by the critic's prediction."""

from __future__ import annotations

import pandas as pd

from crfm_core import DataError
from crfm_core.curation.filter_inputs import FilterInputs
from crfm_core.curation.selection import keep_best
from crfm_core.segmentor.evaluation import agreement
from crfm_core.settings import AgreementFilter


def apply(settings: AgreementFilter, inputs: FilterInputs) -> pd.DataFrame:
    """Keep the best share of all images by the mIoU of prediction and mask in percent, written to the new column ``agreement`` (NaN for
    an image without labelled pixels). Raises DataError when no image has a labelled pixel."""
    scores = agreement(inputs.critic, inputs.manifest, inputs.root, inputs.batch_size)["per_tile"]
    if all(score is None for score in scores):
        raise DataError(
            f"{inputs.manifest}: none of its {len(scores)} images has a labelled pixel, so that none can be compared with its mask; "
            "raise the margin of the pixel filter before, or filter images first"
        )
    return keep_best(inputs.manifest, "agreement", scores, settings.keep, inputs.out, inputs.classes)
