"""scripts/report.py: a run folder -> its report: models, judges, what was learned from.

    python -m scripts.report runs/zoo                  writes report.json, .md, .html, figures/
    python -m scripts.report runs/zoo --data DIR       where the run's data folder has moved
    python -m scripts.report runs/zoo --trace M2:17    the life of one prompt, writer to margin

The judge is measured against people's rankings (the paper's table 4), the models against each
other on the test prompts (figure 3). The second needs somebody outside the loop who grades
answers: oracle.py of a toy world's data folder, which training never reads. scripts/compare.py
asks other judges. The tables are made in scripts/pages.py, the figures in scripts/figures.py.

Left out: win rates corrected for length, several runs side by side.
"""

import argparse
import importlib.util
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dpo import collate, dpo_loss, sequence_logps
from judge import MAX_SCORE, mean_scores, parse_rate, prefer, read_ranked, score_histogram
from model import UserError, read_json, write_json
from sample import fingerprint, load_for_sampling, read_jsonl, rouge_l, run_command
from scripts import pages
from scripts.pages import report_text, table

MAX_MODELS = 100  # names that are looked for: M1 to M99
OUTCOMES = ("pair", "tie", "identical texts", "fewer than two scored responses")  # of judge.prefer


# ---- statistics ------------------------------------------------------------------------------


def mean(values) -> float | None:
    """The mean of those that are not None; None where there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def rankdata(values) -> np.ndarray:
    """Ranks from 1; ties share their mean rank (as scipy.stats.rankdata)."""
    values = np.asarray(values, dtype=float)
    _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = counts.cumsum()
    return (last_rank - (counts - 1) / 2)[level]


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else None


def spearman(a, b) -> float | None:
    """Spearman's rank correlation; None where one side is constant or empty."""
    if not len(a):
        return None
    x = rankdata(a)
    y = rankdata(b)
    return cosine(x - x.mean(), y - y.mean())


def pair_signs(values) -> np.ndarray:
    """For every two values: 1 where the first is greater, -1 where the second is, 0 for a tie."""
    values = np.asarray(values, dtype=float)
    i, j = np.triu_indices(len(values), 1)
    return np.sign(values[i] - values[j])


def kendall(a, b) -> float | None:
    """Kendall's tau-b; None where one side is constant."""
    return cosine(pair_signs(a), pair_signs(b))


# ---- agreement with people (section 3.1 and table 4) -----------------------------------------


def agreement(ranks: list[list[int]], scores: list[list[float | None]]) -> dict:
    """How a judge's scores agree with people's ranks (0 = best); one list for each prompt.

    A pair is two scored responses that people rank differently. The paper does not say how pairs
    of equal score count, and that decides the numbers: `pairwise` leaves them out (the only
    reading under which its tables are possible), the two other readings stand beside it. An exact
    match has people's whole order, their ties included.
    """
    pairs = Counter()  # 1: people's order, -1: the opposite order, 0: equal scores
    top_is_best = []
    exact_matches = 0
    spearmans = []
    kendalls = []
    for prompt_ranks, prompt_scores in zip(ranks, scores, strict=True):
        rows = zip(prompt_ranks, prompt_scores, strict=True)
        scored_rows = [(rank, score) for rank, score in rows if score is not None]
        people = [-rank for rank, _ in scored_rows]
        judge = [score for _, score in scored_rows]
        people_signs = pair_signs(people)
        judge_signs = pair_signs(judge)
        differs = people_signs != 0
        pairs.update((people_signs * judge_signs)[differs].tolist())
        if len(scored_rows) == len(prompt_ranks):
            exact_matches += bool((people_signs == judge_signs).all())
        if len(scored_rows) > 1:
            spearmans.append(spearman(people, judge))
            kendalls.append(kendall(people, judge))
        best = min(prompt_ranks)
        top_is_best += [float(rank == best) for rank, score in scored_rows if score >= MAX_SCORE]
    right, wrong, tied = pairs[1], pairs[-1], pairs[0]
    total = right + wrong + tied
    return {
        "pairwise": ratio(right, right + wrong),
        "tie_rate": ratio(tied, total),
        "pairwise_ties_half": ratio(right + tied / 2, total),
        "pairwise_ties_wrong": ratio(right, total),
        "exact_match": ratio(exact_matches, len(ranks)),
        "top_score_is_best": mean(top_is_best),
        "spearman": mean(spearmans),
        "kendall": mean(kendalls),
        "pairs": total,
        "pairs_without_ties": right + wrong,
        "prompts": len(ranks),
        "top_scores": len(top_is_best),
    }


