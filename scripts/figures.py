"""scripts/figures.py: a report and metrics.jsonl -> figures in SVG. scripts/report.py calls it,
and scripts/scaling.py for a figure of several runs.

Text and axes have the colour of the text around the figure (currentColor) and no background, so
that one figure serves a light page, a dark one and paper. The colours are those of Okabe and Ito
that stand out on both; series differ in marker and dash too. Needs matplotlib.
"""

import re
from io import StringIO
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from judge import MAX_SCORE

INK = "#010203"  # stands for the colour of the text until the SVG is written
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a"
STYLES = [
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (PINK, "D", ":"),
    (GREY, "v", "-"),
]
HATCHES = (None, "//", "..", "xx", "\\\\")
STEPS = "Faint: each update; strong: the running mean, weighted by tokens."
ROUNDS = "A round has the name of the model that it makes."
THEME = (
    "<style>svg{color:#222}"
    "@media (prefers-color-scheme:dark){svg{color:#ddd}}"
    "@media print{svg{color:#000}}</style>"
)
RC_PARAMS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
}


def draw(r: dict, curves: dict[str, list[dict]]) -> list[dict]:
    """The figures that a run has data for, each {"name", "title", "caption", "svg"}.

    curves: the rows of metrics.jsonl by model.
    """
    draw_one = [head_to_head, agreement, scores, votes, lengths, pairs]
    draw_one += [sft_loss, dpo_loss, margin, log_probs]
    figures = []
    with matplotlib.rc_context(RC_PARAMS):
        for function in draw_one:
            figure = function(r, curves)
            if figure:
                title, caption, ax = figure
                name = function.__name__
                svg = to_svg(ax, caption)
                figures.append({"name": name, "title": title, "caption": caption, "svg": svg})
    return figures


# ---- axes ------------------------------------------------------------------------------------


def axes(xlabel: str, ylabel: str, height: float = 2.7):
    """4.4 inches wide: readable on a telephone, and two stand side by side on a desk."""
    ax = Figure(figsize=(4.4, height), layout="constrained").add_subplot()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def to_svg(ax, caption: str) -> str:
    """The figure as SVG for use inside a page: without ids, which would not be unique there."""
    out = StringIO()
    ax.figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    start = f'<svg role="img" aria-label="{label}" '
    svg = svg.replace("<svg ", start, 1)
    head, _, rest = svg.partition(">")
    return f"{head}>{THEME}{rest}"


def legend(ax, columns: int = 2):
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def plot_by_model(ax, names: list[str], series: dict[str, dict]):
    """A line for each series {model: value, (value, error) or (value, (below, above))}; models
    without one are left out."""
    for (label, values), (colour, marker, dash) in zip(series.items(), cycle(STYLES)):
        positions = []
        heights = []
        errors = []
        for position, name in enumerate(names):
            value = values.get(name)
            if value is not None:
                height, error = value if isinstance(value, tuple) else (value, 0)
                positions.append(position)
                heights.append(height)
                errors.append(error)
        style = {"label": label, "color": colour, "marker": marker, "ls": dash}
        yerr = np.transpose(errors) if any(errors) else None
        ax.errorbar(positions, heights, yerr=yerr, capsize=3, **style)
    ax.set_xticks(range(len(names)), names)
    ax.margins(x=0.08)


def without_empty(series: dict[str, dict]) -> dict[str, dict]:
    """The series that have a value."""
    nonempty = {}
    for label, values in series.items():
        if any(value is not None for value in values.values()):
            nonempty[label] = values
    return nonempty


