"""figures.py: the figures of a report, report.json and metrics.jsonl -> SVG. judge.py loads this file by its path.

Text and axes are drawn in the colour of the text around the figure (currentColor) on no background, so that one
figure serves a light page, a dark one and paper. Colours are those of Okabe and Ito that stand out on both; series
differ in marker and dash too. Needs matplotlib, which is a development extra.
"""

import re
from io import StringIO
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # stands for the colour of the text until the SVG is written
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a"
LOOKS = [(BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"), (GREY, "v", "-")]
STEPS = "Faint: each update; strong: the running mean, weighted by tokens."
THEME = "<style>svg{color:#222}@media (prefers-color-scheme:dark){svg{color:#ddd}}@media print{svg{color:#000}}</style>"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "font.family": "sans-serif",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
    "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 5, "hatch.linewidth": 0.6,
}  # fmt: skip


def draw(r: dict, curves: dict[str, list[dict]]) -> list[dict]:
    """All figures the run has data for, each {"name", "title", "caption", "svg"}."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for make in (head_to_head, agreement, scores, votes, lengths, pairs, sft_loss, dpo_loss, margin, log_probs):
            found = make(r, curves)
            if found:
                title, caption, ax = found
                drawn.append({"name": make.__name__, "title": title, "caption": caption, "svg": to_svg(ax, caption)})
    return drawn


# ---- axes --------------------------------------------------------------------------------------------------


def axes(xlabel: str, ylabel: str, height: float = 2.7):
    """4.4 inches wide: the text stays readable on a telephone, and two stand side by side on a desk."""
    ax = Figure(figsize=(4.4, height), layout="constrained").add_subplot()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def to_svg(ax, caption: str) -> str:
    out = StringIO()
    ax.figure.savefig(out, format="svg", transparent=True)
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")  # ids would not be unique on the page
    svg = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px sans-serif", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub("<svg ([^>]*)>", rf'<svg role="img" aria-label="{label}" \1>{THEME}', svg, count=1)


def legend(ax, columns: int = 2):
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=columns)


def by_model(ax, names: list[str], series: dict[str, dict]):
    """A line for each series {model: value or (value, error)}; models it does not know are left out."""
    for (label, values), (colour, mark, dash) in zip(series.items(), LOOKS, strict=False):
        at = [i for i, name in enumerate(names) if values.get(name) is not None]
        points = [values[names[i]] for i in at]
        height, error = zip(*(p if isinstance(p, tuple) else (p, 0) for p in points), strict=True)
        ax.errorbar(at, height, yerr=error if any(error) else None, label=label, color=colour, marker=mark, ls=dash,
                    capsize=3)  # fmt: skip
    ax.set_xticks(range(len(names)), names)
    ax.margins(x=0.08)


def by_step(ax, curves: dict, names: list[str], key: str, scale: float = 1.0, only_dash: str = "", suffix: str = ""):
    """A curve for each model: every step faint, their running mean (over a twentieth of them) strong.

    A step counts by its tokens: an epoch's last batch may be a pair or two, far from all others.
    """
    for name, (colour, _, dash) in zip(names, cycle(LOOKS)):
        values = np.array([row[key] * scale for row in curves[name]])
        weights = np.array([row.get("tokens", 1) for row in curves[name]])
        window = np.ones(min(len(values), max(5, len(values) // 20)))
        mean = np.convolve(values * weights, window, "valid") / np.convolve(weights, window, "valid")
        ax.plot(range(1, len(values) + 1), values, color=colour, lw=0.7, alpha=0.5)
        middle = np.arange(len(mean)) + (len(window) + 1) / 2
        ax.plot(middle, mean, color=colour, ls=only_dash or dash, lw=1.6, label=name + suffix)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


# ---- figures: each gives title, caption and axes, or None where the run has no data for it -------------------


def head_to_head(r, curves):
    pairs = r["head_to_head"]
    if not pairs:
        return None
    ax = axes("share of the test prompts (%)", "", 0.9 + 0.36 * len(pairs))
    left = np.zeros(len(pairs))
    for key, colour, ink in (("win", BLUE, "white"), ("tie", GREY, "black"), ("lose", ORANGE, "black")):
        share = np.array([h[key] for h in pairs.values()])
        bars = ax.barh(list(pairs), share, left=left, color=colour, label=f"first {key}s" if key != "tie" else "tie")
        labels = [f"{s:.1f}" if s >= 7 else "" for s in share]
        ax.bar_label(bars, labels, label_type="center", color=ink, fontsize=9)
        left += share
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    legend(ax, 3)
    count = sum(next(iter(pairs.values()))["counts"])
    caption = f"How often the first model answers better than the second, on {count} test prompts, by the true reward."
    return "Head to head", caption, ax


def agreement(r, curves):
    exams = {n: a for n, a in r["agreement"].items() if a["pairs"]}
    keys = {"pairwise, ties left out": "pairwise", "five is best": "five_best", "exact order": "exact_match"}
    series = {label: {n: 100 * a[k] for n, a in exams.items() if a[k] is not None} for label, k in keys.items()}
    series = {label: values for label, values in series.items() if values}
    if not series:
        return None
    ax = axes("judge", "agreement (%)")
    by_model(ax, list(exams), series)
    ax.set_ylim(0, 100)
    legend(ax)
    caption = (
        "How often a model's scores agree with held-out human rankings: two responses in the same order, a response "
        "of score 5 that people rank first, all responses to a prompt in the same order."
    )
    return "The judge against people", caption, ax


def scores(r, curves):
    writers = round_of(r)
    series = {
        "true, test answers": {
            n: (m["true_mean"], m["true_error"]) for n, m in r["models"].items() if "true_mean" in m
        },
        "true, own responses": {n: h.get("true_score") for n, h in writers.items()},
        "judged, own responses": {n: h["score_mean"] for n, h in writers.items()},
    }
    series = {label: values for label, values in series.items() if any(v is not None for v in values.values())}
    if not series:
        return None
    ax = axes("model", "mean score (0 to 5)")
    by_model(ax, list(r["models"]), series)
    ax.set_ylim(0, 5)
    legend(ax)
    return (
        "True and judged score",
        (
            "Mean score of each model's answers to the test prompts (bars: 95 % interval), and of its responses to new "
            "prompts; true by the oracle, judged by the round's own votes."
        ),
        ax,
    )


def votes(r, curves):
    rounds = r["health"]
    if not rounds:
        return None
    ax = axes("score", "readable votes (%)")
    width = 0.8 / len(rounds)
    kinds = sorted({s for h in rounds.values() for s in h["scores"]}, key=float)
    for i, ((name, h), (colour, *_)) in enumerate(zip(rounds.items(), cycle(LOOKS))):
        total = sum(h["scores"].values()) or 1
        share = [100 * h["scores"].get(s, 0) / total for s in kinds]
        ax.bar(np.arange(len(kinds)) + (i + 0.5) * width - 0.4, share, width, color=colour, label=f"for {name}",
               hatch=(None, "//", "..", "xx", "\\\\")[i % 5], edgecolor=INK, linewidth=0.6)  # fmt: skip
    ax.set_xticks(range(len(kinds)), kinds)
    legend(ax, 3)
    return (
        "Votes by score",
        "How often each score was given in the round that made each model; unreadable votes left out.",
        ax,
    )


def lengths(r, curves):
    rounds = round_of(r)
    series = {
        "test answers": {n: m["tokens"] for n, m in r["models"].items()},
        "chosen of its pairs": {n: h["length_chosen"] for n, h in rounds.items()},
        "rejected of its pairs": {n: h["length_rejected"] for n, h in rounds.items()},
    }
    series = {label: values for label, values in series.items() if any(v is not None for v in values.values())}
    if not series:
        return None
    ax = axes("model", "mean length (tokens)")
    by_model(ax, list(r["models"]), series)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    legend(ax)
    return (
        "Answer length",
        ("Mean length of each model's answers to the test prompts, and of the responses it chose and rejected."),
        ax,
    )


def pairs(r, curves):
    rounds = r["health"]
    if not rounds:
        return None
    ax = axes("new prompts", "", 1.2 + 0.42 * len(rounds))
    left = np.zeros(len(rounds))
    kinds = {
        "pair": [h["pairs"] for h in rounds.values()],
        "tie": [h["ties"] for h in rounds.values()],
        "unread or identical": [h["prompts"] - h["pairs"] - h["ties"] for h in rounds.values()],
    }
    for (label, count), colour in zip(kinds.items(), (BLUE, GREY, ORANGE), strict=True):
        bars = ax.barh([f"for {n}" for n in rounds], count, left=left, color=colour, label=label)
        if label == "pair":
            ax.bar_label(bars, [f"{c:,}" for c in count], label_type="center", color="white", fontsize=9)
        left += count
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(ax, 3)
    return "Pairs kept", "What became of the new prompts of each round: only a pair is learned from.", ax


def sft_loss(r, curves):
    names = [n for n, rows in curves.items() if "margin" not in rows[0]]
    if not names:
        return None
    ax = axes("update", "loss (nats per token)")
    by_step(ax, curves, names, "loss")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    legend(ax, 4)
    return "SFT loss", f"Loss of the supervised models. {STEPS}", ax


def dpo_loss(r, curves):
    names = preferred(curves)
    if not names:
        return None
    ax = axes("update", "loss (nats per pair)")
    by_step(ax, curves, names, "loss")
    ax.axhline(np.log(2), color=INK, lw=0.8, ls=":")
    legend(ax, 4)
    return "DPO loss", f"Loss of each DPO round; dotted: ln 2 = 0.693, where policy and reference are one. {STEPS}", ax


def margin(r, curves):
    names = preferred(curves)
    if not names:
        return None
    ax = axes("update", "margin x beta (nats)")
    by_step(ax, curves, names, "margin")
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    legend(ax, 4)
    caption = f"How much more the policy prefers chosen to rejected than the reference does, times beta. {STEPS}"
    return "DPO margin", caption, ax


def log_probs(r, curves):
    names = preferred(curves)
    if not names:
        return None
    ax, beta = axes("update", "change (nats)"), r["config"].get("beta", 0.1)
    by_step(ax, curves, names, "reward_chosen", 1 / beta, "-", " chosen")
    by_step(ax, curves, names, "reward_rejected", 1 / beta, "--", " rejected")
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    legend(ax)
    return (
        "Log-probabilities under DPO",
        (
            "Log-probability of chosen and rejected responses against the reference, in nats a response. Below the "
            f"dotted line a response has become less likely; that should happen to the rejected ones. {STEPS}"
        ),
        ax,
    )


def preferred(curves) -> list[str]:
    return [n for n, rows in curves.items() if "margin" in rows[0]]


def round_of(r) -> dict[str, dict]:
    """Rounds by the model that wrote and judged in them, not by the one they made."""
    return {f"M{int(name[1:]) - 1}": h for name, h in r["health"].items()}
