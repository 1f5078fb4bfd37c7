"""An evaluation as one page of HTML that needs nothing else: tables, pictures, agreement plots.

Pictures are slices of patients: the page belongs where the images belong. Patients are numbers in
the order of their hashes.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from dicomnode.imaging.units import Unit
from training.evaluation import Evaluation, Shown
from training.intervals import Agreement
from training.measures import Asked, meaning
from training.metrics import SOFT_TISSUE_WINDOW
from training.similarity import Array

_WINDOWS: Mapping[Unit, tuple[float, float]] = {"HU": SOFT_TISSUE_WINDOW, "SUV": (0.0, 10.0)}
_ERRORS: Mapping[Unit, float] = {"HU": 200.0, "SUV": 2.0}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:66rem;padding:0 1rem;
color:#1b1b1f;background:#fff}
table{border-collapse:collapse;margin:.6rem 0 1.6rem}th,td{padding:.25rem .7rem;text-align:right;
border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums;
white-space:nowrap}th:first-child,td:first-child,
td.words,th.words{text-align:left}th{border-bottom:2px solid #888}
td.words{color:#555;white-space:normal}
.scroll{overflow-x:auto}.four{display:grid;grid-template-columns:repeat(4,1fr);gap:.4rem;
margin:.4rem 0 1rem}.four img{width:100%;background:#000}figure{margin:0}
figcaption{font-size:.85rem;color:#555}code{background:#f2f2f4;padding:.1rem .3rem;
overflow-wrap:anywhere}.note{border-left:4px solid #c80;padding:.3rem .8rem;background:#fff8e8}
svg{max-width:30rem;width:100%;height:auto}
"""


def report(found: Evaluation, title: str, facts: Mapping[str, str]) -> str:
    """The page.

    Args:
        facts: what was judged and how (package, part, command, ...): name -> words.
    """
    asked = found.asked
    number = len(set(found.patients))
    notes = [] if number > 1 else ["One patient: no interval, test or agreement means anything."]
    if asked.profile == "unpaired":
        notes.append("No slice has its truth: none of these figures says that a result is right.")
    if found.spread is not None and found.spread.warning:
        notes.append(f"{found.spread.name}: {found.spread.warning}.")
    parts = [
        "<h2>Figures</h2>",
        f"<p>Means over {number} patients ({len(found.patients)} volumes), each patient's volumes "
        "averaged first; intervals are 95 %, by bootstrap over patients. Profile "
        f"<b>{asked.profile}</b>, range {asked.low:g} to {asked.high:g} {asked.unit}.</p>",
        _figures(found),
        _differences(found),
        _spread(found),
        _agreements(found),
        "<h2>Patients</h2>",
        _patients(found),
        "<h2>Pictures</h2>",
        _legend(asked),
        *(_picture(shown, asked) for shown in found.pictures),
    ]
    return page(title, facts, notes, parts)


def page(title: str, facts: Mapping[str, str], notes: Sequence[str], parts: Sequence[str]) -> str:
    """A whole page that needs nothing else.

    Args:
        facts: name -> words, above everything.
        notes: what a reader must not overlook.
        parts: HTML.
    """
    top = [
        f"<h1>{escape(title)}</h1>",
        table([], [[name, f"<code>{escape(words)}</code>"] for name, words in facts.items()], 1),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    width = '<meta name="viewport" content="width=device-width">'
    body = "\n".join([*top, *parts])
    return f'<!doctype html><html lang="en"><head>{head}{width}</head><body>{body}</body></html>\n'


def _figures(found: Evaluation) -> str:
    rows = []
    for name, over in found.summaries().items():
        words, unit = meaning(name, found.asked)
        interval = f"{over.low:.4g} to {over.high:.4g}"
        rows.append(
            [name, f"{over.mean:.4g}", interval, f"{over.deviation:.3g}", unit, escape(words)]
        )
    return table(["figure", "mean", "95 % interval", "SD", "unit", "what it is"], rows, 5)


def _differences(found: Evaluation) -> str:
    if not found.others:
        return ""
    rows = [
        [
            name,
            f"{over.mean:+.4g}",
            f"{over.low:+.4g} to {over.high:+.4g}",
            f"{over.t_test:.2g}",
            f"{over.wilcoxon:.2g}",
        ]
        for name, over in found.differences().items()
    ]
    head = ["figure", "difference", "95 % interval", "p, paired t", "p, Wilcoxon"]
    words = "<p>Result minus what it is compared with, by patient; p values are two-sided and not "
    return f"<h2>Compared</h2>{words}corrected for the number of figures.</p>{table(head, rows)}"


def _spread(found: Evaluation) -> str:
    if (spread := found.spread) is None:
        return ""
    rows = [
        ["Fréchet distance", f"{spread.frechet:.4g}"],
        ["squared kernel distance", f"{spread.kernel:.4g}"],
        ["slices of results, of truths", f"{spread.results}, {spread.truths}"],
        ["features", str(spread.length)],
        ["grey values", escape(spread.window)],
    ]
    return f"<h2>{escape(spread.name)}</h2>{table([], rows)}"


def _agreements(found: Evaluation) -> str:
    parts = []
    pairs, unit = found.pairs(), escape(found.asked.unit)
    for name, over in found.agreements().items():
        low, high = over.lower_interval[0], over.upper_interval[1]
        parts.append(
            f"<figure>{_plot(pairs[name], over)}<figcaption>{escape(name)}: result minus truth "
            f"over their mean, {unit}, a dot per patient. Bias {over.bias:+.4g}, 95 % limits of "
            f"agreement {over.lower:.4g} to {over.upper:.4g}; with their 95 % intervals "
            f"{low:.4g} to {high:.4g}.</figcaption></figure>"
        )
    return f"<h2>Agreement (Bland and Altman)</h2>{''.join(parts)}" if parts else ""


def _plot(pairs: Sequence[tuple[float, float]], over: Agreement) -> str:
    """Differences over means, with bias and limits, as SVG."""
    made, truth = np.asarray(pairs).T
    means, differences = (made + truth) / 2, made - truth
    left, right = float(means.min()), float(means.max())
    bottom = min(float(differences.min()), over.lower)
    top = max(float(differences.max()), over.upper)

    def x(value: float) -> float:
        return 70 + 350 * (value - left) / ((right - left) or 1.0)

    def y(value: float) -> float:
        return 190 - 170 * (value - bottom) / ((top - bottom) or 1.0)

    lines = "".join(
        f'<line x1="60" x2="430" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#888" {dash}/>'
        f'<text x="55" y="{y(v) + 4:.1f}" text-anchor="end" font-size="11">{v:.3g}</text>'
        for v, dash in (
            (over.bias, ""),
            (over.lower, 'stroke-dasharray="5 4"'),
            (over.upper, 'stroke-dasharray="5 4"'),
        )
    )
    dots = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="#2563a8"/>'
        for a, b in zip(means.tolist(), differences.tolist(), strict=True)
    )
    ends = (
        f'<text x="70" y="215" font-size="11">{left:.4g}</text>'
        f'<text x="420" y="215" font-size="11" text-anchor="end">{right:.4g}</text>'
    )
    return f'<svg viewBox="0 0 440 222" role="img">{lines}{dots}{ends}</svg>'


