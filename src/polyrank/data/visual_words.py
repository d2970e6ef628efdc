"""Visual words: a fixed feature vector of each image as a short row of discrete codes, coarse to fine.

Where there are no pictures, the vector is made from a few captions that the image has beside those that are learned
and scored: TF-IDF of each language on its own, put side by side, reduced by truncated SVD to unit vectors x. Residual
vector quantisation then gives L codes of C values,

    r_0 = x,   c_l = nearest centroid of level l to r_l,   r_{l+1} = r_l - centroid_l[c_l]

with the centroids of level l from k-means on the residuals of the images that the codes are fitted on.

Source: TF-IDF, SVD and k-means are scikit-learn's; residual quantisation as in product search and image tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Codebook:
    """How fine the codes are: `levels` codes of `size` values each, made from vectors of `width` numbers."""

    levels: int = 8
    size: int = 128
    width: int = 96

    def __post_init__(self) -> None:
        for name, low in (("levels", 1), ("size", 2), ("width", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"codebook.{name} must be at least {low}, got {getattr(self, name)}")

    def tokens(self) -> list[str]:
        """Every word that `as_text` may write: level 0's, then level 1's, ..."""
        return [f"<v{level}_{code}>" for level in range(self.levels) for code in range(self.size)]


def image_vectors(
    fit: Sequence[dict[str, str]], others: Sequence[dict[str, str]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (images, width) float32 of the images that they are fitted on, and of others.

    Args: for each image its text by language (the captions that describe it, joined).
    Raises: DataError where there are fewer images or words than `width`.
    """
    import numpy as np
    from scipy.sparse import hstack
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    fitted, rest = [], []
    for language in sorted(fit[0]) if fit else ():
        words = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(fit) < 1000 else 5)
        fitted.append(words.fit_transform(image[language] for image in fit))
        rest.append(words.transform([image[language] for image in others]) if others else None)
    columns = sum(part.shape[1] for part in fitted)
    if len(fit) <= width or columns <= width:
        raise DataError(f"{len(fit)} images with {columns} words are too few for vectors of {width}")
    svd = TruncatedSVD(width, random_state=0)
    first = normalize(svd.fit_transform(hstack(fitted).tocsr())).astype(np.float32)
    if not others:
        return first, np.zeros((0, width), np.float32)
    return first, normalize(svd.transform(hstack(rest).tocsr())).astype(np.float32)


def quantize(fit: np.ndarray, others: np.ndarray, codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """Codes (images, levels) int64 of the vectors that the centroids are fitted on, and of others.

    Raises: DataError where there are fewer vectors than centroids.
    """
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    if len(fit) < codebook.size:
        raise DataError(f"{len(fit)} images are too few for {codebook.size} codes")
    parts = [np.array(fit, np.float32), np.array(others, np.float32)]
    codes: list[list[np.ndarray]] = [[], []]
    for level in range(codebook.levels):
        means = MiniBatchKMeans(codebook.size, random_state=level, n_init=1, batch_size=4096, max_iter=20)
        means.fit(parts[0])
        for side, residual in enumerate(parts):
            chosen = means.predict(residual) if len(residual) else np.zeros(0, np.int64)
            codes[side].append(chosen.astype(np.int64))
            parts[side] = residual - means.cluster_centers_[chosen].astype(np.float32)
    return np.stack(codes[0], 1), np.stack(codes[1], 1)


def as_text(codes: Sequence[int]) -> str:
    """One image's codes as a prompt: <v0_17><v1_3>..."""
    return "".join(f"<v{level}_{int(code)}>" for level, code in enumerate(codes))
