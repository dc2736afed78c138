"""judge.py: text -> preferences. The judge's prompt, its parser, scores, pairs; and how good judge and models are.

Paper section 2.2: the model that wrote the responses also grades them. Its judgement argues first and ends in
`Score: n`; three judgements are averaged; the best response of a prompt against the worst one is a preference.

    python judge.py runs/zoo          the report of a run, also written to runs/zoo/report.json

The report's head-to-head needs somebody outside the loop: in a toy world `oracle.py` of the data folder, which
knows the true quality. Training never reads it.

Left out: outside judges over the network, judging in both orders (a score looks at one response at a time).
"""

import argparse
import importlib.util
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from model import BadInput, Llama, Tokenizer, read_json, write_json
from sample import generate, read_rows

# ---- the judge's prompt and its verdict --------------------------------------------------------------------


def check_template(template: str, path) -> str:
    if template.count("{prompt}") != 1 or template.count("{response}") != 1:
        raise BadInput(f"{path}: a judge template holds {{prompt}} and {{response}} once each")
    return template


def judge_prompt(template: str, prompt: str, response: str) -> str:
    """Fill the template in one pass, so that braces and placeholders in the texts themselves survive."""
    texts = {"prompt": prompt, "response": response}
    return re.sub(r"\{(prompt|response)\}", lambda m: texts[m[1]], template)


MARKER = re.compile(r"score[\s*_]*:[\s*_<\[(`$]*", re.IGNORECASE)
POINTS = re.compile(r"(\d+(?:\.\d+)?)(?![.,]?\d|[ \t]*[-\u2013]\s*\d)(?:\s*(?:/|out of)\s*(\d+))?", re.IGNORECASE)


def parse_score(text: str) -> float | None:
    """The verdict of a judgement: 0 to 5, or None where it cannot be read, which is never the same as a 0.

    Give it generated text only. The last `Score:` decides: "Score: 2 ... Score: 4" is 4.0, "**Score:** 4/5" is
    4.0, "Score: 10", "Score: five" and "Score: 4/10" are None.
    """
    ends = [m.end() for m in MARKER.finditer(text)]
    found = POINTS.match(text, ends[-1]) if ends else None
    if not found or found[2] not in (None, "5") or float(found[1]) > 5:
        return None
    return float(found[1])


def score(
    model: Llama, tok: Tokenizer, template: str, rows: list[dict], *, key: tuple, votes: int = 3, max_new: int, **knobs
) -> list[dict]:
    """Judge rows {"id", "k", "prompt", "response"}: `votes` judgements each {"id", "k", "vote", "text", "score"}.

    An empty response is not judged, nor is one that does not fit the context: it has no judgement and no score.
    """
    rows = [r for r in rows if r["response"]]
    prompts = [tok.chat(judge_prompt(template, r["prompt"], r["response"])) for r in rows]
    fits = [i for i, ids in enumerate(prompts) if len(ids) + max_new <= model.cfg.max_len]
    rows, prompts = [rows[i] for i in fits], [prompts[i] for i in fits]
    keys = [(*key, r["id"], r["k"]) for r in rows]
    drawn = generate(model, prompts, keys, n=votes, stop=[tok.eos], max_new=max_new, **knobs)
    out = []
    for row, judgements in zip(rows, drawn, strict=True):
        for vote, ids in enumerate(judgements):
            text = tok.decode([i for i in ids if i != tok.eos])
            out.append({"id": row["id"], "k": row["k"], "vote": vote, "text": text, "score": parse_score(text)})
    return out


# ---- scores -> pairs ---------------------------------------------------------------------------------------


def mean_scores(judgements: list[dict]) -> dict[tuple, float]:
    """(id, k) -> the mean of its readable votes; a response without a readable vote is absent."""
    votes = defaultdict(list)
    for j in judgements:
        if j["score"] is not None:
            votes[j["id"], j["k"]].append(j["score"])
    return {at: math.fsum(v) / len(v) for at, v in votes.items()}


