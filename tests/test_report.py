"""scripts/report.py: metrics against scipy and brute force, rounds by hand, pages, figures."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_net
from scipy import stats

from dpo import collate, dpo_loss, sequence_logps
from judge import MAX_SCORE, mean_scores, prefer
from model import UserError, read_json, save
from sample import fingerprint, read_jsonl
from scripts import pages
from scripts.pages import cell_text, report_text, table, tables
from scripts.report import (
    agreement,
    chosen_fall,
    draw_figures,
    head_to_head,
    kendall,
    load_oracle,
    main,
    mean,
    rankdata,
    read_metrics,
    repeats,
    report,
    round_stats,
    run_models,
    run_rounds,
    spearman,
    trace_prompt,
    true_grade,
    warnings,
)

ROOT = Path(__file__).resolve().parents[1]


def write_rows(path: Path, *rows: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- agreement with people, against scipy and brute force


def random_ranking(rng):
    """Human ranks with ties and gaps (0, 3, 3, 7); means of votes as scores, some of them None."""
    n = int(rng.integers(2, 7))
    ranks = rng.integers(0, rng.integers(1, 5), n) * rng.integers(1, 4)
    scores = []
    for _ in range(n):
        scores.append(None if rng.random() < 0.15 else float(rng.integers(0, 16)) / 3)
    return ranks.tolist(), scores


def scored_pairs(ranks, scores):
    return [(-r, s) for r, s in zip(ranks, scores, strict=True) if s is not None]


def test_ranks_and_rank_correlations_equal_scipys_on_1000_rankings_with_ties_and_gaps():
    rng = np.random.default_rng(1)
    num_constant = 0
    for _ in range(1000):
        rows = scored_pairs(*random_ranking(rng))
        if len(rows) < 2:
            continue
        a, b = zip(*rows, strict=True)
        np.testing.assert_allclose(rankdata(b), stats.rankdata(b))
        if len(set(a)) == 1 or len(set(b)) == 1:
            num_constant += 1
            assert spearman(a, b) is kendall(a, b) is None
        else:
            assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
            assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    assert 100 < num_constant < 600


def test_the_length_correlation_of_a_whole_round_needs_little_memory():
    """5,000 prompts of 4 candidates: a table of all pairs would hold 400 million entries."""
    x = np.random.default_rng(0).integers(0, 16, 20_000)
    tracemalloc.start()
    ranks = rankdata(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(ranks, stats.rankdata(x))
    assert peak < 20e6


def agreement_by_brute_force(all_ranks, all_scores):
    """agreement() again, written from its description with scipy and plain loops."""
    pairs, exact, top, spearmans, kendalls = Counter(), 0, [], [], []
    for ranks, scores in zip(all_ranks, all_scores, strict=True):
        rows = zip(ranks, scores, strict=True)
        for (r1, s1), (r2, s2) in itertools.combinations(rows, 2):
            if r1 != r2 and s1 is not None and s2 is not None:
                pairs["tie" if s1 == s2 else "right" if (s1 > s2) == (r1 < r2) else "wrong"] += 1
        if None not in scores:
            by_people = stats.rankdata(ranks, method="dense").tolist()
            by_judge = stats.rankdata([-s for s in scores], method="dense").tolist()
            exact += by_people == by_judge
        top += [r == min(ranks) for r, s in zip(ranks, scores, strict=True) if s == MAX_SCORE]
        rows = scored_pairs(ranks, scores)
        if len(rows) > 1 and all(len(set(side)) > 1 for side in zip(*rows, strict=True)):
            spearmans.append(stats.spearmanr(*zip(*rows, strict=True)).statistic)
            kendalls.append(stats.kendalltau(*zip(*rows, strict=True)).statistic)
    total = pairs.total()
    right, strict = pairs["right"], pairs["right"] + pairs["wrong"]
    return {
        "pairwise": right / strict if strict else None,
        "tie_rate": pairs["tie"] / total if total else None,
        "pairwise_ties_half": (right + pairs["tie"] / 2) / total if total else None,
        "pairwise_ties_wrong": right / total if total else None,
        "exact_match": exact / len(all_ranks),
        "top_score_is_best": sum(top) / len(top) if top else None,
        "spearman": float(np.mean(spearmans)) if spearmans else None,
        "kendall": float(np.mean(kendalls)) if kendalls else None,
        "pairs": total,
        "pairs_without_ties": strict,
        "prompts": len(all_ranks),
        "top_scores": len(top),
    }


def test_agreement_equals_brute_force_on_random_judges():
    rng = np.random.default_rng(2)
    num_exact = 0
    for _ in range(200):
        rows = [random_ranking(rng) for _ in range(rng.integers(1, 9))]
        ranks, scores = map(list, zip(*rows, strict=True))
        got, want = agreement(ranks, scores), agreement_by_brute_force(ranks, scores)
        assert got.keys() == want.keys()
        num_exact += want["exact_match"] > 0
        for key, value in want.items():
            assert got[key] == (value if value is None else pytest.approx(value, abs=1e-12)), key
    assert num_exact > 20, "whole orders must occur, or they were not tested"


def test_agreement_of_hand_made_rankings():
    """Right, wrong, tied: 2 0 1 | 0 3 0 (one has no score) | 2 0 0 (people tie) | 1 0 0."""
    ranks = [[0, 1, 2], [1, 0, 2, 3], [0, 0, 1], [0, 1]]
    scores = [[5, 3, 3], [4, 2, 5, None], [3, 4, 1], [3, 2]]
    got = agreement(ranks, scores)
    assert (got["pairs"], got["pairs_without_ties"], got["prompts"]) == (9, 8, 4)
    assert got["top_scores"] == 2
    assert got["pairwise"] == pytest.approx(5 / 8)
    assert got["tie_rate"] == pytest.approx(1 / 9)
    assert got["pairwise_ties_half"] == pytest.approx(5.5 / 9)
    assert got["pairwise_ties_wrong"] == pytest.approx(5 / 9)
    assert got["exact_match"] == pytest.approx(1 / 4)
    assert got["top_score_is_best"] == pytest.approx(1 / 2)
    assert got["spearman"] == pytest.approx((3**0.5 / 2 - 1 + 3**0.5 / 2 + 1) / 4)
    assert got["kendall"] == pytest.approx((2 / 6**0.5 - 1 + 2 / 6**0.5 + 1) / 4)
    json.dumps(got)


def test_a_perfect_and_a_reversed_judge():
    ranks = [[0, 1, 2, 3], [3, 1, 0, 2]]
    good = agreement(ranks, [[MAX_SCORE - r for r in row] for row in ranks])
    bad = agreement(ranks, [[r + MAX_SCORE - 3 for r in row] for row in ranks])
    for key in ("pairwise", "exact_match", "top_score_is_best", "spearman", "kendall"):
        assert good[key] == pytest.approx(1)
        assert bad[key] == pytest.approx(-1 if key in ("spearman", "kendall") else 0)
    assert good["tie_rate"] == bad["tie_rate"] == 0


def test_a_judge_without_opinion_agrees_with_nobody():
    constant = agreement([[0, 1, 2]], [[4, 4, 4]])
    assert constant["pairwise"] is None
    assert constant["tie_rate"] == 1 and constant["exact_match"] == 0
    assert constant["pairwise_ties_half"] == 0.5 and constant["pairwise_ties_wrong"] == 0
    assert constant["spearman"] is constant["top_score_is_best"] is None
    silent = agreement([[0, 1], [1, 0]], [[None, None], [None, 3]])
    assert silent["pairs"] == 0 and silent["exact_match"] == 0
    assert silent["pairwise"] is silent["spearman"] is silent["kendall"] is None


# ---- head to head

PAPER = [  # figure 3: whole counts of 256 prompts, and what the paper prints
    ((78, 99, 79), ("30.5", "38.7", "30.9")),
    ((126, 93, 37), ("49.2", "36.3", "14.5")),
    ((160, 71, 25), ("62.5", "27.7", "9.8")),
    ((142, 84, 30), ("55.5", "32.8", "11.7")),
    ((122, 102, 32), ("47.7", "39.8", "12.5")),
    ((176, 58, 22), ("68.8", "22.7", "8.6")),
]
PAPER_NAMES = ["M1 vs SFT", "M2 vs SFT", "M3 vs SFT", "M2 vs M1", "M3 vs M2", "M3 vs M1"]


def grades(win, tie, lose):
    return [3.0] * win + [2.0] * tie + [1.0] * lose, [2.0] * (win + tie + lose)


def papers_head_to_heads():
    rows = zip(PAPER_NAMES, PAPER, strict=True)
    return {name: head_to_head(*grades(*counts)) for name, (counts, _) in rows}


@pytest.mark.parametrize("counts, decimals", PAPER)
def test_head_to_head_gives_the_papers_percentages_from_its_whole_counts(counts, decimals):
    got = head_to_head(*grades(*counts))
    assert tuple(f"{got[key]:.1f}" for key in ("win", "tie", "lose")) == decimals
    assert got["counts"] == list(counts)
    other = head_to_head(*reversed(grades(*counts)))
    assert (other["win"], other["lose"]) == (got["lose"], got["win"])


@pytest.mark.parametrize("counts, _", PAPER)
def test_the_interval_holds_the_estimate_and_has_the_normal_width(counts, _):
    widths = []
    for times in (1, 4):
        win, tie, lose = (c * times for c in counts)
        got, n = head_to_head(*grades(win, tie, lose)), win + tie + lose
        assert got["low"] < got["win"] - got["lose"] < got["high"]
        variance = ((win + lose) / n - ((win - lose) / n) ** 2) / n
        width = got["high"] - got["low"]
        assert width == pytest.approx(2 * 1.96 * 100 * variance**0.5, rel=0.06)
        widths.append(width)
    assert widths[1] < 0.6 * widths[0]
    assert head_to_head(*grades(*counts)) == head_to_head(*grades(*counts)), "no random seed"


def test_head_to_head_wants_grades_of_the_same_prompts():
    for a, b in (([1.0], []), ([], [])):
        with pytest.raises(AssertionError):
            head_to_head(a, b)


def test_the_papers_table_is_printed_to_its_decimals():
    """78/99/79 of 256 and so on; 176 of 256 is 68.75 %, a tie that the paper rounds to 68.8."""
    t = pages.head_to_head_table("Figure 3", papers_head_to_heads())
    lines = [
        line.split() for line in table(t.title, t.columns, t.rows).split("\n") if "vs" in line
    ]
    assert [tuple(line[3:6]) for line in lines] == [decimals for _, decimals in PAPER]
    assert {line[-1] for line in lines} == {"256"}


# ---- warnings: the stats of two healthy rounds (the zoo's default run), one figure changed

HEALTHY = {"state": "finished", "truncated": 0.0, "copies": 0.0, "short": 0.0, "openings": 0.14}
HEALTHY |= {"empty": 0, "no_room_for_judge": 0, "outcomes": {}}
FIRST = HEALTHY | {
    "prompts": 300,
    "pairs": 298,
    "responses": 1200,
    "judgements": 3600,
    "parse_rate": 0.9978,
    "length": 16.94,
    "scores": {"0": 182, "1": 257, "2": 698, "3": 1264, "4": 968, "5": 217},
    "score_length_correlation": 0.083,
    "repeats": 0.013,
    "chosen_fall": -0.067,
}
SECOND = HEALTHY | {
    "prompts": 600,
    "pairs": 596,
    "responses": 2400,
    "judgements": 7200,
    "parse_rate": 0.9947,
    "length": 21.42,
    "scores": {"0": 72, "1": 298, "2": 1064, "3": 2207, "4": 2606, "5": 912},
    "score_length_correlation": -0.02,
    "repeats": 0.004,
    "chosen_fall": 0.014,
}
FAILED = {"state": "failed", "pairs": 0, "chosen_fall": None}
FAILED |= {"outcomes": {"pair": 0, "tie": 590, "fewer than two scored responses": 10}}


def test_a_healthy_run_has_no_warnings():
    assert warnings(FIRST) == warnings(SECOND, FIRST) == []


@pytest.mark.parametrize(
    "ill, well, words",
    [
        (
            {"scores": {"3": 5, "4": 95}},
            {"scores": {"3": 10, "4": 90}},
            ["one and the same score: 95.0%", "90%"],
        ),
        ({"scores": {"4": 7}}, {"scores": {"4": 7, "5": 1}}, ["one and the same score: 100.0%"]),
        (
            {"parse_rate": 0.85, "before": 0.89},
            {"parse_rate": 0.9, "before": 0.95},
            ["cannot be read: 15.0%", "more than 10%", "EFT"],
        ),
        (
            {"parse_rate": 0.93},
            {"parse_rate": 0.95},
            ["fall of readable judgements since the round before: 6.8%"],
        ),
        ({"pairs": 100}, {"pairs": 300}, ["prompts without a pair: 83.3%", "--candidates"]),
        ({"length": 25.0}, {"length": 23.0}, ["growth", "47.6%", "by +0.08 there"]),
        ({"truncated": 0.2}, {"truncated": 0.05}, ["the length limit: 20.0%", "more than 5%"]),
        ({"repeats": 0.6}, {"repeats": 0.5}, ["copy another of their prompt: 60.0%", "--temp"]),
        ({"openings": 0.7}, {"openings": 0.5}, ["same three words: 70.0%"]),
        ({"copies": 0.1}, {"copies": 0.05}, ["stand there twice: 10.0%"]),
        ({"short": 0.5}, {"short": 0.2}, ["fewer than 15 characters: 50.0%"]),
        ({"chosen_fall": 0.2}, {"chosen_fall": 0.1}, ["lost under DPO: 20.0%", "--dpo-lr"]),
        (
            {"empty": 200, "no_room_for_judge": 280},
            {"empty": 200, "no_room_for_judge": 40},
            ["not judged: 20.0%", "200 are empty, 280 leave the judge no room"],
        ),
        (FAILED, {"state": "unfinished", "pairs": 0}, ["the round failed: none of 600 prompts"]),
    ],
)
def test_each_illness_has_one_warning_with_its_figure(ill, well, words):
    for change, expected in ((ill, 1), (well, 0)):
        before = FIRST | {"parse_rate": change.get("before", FIRST["parse_rate"])}
        lines = warnings(SECOND | change, before)
        assert len(lines) == expected, lines
        assert expected == 0 or all(word in lines[0] for word in words), lines


def test_a_failed_round_tells_what_became_of_its_prompts():
    (line,) = warnings(SECOND | FAILED, FIRST)
    assert "(590 tie, 10 fewer than two scored responses)" in line and "0 pair" not in line


def test_what_is_not_known_is_no_illness():
    unknown = dict.fromkeys(("repeats", "chosen_fall", "score_length_correlation"))
    assert warnings(SECOND | unknown, FIRST | unknown) == []
    not_judged = {"scores": {}, "parse_rate": None, "judgements": 0, "state": "unfinished"}
    assert warnings(SECOND | not_judged, FIRST) == []


def test_a_remedy_names_flags_and_files_that_exist():
    everything = {
        "scores": {"4": 7},
        "parse_rate": 0.5,
        "pairs": 0,
        "length": 99.0,
        "empty": 600,
    }
    everything |= dict.fromkeys(
        ("truncated", "repeats", "openings", "copies", "short", "chosen_fall"), 1.0
    )
    lines = warnings(SECOND | everything, FIRST) + warnings(SECOND | FAILED)
    assert len(lines) == 13
    source = (ROOT / "train.py").read_text()
    flags = set(re.findall(r"^    (\w+): \w+ = ", source, re.MULTILINE))
    named = {flag for line in lines for flag in re.findall(r"--([a-z-]+)", line)}
    assert named and {flag.replace("-", "_") for flag in named} <= flags
    for file in {file for line in lines for file in re.findall(r"\w+\.(?:jsonl|txt)", line)}:
        assert file in source, file


def candidates_of(*texts, prompt=0):
    return [{"id": prompt, "k": k, "response": text} for k, text in enumerate(texts)]


def test_repeats_are_copies_of_an_earlier_candidate_of_the_same_prompt():
    text = "a b c d e f g h i j k"
    assert repeats(candidates_of(text, text, "x y", text)) == pytest.approx(2 / 3)
    others = candidates_of(text, "x y z") + candidates_of(text, "u v", prompt=1)
    assert repeats(others) == 0, "of another prompt it is none"
    assert repeats(candidates_of(text, text.replace("k", "z"))) == 1, "ROUGE-L of 10 in 11: 0.909"
    nine_of_ten = candidates_of("a b c d e f g h i j", "a b c d e f g h i z")
    assert repeats(nine_of_ten) == 0, "0.9 is not over 0.9"
    assert repeats(candidates_of("\u5929\u6c14", "\u72d0\u72f8", "\u5929\u6c14")) == 0.5
    assert repeats(candidates_of("", "")) == 1
    assert repeats(candidates_of("one")) is None


def test_the_fall_of_the_chosen_log_prob_is_that_of_the_last_fifth():
    """Rewards of the last 2 of 10 steps: -0.3 and -0.1; the log-prob fell by 2 of 8 nats each."""
    curve = [{"reward_chosen": 5.0, "logp_chosen": -1.0}] * 8
    curve += [{"reward_chosen": -0.3, "logp_chosen": -12.0}]
    curve += [{"reward_chosen": -0.1, "logp_chosen": -8.0}]
    assert chosen_fall(curve, beta=0.1) == pytest.approx(4 / 16)
    assert chosen_fall(curve[-1:], beta=0.1) == pytest.approx(1 / 7)
    assert chosen_fall(curve[:8], beta=0.1) < 0, "a rise is no fall"
    assert chosen_fall([{"loss": 1.0}], beta=0.1) is chosen_fall([], beta=0.1) is None


# ---- a small run by hand, without weights

ORACLE = """
def criteria(prompt, response):
    return {"true": "rivers" in response, "short": len(response) < 20}

