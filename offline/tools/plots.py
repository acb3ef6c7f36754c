"""Pictures of a plan and of a checkpoint."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vllm_babai.errors import QuantizationError

SIZE = (7, 4.5)


def check_plot(path: Path) -> None:
    """Raise QuantizationError, before anything is computed, where the picture could not be written in the end."""
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise QuantizationError(f"--plot {path}: use a name that ends with .png")
    if not path.parent.is_dir():
        raise QuantizationError(f"--plot {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise QuantizationError(f"--plot {path} cannot be written: choose another file")


def plot_tradeoff(curves: dict[str, list[tuple[float, float]]], chosen: tuple[float, float], path: Path) -> None:
    """Expected loss against bits per weight. curves: format → (bits, nats per token); chosen: the plan's own point."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.plot(*chosen, marker="o", linestyle="", color="black", label="this plan")
    axes.set(xlabel="bits per weight", ylabel="expected KL divergence, nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_integers(counts: dict[int, int], path: Path) -> None:
    """How the integers of a checkpoint are distributed. counts: integer → how often."""
    total = sum(counts.values())
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.bar(list(counts), [count / total for count in counts.values()], width=0.9)
    axes.set(xlabel="integer", ylabel="share of weights", yscale="log")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)