def prefer(prompts: list[dict], candidates: list[dict], scores: dict[tuple, float]) -> tuple[list[dict], Counter]:
    """Best mean score against worst, one pair a prompt (section 2.3); also a count of what became of the prompts.

    Ties are dropped, identical texts are dropped; among several best or worst the first by index is taken.
    """
    by_id = defaultdict(list)
    for c in candidates:
        if (c["id"], c["k"]) in scores:
            by_id[c["id"]].append(c)
    pairs, tally = [], Counter()
    for p in prompts:
        ranked = sorted(by_id[p["id"]], key=lambda c: c["k"])
        points = [scores[c["id"], c["k"]] for c in ranked]
        if len(ranked) < 2:
            tally["fewer than two scored responses"] += 1
            continue
        best, worst = (ranked[points.index(f(points))] for f in (max, min))
        if max(points) == min(points):
            tally["tie"] += 1
        elif best["response"] == worst["response"] or best["tokens"] == worst["tokens"]:
            tally["identical texts"] += 1
        else:
            tally["pair"] += 1
            pairs.append(
                {
                    "id": p["id"],
                    "prompt": p["prompt"],
                    "chosen": best["response"],
                    "rejected": worst["response"],
                    "chosen_score": max(points),
                    "rejected_score": min(points),
                    "chosen_tokens": best["tokens"],
                    "rejected_tokens": worst["tokens"],
                }
            )
    return pairs, tally


# ---- agreement with people (section 3.1 and Table 4) -------------------------------------------------------


def midranks(values) -> np.ndarray:
    """Ranks from 0, ties share their mean rank."""
    _, level, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[level]


def spearman(a, b) -> float | None:
    """Rank correlation; None where one side is constant."""
    x, y = midranks(a), midranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else None


def kendall(a, b) -> float | None:
    """Kendall's tau-b; None where one side is constant."""
    i, j = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.asarray(v, dtype=float)[i] - np.asarray(v, dtype=float)[j]) for v in (a, b))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else None


def mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def agreement(ranks: list[list[int]], scores: list[list[float | None]]) -> dict:
    """How a judge's scores agree with human ranks (0 = best), one list per instruction.

    The paper does not say how tied scores count, and it decides the numbers: `pairwise` leaves them out (the only
    reading under which its tables are possible), the two other readings stand beside it. Pairs that people rank
    equal are in none of the three, nor are responses without a readable score. An exact match has the people's
    whole ordering, their ties included.
    """
    right = wrong = tied = fives = five_best = exact = 0
    for r, s in zip(ranks, scores, strict=True):
        same = None not in s
        for i in range(len(r)):
            if s[i] is not None and s[i] >= 5:
                fives, five_best = fives + 1, five_best + (r[i] == min(r))
            for j in range(i):
                if s[i] is None or s[j] is None:
                    continue
                human, judge = np.sign(r[j] - r[i]), np.sign(s[i] - s[j])
                same &= bool(human == judge)
                if human:
                    right, wrong, tied = right + (judge == human), wrong + (judge == -human), tied + (judge == 0)
        exact += same
    both = [[(-a, b) for a, b in zip(r, s, strict=True) if b is not None] for r, s in zip(ranks, scores, strict=True)]
    both = [list(zip(*pairs, strict=True)) for pairs in both if len(pairs) > 1]
    total = right + wrong + tied

    def share(part, whole):
        return float(part / whole) if whole else None

    return {
        "pairwise": share(right, right + wrong),
        "tie_rate": share(tied, total),
        "pairwise_ties_half": share(right + tied / 2, total),
        "pairwise_ties_wrong": share(right, total),
        "exact_match": share(exact, len(ranks)),
        "five_best": share(five_best, fives),
        "spearman": mean(spearman(*pair) for pair in both),
        "kendall": mean(kendall(*pair) for pair in both),
        "pairs": int(total),
    }


def head_to_head(a: list[float], b: list[float], resamples: int = 10000) -> dict:
    """Grades of two models on the same prompts -> win, tie, lose of the first in percent, and counts.

    low and high bound win minus lose: a 95 % bootstrap interval over prompts, in points.
    """
    assert len(a) == len(b) and a, (len(a), len(b))
    counts = np.array([sum(x > y for x, y in zip(a, b, strict=True)), 0, sum(x < y for x, y in zip(a, b, strict=True))])
    counts[1] = len(a) - counts.sum()
    drawn = np.random.default_rng(0).multinomial(len(a), counts / len(a), size=resamples)  # resampled prompts
    low, high = np.percentile((drawn[:, 0] - drawn[:, 2]) / len(a) * 100, [2.5, 97.5])
    win, tie, lose = (counts / len(a) * 100).tolist()
    return {"win": win, "tie": tie, "lose": lose, "low": float(low), "high": float(high), "counts": counts.tolist()}


# ---- the report of a run -----------------------------------------------------------------------------------


def read_ranked(path: Path) -> list[dict]:
    """Rows of human rankings: texts, and one whole number for each of them."""
    rows = read_rows(path, "prompt", "responses", "ranks")
    for number, row in enumerate(rows, 1):
        texts, ranks = row["responses"], row["ranks"]
        if [type(t) for t in texts] != [str] * len(ranks) or [type(r) for r in ranks] != [int] * len(texts):
            raise BadInput(
                f"{path}: row {number} has not one rank (a whole number) for each response (a text); mend it"
            )
    return rows


