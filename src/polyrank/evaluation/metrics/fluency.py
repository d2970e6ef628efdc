"""FENSE's detector of fluency errors, as a sentence-transformers folder with safetensors.

It is BERT, the vector of its first token, a linear map to six logits and a sigmoid; the last probability is that of any
error (the others: kinds of errors that it was trained on). The published file (echecker_clotho_audiocaps_base.ckpt,
release V0.1 of blmoistawinde/fense) is a torch pickle, which no metric reads; it is turned once into a folder:

    python -m polyrank.evaluation.metrics.fluency CHECKPOINT ENCODER FOLDER

ENCODER is a folder (or hub id) of the encoder that the file names, with its tokenizer: bert-base-uncased for the base
detector. Then `polyrank evaluate ... --model fluency=FOLDER`.

Source: FENSE (Zhou et al. 2022), section 3.2. Texts are lower-cased, without punctuation, cut at 64 tokens, as there.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import CheckpointError, ConfigError
from ._encoders import sentence_vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LENGTH = 64
_OLD = "embeddings.position_ids"  # a constant that transformers no longer saves


def error_probabilities(model: Any, texts: Sequence[str]) -> list[float]:
    """Probability of a fluency error in each text. Raises: ConfigError if the model gives no probabilities."""
    plain = [re.sub(r"[^\w\s]", "", text).lower() for text in texts]
    found = sentence_vectors(model, plain)
    if any(vector.min() < 0 or vector.max() > 1 for vector in found.values()):
        raise ConfigError(f"model 'fluency' gives no probabilities; make its folder by python -m {__spec__.name}")
    return [float(found[text][-1]) for text in plain]


def build_detector(encoder: str, num_classes: int) -> SentenceTransformer:
    """An encoder with an untrained head of `num_classes` probabilities on its first token's vector."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from torch.nn import Sigmoid

    try:
        body = Transformer(encoder, max_seq_length=LENGTH)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load an encoder from {encoder!r}: {str(error).splitlines()[0]}") from None
    width = body.get_embedding_dimension()
    head = Dense(width, num_classes, activation_function=Sigmoid())
    return SentenceTransformer(modules=[body, Pooling(width, "cls"), head], device="cpu").eval()


def convert_detector(checkpoint: str | Path, encoder: str, folder: str | Path) -> Path:
    """Write FENSE's published checkpoint as a folder that `--model fluency=` takes. Returns the folder.

    torch's weights-only loader opens the file: it builds tensors and plain containers and calls nothing named in it.
    Raises: CheckpointError if the file is something else, or does not fit the encoder; ConfigError for a bad encoder.
    """
    import pickle

    import torch

    checkpoint = Path(checkpoint)
    if not zipfile.is_zipfile(checkpoint):
        raise CheckpointError(f"{checkpoint} is no file as torch.save writes it")
    try:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        state, num_classes = dict(saved["state_dict"]), int(saved["num_classes"])
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint} holds no fluency detector: {str(error).splitlines()[0]:.200}") from None
    model: Any = build_detector(encoder, num_classes)
    body = {key[len("encoder.") :]: value for key, value in state.items() if key.startswith("encoder.")}
    body.pop(_OLD, None)
    head = {key.replace("clf.", "linear."): value for key, value in state.items() if key.startswith("clf.")}
    try:
        model[0].model.load_state_dict(body)
        model[2].load_state_dict(head)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint} does not fit the encoder {encoder}: {lines:.200}") from None
    model.save(str(folder), create_model_card=False, safe_serialization=True)
    return Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="FENSE's fluency detector as a folder for --model fluency=FOLDER")
    parser.add_argument("checkpoint")
    parser.add_argument("encoder")
    parser.add_argument("folder")
    given = parser.parse_args(arguments)
    print(convert_detector(given.checkpoint, given.encoder, given.folder))


if __name__ == "__main__":
    main()
