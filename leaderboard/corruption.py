"""Numbers about common corruptions that are no shares: the drop against clean accuracy, errors against a reference.

The sets are those of papers: the fifteen of Hendrycks and Dietterich (ICLR 2019), and the eighteen that the code of
RiFT (ICCV 2023) averages, which leave out glass blur and take in the four additional ones. All is derived from outcome
tables and stored nowhere.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

from robustboard.errors import RecordError
from robustboard.leaderboard.outcomes import corruption_columns

STANDARD_15: Final = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
RIFT_18: Final = (
    *(name for name in STANDARD_15 if name != "glass_blur"), "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip


class RelativeDrop(NamedTuple):
    """The share of its clean accuracy that a model loses under corruptions, with its 95 % interval.

    It is no share of examples: it is negative where corruption helps, without a lower limit. At most it is 1.
    """

    value: float
    n: int
    low: float
    high: float


def relative_drop(outcomes: pd.DataFrame, *, confidence: float = 0.95) -> RelativeDrop | None:
    """1 - (mean accuracy under the table's corruptions) / (clean accuracy); None where either is not there or n < 2.

    Both means are over the same examples, so the interval is that of a ratio of paired means: the variance of its
    linearised residuals over the examples (the delta method; Cochran, "Sampling Techniques", section 2.11).

    >>> relative_drop(pd.DataFrame({"clean": [True, True], "corruption/fog/1": [True, False]})).value
    0.5
    """
    columns = [column for columns in corruption_columns(outcomes).values() for column in columns]
    clean = outcomes["clean"].to_numpy(float)
    if not columns or clean.sum() == 0 or len(clean) < 2:
        return None
    shares = outcomes[columns].to_numpy(bool).mean(axis=1)
    ratio = float(shares.mean() / clean.mean())
    residuals = (shares - ratio * clean) / clean.mean()
    error = float(residuals.std(ddof=1) / np.sqrt(len(clean)))
    half = float(ndtri(0.5 + confidence / 2)) * error
    return RelativeDrop(1 - ratio, len(clean), 1 - ratio - half, min(1 - ratio + half, 1.0))


def mean_corruption_error(outcomes: pd.DataFrame, reference: pd.DataFrame) -> float:
    """mCE: the mean over corruptions of a model's summed errors divided by a reference's.

    It means something only beside the reference that it names. ImageNet-C has AlexNet; for CIFAR-10-C and MNIST-C there
    is no agreed one, so the board publishes no mCE.

    Args:
        outcomes: the model's table.
        reference: the reference's, with the same corruptions and severities.

    Raises:
        RecordError: if the corruptions differ, or the reference makes no error under one.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.2.
    """
    columns = corruption_columns(outcomes)
    if not columns or columns != corruption_columns(reference):
        raise RecordError("mCE needs two outcome tables with the same corruptions and severities.")
    ratios = []
    for name, severities in columns.items():
        own, others = ((~table[severities].to_numpy(bool)).mean() for table in (outcomes, reference))
        if others == 0:
            raise RecordError(f"mCE is not defined: the reference makes no error under {name}.")
        ratios.append(own / others)
    return float(np.mean(ratios))
