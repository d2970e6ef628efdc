"""`polyrank inspect`: an adapter's own spectra and, with its base model, its intruder dimensions."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...analysis.inspect import Inspection, Layer, inspect_adapter
from ...analysis.weight_pairs import LayerSpectrum
from ...core.errors import ConfigError

Rows = list[list[str]]


def inspect(args: Namespace) -> tuple[dict[str, Any], list[Rows], tuple[str, ...]]:
    """What `polyrank inspect` prints: as JSON, as blocks of rows, and its notes. Writes the plot if one is asked for.

    Args: source, model (the base, or None), layers, intruder, top_k, epsilon, plot (file or None), allow_bin.
    Raises: ConfigError, CheckpointError for what was given wrongly.
    """
    from ...analysis.bin_files import converted

    if args.intruder and not args.model:
        raise ConfigError("--intruder compares with the base model's weights: give it with --base MODEL")
    if args.plot and Path(args.plot).suffix != ".png":
        raise ConfigError(f"--plot writes a PNG: the file must end in .png, got {args.plot!r}")
    source = _folder(Path(args.source))
    with converted(source) if args.allow_bin else nullcontext(source) as place:
        seen = inspect_adapter(place, _base(args.model))
        spectra = _spectra(place, args) if args.intruder else []
    value, blocks = as_json(seen, layers=args.layers) | {"path": str(source)}, as_rows(seen, layers=args.layers)
    if args.intruder:
        value["intruders"] = spectra_json(spectra, args, layers=args.layers)
        blocks += spectra_rows(spectra, layers=args.layers)
    if args.plot:
        value["plot"] = str(_plot(seen, spectra, args))
        blocks.append([["plot", value["plot"]]])
    return value, blocks, seen.notes


def _folder(path: Path) -> Path:
    from .saved import adapter_folder

    if (path / "config.yaml").is_file() or (path.is_dir() and not any(path.glob("*.*"))):
        return adapter_folder(path)
    return path


def _base(name: str | None) -> Any:
    from .saved import load_base

    return load_base(name) if name else None


def _spectra(folder: Path, args: Namespace) -> list[LayerSpectrum]:
    from rich.console import Console
    from rich.progress import track

    from ...analysis.weight_pairs import adapted_model, layer_spectra, weight_pairs

    model = adapted_model(folder, _base(args.model))
    found = layer_spectra(weight_pairs(model), args.top_k, args.epsilon)
    console = Console(stderr=True, quiet=args.quiet)
    return list(track(found, "singular vectors, layer by layer", console=console, transient=True))


def spectra_json(spectra: list[LayerSpectrum], args: Namespace, layers: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "top_k": args.top_k,
        "epsilon": args.epsilon,
        "intruders": sum(row.intruders for row in spectra),
        "right_intruders": sum(row.right_intruders for row in spectra),
        "span_intruders": sum(row.span_intruders for row in spectra),
        "matrices": len(spectra),
    }
    if layers:
        value["layers"] = [vars(row) for row in spectra]
    return value


def spectra_rows(spectra: list[LayerSpectrum], layers: bool) -> list[Rows]:
    """Sums of the intruders, and each layer's if asked for."""
    counts = [("left", "intruders"), ("right", "right_intruders"), ("left, by span", "span_intruders")]
    sums = [["intruder dimensions", "all", "of vectors"]]
    looked_at = sum(len(row.similarity) for row in spectra)
    sums += [[name, str(sum(getattr(row, key) for row in spectra)), f"{looked_at:,}"] for name, key in counts]
    if not layers:
        return [sums]
    rows = [["layer", "hypothesis", "left", "right", "by span", "least cosine", "eff. rank"]]
    rows += [
        [
            row.module,
            *map(str, (row.hypothesis, row.intruders, row.right_intruders, row.span_intruders)),
            f"{min(row.similarity):.3f}",
            f"{row.effective_rank:.2f}",
        ]
        for row in spectra
    ]
    return [sums, rows]