def grade(prompt, response):
    if not prompt.startswith("Where"):
        raise ValueError("not of this world")
    return sum(criteria(prompt, response).values())
"""


def answer(text, size, truncated=False):
    return {"prompt": "Where?", "response": text, "tokens": [3] * size, "truncated": truncated}


ANSWERS = {
    "SFT": [
        answer("woods", 2),
        answer("rivers", 2),
        answer("no idea at all where it is", 8, True),
    ],
    "M1": [
        answer("rivers", 2),
        answer("rivers", 2),
        answer("no idea at all where it is", 8, True),
    ],
    "M2": [answer("rivers", 3), answer("rivers", 3), answer("rivers", 3)],
}


def votes(points: dict) -> list[dict]:
    """{prompt: the score of each candidate, one vote} -> judgements."""
    rows = []
    for i, scores in points.items():
        for k, score in enumerate(scores):
            rows.append({"id": i, "k": k, "vote": 0, "text": f"Score: {score}", "score": score})
    return rows


def write_round(folder: Path, points: dict, with_pairs=True):
    """Four prompts with two candidates each; texts of prompts 0 and 2 differ."""
    texts = ["Where is A?", "Where is B?", "Tell me", "Where is D?"]
    prompts = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    responses = {0: ["in rivers", "in woods"], 2: ["x", "y"]}
    candidates = []
    for i, k in itertools.product(range(4), range(2)):
        row = {"id": i, "k": k, "prompt": texts[i], "response": responses.get(i, ["c", "d"])[k]}
        row |= {"tokens": [1] * (4 - 2 * k + i), "truncated": (i, k) == (3, 1)}
        candidates.append(row)
    judgements = votes(points)
    pairs, outcomes = prefer(prompts, candidates, mean_scores(judgements))
    write_rows(folder / "prompts.jsonl", *prompts)
    write_rows(folder / "candidates.jsonl", *candidates)
    write_rows(folder / "judgements.jsonl", *judgements)
    if with_pairs:
        write_rows(folder / "pairs.jsonl", *pairs)
    return outcomes


@pytest.fixture
def run(tmp_path):
    """SFT, M1 and M2: three test prompts, a ranking of three, and the round that makes M2."""
    data, run = tmp_path / "data", tmp_path / "run"
    config = {"data": str(data), "iters": 2, "temperature": 0.5, "top_p": 0.8}
    write_rows(run / "config.json", config)
    data.mkdir()
    (data / "oracle.py").write_text(ORACLE)
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]}
    write_rows(data / "eft_eval.jsonl", ranked)
    for name, rows in ANSWERS.items():
        write_rows(run / name / "config.json", {})
        write_rows(run / name / "test.jsonl", *rows)
    judgements = []
    for k, scores in enumerate([[1, 2, None], [3, 3, None], [2, None, None]]):
        for vote, score in enumerate(scores):
            judgements.append({"id": 0, "k": k, "vote": vote, "text": "", "score": score})
    write_rows(run / "M1" / "exam.jsonl", *judgements)
    outcomes = write_round(run / "M2", {0: [4, 1], 1: [2, 2], 2: [5, 3], 3: [1, None]})
    assert outcomes == {"pair": 2, "tie": 1, "fewer than two scored responses": 1}
    return run


def oracle_of(text=ORACLE):
    namespace = {}
    exec(text, namespace)
    return SimpleNamespace(**namespace)


def test_the_report_of_a_run_by_hand(run):
    r = report(run, oracle_of())
    assert run_models(run) == ["SFT", "M1", "M2"] == list(r["models"])
    assert r["models"]["SFT"]["answers"] == 3
    assert r["models"]["SFT"]["characters"] == pytest.approx((5 + 6 + 26) / 3)
    assert r["models"]["SFT"]["tokens"] == 4
    assert r["models"]["SFT"]["truncated"] == pytest.approx(1 / 3)
    assert r["models"]["SFT"]["true_mean"] == pytest.approx((1 + 2 + 0) / 3)
    assert r["models"]["SFT"]["criteria"] == pytest.approx({"true": 1 / 3, "short": 2 / 3})
    assert {name: h["counts"] for name, h in r["head_to_head"].items()} == {
        "M1 vs SFT": [1, 2, 0],
        "M2 vs SFT": [2, 1, 0],
        "M2 vs M1": [1, 2, 0],
    }
    assert list(r["agreement"]) == ["M1"]
    result = r["agreement"]["M1"]  # means 1.5, 3, 2 against ranks 2, 0, 1: perfect
    assert result["pairwise"] == result["exact_match"] == 1 and result["pairs"] == 3
    assert result["parse_rate"] == pytest.approx(5 / 9) and result["judgements"] == 9
    assert r["missing"] == []


def test_the_stats_of_a_round_by_hand(run):
    assert run_rounds(run) == ["M2"]
    h = round_stats(run / "M2", oracle_of())
    assert (h["state"], h["prompts"], h["pairs"], h["responses"]) == ("finished", 4, 2, 8)
    assert h["parse_rate"] == pytest.approx(7 / 8)
    assert h["scores"] == {"1": 2, "2": 2, "3": 1, "4": 1, "5": 1}
    assert h["score_mean"] == pytest.approx(18 / 7)
    assert (h["score_chosen"], h["score_rejected"]) == (4.5, 2)
    assert h["truncated"] == pytest.approx(1 / 8)
    assert h["length"] == pytest.approx((4 + 2 + 5 + 3 + 6 + 4 + 7 + 5) / 8)
    assert (h["length_chosen"], h["length_rejected"]) == (5, 3)
    lengths, points = [4, 2, 5, 3, 6, 4, 7], [4, 1, 2, 2, 5, 3, 1]
    expected = stats.spearmanr(points, lengths).statistic
    assert h["score_length_correlation"] == pytest.approx(expected)
    # "Tell me" is outside the oracle's world: one pair is known
    assert (h["true_chosen"], h["true_rejected"]) == (2, 1)
    assert (h["true_agree"], h["true_equal"], h["true_disagree"]) == (1, 0, 0)


def test_every_new_prompt_is_accounted_for(run):
    r = report(run)
    outcomes = r["rounds"]["M2"]["outcomes"]
    assert outcomes == {
        "pair": 2,
        "tie": 1,
        "identical texts": 0,
        "fewer than two scored responses": 1,
    }
    (t,) = [t for t in tables(r) if t.title.startswith("What became of the new prompts")]
    ((name, num_prompts, *counts),) = t.rows
    assert (name, num_prompts) == ("M2", 4) and sum(counts) == 4
    assert t.columns[2:] == list(outcomes)


def test_responses_without_a_judgement_are_empty_or_too_long(run):
    candidates = read_jsonl(run / "M2" / "candidates.jsonl")
    candidates[0]["response"] = ""
    write_rows(run / "M2" / "candidates.jsonl", *candidates)
    judgements = read_jsonl(run / "M2" / "judgements.jsonl")[3:]
    write_rows(run / "M2" / "judgements.jsonl", *judgements)
    h = round_stats(run / "M2")
    assert (h["empty"], h["no_room_for_judge"]) == (1, 2)


# ---- rounds that failed or have not finished


def test_a_failed_round_warns_and_never_says_that_all_is_well(run):
    shutil.rmtree(run / "M2")
    write_round(run / "M2", {0: [3, 3], 1: [2, 2], 2: [1, 1], 3: [None, None]}, with_pairs=False)
    r = report(run, oracle_of())
    assert r["missing"] == ["M2: not made, as the round that makes M2 failed"]
    assert r["rounds"]["M2"]["state"] == "failed"
    first, *others = r["warnings"]
    assert first.startswith("M2: the round failed: none of 4 prompts gave a pair (3 tie, 1 fewer")
    assert any("cannot be read: 25.0%" in line for line in others)
    assert "No warnings" not in report_text(r) and "Warnings\n  M2: the round" in report_text(r)
    assert not any("goes on" in line for line in r["missing"]), "it would fail again"


def test_a_round_of_unreadable_judgements_is_a_failed_one(run):
    shutil.rmtree(run / "M2")
    write_round(run / "M2", {i: [None, None] for i in range(4)}, with_pairs=False)
    lines = report(run)["warnings"]
    assert "4 fewer than two scored responses" in lines[0]
    assert any("M2: judgements that cannot be read: 100.0%" in line for line in lines)


def test_a_round_that_is_under_way_is_neither_well_nor_ill(run):
    (run / "M2" / "pairs.jsonl").unlink()
    (run / "M2" / "config.json").unlink()
    for judged in (True, False):
        r = report(run, oracle_of())
        assert r["rounds"]["M2"]["state"] == "unfinished"
        text = report_text(r | {"warnings": []})
        assert "No warnings yet: no self-rewarding round is finished." in text
        assert any(line.startswith("M2: not finished") for line in r["missing"])
        assert (r["rounds"]["M2"]["outcomes"]["pair"] is None) == (not judged)
        (run / "M2" / "judgements.jsonl").unlink(missing_ok=True)


def test_no_judge_reached_an_empty_judgement_file(run):
    """All responses too long for the judge: no judgement, so the round fails."""
    (run / "M2" / "pairs.jsonl").unlink()
    (run / "M2" / "judgements.jsonl").write_text("")
    lines = report(run)["warnings"]
    assert "none of 4 prompts gave a pair" in lines[0]
    assert any(
        "not judged: 100.0%" in line and "8 leave the judge no room" in line for line in lines
    )


def test_a_round_without_a_response_can_be_reported(run):
    """No prompt leaves room for a response."""
    for file in ("candidates", "judgements"):
        (run / "M2" / f"{file}.jsonl").write_text("")
    (run / "M2" / "pairs.jsonl").unlink()
    r = report(run, oracle_of())
    assert "none of 4 prompts gave a pair (4 fewer than two" in r["warnings"][0]
    assert trace_prompt(run, "M2:0").endswith("(0 of 0 responses have a score).")
    assert "M2" in report_text(r)


@pytest.mark.parametrize(
    "gone",
    ["SFT/test.jsonl", "M1/test.jsonl", "M2/test.jsonl", "M1/exam.jsonl", "M2/pairs.jsonl"],
)
def test_a_run_that_is_not_finished_can_be_reported(run, gone):
    (run / gone).unlink()
    r = report(run, oracle_of())
    assert len(r["head_to_head"]) == (1 if "test" in gone else 3)
    assert "True score" in report_text(r)


def test_a_run_without_a_model_or_config_is_refused(run, tmp_path):
    for name in ("SFT", "M1", "M2"):
        (run / name / "config.json").unlink()
    with pytest.raises(UserError, match="no finished model"):
        report(run)
    with pytest.raises(UserError, match="config.json"):
        report(tmp_path / "nowhere")


# ---- what the report says beside its figures


def test_the_report_tells_how_its_texts_were_sampled(run):
    assert "temperature 0.5, top-p 0.8" in report_text(report(run)).split("\n")[0]


def test_a_judge_that_nothing_can_be_read_of_is_explained_and_is_no_row_of_dashes(run):
    rows = [{"id": 0, "k": k, "vote": 0, "text": "It is so.", "score": None} for k in range(3)]
    for name in ("SFT", "M2"):
        write_rows(run / name / "exam.jsonl", *rows)
    r = report(run)
    assert list(r["agreement"]) == ["SFT", "M1", "M2"]
    (t,) = [t for t in tables(r) if t.title.startswith("The judge against")]
    assert [row[0] for row in t.rows] == ["M1"]
    assert "SFT is not in the table: none of its 3 judgements ends in a score, as it has" in t.note
    assert "never saw a judgement" in t.note
    assert "M2 is not in the table: none of its 3 judgements ends in a score that can" in t.note


def test_percentages_of_the_judge_stand_beside_their_counts(run):
    (t,) = [t for t in tables(report(run)) if t.title.startswith("The judge against")]
    name, pairs, ties, exact, top, _, _, readable = t.rows[0]
    assert (name, pairs, ties, exact) == ("M1", "100.0% of 3", "0.0% of 3", "100.0% of 1")
    assert (top, readable) == (None, "55.6% of 9")


def test_a_column_has_one_meaning_in_all_tables(run):
    """ "Ties" is a count in one table and a percentage in none."""
    columns = [column for t in tables(report(run, oracle_of())) for column in t.columns]
    assert not {"ties", "len +", "len -", "r(len)", "cut %", "5-best", "for"} & set(columns)
    assert "tie %" in columns and "tie" in columns and "pairs of equal score" in columns


def test_a_report_without_an_oracle_says_what_is_missing_in_one_line(run):
    (run.parent / "data" / "oracle.py").unlink()
    main([str(run)])
    r = json.loads((run / "report.json").read_text())
    (line,) = r["missing"]
    assert "oracle.py" in line and "no head to head" in line and "scripts.compare" in line
    assert "win %" not in report_text(r) and "Length of the answers" in report_text(r)
    assert r["head_to_head"] == {} and "true_mean" not in r["models"]["M1"]
    assert "true_chosen" not in r["rounds"]["M2"]
    assert f"Missing: {pages.plain(line)}" in (run / "report.md").read_text()


def test_what_is_not_there_is_told_line_by_line(run):
    config = read_json(run / "config.json")
    write_rows(run / "config.json", config | {"iters": 4})
    for path in [*run.glob("*/test.jsonl"), *run.glob("*/exam.jsonl")]:
        path.unlink()
    models, answers, judges = report(run)["missing"]
    assert models.startswith("M3, M4: not finished")
    assert answers.endswith("test.jsonl is not there"), "the data folder has none"
    assert "train.py makes them at its end" in judges, "it has an eft_eval.jsonl"


def test_a_table_lines_up_and_shows_nothing_as_a_dash():
    text = table("T", ["", "a", "long"], [("x", 1.234, None), ("yyy", "50.0", 7)])
    assert text == "T\n          a  long\n  x    1.23     -\n  yyy  50.0     7"


def test_long_headings_are_wrapped_and_keep_their_words_over_the_numbers():
    text = table("T", ["", "a", "a name of many words indeed"], [("x", 1, 2)], "A note.")
    title, *lines, note = text.split("\n")
    assert [line.split() for line in lines] == [
        ["a", "name", "of", "many"],
        ["a", "words", "indeed"],
        ["x", "1", "2"],
    ]
    assert len({len(line) for line in lines}) == 1 and note == "  A note."


def test_a_margin_of_nothing_has_no_sign():
    values = (-0.001, 0.0, None, -0.5, 3)
    assert [cell_text(value) for value in values] == ["0.00", "0.00", "-", "-0.50", "3"]


# ---- the data folder


def test_a_data_folder_that_has_moved_is_given_by_a_flag(run, capsys):
    data = run.parent / "data"
    expected = report(run, oracle_of())
    data.rename(run.parent / "elsewhere")
    with pytest.raises(UserError, match="data: no such folder.*--data DIR"):
        main([str(run)])
    main([str(run), "--data", str(run.parent / "elsewhere")])
    written = json.loads((run / "report.json").read_text())
    assert written == json.loads(json.dumps(expected))
    main([str(run), "--trace", "M2:1"])
    assert capsys.readouterr().out.count("Prompt M2:1, ") == 1, "a trace does without"


def test_rankings_that_are_others_now_are_not_reported(run):
    """Judgements are matched with people's ranks by their place."""
    config = read_json(run / "config.json")
    path = Path(config["data"]) / "eft_eval.jsonl"
    write_rows(
        run / "config.json", config | {"files": {path.name: fingerprint(path.read_bytes())}}
    )
    r = report(run)
    assert list(r["agreement"]) == ["M1"]
    assert "files" not in [row[0] for row in pages.knobs_table(r["config"]).rows]
    write_rows(run / "config.json", config | {"files": {path.name: "another"}})
    with pytest.raises(UserError, match="eft_eval.jsonl: has changed since .*--data DIR"):
        report(run)


