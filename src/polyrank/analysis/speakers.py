"""Can one tell from a candidate which hypothesis wrote it? A linear SVM on sentence vectors, and their PCA.

Accuracy on candidates of inputs held out: 1/K where the hypotheses write alike, 1 where each has a style of its own.
The split is by input, so that what an input is about tells nothing. What chance gives on the same texts is measured:
the K candidates of each input change writers at random, and all is fitted anew.

Source: LoRA-MCL (arXiv 2507.10419), its analysis with StyleDistance vectors, 70 % to train on. Differs: split by input,
chance by permutation; any vectors, TF-IDF of words and word pairs where there is no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Speakers:
    """Attributes:
    accuracy: share of the held-out candidates given to the hypothesis that wrote them.
    confusion: (K, K) counts, row: who wrote, column: who was guessed.
    points: (N, K, 2) first two principal components. explained: their shares of the variance.
    """

    accuracy: float
    confusion: np.ndarray
    points: np.ndarray
    explained: tuple[float, float]


def tfidf_vectors(candidates: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, K, width) vectors of words and word pairs that occur twice, as many as 2,000 of them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text for row in candidates for text in row]
    try:
        matrix = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=2000).fit_transform(texts)
    except ValueError:
        raise DataError("the candidates share no words: there is nothing to compare them by") from None
    return np.asarray(matrix.todense()).reshape(len(candidates), -1, matrix.shape[1])


def tell_speakers(vectors: np.ndarray, share: float = 0.7, seed: int = 0) -> Speakers:
    """Fit on the candidates of a random `share` of the inputs, judge on the others.

    Args: vectors: (N, K, width), that of candidate k of input i at [i, k].
    Raises: ConfigError for fewer than two hypotheses, or a share that leaves a side without inputs.
    """
    from sklearn.metrics import confusion_matrix

    vectors = _checked(vectors)
    who, guessed = _guesses(vectors, share, seed)
    confusion = confusion_matrix(who, guessed, labels=range(vectors.shape[1]))
    points, explained = two_components(vectors)
    return Speakers(float(np.mean(who == guessed)), confusion, points, explained)


def chance_accuracies(vectors: np.ndarray, times: int = 20, share: float = 0.7, seed: int = 0) -> list[float]:
    """Accuracies of `tell_speakers` where the candidates of each input have changed writers at random, sorted.

    With a of them at or above the accuracy found, p = (1 + a) / (1 + times). Raises: as `tell_speakers`.
    """
    vectors = _checked(vectors)
    draw = np.random.default_rng(seed)
    found = []
    for number in range(times):
        order = draw.permuted(np.tile(np.arange(vectors.shape[1]), (len(vectors), 1)), axis=1)
        who, guessed = _guesses(np.take_along_axis(vectors, order[:, :, None], axis=1), share, seed + number)
        found.append(float(np.mean(who == guessed)))
    return sorted(found)


def two_components(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """(N, K, 2) coordinates on the first two principal axes of all vectors, and the axes' shares of the variance.

    An axis that does not exist (fewer than two dimensions or different texts) has coordinates and share 0.
    """
    from sklearn.decomposition import PCA

    num, count, width = vectors.shape
    rank = min(2, width, num * count)
    pca = PCA(rank, svd_solver="full")
    flat = vectors.reshape(-1, width)
    if not np.ptp(flat, axis=0).any():
        return np.zeros((num, count, 2)), (0.0, 0.0)
    points, shares = np.zeros((num * count, 2)), [0.0, 0.0]
    found = pca.fit_transform(flat)
    for axis, part in enumerate(pca.explained_variance_ratio_.tolist()):
        if part > 1e-12:  # else rounding
            points[:, axis], shares[axis] = found[:, axis], part
    return points.reshape(num, count, 2), (shares[0], shares[1])


def _guesses(vectors: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Who wrote the held-out candidates, and who is guessed: one SVM against the others for each hypothesis."""
    from sklearn.svm import LinearSVC

    num, count, width = vectors.shape
    first = round(share * num)
    if not 0 < first < num:
        raise ConfigError(f"a share of {share} of {num} inputs leaves none to train on, or none to judge by")
    order = np.random.default_rng(seed).permutation(num)
    train, test = order[:first], order[first:]
    who: Any = np.tile(np.arange(count), (num, 1))
    model = LinearSVC(random_state=seed, max_iter=5000).fit(vectors[train].reshape(-1, width), who[train].ravel())
    return who[test].ravel(), model.predict(vectors[test].reshape(-1, width))


def _checked(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.shape[1] < 2:
        raise ConfigError("one hypothesis alone cannot be told from others")
    return vectors
