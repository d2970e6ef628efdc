"""Sound files as one channel of 16 kHz: channels averaged, then resampled by a polyphase filter.

Reading is libsndfile's (WAV, FLAC, OGG, MP3), the filter scipy's.
"""

from __future__ import annotations

import io
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

SAMPLE_RATE = 16_000


def read_audio(source: str | Path | bytes, name: str | None = None) -> tuple[np.ndarray, int]:
    """Samples (frames, channels) float32 in -1..1, and their rate in Hz.

    Args: source: a file, or a file's bytes, then with a `name` for messages.
    Raises: ConfigError without the package soundfile; DataError for a file that is missing, no sound, or has no frames
        or no finite samples.
    """
    import numpy as np

    try:
        import soundfile
    except ImportError:
        raise ConfigError("reading audio needs the package soundfile (pip install 'polyrank[captioning]')") from None
    name = repr(name if name is not None else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise DataError(f"{name}: no such file")
    try:
        samples, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), dtype="float32", always_2d=True
        )
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise DataError(f"{name} is no sound file that can be read: {str(error).splitlines()[0]}") from error
    if not samples.size:
        raise DataError(f"{name} has zero length")
    if not np.isfinite(samples).all():
        raise DataError(f"{name} holds samples that are no finite numbers")
    return samples, int(rate)


def to_mono(samples: np.ndarray) -> np.ndarray:
    """Mean over the channels, (frames, channels) -> (frames,) float32."""
    import numpy as np

    return np.asarray(samples, np.float32).mean(axis=1, dtype=np.float32)


def resample(samples: np.ndarray, rate: int, target: int = SAMPLE_RATE) -> np.ndarray:
    """(frames,) at `rate` Hz as ceil(frames * target / rate) frames at `target` Hz, float32.

    Raises: DataError for a rate that is not positive.
    """
    import numpy as np
    from scipy.signal import resample_poly

    if rate < 1 or target < 1:
        raise DataError(f"a sample rate must be positive, got {rate} and {target} Hz")
    if rate == target:
        return np.asarray(samples, np.float32)
    common = gcd(rate, target)
    return resample_poly(samples, target // common, rate // common).astype(np.float32)


def load_mono(source: str | Path | bytes, name: str | None = None, max_samples: int | None = None) -> np.ndarray:
    """(samples,) float32 at 16 kHz, cut to `max_samples`. Raises as `read_audio`."""
    samples, rate = read_audio(source, name)
    return resample(to_mono(samples), rate)[:max_samples]