def judge_eval(ranked: list[dict], judgements: list[dict]) -> dict:
    """Agreement of a model's judgements with the ranked rows that they were made of."""
    means = mean_scores(judgements)
    scores = []
    for i, row in enumerate(ranked):
        scores.append([means.get((i, k)) for k in range(len(row["responses"]))])
    result = agreement([row["ranks"] for row in ranked], scores)
    result["parse_rate"] = parse_rate(judgements)
    result["judgements"] = len(judgements)
    return result


# ---- head to head (section 3.2 and figure 3) -------------------------------------------------


def head_to_head(a: list[float], b: list[float], resamples: int = 10000) -> dict:
    """Grades of two models on the same prompts -> win, tie, lose of the first in percent; counts.

    low and high bound win minus lose: a 95 % bootstrap interval over prompts, in points.
    """
    assert len(a) == len(b) and a, (len(a), len(b))
    signs = np.sign(np.subtract(a, b))
    counts = np.array([(signs == sign).sum() for sign in (1, 0, -1)])
    win, tie, lose = (100 * counts / len(a)).tolist()
    rng = np.random.default_rng(0)
    resampled = rng.multinomial(len(a), counts / len(a), size=resamples)
    differences = 100 * (resampled[:, 0] - resampled[:, 2]) / len(a)
    low, high = np.percentile(differences, [2.5, 97.5]).tolist()
    return {
        "win": win,
        "tie": tie,
        "lose": lose,
        "low": low,
        "high": high,
        "counts": counts.tolist(),
    }


def load_oracle(path: Path):
    """A toy world's oracle.py: grade(prompt, response) -> 0..MAX_SCORE.

    It may have criteria(prompt, response) -> {name: earned or not}. Raises UserError.
    """
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path}: no such Python file; an oracle is like data/zoo/oracle.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "grade"):
        raise UserError(
            f"{path}: no grade(prompt, response); an oracle is like data/zoo/oracle.py"
        )
    return module


def true_grade(oracle, prompt: str, response: str) -> float | None:
    """The oracle's grade; None for a prompt of a model that is none of the oracle's world."""
    try:
        return oracle.grade(prompt, response)
    except ValueError:
        return None


# ---- the files of a run ----------------------------------------------------------------------


class Round(NamedTuple):
    """The rows of the round that makes a model; no rows where a file is not there yet."""

    prompts: list[dict]
    candidates: list[dict]
    judgements: list[dict]
    pairs: list[dict]


def run_models(run: Path) -> list[str]:
    """The finished models of a run, in the order of training: SFT, M1, M2, ..."""
    names = ["SFT", *(f"M{i}" for i in range(1, MAX_MODELS))]
    return [name for name in names if (run / name / "config.json").exists()]


def run_rounds(run: Path, file: str = "candidates.jsonl") -> list[str]:
    """The models whose self-rewarding rounds have come as far as this file: M2, M3, ..."""
    names = [f"M{i}" for i in range(2, MAX_MODELS)]
    return [name for name in names if (run / name / file).exists()]


def model_before(name: str) -> str:
    """M2 -> M1: the model that writes and judges in the round that makes M2."""
    return f"M{int(name[1:]) - 1}"


def read_round(folder: Path) -> Round:
    files = []
    for name in ("prompts", "candidates", "judgements", "pairs"):
        path = folder / f"{name}.jsonl"
        files.append(read_jsonl(path, allow_empty=True, missing_ok=True))
    return Round(*files)


def read_metrics(run: Path) -> dict[str, list[dict]]:
    """What training logged: a row for each update, by the model that it trains."""
    curves = defaultdict(list)
    for row in read_jsonl(run / "metrics.jsonl", allow_empty=True, missing_ok=True):
        curves[row["model"]].append(row)
    return dict(curves)


def read_run_config(run: Path) -> dict:
    config = read_json(run / "config.json")
    if "data" not in config:
        raise UserError(f"{run}: a model's folder; give the folder of its run, such as runs/zoo")
    return config


# ---- what a round learned from ---------------------------------------------------------------