def running_mean(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over a twentieth of the updates (at least 5), and the middle of each in updates."""
    window = np.ones(min(len(values), max(5, len(values) // 20)))
    sums = np.convolve(values * weights, window, "valid")
    means = sums / np.convolve(weights, window, "valid")
    return np.arange(len(means)) + (len(window) + 1) / 2, means


def plot_by_step(ax, curves: dict, names: list[str], key: str, scale=1.0, dash="", suffix=""):
    """A curve for each model: every update faint, their running mean strong.

    An update counts by its tokens: an epoch's last batch may be a pair or two, far from the rest.
    """
    for name, (colour, _, own_dash) in zip(names, cycle(STYLES)):
        values = scale * np.array([row[key] for row in curves[name]])
        weights = np.array([row.get("tokens", 1) for row in curves[name]])
        steps, means = running_mean(values, weights)
        ax.plot(range(1, len(values) + 1), values, color=colour, lw=0.7, alpha=0.5)
        ax.plot(steps, means, color=colour, ls=dash or own_dash, lw=1.6, label=name + suffix)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def plot_stacked_bars(ax, names: list[str], parts: dict[str, np.ndarray], colours) -> dict:
    """Horizontal bars, the first name at the top; -> {label of a part: its bars}."""
    left = np.zeros(len(names))
    bars = {}
    for (label, widths), colour in zip(parts.items(), colours, strict=True):
        bars[label] = ax.barh(names, widths, left=left, color=colour, label=label)
        left += widths
    ax.invert_yaxis()
    return bars


# ---- figures: each gives title, caption and axes, or None where the run has no data for it ----


def head_to_head(r: dict, curves: dict):
    results = r["head_to_head"]
    if not results:
        return None
    ax = axes("test prompts (%)", "", 0.9 + 0.36 * len(results))
    parts = {}
    for key, label in (("win", "first wins"), ("tie", "tie"), ("lose", "first loses")):
        parts[label] = np.array([result[key] for result in results.values()])
    bars = plot_stacked_bars(ax, list(results), parts, (BLUE, GREY, ORANGE))
    for label, ink in zip(parts, ("white", "black", "black"), strict=True):
        texts = [f"{share:.1f}" if share >= 7 else "" for share in parts[label]]
        ax.bar_label(bars[label], texts, label_type="center", color=ink, fontsize=9)
    ax.set_xlim(0, 100)
    legend(ax, 3)
    count = sum(next(iter(results.values()))["counts"])
    caption = (
        "How often the first model answers better than the second, "
        f"on {count} test prompts, by the true score."
    )
    return "Head to head", caption, ax


def agreement(r: dict, curves: dict):
    judges = {name: result for name, result in r["agreement"].items() if result["pairs"]}
    keys = {
        "pairs, ties left out": "pairwise",
        f"scores of {MAX_SCORE}": "top_score_is_best",
        "whole prompts": "exact_match",
    }
    series = {}
    for label, key in keys.items():
        rates = {name: result[key] for name, result in judges.items()}
        series[label] = {name: 100 * rate for name, rate in rates.items() if rate is not None}
    series = without_empty(series)
    if not series:
        return None
    ax = axes("judge", "agreement (%)")
    plot_by_model(ax, list(judges), series)
    ax.set_ylim(0, 100)
    legend(ax)
    caption = (
        "How often a model's scores agree with held-out human rankings: "
        "pairs of responses that it puts in people's order, "
        f"responses to which it gives a {MAX_SCORE} and that people rank first, "
        "prompts whose responses it puts wholly in people's order."
    )
    return "The judge against people", caption, ax


def scores(r: dict, curves: dict):
    true_scores = {}
    for name, model in r["models"].items():
        if "true_mean" in model:
            true_scores[name] = (model["true_mean"], model["true_error"])
    rounds = rounds_by_writer(r)
    series = {
        "true, test answers": true_scores,
        "true, own responses": {n: stats.get("true_score") for n, stats in rounds.items()},
        "judged, own responses": {n: stats["score_mean"] for n, stats in rounds.items()},
    }
    series = without_empty(series)
    if not series:
        return None
    ax = axes("model", f"mean score (0 to {MAX_SCORE})")
    plot_by_model(ax, list(r["models"]), series)
    ax.set_ylim(0, MAX_SCORE)
    legend(ax)
    caption = (
        "Mean score of each model's answers to the test prompts (bars: 95 % interval), "
        "and of its responses to new prompts; true by the oracle, judged by its own votes."
    )
    return "True and judged score", caption, ax


def votes(r: dict, curves: dict):
    rounds = {name: stats for name, stats in r["rounds"].items() if stats["scores"]}
    if not rounds:
        return None
    ax = axes("score", "readable votes (%)")
    width = 0.8 / len(rounds)
    kinds = sorted({score for stats in rounds.values() for score in stats["scores"]}, key=float)
    for i, (name, stats) in enumerate(rounds.items()):
        total = sum(stats["scores"].values())
        shares = [100 * stats["scores"].get(score, 0) / total for score in kinds]
        positions = np.arange(len(kinds)) + (i + 0.5) * width - 0.4
        style = {"color": STYLES[i % 5][0], "hatch": HATCHES[i % 5]}
        ax.bar(positions, shares, width, label=name, edgecolor=INK, linewidth=0.6, **style)
    ax.set_xticks(range(len(kinds)), kinds)
    legend(ax, 3)
    caption = f"How often each score was given in each round, of the readable votes. {ROUNDS}"
    return "Votes by score", caption, ax


def lengths(r: dict, curves: dict):
    rounds = rounds_by_writer(r)
    series = {
        "test answers": {n: model["tokens"] for n, model in r["models"].items()},
        "chosen of its pairs": {n: stats["length_chosen"] for n, stats in rounds.items()},
        "rejected of its pairs": {n: stats["length_rejected"] for n, stats in rounds.items()},
    }
    series = without_empty(series)
    if not series:
        return None
    ax = axes("model", "mean length (tokens)")
    plot_by_model(ax, list(r["models"]), series)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    legend(ax)
    caption = (
        "Mean length of each model's answers to the test prompts, "
        "and of the responses it chose and rejected."
    )
    return "Answer length", caption, ax


def pairs(r: dict, curves: dict):
    rounds = {}
    for name, stats in r["rounds"].items():
        if stats["outcomes"]["pair"] is not None:  # it is judged
            rounds[name] = stats
    if not rounds:
        return None
    ax = axes("new prompts", "", 1.4 + 0.42 * len(rounds))
    outcomes = next(iter(rounds.values()))["outcomes"]
    parts = {}
    for outcome in outcomes:
        parts[outcome] = np.array([stats["outcomes"][outcome] for stats in rounds.values()])
    bars = plot_stacked_bars(ax, list(rounds), parts, (BLUE, GREY, PINK, ORANGE))
    texts = [f"{count:,}" if count else "" for count in parts["pair"]]
    ax.bar_label(bars["pair"], texts, label_type="center", color="white", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(ax)
    caption = f"What became of the new prompts: only a pair is learned from. {ROUNDS}"
    return "From prompts to pairs", caption, ax


def sft_loss(r: dict, curves: dict):
    names = [name for name, rows in curves.items() if "margin" not in rows[0]]
    if not names:
        return None
    ax = axes("update", "loss (nats per token)")
    plot_by_step(ax, curves, names, "loss")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    legend(ax, 4)
    return "SFT loss", f"Loss of the supervised models. {STEPS}", ax


def dpo_loss(r: dict, curves: dict):
    names = dpo_models(curves)
    if not names:
        return None
    ax = axes("update", "loss (nats per pair)")
    plot_by_step(ax, curves, names, "loss")
    ax.axhline(np.log(2), color=INK, lw=0.8, ls=":")
    legend(ax, 4)
    caption = (
        "Loss of each DPO round; dotted: ln 2 = 0.693, where policy and reference are one "
        f"(the first update, dropout apart). {STEPS}"
    )
    return "DPO loss", caption, ax


def margin(r: dict, curves: dict):
    names = dpo_models(curves)
    if not names:
        return None
    ax = axes("update", "margin x beta (nats)")
    plot_by_step(ax, curves, names, "margin")
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    legend(ax, 4)
    caption = (
        "How much more the policy prefers chosen to rejected than the reference does, "
        f"times beta. {STEPS}"
    )
    return "DPO margin", caption, ax


def log_probs(r: dict, curves: dict):
    names = dpo_models(curves)
    if not names:
        return None
    ax = axes("update", "change (nats)")
    scale = 1 / r["config"].get("beta", 0.1)  # a reward is beta times the change
    plot_by_step(ax, curves, names, "reward_chosen", scale, "-", " chosen")
    plot_by_step(ax, curves, names, "reward_rejected", scale, "--", " rejected")
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    legend(ax)
    caption = (
        "Log-probability of chosen and rejected responses against the reference, in nats a "
        "response. Below the dotted line a response has become less likely; that should happen "
        f"to the rejected ones. {STEPS}"
    )
    return "Log-probabilities under DPO", caption, ax


def dpo_models(curves: dict) -> list[str]:
    return [name for name, rows in curves.items() if "margin" in rows[0]]


def rounds_by_writer(r: dict) -> dict[str, dict]:
    """Rounds by the model that wrote and judged in them, not by the one that they make."""
    return {f"M{int(name[1:]) - 1}": stats for name, stats in r["rounds"].items()}


# ---- several runs ----------------------------------------------------------------------------


def scaling(rows: list[dict]) -> str:
    """The rows of the table of scripts/scaling.py -> true mean and judge accuracy by model, as
    SVG; a line for each base."""
    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=(8.8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set(xlabel="model", ylabel="true mean score of test answers")
        right.set(xlabel="judge", ylabel="pairs ordered right (%)")
        names = list(dict.fromkeys(row["model"] for row in rows))
        plot_by_model(left, names, series_by_base(rows, "true_mean"))
        plot_by_model(right, names, series_by_base(rows, "pairs_right", 100))
        legend(left, 5)
        caption = (
            "True mean score of each model's answers to the test prompts, and how often it orders "
            "held-out pairs of responses as people do (ties left out), by width of the base; "
            "seeds pooled. Bars: 95 % interval over prompts."
        )
        return to_svg(left, caption)


def series_by_base(rows: list[dict], key: str, scale: int = 1) -> dict[str, dict]:
    """A series for `plot_by_model` for each base."""
    series = {}
    for row in rows:
        values = series.setdefault(f"{row['dim']} ({row['parameters'] / 1e6:.1f} M)", {})
        if row[key]:
            value, low, high = (scale * row[key][bound] for bound in ("value", "low", "high"))
            values[row["model"]] = value, (max(0, value - low), max(0, high - value))
    return series