def _plot(seen: Inspection, spectra: list[LayerSpectrum], args: Namespace) -> Path:
    from ...report.markov_figures import save_png
    from ...report.spectra_figures import SpectrumRow, spectrum_figure

    several = seen.num_hypotheses > 1
    if spectra:
        rows = [
            SpectrumRow(
                row.module + (f" [{row.hypothesis}]" if several else ""),
                row.singular_values,
                row.similarity,
                row.base_singular_values,
            )
            for row in spectra
        ]
    else:
        rows = [
            SpectrumRow(layer.module + (f" [{k}]" if several else ""), update.singular_values)
            for layer in seen.layers
            for k, update in enumerate(layer.updates)
        ]
    if not rows:
        raise ConfigError("nothing to plot: no update could be computed (give the base model with --base MODEL)")
    return save_png(spectrum_figure(rows, Path(args.source).name, args.epsilon if spectra else None), args.plot)


def as_json(seen: Inspection, layers: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "path": seen.path,
        "method": seen.method,
        "base_model": seen.base_model,
        "parameters": seen.parameters,
        "other_parameters": seen.other_parameters,
        "adapted_layers": len(seen.layers),
        "num_hypotheses": seen.num_hypotheses,
        "frobenius": [seen.frobenius(k) for k in range(seen.num_hypotheses)],
        "mean_effective_rank": [_mean_rank(seen, k) for k in range(seen.num_hypotheses)],
        "cosines": seen.cosines,
        "notes": list(seen.notes),
    }
    if layers:
        value["layers"] = [
            {
                "module": layer.module,
                "parameters": layer.parameters,
                "updates": [vars(update) for update in layer.updates],
            }
            for layer in seen.layers
        ]
    return value


def as_rows(seen: Inspection, layers: bool) -> list[Rows]:
    """Blocks of rows: the sums, one row for each hypothesis, cosines, and each layer if asked for."""
    several = seen.num_hypotheses > 1
    blocks: list[Rows] = [
        [
            ["method", seen.method],
            ["base model", seen.base_model or "–"],
            ["parameters", f"{seen.parameters:,}"],
            ["  of them no update", f"{seen.other_parameters:,}"],
            ["adapted layers", f"{len(seen.layers):,}"],
        ]
    ]
    if seen.num_hypotheses:
        head = ["hypothesis"] if several else ["update"]
        cosines = [f"cos {k}" for k in range(seen.num_hypotheses)] if seen.cosines else []
        rows = [[*head, "frobenius", "mean effective rank", *cosines]]
        for k in range(seen.num_hypotheses):
            shown = [f"{value:.3f}" for value in seen.cosines[k]] if seen.cosines else []
            rows.append([str(k), f"{seen.frobenius(k):.4g}", f"{_mean_rank(seen, k):.2f}", *shown])
        blocks.append(rows)
    if layers:
        head = [
            "layer",
            "parameters",
            *(["hypothesis"] if several else []),
            "rank",
            "frobenius",
            "spectral",
            "eff. rank",
        ]
        blocks.append([head, *(row for layer in seen.layers for row in _layer_rows(layer, several))])
    return blocks


def _layer_rows(layer: Layer, several: bool) -> Rows:
    if not layer.updates:
        return [[layer.module, f"{layer.parameters:,}", *(["–"] * (5 if several else 4))]]
    return [
        [
            layer.module if k == 0 else "",
            f"{layer.parameters:,}" if k == 0 else "",
            *([str(k)] if several else []),
            str(update.rank or "–"),
            f"{update.frobenius:.4g}",
            f"{update.spectral:.4g}",
            f"{update.effective_rank:.2f}",
        ]
        for k, update in enumerate(layer.updates)
    ]


def _mean_rank(seen: Inspection, hypothesis: int) -> float:
    ranks = [layer.updates[hypothesis].effective_rank for layer in seen.layers if hypothesis < len(layer.updates)]
    return sum(ranks) / len(ranks)