@pytest.mark.parametrize("ranks", [[2, 0, 1, 3], [0, 1]])
def test_a_ranking_with_more_ranks_than_responses_is_named(run, ranks):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": ranks}
    write_rows(run.parent / "data" / "eft_eval.jsonl", row)
    with pytest.raises(UserError, match="eft_eval.jsonl"):
        report(run)


def test_a_test_prompt_that_the_oracle_does_not_know_is_named(run):
    other = answer("r", 1) | {"prompt": "Tell me"}
    write_rows(run / "M1" / "test.jsonl", answer("r", 1), other)
    with pytest.raises(UserError, match="test.jsonl: row 2 .*remove .*oracle.py"):
        report(run, oracle_of())
    assert report(run)["models"]["M1"]["answers"] == 2


def test_an_oracle_is_a_python_file_with_grades(tmp_path):
    (tmp_path / "empty.py").write_text("")
    for path in (tmp_path / "none.py", tmp_path, tmp_path / "empty.py"):
        with pytest.raises(UserError, match=f"{path.name}.*data/zoo/oracle.py"):
            load_oracle(path)
    (tmp_path / "oracle.py").write_text(ORACLE)
    oracle = load_oracle(tmp_path / "oracle.py")
    assert true_grade(oracle, "Where?", "rivers") == 2
    assert true_grade(oracle, "Tell me", "rivers") is None