def round_stats(folder: Path, oracle=None) -> dict:
    """Counts, rates and means of the round that makes a model; with an oracle also true_*.

    state: "finished" where pairs.jsonl is there, "failed" where no prompt gives a pair, else
    "unfinished".
    """
    files = read_round(folder)
    scores = mean_scores(files.judgements)
    config = read_json(folder.parent / "config.json")
    curve = read_metrics(folder.parent).get(folder.name, [])
    stats = {"state": "unfinished", "outcomes": dict.fromkeys(OUTCOMES)}
    if (folder / "judgements.jsonl").exists():
        _, outcomes = prefer(files.prompts, files.candidates, scores)
        stats["outcomes"] = {name: outcomes[name] for name in OUTCOMES}
        stats["state"] = "unfinished" if outcomes["pair"] else "failed"
    if (folder / "pairs.jsonl").exists():
        stats["state"] = "finished"
    stats |= prompt_stats(files.prompts)
    stats |= response_stats(files.candidates, scores)
    stats |= vote_stats(files.candidates, files.judgements)
    stats |= pair_stats(files.pairs)
    stats["chosen_fall"] = chosen_fall(curve, config.get("beta", 0.1))
    if oracle:
        stats |= true_stats(oracle, files, scores)
    return stats


def prompt_stats(prompts: list[dict]) -> dict:
    """openings: the share with the most common first three words; copies: of repeated texts."""
    texts = [row["prompt"] for row in prompts]
    openings = Counter(tuple(text.split()[:3]) for text in texts)
    most_common = max(openings.values(), default=0)
    return {
        "prompts": len(texts),
        "openings": ratio(most_common, len(texts)),
        "copies": ratio(len(texts) - len(set(texts)), len(texts)),
        "short": mean(float(len(text) < 15) for text in texts),
    }


def response_stats(candidates: list[dict], scores: dict[tuple, float]) -> dict:
    scored_rows = [row for row in candidates if (row["id"], row["k"]) in scores]
    points = [scores[row["id"], row["k"]] for row in scored_rows]
    return {
        "responses": len(candidates),
        "score_mean": mean(points),
        "length": mean(len(row["tokens"]) for row in candidates),
        "score_length_correlation": spearman(points, [len(row["tokens"]) for row in scored_rows]),
        "truncated": mean(float(row["truncated"]) for row in candidates),
        "repeats": repeats(candidates[:2000]),  # enough to see it, and a second's work
    }


def repeats(candidates: list[dict]) -> float | None:
    """The share of candidates, but for each prompt's first, that nearly copy an earlier one."""
    earlier = defaultdict(list)
    is_copy = []
    for row in candidates:
        text = row["response"].split()
        others = earlier[row["id"]]
        if others:
            is_copy.append(float(any(nearly_equal(text, old) for old in others)))
        others.append(text)
    return mean(is_copy)


def nearly_equal(a: list[str], b: list[str]) -> bool:
    return a == b or rouge_l(a, b) > 0.9


def vote_stats(candidates: list[dict], judgements: list[dict]) -> dict:
    """Judgements by score. A response without any is empty, or leaves the judge no room."""
    judged = {(row["id"], row["k"]) for row in judgements}
    not_judged = [row for row in candidates if (row["id"], row["k"]) not in judged]
    empty = [row for row in not_judged if not row["response"]]
    return {
        "judgements": len(judgements),
        "parse_rate": parse_rate(judgements),
        "scores": score_histogram(judgements),
        "empty": len(empty),
        "no_room_for_judge": len(not_judged) - len(empty),
    }


def pair_stats(pairs: list[dict]) -> dict:
    return {
        "pairs": len(pairs),
        "score_chosen": mean(row["chosen_score"] for row in pairs),
        "score_rejected": mean(row["rejected_score"] for row in pairs),
        "length_chosen": mean(len(row["chosen_tokens"]) for row in pairs),
        "length_rejected": mean(len(row["rejected_tokens"]) for row in pairs),
    }