def _patients(found: Evaluation) -> str:
    names = found.names
    rows = [
        [str(number), *(f"{own[name]:.4g}" if name in own else "" for name in names)]
        for number, own in enumerate(found.by_patient(), start=1)
    ]
    return table(["patient", *names], rows)


def _legend(asked: Asked) -> str:
    low, high = _WINDOWS.get(asked.unit, (asked.low, asked.high))
    error = _error_of(asked)
    return (
        "<p>The slice with most of the body, of up to eight patients: source and result, and where "
        f"there is one truth and result minus truth. Windows are fixed: {low:g} to {high:g} "
        f"{asked.unit}; the difference from blue (-{error:g}) over white to red (+{error:g} "
        f"{asked.unit}). A source in another "
        "unit is shown from its 1st to its 99th percentile.</p>"
    )


def _error_of(asked: Asked) -> float:
    return _ERRORS.get(asked.unit, (asked.high - asked.low) / 5)


def _picture(shown: Shown, asked: Asked) -> str:
    low, high = _WINDOWS.get(asked.unit, (asked.low, asked.high))
    images = {"result": shown.result, "truth": shown.truth}
    known = {name: image for name, image in images.items() if image is not None}
    cells = {name: _grey(image, low, high) for name, image in known.items()}
    if shown.source is not None:
        own = (low, high) if shown.same_unit else _percentiles(shown.source)
        cells = {"source": _grey(shown.source, *own), **cells}
    if shown.truth is not None:
        error = (shown.result - shown.truth) / _error_of(asked)
        cells["result - truth"] = _coloured(error)
    figures = "".join(
        f'<figure><img alt="{name}" src="{_data(pixels)}"><figcaption>{name}</figcaption></figure>'
        for name, pixels in cells.items()
    )
    return f'<h3>Patient {shown.number}</h3><div class="four">{figures}</div>'


def _grey(image: Array, low: float, high: float) -> NDArray[np.uint8]:
    share = np.clip((image - low) / (high - low), 0, 1)
    return np.asarray(np.rint(share * 255), np.uint8)


def _percentiles(image: Array) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(image, [1, 99]))
    return (low, high) if high > low else (low, low + 1.0)


def _coloured(share: Array) -> NDArray[np.uint8]:
    """(rows, columns, 3) of values in [-1, 1]: blue, white at 0, red."""
    share = np.clip(share, -1, 1)
    fade = 1 - np.abs(share)
    red, blue = np.where(share > 0, 1.0, fade), np.where(share < 0, 1.0, fade)
    return np.asarray(np.rint(np.stack([red, fade, blue], axis=-1) * 255), np.uint8)


def _data(pixels: NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Pillow.fromarray(pixels).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = -1) -> str:
    """Cells are HTML; the column `words` is one of text."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="words">{cell}</{tag}>' if index == words else f"<{tag}>{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )

    top = f"<tr>{row(head, 'th')}</tr>" if head else ""
    lines = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table>{top}{lines}</table></div>'