def test_the_mean_leaves_out_what_is_not_known():
    assert mean([1, None, 2]) == 1.5
    assert mean([None]) is mean([]) is None


# ---- a run with real models and nasty texts

SVG = "http://www.w3.org/2000/svg"
NASTY = [
    "<script>alert(1)</script>",
    "</td></table><img src=http://x.y/z.png onerror=alert(2)>",
    "a | b\n|---|\n- c",
    "```\n# not a title\n```",
    "![pixel](http://x.y/p.png) [go](http://x.y)",
    "&amp; \\| `code` *b* _i_ ~s~ $x$",
    "<!--body--> {prompt} \u202eright to left \u2028line 😀",
]
NASTY_ORACLE = """
def grade(prompt, response):
    if "Tell" in prompt:
        raise ValueError("not of this world")
    return len(response) % 6
"""
NASTY_POINTS = {0: "413", 1: "222", 2: "5x0", 3: "xxx", 4: "121", 5: "135"}  # x: unreadable


def logps(net, tok, prompt, tokens):
    with torch.no_grad():
        return sequence_logps(net, *collate([(tok.chat(prompt), tokens)])).item()


def nasty_round(net, tok):
    """Six prompts with three candidates each, judged twice: prompts, candidates, votes, pairs."""
    texts = ["Tell me", *NASTY[:5]]
    prompts = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    candidates = []
    judgements = []
    for i, k in itertools.product(range(6), range(3)):
        response, encoded = ("same", "same") if i == 5 else (f"{i}{k} {NASTY[k]}", f"{i} {k}")
        row = {"id": i, "k": k, "prompt": texts[i], "response": response}
        row |= {"tokens": [*tok.encode(encoded), tok.eos], "truncated": (i, k) == (0, 1)}
        candidates.append(row)
        point = NASTY_POINTS[i][k]
        for vote in range(2):
            text = f"Vote {vote} on {i}.{k} {NASTY[i]}"
            score = None if point == "x" else float(point)
            judgements.append({"id": i, "k": k, "vote": vote, "text": text, "score": score})
    pairs, outcomes = prefer(prompts, candidates, mean_scores(judgements))
    assert set(outcomes.values()) == {1, 3} and len(outcomes) == 4 and outcomes["pair"] == 3
    for pair in pairs:
        for side in ("chosen", "rejected"):
            tokens = pair[f"{side}_tokens"]
            pair[f"reference_{side}"] = logps(net, tok, pair["prompt"], tokens)
    return prompts, candidates, judgements, pairs