def chosen_fall(curve: list[dict], beta: float) -> float | None:
    """The share of their log-prob that chosen responses have lost, in the last fifth of DPO."""
    rows = [row for row in curve if "reward_chosen" in row]
    tail = rows[-max(1, len(rows) // 5) :]
    # a reward is beta * (log-prob - reference)
    change = sum(row["reward_chosen"] for row in tail) / beta
    reference = sum(row["logp_chosen"] for row in tail) - change
    return ratio(change, reference)


def true_stats(oracle, files: Round, scores: dict[tuple, float]) -> dict:
    """True grades of scored responses and of pairs; prompts that it does not know do not count."""
    prompts = {row["id"]: row["prompt"] for row in files.prompts}
    scored_rows = [row for row in files.candidates if (row["id"], row["k"]) in scores]
    grades = [true_grade(oracle, prompts[row["id"]], row["response"]) for row in scored_rows]
    chosen = []
    rejected = []
    for row in files.pairs:
        grade = true_grade(oracle, row["prompt"], row["chosen"])
        if grade is not None:
            chosen.append(grade)
            rejected.append(true_grade(oracle, row["prompt"], row["rejected"]))
    signs = np.sign(np.subtract(chosen, rejected))
    return {
        "true_score": mean(grades),
        "true_chosen": mean(chosen),
        "true_rejected": mean(rejected),
        "true_agree": ratio((signs == 1).sum(), len(signs)),
        "true_equal": ratio((signs == 0).sum(), len(signs)),
        "true_disagree": ratio((signs == -1).sum(), len(signs)),
    }


# ---- warnings --------------------------------------------------------------------------------


class Check(NamedTuple):
    """A figure of a round; where it is over the limit, the report warns."""

    value: float | None
    limit: float
    what: str
    remedy: str


def warnings(now: dict, before: dict | None = None) -> list[str]:
    """What looks wrong in the stats of a round, given those of the round before.

    A line each, with a remedy; none for a healthy round.
    """
    lines = []
    if now["state"] == "failed":
        outcomes = ", ".join(f"{n} {name}" for name, n in now["outcomes"].items() if n)
        lines.append(
            f"the round failed: none of {now['prompts']} prompts gave a pair ({outcomes}); "
            "the judge needs EFT rows, more SFT, or a shorter judge.txt"
        )
    checks = [*prompt_checks(now), *response_checks(now, before or now)]
    if now["state"] != "unfinished":
        checks.append(unjudged_check(now))
    if now["state"] == "finished":
        checks += pair_checks(now)
    if now["judgements"]:
        checks += judge_checks(now, before or now)
    for value, limit, what, remedy in checks:
        if value is not None and value > limit:
            lines.append(f"{what}: {value:.1%}, more than {limit:.0%}; {remedy}")
    return lines


def prompt_checks(now: dict) -> Iterator[Check]:
    yield Check(
        now["openings"],
        0.5,
        "new prompts that begin with the same three words",
        "vary ift.jsonl or propose.txt",
    )
    yield Check(now["copies"], 0.05, "new prompts that stand there twice", "lower --rouge")
    yield Check(
        now["short"],
        0.2,
        "new prompts of fewer than 15 characters",
        "take another --writer or propose.txt",
    )


def response_checks(now: dict, before: dict) -> Iterator[Check]:
    correlation = before["score_length_correlation"] or 0
    growth = None
    if now["length"] and before["length"]:
        growth = now["length"] / before["length"] - 1
    yield Check(
        growth,
        0.4,
        "growth of the responses since the round before",
        f"score and length correlate by {correlation:+.2f} there: "
        "let judge.txt say that length earns no point",
    )
    yield Check(
        now["truncated"], 0.05, "responses cut by the length limit", "raise --max-response"
    )
    yield Check(
        now["repeats"],
        0.5,
        "candidates that nearly copy another of their prompt",
        "raise --temperature or --top-p",
    )


def judge_checks(now: dict, before: dict) -> Iterator[Check]:
    readable = now["parse_rate"]
    yield Check(
        ratio(max(now["scores"].values(), default=0), sum(now["scores"].values())),
        0.9,
        "votes that are one and the same score",
        "the judge has collapsed: balance the scores in eft.jsonl, or change judge.txt",
    )
    yield Check(
        1 - readable,
        0.1,
        "judgements that cannot be read",
        "add EFT rows, or raise --max-judgement",
    )
    yield Check(
        (before["parse_rate"] or 0) - readable,
        0.05,
        "fall of readable judgements since the round before",
        "DPO unlearns judging: lower --dpo-lr",
    )


def unjudged_check(now: dict) -> Check:
    not_judged = now["empty"] + now["no_room_for_judge"]
    return Check(
        ratio(not_judged, now["responses"]),
        0.1,
        "responses that were not judged",
        f"{now['empty']} are empty, {now['no_room_for_judge']} leave the judge no room: "
        "lower --max-response, or shorten judge.txt",
    )


def pair_checks(now: dict) -> Iterator[Check]:
    yield Check(
        1 - now["pairs"] / now["prompts"],
        0.5,
        "prompts without a pair",
        "raise --candidates or --votes",
    )
    yield Check(
        now["chosen_fall"],
        0.1,
        "log-prob that chosen responses lost under DPO",
        "lower --dpo-lr",
    )


# ---- the report ------------------------------------------------------------------------------


def report(run: Path, oracle=None, data: Path | None = None) -> dict:
    """All that can be said of a run from its files. true_* and head_to_head need an oracle.

    data: the data folder, where it has moved. Raises UserError where it is not the run's.
    """
    config = read_run_config(run)
    data = data or Path(config["data"])
    if not data.is_dir():
        raise UserError(f"{data}: no such folder, the data of {run}; give --data DIR if it moved")
    names = run_models(run)
    if not names:
        raise UserError(f"{run}: no finished model; run train.py again with the same --out")
    result = {"config": config, "warnings": [], "missing": []}
    result["models"] = {name: model_stats(run / name, oracle) for name in names}
    result["agreement"] = evaluate_judges(run, names, config, data)
    result["rounds"] = {name: round_stats(run / name, oracle) for name in run_rounds(run)}
    result["head_to_head"] = compare_models(run, names, oracle)
    before = None
    for name, stats in result["rounds"].items():
        result["warnings"] += [f"{name}: {line}" for line in warnings(stats, before)]
        before = stats
    result["missing"] = missing_parts(result, oracle, data)
    return result


def read_answers(folder: Path) -> list[dict]:
    """A model's answers to the test prompts; none where it has not answered them."""
    return read_jsonl(folder / "test.jsonl", "prompt", allow_empty=True, missing_ok=True)


def grade_answers(folder: Path, oracle) -> list[float]:
    grades = []
    for number, row in enumerate(read_answers(folder), 1):
        grade = true_grade(oracle, row["prompt"], row["response"])
        if grade is None:
            raise UserError(
                f"{folder}/test.jsonl: row {number} is no prompt of the oracle's world; "
                "remove oracle.py from the data folder for a report without true scores"
            )
        grades.append(grade)
    return grades


def model_stats(folder: Path, oracle=None) -> dict:
    """Length and, with an oracle, true quality of a model's answers to the test prompts."""
    answers = read_answers(folder)
    stats = {
        "answers": len(answers),
        "characters": mean(len(row["response"]) for row in answers),
        "tokens": mean(len(row["tokens"]) for row in answers),
        "truncated": mean(float(row["truncated"]) for row in answers),
    }
    if oracle and answers:
        grades = grade_answers(folder, oracle)
        stats["true_mean"] = mean(grades)
        stats["true_error"] = 1.96 * float(np.std(grades)) / len(grades) ** 0.5
        if hasattr(oracle, "criteria"):
            stats["criteria"] = criteria_rates(oracle, answers)
    return stats


def criteria_rates(oracle, answers: list[dict]) -> dict[str, float]:
    """The share of the answers that earn each of the oracle's points."""
    counts = Counter()
    for row in answers:
        for name, is_earned in oracle.criteria(row["prompt"], row["response"]).items():
            counts[name] += bool(is_earned)
    return {name: ratio(count, len(answers)) for name, count in counts.items()}


def evaluate_judges(run: Path, names: list[str], config: dict, data: Path) -> dict[str, dict]:
    """`judge_eval` of each model that has judged the held-out rankings.

    Judgements are matched with people's ranks by their place: the file must be the run's.
    """
    names = [name for name in names if (run / name / "exam.jsonl").exists()]
    if not names:
        return {}
    path = data / "eft_eval.jsonl"
    ranked = read_ranked(path)
    run_fingerprint = config.get("files", {}).get(path.name)
    if run_fingerprint not in (None, fingerprint(path.read_bytes())):
        raise UserError(
            f"{path}: has changed since {run} was made; "
            "bring the old file back, or give --data DIR, the folder that has it"
        )
    results = {}
    for name in names:
        judgements = read_jsonl(run / name / "exam.jsonl", allow_empty=True)
        results[name] = judge_eval(ranked, judgements)
    return results


def compare_models(run: Path, names: list[str], oracle) -> dict[str, dict]:
    """Every model against every earlier one."""
    if not oracle:
        return {}
    grades = {name: grade_answers(run / name, oracle) for name in names}
    names = [name for name in names if grades[name]]
    results = {}
    for earlier, later in combinations(names, 2):
        results[f"{later} vs {earlier}"] = head_to_head(grades[later], grades[earlier])
    return results


def missing_parts(r: dict, oracle, data: Path) -> list[str]:
    """What the report cannot tell, and why: a line each."""
    lines = []
    last = r["config"].get("iters", 0)
    all_names = ["SFT", *(f"M{i}" for i in range(1, last + 1))]
    names = ", ".join(name for name in all_names if name not in r["models"])
    failed_rounds = [name for name, stats in r["rounds"].items() if stats["state"] == "failed"]
    if failed_rounds:
        lines.append(f"{names}: not made, as the round that makes {failed_rounds[0]} failed")
    elif names:
        lines.append(f"{names}: not finished; train.py with the same --out goes on")
    has_answers = any(stats["answers"] for stats in r["models"].values())
    if not has_answers:
        lines.append(f"no answers to test prompts: {why_not_there(data / 'test.jsonl')}")
    if has_answers and not oracle:
        lines.append(
            f"no {data / 'oracle.py'}, so nobody outside the loop grades the answers: "
            "no head to head, no true scores (python -m scripts.compare asks another judge)"
        )
    if not r["agreement"]:
        why = why_not_there(data / "eft_eval.jsonl")
        lines.append(f"no judgements of held-out human rankings: {why}")
    return lines


def why_not_there(path: Path) -> str:
    """Why no model has worked on this file of the data folder."""
    if path.exists():
        return "train.py makes them at its end, when all models are trained"
    return f"{path} is not there"


def draw_figures(r: dict, run: Path) -> list[dict] | None:
    """The figures of a report; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from scripts import figures

    return figures.draw(r, read_metrics(run))


# ---- the trace of one prompt -----------------------------------------------------------------


def find_prompt(run: Path, address: str) -> tuple[str, Round]:
    """ "M2:17", or "17" in the last round that has responses -> "M2" and that prompt's rows."""
    rounds = run_rounds(run, "prompts.jsonl")
    with_responses = run_rounds(run) or rounds
    name, _, number = address.rpartition(":")
    name = name or (with_responses or [""])[-1]
    if name in rounds:
        files = read_round(run / name)
        rows = Round(*([row for row in file if str(row["id"]) == number] for file in files))
        if rows.prompts:
            return name, rows
    there = []
    for round_name in rounds:
        ids = [row["id"] for row in read_round(run / round_name).prompts]
        there.append(f"{round_name}:{min(ids)} to {round_name}:{max(ids)}" if ids else round_name)
    choices = ", ".join(there) or "none yet"
    raise UserError(f"{run}: no prompt {address!r}; give --trace one that is there ({choices})")


def trace_prompt(run: Path, address: str, oracle=None) -> str:
    """The life of one prompt as text: its writer, candidates, votes, the pair and why, the margin.

    A round that failed or has not finished is shown as far as it came.
    """
    config = read_json(run / "config.json")
    name, files = find_prompt(run, address)
    (prompt,) = files.prompts
    scores = mean_scores(files.judgements)
    writer = config.get("writer") or config.get("init")
    text = textwrap.indent(prompt["prompt"], "  ")
    parts = [f"Prompt {name}:{prompt['id']}, written by {writer}:\n{text}"]
    sides = pair_sides(files, scores)
    for row in files.candidates:
        facts = response_facts(row, prompt, scores, oracle)
        facts += [side.upper() for side, k in sides.items() if k == row["k"]]
        title = f"Response {row['k']} of {model_before(name)}: {', '.join(facts)}"
        votes = [vote_text(j) for j in files.judgements if j["k"] == row["k"]]
        body = textwrap.indent("\n".join([row["response"], *votes]), "  ")
        parts.append(f"{title}\n{body}")
    parts.append(explain_pair(run / name, files, scores))
    for pair in files.pairs:
        parts.append(dpo_table(run, name, pair, config["beta"]))
    return "\n\n".join(parts)


def pair_sides(files: Round, scores: dict[tuple, float]) -> dict[str, int]:
    """Which candidates the pair is made of: {"chosen": k, "rejected": k}.

    They have its tokens; among several such, its scores too.
    """
    sides = {}
    for pair in files.pairs:
        for side in ("chosen", "rejected"):
            twins = [row for row in files.candidates if row["tokens"] == pair[f"{side}_tokens"]]
            exact = [
                row for row in twins if scores.get((row["id"], row["k"])) == pair[f"{side}_score"]
            ]
            for row in (exact or twins)[:1]:
                sides[side] = row["k"]
    return sides


def response_facts(row: dict, prompt: dict, scores: dict[tuple, float], oracle) -> list[str]:
    score = scores.get((row["id"], row["k"]))
    facts = ["no readable vote" if score is None else f"mean score {score:.2f}"]
    if oracle:
        facts.append(f"true score {true_grade(oracle, prompt['prompt'], row['response'])}")
    facts.append(f"{len(row['tokens'])} tokens")
    if row["truncated"]:
        facts.append("cut by the length limit")
    return facts


def vote_text(judgement: dict) -> str:
    score = judgement["score"]
    vote = "unreadable" if score is None else f"{score:g}"
    text = textwrap.indent(judgement["text"], "  ")
    return f"vote {judgement['vote']}: {vote}\n{text}"


def explain_pair(folder: Path, files: Round, scores: dict[tuple, float]) -> str:
    """Why the prompt has a pair or none, as judge.prefer says it."""
    if files.pairs:
        return "Pair: the best mean score against the worst."
    if not (folder / "candidates.jsonl").exists():
        return "No pair yet: there are no responses (no candidates.jsonl)."
    if not (folder / "judgements.jsonl").exists():
        return "No pair yet: the responses are not judged (no judgements.jsonl)."
    _, outcomes = prefer(files.prompts, files.candidates, scores)
    (reason,) = outcomes
    if reason == "pair":
        return "No pair yet: these scores give one, but pairs.jsonl does not hold it."
    num_scored = sum((row["id"], row["k"]) in scores for row in files.candidates)
    return f"No pair: {reason} ({num_scored} of {len(files.candidates)} responses have a score)."


@torch.no_grad()
def dpo_table(run: Path, name: str, pair: dict, beta: float) -> str:
    """The pair under the stored reference and under the round's models, where they are there."""
    reference = [torch.tensor([pair[f"reference_{side}"]]) for side in ("chosen", "rejected")]
    rows = [dpo_row("reference, stored", reference, reference, beta)]
    for model_name in (model_before(name), name):
        folder = run / model_name
        if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
            model, tok = load_for_sampling(folder)
            example = (tok.chat(pair["prompt"]), pair["chosen_tokens"], pair["rejected_tokens"])
            batch = collate([example], model.embed_tokens.weight.device)
            policy = sequence_logps(model, *batch).cpu().split(1)
            rows.append(dpo_row(model_name, policy, reference, beta))
    title = f"DPO from {model_before(name)} to {name} on this pair"
    columns = ["", "log-prob of chosen", "log-prob of rejected", "margin", "loss"]
    return table(title, columns, rows, f"In nats; the margin is times beta = {beta}.")


def dpo_row(name: str, policy, reference, beta: float) -> tuple:
    _, metrics = dpo_loss(*policy, *reference, beta=beta)
    keys = ("logp_chosen", "logp_rejected", "margin", "loss")
    return (name, *(metrics[key].item() for key in keys))


# ---- the command -----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The report of a run.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/zoo")
    parser.add_argument("--data", type=Path, help="the run's data folder, where it has moved")
    parser.add_argument("--trace", metavar="M2:17", help="the life of one prompt instead")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    config = read_run_config(args.run)
    data = args.data or Path(config["data"])
    oracle_file = data / "oracle.py"
    oracle = load_oracle(oracle_file) if oracle_file.exists() else None
    if args.trace is not None:
        print(trace_prompt(args.run, args.trace, oracle))
        return
    r = report(args.run, oracle, data)
    write_json(args.run / "report.json", r)
    figures = draw_figures(r, args.run)
    grade = partial(true_grade, oracle) if oracle else None
    pages.write(args.run, r, figures or [], grade)
    print(report_text(r))
    print(f"\nWritten to {args.run}: report.json, report.md, report.html")
    if figures is None:
        print("No figures: matplotlib is not installed (pip install -r requirements-report.txt).")


if __name__ == "__main__":
    run_command(main)
