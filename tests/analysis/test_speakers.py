"""Telling hypotheses apart: where it must succeed, where it must be chance, and what is refused."""

import numpy as np
import pytest

from polyrank.analysis.speakers import chance_accuracies, tell_speakers, tfidf_vectors, two_components
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


def test_the_axes_are_the_singular_vectors_of_the_centred_vectors():
    vectors = np.random.default_rng(1).normal(size=(20, 3, 6)) * [5, 3, 1, 1, 1, 1]
    points, explained = two_components(vectors)
    flat = vectors.reshape(-1, 6) - vectors.reshape(-1, 6).mean(0)
    u, s, _ = np.linalg.svd(flat, full_matrices=False)
    np.testing.assert_allclose(np.abs(points.reshape(-1, 2)), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    np.testing.assert_allclose(explained, (s**2 / (s**2).sum())[:2])
    assert two_components(np.ones((2, 2, 3)))[1] == (0.0, 0.0)  # all the same: no axis
    points, explained = two_components(np.arange(6.0).reshape(3, 2, 1))  # one dimension: no second axis
    assert explained == (1.0, 0.0)
    assert not points[..., 1].any()
    two_texts = np.random.default_rng(0).normal(size=(2, 5))[np.arange(12).reshape(6, 2) % 2]
    points, explained = two_components(two_texts)  # two texts: no second axis, whatever rounding leaves of it
    assert explained == (pytest.approx(1.0), 0.0)
    assert not points[..., 1].any()


def test_guesses_are_those_of_another_linear_svm():
    """Three clouds, far apart and overlapping: libsvm's soft margin gives (nearly) the confusion of liblinear's."""
    from sklearn.svm import SVC

    draw = np.random.default_rng(2)
    for distance, least in ((8.0, 1.0), (1.5, 0.9)):
        vectors = draw.normal(size=(80, 3, 3)) + distance * np.eye(3)
        found = tell_speakers(vectors, seed=5)
        order = np.random.default_rng(5).permutation(80)
        train, test = vectors[order[:56]].reshape(-1, 3), vectors[order[56:]].reshape(-1, 3)
        guessed = SVC(kernel="linear").fit(train, [0, 1, 2] * 56).predict(test)
        other = np.zeros((3, 3), int)
        for who, guess in zip([0, 1, 2] * 24, guessed, strict=True):
            other[who, guess] += 1
        assert np.minimum(found.confusion, other).sum() >= least * 72
        assert found.accuracy == np.trace(found.confusion) / 72
        assert found.confusion.sum(1).tolist() == [24, 24, 24]


def test_chance_is_what_exchanged_writers_give():
    """Two clouds that are told apart; with writers exchanged a half, give or take; those that write alike: exactly."""
    draw = np.random.default_rng(3)
    apart = draw.normal(size=(100, 2, 4)) + 6 * np.stack([np.zeros(4), np.ones(4)])
    chance = chance_accuracies(apart, times=12)
    assert chance == sorted(chance)
    assert tell_speakers(apart).accuracy == 1.0
    assert max(chance) < 0.8
    assert 0.4 < np.mean(chance) < 0.6
    alike = np.repeat(draw.normal(size=(20, 1, 4)), 2, axis=1)
    assert set(chance_accuracies(alike, times=3)) == {0.5}


def test_what_cannot_be_told():
    with pytest.raises(ConfigError, match="one hypothesis alone"):
        tell_speakers(np.zeros((4, 1, 3)))
    with pytest.raises(ConfigError, match="leaves none"):
        tell_speakers(np.zeros((2, 2, 3)), share=0.1)
    with pytest.raises(ConfigError, match="one hypothesis alone"):
        chance_accuracies(np.zeros((4, 1, 3)))
    with pytest.raises(DataError, match="share no words"):
        tfidf_vectors([["", "!"]])