def metrics_rows():
    rows = []
    for name in ("SFT", "M1"):
        rows += [{"model": name, "step": i, "loss": 3 / (i + 1)} for i in range(30)]
    for i in range(30):
        row = {"model": "M2", "step": i, "loss": 0.69 - i / 99, "margin": i / 50}
        row |= {"reward_chosen": -i / 100, "reward_rejected": -i / 30, "logp_chosen": -10 - i / 20}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def nasty(tmp_path_factory, cfg, tok):
    """SFT, M1, M2 with their weights, a round, DPO's log; and the models."""
    base = tmp_path_factory.mktemp("report")
    data, run = base / "data", base / "<run>"
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]}
    write_rows(data / "eft_eval.jsonl", ranked)
    (data / "oracle.py").write_text(NASTY_ORACLE)
    config = {"data": str(data), "init": "some/base", "writer": "", "beta": 0.2, "iters": 2}
    write_rows(run / "config.json", config | {"note": NASTY[0]})
    nets = {}
    for seed, name in enumerate(("SFT", "M1", "M2")):
        nets[name] = random_net(cfg, seed).eval()
        save(nets[name], tok, run / name)
        rows = []
        for i, text in enumerate(NASTY * 2):
            row = {"id": i, "prompt": f"Why? {text}", "response": f"{name}: {text}"}
            rows.append(row | {"tokens": [5] * (i + 3), "truncated": False})
        write_rows(run / name / "test.jsonl", *rows)
        write_rows(run / name / "exam.jsonl", *votes({0: [1, 4, 3]}))
    prompts, candidates, judgements, pairs = nasty_round(nets["M1"], tok)
    write_rows(run / "M2" / "prompts.jsonl", *prompts)
    write_rows(run / "M2" / "candidates.jsonl", *candidates)
    write_rows(run / "M2" / "judgements.jsonl", *judgements)
    write_rows(run / "M2" / "pairs.jsonl", *pairs)
    write_rows(run / "metrics.jsonl", *metrics_rows())
    return run, nets


