"""Visual words: residual quantisation against a slow loop, vectors that tell images apart."""

import numpy as np
import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.data.visual_words import Codebook, as_text, image_vectors, quantize


def test_more_levels_leave_a_smaller_residual_and_codes_are_nearest_centroids():
    points = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    codes, others = quantize(points, points[:5], Codebook(levels=3, size=8, width=6))
    assert codes.shape == (200, 3)
    assert (others == codes[:5]).all()  # the same vector has the same codes, fitted on or not
    residual, errors = points.astype(np.float64), [float((points**2).sum())]
    for level in range(3):
        means = np.stack([residual[codes[:, level] == c].mean(0) for c in range(8)])
        residual = residual - means[codes[:, level]]
        errors.append(float((residual**2).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_two_clusters_are_two_codes():
    points = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    codes, _ = quantize(points, points[:0], Codebook(levels=1, size=2, width=2))
    assert len(set(codes[:10, 0])) == len(set(codes[10:, 0])) == 1
    assert codes[0, 0] != codes[10, 0]


def test_images_that_are_described_alike_lie_close():
    dogs = [{"en": f"a dog runs over grass {i}", "de": f"ein hund rennt im gras {i}"} for i in range(10)]
    cars = [{"en": f"a red car on a road {i}", "de": f"ein rotes auto auf der strasse {i}"} for i in range(10)]
    fit, new = image_vectors(dogs + cars, [{"en": "the dog on grass", "de": "hund im gras"}], 4)
    assert np.allclose(np.linalg.norm(fit, axis=1), 1, atol=1e-5)
    assert (fit[:10] @ new[0]).min() > (fit[10:] @ new[0]).max()


def test_words_of_a_codebook():
    book = Codebook(levels=2, size=3, width=1)
    assert book.tokens() == ["<v0_0>", "<v0_1>", "<v0_2>", "<v1_0>", "<v1_1>", "<v1_2>"]
    assert as_text(np.array([2, 0])) == "<v0_2><v1_0>"


def test_what_cannot_be_coded():
    with pytest.raises(ConfigError, match=r"codebook\.size must be at least 2, got 1"):
        Codebook(size=1)
    with pytest.raises(DataError, match="3 images are too few for 8 codes"):
        quantize(np.zeros((3, 2), np.float32), np.zeros((0, 2), np.float32), Codebook(size=8))
    with pytest.raises(DataError, match="too few for vectors of 4"):
        image_vectors([{"en": "a dog", "de": "ein hund"}] * 3, [], 4)
