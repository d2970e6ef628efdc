"""Telling hypotheses apart: where it must succeed, where it must be chance, and what is refused."""

import numpy as np
import pytest

from polyrank.analysis.speakers import tell_speakers, tfidf_vectors
from polyrank.core.errors import ConfigError, DataError


def test_hypotheses_with_words_of_their_own_are_told_apart():
    rows = [[f"a dog number {i % 7}", f"ein hund nummer {i % 7}"] for i in range(40)]
    found = tell_speakers(tfidf_vectors(rows))
    assert found.accuracy == 1.0
    assert found.confusion.tolist() == [[12, 0], [0, 12]]  # 30 % of 40 inputs
    assert found.points.shape == (40, 2, 2)
    assert np.sign(found.points[:, 0, 0]).tolist() == (-np.sign(found.points[:, 1, 0])).tolist()  # PCA's first axis
    assert found.explained[0] >= found.explained[1]


def test_what_the_input_is_about_tells_nothing():
    """Vectors that depend on the input alone: whatever is fitted, half of the guesses are right."""
    inputs = np.random.default_rng(0).normal(size=(30, 1, 5))
    found = tell_speakers(np.repeat(inputs, 2, axis=1))
    assert found.accuracy == 0.5


def test_what_cannot_be_told():
    with pytest.raises(ConfigError, match="one hypothesis alone"):
        tell_speakers(np.zeros((4, 1, 3)))
    with pytest.raises(ConfigError, match="leaves none"):
        tell_speakers(np.zeros((2, 2, 3)), share=0.1)
    with pytest.raises(DataError, match="share no words"):
        tfidf_vectors([["", "!"]])