@pytest.fixture(scope="module")
def oracle(nasty):
    return load_oracle(nasty[0].parent / "data" / "oracle.py")


@pytest.fixture(scope="module")
def nasty_report(nasty, oracle):
    return report(nasty[0], oracle)


def test_the_figures_behind_the_warnings_by_hand(nasty, oracle):
    h = round_stats(nasty[0] / "M2", oracle)
    assert h["repeats"] == pytest.approx(2 / 12), "two copies of the last prompt's first candidate"
    assert h["openings"] == pytest.approx(1 / 6)
    assert (h["copies"], h["short"]) == (0, pytest.approx(1 / 6))
    change = sum(-i / 100 for i in range(24, 30)) / 0.2
    reference = sum(-10 - i / 20 for i in range(24, 30)) - change
    assert h["chosen_fall"] == pytest.approx(change / reference)
    scored = []
    for row in read_jsonl(nasty[0] / "M2" / "candidates.jsonl"):
        if row["id"] not in (0, 3) and (row["id"], row["k"]) != (2, 1):
            scored.append(len(row["response"]) % 6)
    assert h["true_score"] == pytest.approx(np.mean(scored)), "of those with a score, as judged"


def test_a_report_warns_by_round_and_shows_it_on_top(nasty_report):
    r = nasty_report
    expected = [f"M2: {line}" for line in warnings(r["rounds"]["M2"])]
    assert r["warnings"] == expected != []
    sections = report_text(r).split("\n\n")
    assert sections[1].startswith("Warnings\n  M2: ") and sections[2].startswith("Head to head")
    calm = report_text(r | {"warnings": []}).split("\n\n")
    assert calm[1] == "No warnings: every finished round is within its thresholds."


# ---- the pages