def models_of(run: Path) -> list[str]:
    order = ["SFT", *(f"M{i}" for i in range(1, 100))]
    return [name for name in order if (run / name / "config.json").exists()]


def load_oracle(path: Path):
    """The toy world's oracle.py: grade(prompt, response) -> 0..5, and, if it likes, criteria(...) -> {name: 0 or 1}."""
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def true_grade(oracle, prompt: str, response: str) -> float | None:
    """The oracle's grade; None where the model has written a prompt that is none of its world's."""
    try:
        return oracle.grade(prompt, response)
    except ValueError:
        return None


def examined(exam: list[dict], judgements: list[dict]) -> dict:
    """Agreement of one model's judgements with the ranked rows they were made of."""
    scores = mean_scores(judgements)
    mine = [[scores.get((i, k)) for k in range(len(row["responses"]))] for i, row in enumerate(exam)]
    return agreement([row["ranks"] for row in exam], mine) | {"parse_rate": parse_rate(judgements)}


def parse_rate(judgements: list[dict]) -> float | None:
    return mean(float(j["score"] is not None) for j in judgements)


def round_health(folder: Path, oracle=None) -> dict:
    """What one self-rewarding round was made of: votes, scores, pairs, lengths; with an oracle, their true worth."""
    candidates, judgements = (read_rows(folder / f"{name}.jsonl") for name in ("candidates", "judgements"))
    prompts = {p["id"]: p["prompt"] for p in read_rows(folder / "prompts.jsonl")}
    pairs, scores = read_rows(folder / "pairs.jsonl"), mean_scores(judgements)
    scored = [c for c in candidates if (c["id"], c["k"]) in scores]
    points = [scores[c["id"], c["k"]] for c in scored]
    histogram = Counter(j["score"] for j in judgements if j["score"] is not None)
    spread = defaultdict(list)
    for c, s in zip(scored, points, strict=True):
        spread[c["id"]].append(s)
    health = {
        "prompts": len(prompts),
        "pairs": len(pairs),
        "ties": sum(len(v) > 1 and min(v) == max(v) for v in spread.values()),
        "unjudged": len(candidates) - len({(j["id"], j["k"]) for j in judgements}),
        "parse_rate": parse_rate(judgements),
        "scores": {f"{s:g}": n for s, n in sorted(histogram.items())},
        "score_mean": mean(points),
        "truncated": mean(float(c["truncated"]) for c in candidates),
        "length": mean(len(c["tokens"]) for c in candidates),
        "length_chosen": mean(len(p["chosen_tokens"]) for p in pairs),
        "length_rejected": mean(len(p["rejected_tokens"]) for p in pairs),
        "score_length_correlation": spearman(points, [len(c["tokens"]) for c in scored]),
    }
    if oracle:
        both = [[true_grade(oracle, p["prompt"], p[side]) for side in ("chosen", "rejected")] for p in pairs]
        known = [(a, b) for a, b in both if a is not None]
        health["true_chosen"], health["true_rejected"] = mean(a for a, _ in known), mean(b for _, b in known)
        health["true_agree"], health["true_equal"], health["true_disagree"] = (
            mean(float(np.sign(a - b) == sign) for a, b in known) for sign in (1, 0, -1)
        )
    return health


def report(run: Path, oracle=None) -> dict:
    """Everything that can be said of a run from its files; head-to-head and true grades need an oracle."""
    config, names = read_json(run / "config.json"), models_of(run)
    if not names:
        raise BadInput(f"{run}: holds no finished model yet; start the run again to go on with it")
    out = {"config": config, "models": {}, "agreement": {}, "health": {}, "head_to_head": {}}
    data, grades = Path(config["data"]), {}
    for name in names:
        folder = run / name
        answers = read_rows(folder / "test.jsonl", "prompt", empty=True) if (folder / "test.jsonl").exists() else []
        out["models"][name] = {
            "answers": len(answers),
            "characters": mean(len(a["response"]) for a in answers),
            "tokens": mean(len(a["tokens"]) for a in answers),
            "truncated": mean(float(a["truncated"]) for a in answers),
        }
        if oracle and answers:
            grades[name] = [oracle.grade(a["prompt"], a["response"]) for a in answers]
            out["models"][name]["true_mean"] = mean(grades[name])
            if hasattr(oracle, "criteria"):
                points = [oracle.criteria(a["prompt"], a["response"]) for a in answers]
                out["models"][name]["criteria"] = {c: mean(float(p[c]) for p in points) for c in points[0]}
        if (folder / "exam.jsonl").exists():
            exam = read_ranked(data / "eft_eval.jsonl")
            out["agreement"][name] = examined(exam, read_rows(folder / "exam.jsonl", empty=True))
        if (folder / "pairs.jsonl").exists():
            out["health"][name] = round_health(folder, oracle)
    graded = [name for name in names if name in grades]
    for i, b in enumerate(graded):
        for a in graded[i + 1 :]:
            out["head_to_head"][f"{a} vs {b}"] = head_to_head(grades[a], grades[b])
    return out


