"""How samples differ from real tiles, by features of both: distances of their distributions, diversity, nearest neighbours.

Features are [N,D], a row per image, as arrays or tensors; sums are taken in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: CMMD's kernel width for embeddings of length 1, and the factor it is published with (Jayasumana et al., CVPR 2024).
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def frechet_distance(real: Any, samples: Any) -> float:
    """Squared Fréchet distance of the normal distributions with the means and covariances of two sets of features.

    It is FID when the features are InceptionV3's (Heusel et al., NeurIPS 2017): |m₁ - m₂|² + tr(S₁ + S₂ - 2 (S₁ S₂)^½). With fewer
    images than features the covariances are singular and the distance is still defined, but it falls as images are added: only
    values of the same counts compare. Raises ValueError for fewer than two rows.
    """
    real, samples = _as_float(real), _as_float(samples)
    if min(len(real), len(samples)) < 2:
        raise ValueError("one image has no covariance; take two or more")
    mean = real.mean(axis=0) - samples.mean(axis=0)
    roots = [_root(features) for features in (real, samples)]
    # With S = Rᵀ R the eigenvalues of S₁ S₂ are the squared singular values of R₁ R₂ᵀ: no square root of a singular matrix is taken.
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(mean @ mean + sum((root**2).sum() for root in roots) - 2 * shared))


def _root(features: np.ndarray) -> np.ndarray:
    """R [at most D, D] with Rᵀ R the covariance of the features."""
    root = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(root, mode="r")) if len(root) > root.shape[1] else root


def kernel_distance(real: Any, samples: Any, subset: int = 100, subsets: int = 100, seed: int = 0) -> tuple[float, float | None, int]:
    """Mean and standard deviation over subsets of the squared maximum mean discrepancy with the kernel (x·y / D + 1)³.

    It is KID when the features are InceptionV3's (Bińkowski et al., ICLR 2018): unbiased, so that it may be negative and does not
    depend on the counts. ``subsets`` times, ``subset`` images of each set are drawn by ``seed``, fewer if a set is smaller; if both are,
    there is one draw, and no deviation. Also returns the number drawn. Raises ValueError for fewer than two rows.
    """
    real, samples = _as_float(real), _as_float(samples)
    subset = min(subset, len(real), len(samples))
    if subset < 2:
        raise ValueError("a subset of one image has no unbiased distance; take two or more")
    if subset == len(real) == len(samples):
        return _unbiased_discrepancy(real, samples), None, subset
    rng = np.random.default_rng(seed)
    values = [
        _unbiased_discrepancy(*(features[rng.choice(len(features), subset, replace=False)] for features in (real, samples)))
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values)), subset


def _unbiased_discrepancy(one: np.ndarray, other: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        own = kernel(a, a)
        return (own.sum() - np.trace(own)) / (len(a) * (len(a) - 1))

    return float(within(one) + within(other) - 2 * kernel(one, other).mean())


def cmmd(real: Any, samples: Any, chunk: int = 2048) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al., CVPR 2024) of CLIP embeddings [N,D] of length 1.

    The kernel is exp(-|x - y|² / 2σ²) with σ = 10, and the result is 1000 times the squared discrepancy, by the biased estimator of
    least variance (Gretton et al., 2012, equation 5), as in the paper's released code: an image's distance to itself counts, so
    that small sets are farther apart than large ones. Only values of the same counts and model compare.
    """
    real, samples = _as_float(real), _as_float(samples)

    def parts(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            yield part, (part**2).sum(axis=1)

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for (one, its), (other, others) in itertools.product(parts(a), parts(b)):
            squares = its[:, None] + others - 2 * one @ other.T
            total += np.exp(-np.maximum(squares, 0) / (2 * CMMD_SIGMA**2)).sum()
        return total / (len(a) * len(b))

    return float(CMMD_SCALE * (mean_kernel(real, real) + mean_kernel(samples, samples) - 2 * mean_kernel(real, samples)))


def diversity(features: Any, groups: Sequence[Hashable] | None = None) -> float | None:
    """Mean of 1 - cosine over all pairs of rows; with ``groups``, one key per row, over the pairs within each, averaged over groups.

    0 where all are alike. None where there are no pairs.
    """
    features = _as_float(features)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    members: dict[Hashable, list[int]] = {}
    for row, key in enumerate(groups or [None] * len(features)):
        members.setdefault(key, []).append(row)
    means = [mean for rows in members.values() if (mean := _mean_of_pairs(features[rows])) is not None]
    return float(np.mean(means)) if means else None


def _mean_of_pairs(features: np.ndarray) -> float | None:
    """Mean of 1 - x·y over the pairs of rows, from the length of their sum."""
    count, total = len(features), features.sum(axis=0)
    if count < 2:
        return None
    return max(0.0, float(1 - (total @ total - (features**2).sum()) / (count * (count - 1))))


@torch.no_grad()
def nearest_references(
    samples: Any, references: Sequence[Any], others: int = 50, device: torch.device | str = "cpu", chunk: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference of each sample, and how much nearer it is than the next ones: (index [N], ratio [N]).

    After Carlini et al. (Extracting Training Data from Diffusion Models, USENIX Security 2023): the distance to the nearest divided
    by the mean distance to the ``others`` next ones, fewer where there are fewer. About 1 for an image that owes nothing to a
    single reference, 0 for a copy; NaN with one reference, and 1 where that mean is 0.

    Args:
        samples: [N,D].
        references: one or more sets [M,D] of the same M things, e.g. as they are and mirrored; the nearer counts.

    It takes 2 N M D operations per set, and memory for the references in float32 and ``chunk`` x M distances.
    """
    references = [torch.as_tensor(one).to(device).float() for one in references]
    lengths = [one.square().sum(dim=1) for one in references]
    count = min(others + 1, len(references[0]))
    indices, ratios = [], []
    for part in torch.as_tensor(samples).split(chunk):
        part = part.to(device).float()
        squares: Any = None
        for one, length in zip(references, lengths, strict=True):
            found = torch.addmm(length, part, one.T, alpha=-2).add_(part.square().sum(dim=1, keepdim=True))
            squares = found if squares is None else torch.minimum(squares, found)
        closest, index = squares.clamp_(min=0).sqrt_().topk(count, largest=False)
        scale = closest[:, 1:].mean(dim=1)  # NaN where there are no others
        ratios.append(torch.where(scale == 0, torch.ones_like(scale), closest[:, 0] / scale).cpu())
        indices.append(index[:, 0].cpu())
    return torch.cat(indices).numpy(), torch.cat(ratios).numpy()


def _as_float(features: Any) -> np.ndarray:
    return np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64)
