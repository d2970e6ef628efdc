"""SpecAugment masks: their shape, their widths' distribution, their limits."""

import pytest
import torch

from polyrank.core.errors import ConfigError
from polyrank.evaluation.spec_augment import LIGHT, draw_band, spec_augment


def test_a_mask_is_one_band_of_time_and_one_of_frequency_for_the_whole_batch():
    torch.manual_seed(0)
    features = torch.ones(3, 10, 40)
    widths = []
    for _ in range(2000):
        masked = spec_augment(features, *LIGHT, length=30)
        zero = masked[0] == 0
        assert torch.equal(masked, masked[:1].expand(3, -1, -1))
        times, bands = zero.all(0), zero.all(1)
        assert torch.equal(zero, times[None] | bands[:, None])  # a cross and nothing else
        for line in (times, bands):
            where = line.nonzero()[:, 0].tolist()
            assert where == list(range(where[0], where[0] + len(where))) if where else True
        assert not times[30:].any()
        assert int(times.sum()) < 0.2 * 30
        assert int(bands.sum()) < 0.3 * 10
        widths.append((int(times.sum()), int(bands.sum())))
    assert bool((features == 1).all())
    # floor of a uniform in [0, 6): mean 2.5, variance 35 / 12; in [0, 3): mean 1, variance 2 / 3
    means = torch.tensor(widths).double().mean(0)
    assert abs(means[0] - 2.5) < 4 * (35 / 12 / 2000) ** 0.5
    assert abs(means[1] - 1.0) < 4 * (2 / 3 / 2000) ** 0.5
    turned = spec_augment(features.transpose(1, 2), 1.0, 0.0, time_axis=-2, generator=torch.Generator().manual_seed(1))
    same = spec_augment(features, 1.0, 0.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(turned.transpose(1, 2), same)
    assert all(0 <= first <= end <= 7 for first, end in (draw_band(7, 1.0) for _ in range(200)))


def test_wrong_masks():
    with pytest.raises(ConfigError, match="and time_axis 1"):
        spec_augment(torch.zeros(2, 3, 4), 0.1, 0.1, time_axis=1)
    with pytest.raises(ConfigError, match=r"got a shape of \(3, 4\)"):
        spec_augment(torch.zeros(3, 4), 0.1, 0.1)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\], got -0.1"):
        draw_band(4, -0.1)