def table(title: str, columns: list[str], rows: list[tuple]) -> str:
    """Plain text columns; numbers on the right, None as a dash."""
    cells = [columns] + [
        ["-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in r] for r in rows
    ]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in cells]  # fmt: skip
    return "\n".join([title, *("  " + line.rstrip() for line in lines)])


def percent(x: float | None) -> str | None:
    return None if x is None else f"{100 * x:.1f}"


def show(r: dict) -> str:
    """The report as text: the paper's Figure 3 and Table 4 in miniature."""
    parts = []
    if r["head_to_head"]:
        parts.append(table(
            "Head to head on the test prompts, by the true reward (percent; interval: 95 % of win - lose)",
            ["", "win", "tie", "lose", "win - lose", "interval"],
            [(k, f"{h['win']:.1f}", f"{h['tie']:.1f}", f"{h['lose']:.1f}", f"{h['win'] - h['lose']:+.1f}",
              f"[{h['low']:+.1f}, {h['high']:+.1f}]") for k, h in r["head_to_head"].items()],
        ))  # fmt: skip
        graded = {k: m for k, m in r["models"].items() if "true_mean" in m}
        names = list(next(iter(graded.values())).get("criteria", {}))
        parts.append(table(
            "True quality of the answers (0 to 5, and the share that earns each point)",
            ["", "mean", *names, "tokens", "truncated %"],
            [(k, m["true_mean"], *(m["criteria"][c] for c in names), f"{m['tokens']:.1f}", percent(m["truncated"]))
             for k, m in graded.items()],
        ))  # fmt: skip
    elif any(m["answers"] for m in r["models"].values()):
        parts.append(table("Answers to the test prompts", ["", "tokens", "characters", "truncated %"],
                           [(k, m["tokens"], m["characters"], percent(m["truncated"]))
                            for k, m in r["models"].items()]))  # fmt: skip
    if r["agreement"]:
        parts.append(table(
            "The judge against held-out human rankings (percent; pairwise without ties)",
            ["", "pairwise", "ties", "exact", "5-best", "spearman", "kendall", "readable"],
            [(k, percent(a["pairwise"]), percent(a["tie_rate"]), percent(a["exact_match"]), percent(a["five_best"]),
              a["spearman"], a["kendall"], percent(a["parse_rate"])) for k, a in r["agreement"].items()],
        ))  # fmt: skip
    if r["health"]:
        parts.append(table(
            "What each self-rewarding round learned from (chosen, rejected: true mean)",
            ["for", "prompts", "pairs", "ties", "readable", "score", "chosen", "rejected", "len +", "len -", "r(len)",
             "cut %"],
            [(k, h["prompts"], h["pairs"], h["ties"], percent(h["parse_rate"]), h["score_mean"], h.get("true_chosen"),
              h.get("true_rejected"), f"{h['length_chosen']:.1f}", f"{h['length_rejected']:.1f}",
              h["score_length_correlation"], percent(h["truncated"])) for k, h in r["health"].items()],
        ))  # fmt: skip
        scores = sorted({s for h in r["health"].values() for s in h["scores"]}, key=float)
        parts.append(table(
            "Its votes by score, of those that could be read (percent)", ["for", *scores],
            [(k, *(f"{100 * h['scores'].get(s, 0) / max(1, sum(h['scores'].values())):.1f}" for s in scores))
             for k, h in r["health"].items()],
        ))  # fmt: skip
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description="The report of a run.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/zoo")
    run = parser.parse_args().run
    path = Path(read_json(run / "config.json")["data"]) / "oracle.py"
    r = report(run, load_oracle(path) if path.exists() else None)
    print(show(r))
    if not path.exists():
        print(f"\nNo {path}: nobody outside the loop grades the answers, so there is no head-to-head.")
    write_json(run / "report.json", r)


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(f"error: {e}")