class Reader(HTMLParser):
    """Checks that tags are balanced; collects tags, links and the text of cells."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}
    LINKS = {"src", "href", "srcset", "data", "poster", "action"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells, self.links = [], Counter(), [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name.split(":")[-1] in self.LINKS:
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module", params=["with figures", "without"])
def written(request, nasty, nasty_report, oracle):
    """report.html and report.md as texts."""
    run = nasty[0]
    figures = []
    if request.param == "with figures":
        pytest.importorskip("matplotlib")
        figures = draw_figures(nasty_report, run)
    pages.write(run, nasty_report, figures, lambda *texts: true_grade(oracle, *texts))
    return (run / "report.html").read_text(), (run / "report.md").read_text()


def test_the_page_loads_nothing_and_runs_nothing(written):
    page = Reader(written[0])
    assert all(link.startswith("#") for link in page.links)
    loaders = {"script", "img", "link", "iframe", "object", "embed", "audio", "video", "base"}
    assert not page.tags.keys() & loaders
    found = re.findall(r"<style.*?</style>|style=\"[^\"]*\"", written[0], re.DOTALL)
    styles = "".join(found)
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
    assert page.tags["title"] == page.tags["h1"] == 1 and "viewport" in written[0]
    for media in ("prefers-color-scheme: dark", "print", "max-width"):
        assert media in styles


def test_the_page_shows_every_text_as_the_model_wrote_it(written):
    cells = Reader(written[0]).cells
    for name, text in itertools.product(("SFT", "M1", "M2"), NASTY):
        assert f"{name}: {text}" in cells
    assert "Vote 0 on 2.0 " + NASTY[2] in cells
    assert "some/base" in cells and NASTY[0] in cells
    assert not any("Vote 1" in cell for cell in cells)


def test_only_a_report_with_warnings_has_the_box_of_warnings(written, nasty_report, tmp_path):
    page, text = written
    num_warnings = len(nasty_report["warnings"])
    assert page.count("<li>Warning, ") == text.count("- Warning, ") == num_warnings > 0
    pages.write(tmp_path, nasty_report | {"warnings": []}, [], None)
    for file in ("report.html", "report.md"):
        calm = (tmp_path / file).read_text()
        assert "No warnings" in calm and "<ul" not in calm and "Knobs of the run" in calm


def test_every_table_of_the_report_is_in_both_pages(written, nasty_report):
    page, text = written
    for t in tables(nasty_report):
        assert f">{t.title}</h2>" in page
        head, _, *body = text.split(f"## {pages.plain(t.title)}\n\n")[1].split("\n")
        assert len(re.findall(r"(?<!\\)\|", head)) == len(t.columns) + 1
        assert body[len(t.rows) - 1].startswith(f"| {t.rows[-1][0]} ")
        assert pages.plain(t.note) in text
    for line in nasty_report["warnings"]:
        assert line in page and pages.plain(line) in text


def test_markdown_holds_no_tag_no_link_and_no_broken_row(written):
    text = written[1]
    assert set(re.findall(r"<[^>]*>", text)) == {"<br>"}
    paths = re.findall(r"(?<!\\)\]\(([^)]*)", text)
    assert all(path.startswith("figures/") for path in paths)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    assert "```" not in text and "\\`\\`\\`<br>\\# not a title" in text
    assert len([line for line in text.split("\n") if line.startswith("# ")]) == 1
    assert "\u2028" not in text and "\\| b<br>\\|---" in text


def test_ten_test_prompts_stand_for_all(written, tmp_path):
    assert written[0].count("Test prompt: ") == written[1].count("Test prompt: ") == 7, "not twice"
    rows = [answer("r", 1) | {"prompt": f"Q{i}?"} for i in range(256)]
    write_rows(tmp_path / "M1" / "test.jsonl", *rows)
    shown = pages.answer_examples(tmp_path, ["M1", "M2"], None)
    assert [t.title for t in shown] == [f"Test prompt: Q{i}?" for i in range(0, 250, 25)]


def test_a_failed_round_has_examples_of_its_judgements(run):
    (run / "M2" / "pairs.jsonl").unlink()
    pages.write(run, report(run), [], None)
    assert "| M2:3 | Where is D? | c | 1 | Score: 1 |" in (run / "report.md").read_text()


# ---- the figures


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    from scripts import figures

    return figures


def test_every_figure_has_a_caption_units_and_colours_for_any_background(
    figures, nasty, nasty_report
):
    curves = read_metrics(nasty[0])
    all_figures = figures.draw(nasty_report, curves)
    assert len(all_figures) == 10 == len({f["name"] for f in all_figures})
    units = r"\((%|nats.*|tokens|0 to 5)\)|new prompts"
    for f in all_figures:
        root = ET.fromstring(f["svg"])
        assert f["title"] and f["caption"].endswith(".")
        assert root.get("aria-label") == f["caption"]
        width = float(root.get("viewBox").split()[2])
        assert width < 330, "text is shrunk on a telephone by a fifth at most"
        texts = {}
        for element in root.iter(f"{{{SVG}}}text"):
            texts["".join(element.itertext()).strip()] = element.get("style")
        assert any(re.search(units, text) for text in texts), (f["name"], texts)
        for text, style in texts.items():
            assert "fill: currentColor" in style or re.fullmatch(r"[\d.,]+", text), f["name"]
        for kind in ("path", "rect", "use"):
            for shape in root.iter(f"{{{SVG}}}{kind}"):
                style = shape.get("style", "")
                assert not re.search("(fill|stroke): (#000000|#ffffff|black|white)", style)
        assert "<metadata" not in f["svg"] and len(f["svg"]) < 60_000
    assert figures.draw(nasty_report, curves) == all_figures, "the same run, the same figures"


def test_a_small_batch_weighs_little_in_the_running_mean(figures):
    rows = [{"loss": 0.5, "tokens": 100} for _ in range(20)]
    rows[7] = {"loss": 9.0, "tokens": 2}
    ax = figures.axes("update", "loss")
    figures.plot_by_step(ax, {"M2": rows}, ["M2"], "loss")
    faint, strong = (line.get_ydata() for line in ax.lines)
    assert max(faint) == 9 and max(strong) == pytest.approx((4 * 50 + 18) / 402)


def test_no_point_touches_the_upper_edge(figures, nasty_report):
    _, _, ax = figures.lengths(nasty_report, {})
    longest = max(m["tokens"] for m in nasty_report["models"].values())
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 1.05 * longest


def test_bars_are_as_long_as_the_shares(figures, nasty):
    """The six rows of the paper: widths in the SVG are proportional to the percentages."""
    r = report(nasty[0]) | {"head_to_head": papers_head_to_heads(), "rounds": {}, "agreement": {}}
    svgs = {f["name"]: f["svg"] for f in figures.draw(r, {})}
    assert svgs.keys() == {"head_to_head", "lengths"}, "what there is no data for is not drawn"
    colours = ("0072b2", "8a8a8a", "d55e00")
    pattern = (
        rf'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*style="fill: #({"|".join(colours)})'
    )
    bars = {colour: [] for colour in colours}
    for left, right, colour in re.findall(pattern, svgs["head_to_head"]):
        bars[colour].append((float(left), float(right)))
    bars = {colour: edges[:6] for colour, edges in bars.items()}  # the legend's come after
    for win, tie, lose in zip(*bars.values(), strict=True):
        assert (win[1], tie[1]) == pytest.approx((tie[0], lose[0])), "end to end"
    first_left, first_right = bars[colours[0]][0]
    scale = (first_right - first_left) / (100 * PAPER[0][0][0] / 256)
    for i, colour in enumerate(colours):
        widths = [right - left for left, right in bars[colour]]
        shares = [100 * counts[i] / 256 for counts, _ in PAPER]
        assert widths == pytest.approx([share * scale for share in shares], rel=1e-3)
    for _, decimals in PAPER:
        assert all(f">{d}<" in svgs["head_to_head"] for d in decimals if float(d) >= 7)


def test_the_bars_of_a_round_are_its_prompts_outcomes(figures, nasty_report):
    _, _, ax = figures.pairs(nasty_report, {})
    widths = {bars.get_label(): bars.patches[0].get_width() for bars in ax.containers}
    assert widths == nasty_report["rounds"]["M2"]["outcomes"] and sum(widths.values()) == 6


def test_many_rounds_and_a_run_without_an_oracle_are_drawn(figures, nasty):
    r, curves = report(nasty[0]), read_metrics(nasty[0])
    names = {f["name"] for f in figures.draw(r, curves)}
    assert names >= {"scores", "lengths", "votes", "log_probs"}
    rounds = {f"M{i}": r["rounds"]["M2"] for i in range(2, 9)}
    longer = curves | dict.fromkeys(rounds, curves["M2"])
    models = dict.fromkeys(("SFT", "M1", *rounds), r["models"]["M1"])
    svgs = {
        f["name"]: f["svg"] for f in figures.draw(r | {"rounds": rounds, "models": models}, longer)
    }
    for name in ("votes", "pairs", "margin", "log_probs"):
        assert ">M8" in svgs[name], name


def test_a_failed_round_is_drawn(figures, run):
    for change in ("pairs.jsonl", "judgements.jsonl"):
        (run / "M2" / change).unlink()
        figures.draw(report(run), {})


def test_matplotlib_is_asked_for_by_the_figures_alone():
    ours = {"dpo", "judge", "model", "sample", "scripts"}
    for file in ("report.py", "pages.py"):
        source = (ROOT / "scripts" / file).read_text()
        roots = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
        assert roots - sys.stdlib_module_names <= {"numpy", "torch"} | ours, file


# ---- the trace of one prompt


def test_the_trace_of_a_prompt_by_hand(nasty, oracle, tok):
    run, nets = nasty
    text = trace_prompt(run, "M2:2", oracle)
    start = (
        f"Prompt M2:2, written by some/base:\n  {NASTY[1]}\n\nResponse 0 of M1: mean score 5.00, "
    )
    assert text.startswith(start)
    (pair,) = [row for row in read_jsonl(run / "M2" / "pairs.jsonl") if row["id"] == 2]
    first, second, third, why, dpo = text.split("\n\n")[1:]
    assert "CHOSEN" in first and "REJECTED" in third and "CHOSEN" not in second + third
    assert "no readable vote" in second and "vote 0: unreadable\n" in second
    assert "vote 1: 0\n" in third
    for k, block in enumerate((first, second, third)):
        response = f"2{k} {NASTY[k]}"
        assert all(f"Vote {v} on 2.{k} " in block for v in range(2))
        assert response.split("\n")[0] in block
        num_tokens = len(tok.encode(f"2 {k}")) + 1
        assert f"true score {len(response) % 6}, {num_tokens} tokens" in block
    assert why == "Pair: the best mean score against the worst."
    rows = [line.split()[-5:] for line in dpo.split("\n") if line.split()[-1][-1].isdigit()]
    assert [row[0] for row in rows] == ["stored", "M1", "M2"]
    reference = [pair["reference_chosen"], pair["reference_rejected"]]
    for name, *figures in rows[1:]:
        policy = []
        for side in ("chosen", "rejected"):
            policy.append(logps(nets[name], tok, pair["prompt"], pair[f"{side}_tokens"]))
        losses, metrics = dpo_loss(*(torch.tensor([x]) for x in policy + reference), beta=0.2)
        expected = [*policy, metrics["margin"].item(), losses.item()]
        assert [float(x) for x in figures] == pytest.approx(expected, abs=0.006)
    assert float(rows[1][3]) == 0 != float(rows[2][3]), "before DPO the policy is the reference"
    assert rows[0][-1] == rows[1][-1] == "0.69", "ln 2"


@pytest.mark.parametrize(
    "ident, why",
    [
        (1, "tie (3 of 3 responses have a score)"),
        (3, "fewer than two scored responses (0 of 3 responses have a score)"),
        (5, "identical texts (3 of 3 responses have a score)"),
    ],
)
def test_a_prompt_without_a_pair_says_why(nasty, ident, why):
    text = trace_prompt(nasty[0], str(ident))
    assert text.endswith(f"No pair: {why}.")
    assert "CHOSEN" not in text and "true score" not in text
    assert text.startswith(f"Prompt M2:{ident}, "), "the last round is the default"


def test_cut_responses_are_named_and_models_without_weights_left_out(nasty, tmp_path):
    assert "cut by the length limit" in trace_prompt(nasty[0], "0").split("\n\n")[2]
    for path in [
        "config.json",
        *(f"M2/{path.name}" for path in (nasty[0] / "M2").glob("*.jsonl")),
    ]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((nasty[0] / path).read_bytes())
    text = trace_prompt(tmp_path, "0")
    assert "reference, stored" in text and not re.search(r"^  M[12] ", text, re.MULTILINE)


def test_the_trace_of_a_failed_round_shows_what_is_there(run):
    shutil.rmtree(run / "M2")
    write_rows(run / "M3" / "prompts.jsonl", {"id": 1, "prompt": "Where is X?"})
    write_round(run / "M2", {0: [3, 3], 1: [2, 2], 2: [1, 1], 3: [None, None]}, with_pairs=False)
    text = trace_prompt(run, "1")
    assert text.startswith("Prompt M2:1, "), "the last round that has responses"
    assert text.count("mean score 2.00") == 2 and text.count("vote 0: 2") == 2
    assert text.endswith("No pair: tie (2 of 2 responses have a score).")
    text = trace_prompt(run, "M2:3")
    assert text.count("vote 0: unreadable") == 2
    assert text.endswith(
        "No pair: fewer than two scored responses (0 of 2 responses have a score)."
    )


def test_the_trace_of_a_round_under_way_shows_what_is_there(run):
    folder = run / "M2"
    (folder / "pairs.jsonl").unlink()
    text = trace_prompt(run, "M2:0")
    assert text.endswith("No pair yet: these scores give one, but pairs.jsonl does not hold it.")
    (folder / "judgements.jsonl").unlink()
    assert trace_prompt(run, "M2:0").endswith("not judged (no judgements.jsonl).")
    (folder / "candidates.jsonl").unlink()
    text = trace_prompt(run, "M2:0")
    assert "Where is A?" in text and "Response" not in text
    assert text.endswith("there are no responses (no candidates.jsonl).")


def test_of_two_equal_candidates_the_one_with_the_pairs_score_is_marked(tmp_path):
    candidates = []
    for k, (text, token) in enumerate([("twin", 7), ("twin", 7), ("x", 8)]):
        row = {"id": 0, "k": k, "prompt": "Why?", "response": text, "tokens": [token, 2]}
        candidates.append(row | {"truncated": False})
    judgements = votes({0: [3, 4, 1]})
    prompts = [{"id": 0, "prompt": "Why?"}]
    pairs, _ = prefer(prompts, candidates, mean_scores(judgements))
    reference = {"reference_chosen": -1.0, "reference_rejected": -2.0}
    write_rows(tmp_path / "config.json", {"beta": 0.1})
    write_rows(tmp_path / "M2" / "prompts.jsonl", *prompts)
    write_rows(tmp_path / "M2" / "candidates.jsonl", *candidates)
    write_rows(tmp_path / "M2" / "judgements.jsonl", *judgements)
    write_rows(tmp_path / "M2" / "pairs.jsonl", pairs[0] | reference)
    blocks = trace_prompt(tmp_path, "0").split("\n\n")
    assert ["CHOSEN" in block for block in blocks[1:4]] == [False, True, False]
    assert "REJECTED" in blocks[3]


@pytest.mark.parametrize("address", ["M2:77", "77", "M3:0", "M1:0", "x", "M2:", ":0x", ""])
def test_a_prompt_that_is_not_there_is_refused_with_what_is(nasty, address):
    with pytest.raises(UserError, match="M2:0 to M2:"):
        trace_prompt(nasty[0], address)


# ---- the command


def command(*args):
    return [sys.executable, "-m", "scripts.report", *map(str, args)]


def test_the_command_prints_the_report_and_writes_it(run, capsys):
    main([str(run)])
    shown = capsys.readouterr().out
    r = json.loads((run / "report.json").read_text())
    assert r == json.loads(json.dumps(report(run, oracle_of())))
    assert shown.startswith(report_text(r))
    line = next(line for line in shown.split("\n") if "M2 vs SFT" in line)
    assert line.split()[3:7] == ["66.7", "33.3", "0.0", "+66.7"]
    assert (run / "report.md").exists() and (run / "report.html").exists()


def test_the_command_traces_a_prompt_or_writes_the_report(nasty, monkeypatch, capsys):
    run, _ = nasty
    for file in ("report.json", "report.md", "report.html"):
        (run / file).unlink(missing_ok=True)
    main([str(run), "--trace", "M2:0"])
    assert capsys.readouterr().out.startswith("Prompt M2:0, ")
    assert not (run / "report.json").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main([str(run)])
    last = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert last.startswith("No figures: matplotlib is not installed")
    for file in ("report.json", "report.md", "report.html"):
        assert (run / file).stat().st_size > 1000


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(run):
    """As `| head` does: the pipe is closed before the first line comes."""
    process = subprocess.Popen(
        command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()
    assert (run / "report.html").exists()


def test_a_models_folder_is_no_run_and_is_told_in_one_line(run):
    result = subprocess.run(command(run / "M2"), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: .*M2: a model's folder; .*\n", result.stderr), result.stderr
