"""Can one tell from a candidate which hypothesis wrote it? A linear SVM on sentence vectors, and their PCA.

Accuracy on candidates of inputs held out: 1/K where the hypotheses write alike, 1 where each has a style of its own.
The split is by input, so that what an input is about tells nothing.

Source: LoRA-MCL (arXiv 2507.10419), its analysis with StyleDistance vectors, 70 % to train on. Differs: split by input;
any vectors, by default TF-IDF of words and word pairs, which needs no model.
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
    from sklearn.decomposition import PCA
    from sklearn.metrics import confusion_matrix
    from sklearn.svm import LinearSVC

    vectors = np.asarray(vectors, dtype=np.float64)
    num, count, width = vectors.shape
    if count < 2:
        raise ConfigError("one hypothesis alone cannot be told from others")
    first = round(share * num)
    if not 0 < first < num:
        raise ConfigError(f"a share of {share} of {num} inputs leaves none to train on, or none to judge by")
    order = np.random.default_rng(seed).permutation(num)
    train, test = order[:first], order[first:]
    who: Any = np.tile(np.arange(count), (num, 1))
    model = LinearSVC(random_state=seed).fit(vectors[train].reshape(-1, width), who[train].ravel())
    guessed = model.predict(vectors[test].reshape(-1, width))
    confusion = confusion_matrix(who[test].ravel(), guessed, labels=range(count))
    pca = PCA(2, random_state=seed)
    points = pca.fit_transform(vectors.reshape(-1, width)).reshape(num, count, 2)
    first_two = (float(pca.explained_variance_ratio_[0]), float(pca.explained_variance_ratio_[1]))
    return Speakers(float(np.trace(confusion) / confusion.sum()), confusion, points, first_two)
