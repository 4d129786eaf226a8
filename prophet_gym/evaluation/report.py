"""The report of an evaluation: plots, contact sheets, videos, and one self-contained HTML page with all of it."""

import base64
import html
import json
import math
import os
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
from numpy.typing import NDArray

from prophet_gym.data.lerobot_format.schema import without_nan


def draw_suite(
    report: Path,
    suite: str,
    curves: dict[str, NDArray[np.float64]],
    real: NDArray[np.uint8],
    imagined: NDArray[np.uint8],
) -> None:
    """Write the drift curves, the contact sheet and the videos of one suite.

    Args:
        curves: PSNR (T,) by name. real, imagined: uint8 (N, T + 1, H, W, 3).
    """
    _draw_curves(curves, report / f"drift_{suite}.png", suite)
    _draw_contact_sheet(real, imagined, report / f"contact_sheet_{suite}.png")
    chosen = np.linspace(0, len(real) - 1, min(8, len(real))).astype(int)
    pairs = np.concatenate([real[chosen], imagined[chosen]], axis=2)  # (8, T + 1, 2 H, W, 3)
    video = np.concatenate(list(pairs), axis=2)
    iio.imwrite(report / f"side_by_side_{suite}.mp4", video, fps=5, codec="libx264", macro_block_size=None)


def write_report(report: Path, results: dict[str, Any]) -> None:
    """Write `results.json` and `report.html`; the pictures of `draw_suite` are embedded in it."""
    parts = ["<!doctype html><meta charset=utf-8><title>Prophet against the real simulator</title>", _STYLE]
    for suite, values in results.items():
        parts.append(f"<h1>{html.escape(suite)}</h1><p>Splits: {html.escape(', '.join(values['splits']))}.")
        if "val" in values["splits"]:
            parts.append("A judge's thresholds are chosen on validation episodes: its outcomes there flatter it.")
        for section, content in values.items():
            if isinstance(content, dict):
                parts.append(f"<h2>{section}</h2>{_table(content)}")
        for path, element in (
            (report / f"drift_{suite}.png", '<img src="data:image/png;base64,{}">'),
            (report / f"contact_sheet_{suite}.png", '<img src="data:image/png;base64,{}">'),
            (report / f"side_by_side_{suite}.mp4", '<video controls loop src="data:video/mp4;base64,{}"></video>'),
        ):
            if path.exists():
                parts.append(element.format(base64.b64encode(path.read_bytes()).decode()))
    for name, text in (
        ("report.html", "\n".join(parts)),
        ("results.json", json.dumps(without_nan(results), indent=1)),
    ):
        temporary = report / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, report / name)


_STYLE = (
    "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child{text-align:left}img,video{display:block;max-width:100%;margin:1em 0}</style>"
)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _table(content: dict[str, Any]) -> str:
    """Numbers by name, or by row and column: nested dicts become rows, the innermost ones columns."""
    if not any(isinstance(value, dict) for value in content.values()):
        rows = "".join(f"<tr><td>{name}</td><td>{_number(value)}</td></tr>" for name, value in content.items())
        return f"<table>{rows}</table>"
    lines: dict[str, dict[str, float]] = {}
    for outer, inner in content.items():
        for name, numbers in inner.items():
            lines[f"{outer}, {name}"] = numbers
    columns = list(next(iter(lines.values())))
    head = "".join(f"<th>{column}</th>" for column in ("", *columns))
    body = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{_number(numbers[column])}</td>' for column in columns)}</tr>"
        for name, numbers in lines.items()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _draw_curves(curves: dict[str, NDArray[np.float64]], path: Path, title: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for index, (name, curve) in enumerate(curves.items()):
        style = "--" if "moving" in name else "-"
        axes.plot(np.arange(1, len(curve) + 1), curve, style, color=f"C{index // 2}", label=name)
    axes.set(xlabel="frames after the start (5 Hz)", ylabel="PSNR (dB)", title=f"{title}: own frames fed back")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_contact_sheet(real: NDArray[np.uint8], imagined: NDArray[np.uint8], path: Path, rows: int = 6) -> None:
    """Eleven moments of each of `rows` episodes spread over the set, real above imagined."""
    moments = np.linspace(0, real.shape[1] - 1, 11).astype(int)
    chosen = np.linspace(0, len(real) - 1, min(rows, len(real))).astype(int)
    strips = []
    for index in chosen:
        strips += [np.concatenate(list(video[index, moments]), axis=1) for video in (real, imagined)]
        strips.append(np.full((6, strips[-1].shape[1], 3), 255, np.uint8))
    iio.imwrite(path, np.concatenate(strips))
