"""The report: metrics against scipy and brute force, health by hand, the length guard, the pages, one prompt's life."""

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_net
from scipy import stats
from test_judge import PAPER, grades, preferred

import judge
from dpo import collate, dpo_loss, sequence_logps
from judge import (
    agreement,
    chosen_fall,
    head_to_head,
    kendall,
    life,
    mean_scores,
    prefer,
    repeats,
    report,
    round_health,
    show,
    spearman,
    tables,
    warnings,
    write_pages,
)
from model import BadInput, read_json, save
from sample import digest

ROOT = Path(__file__).resolve().parents[1]

# ---- agreement with people, against scipy and brute force


def rankings(rng):
    """Human ranks with ties and gaps (0, 3, 3, 7), scores that are means of votes, some of them unread."""
    n = int(rng.integers(2, 7))
    ranks = (rng.integers(0, rng.integers(1, 5), n) * rng.integers(1, 4)).tolist()
    scores = [None if rng.random() < 0.15 else float(rng.integers(0, 16)) / 3 for _ in range(n)]
    return ranks, scores


def test_rank_correlations_equal_scipys_on_1000_rankings_with_ties_and_gaps():
    rng, constant = np.random.default_rng(1), 0
    for _ in range(1000):
        ranks, scores = rankings(rng)
        read = [(-r, s) for r, s in zip(ranks, scores, strict=True) if s is not None]
        if len(read) < 2:
            continue
        a, b = zip(*read, strict=True)
        if len(set(a)) == 1 or len(set(b)) == 1:
            constant += 1
            assert spearman(a, b) is kendall(a, b) is None
        else:
            assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
            assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    assert 100 < constant < 600


def by_brute_force(all_ranks, all_scores):
    """agreement() again, written from its description with scipy and plain loops."""
    pairs, exact, fives, spearmans, kendalls = Counter(), 0, [], [], []
    for ranks, scores in zip(all_ranks, all_scores, strict=True):
        for (r1, s1), (r2, s2) in itertools.combinations(zip(ranks, scores, strict=True), 2):
            if r1 != r2 and s1 is not None and s2 is not None:
                pairs["tie" if s1 == s2 else "right" if (s1 > s2) == (r1 < r2) else "wrong"] += 1
        if None not in scores:
            places = [stats.rankdata(v, method="dense").tolist() for v in (ranks, [-s for s in scores])]
            exact += places[0] == places[1]
        fives += [r == min(ranks) for r, s in zip(ranks, scores, strict=True) if s == 5]
        read = [(-r, s) for r, s in zip(ranks, scores, strict=True) if s is not None]
        if len(read) > 1 and all(len(set(side)) > 1 for side in zip(*read, strict=True)):
            spearmans.append(stats.spearmanr(*zip(*read, strict=True)).statistic)
            kendalls.append(stats.kendalltau(*zip(*read, strict=True)).statistic)
    total, strict = pairs.total(), pairs["right"] + pairs["wrong"]

    def ratio(a, b):
        return a / b if b else None

    return {
        "pairwise": ratio(pairs["right"], strict),
        "tie_rate": ratio(pairs["tie"], total),
        "pairwise_ties_half": ratio(pairs["right"] + pairs["tie"] / 2, total),
        "pairwise_ties_wrong": ratio(pairs["right"], total),
        "exact_match": exact / len(all_ranks),
        "five_best": ratio(sum(fives), len(fives)),
        "spearman": float(np.mean(spearmans)) if spearmans else None,
        "kendall": float(np.mean(kendalls)) if kendalls else None,
        "pairs": total,
    }


def test_agreement_equals_brute_force_on_random_examinations():
    rng, exact = np.random.default_rng(2), 0
    for _ in range(200):
        ranks, scores = zip(*(rankings(rng) for _ in range(rng.integers(1, 9))), strict=True)
        got, want = agreement(list(ranks), list(scores)), by_brute_force(ranks, scores)
        assert got.keys() == want.keys()
        exact += want["exact_match"] > 0
        for key, value in want.items():
            assert got[key] == (value if value is None else pytest.approx(value, abs=1e-12)), key
    assert exact > 20, "whole orders must occur, or they were not tested"


def test_the_papers_table_is_printed_to_its_decimals():
    """78/99/79 of 256 and so on; 176 of 256 is 68.75 %, a tie of rounding that the paper prints as 68.8."""
    names = ["M1 vs SFT", "M2 vs SFT", "M3 vs SFT", "M2 vs M1", "M3 vs M2", "M3 vs M1"]
    rows = {name: head_to_head(*grades(*counts)) for name, (counts, _) in zip(names, PAPER, strict=True)}
    r = {"warnings": [], "models": {"SFT": {"true_mean": 2.5, "tokens": 9.0, "truncated": 0.0}},
         "agreement": {}, "health": {}, "head_to_head": rows}  # fmt: skip
    printed = [line.split() for line in show(r).split("\n") if " vs " in line]
    assert [tuple(line[3:6]) for line in printed] == [decimals for _, decimals in PAPER]


# ---- length guard


@pytest.mark.parametrize(
    "points, lengths, guard, chosen",
    [
        ([4, 3, 2, 1], [9, 2, 1, 1], 0.0, 0),
        ([4, 3, 2, 1], [9, 2, 1, 1], 0.3, 0),  # 3 lies a third of the range below
        ([4, 3, 2, 1], [9, 2, 1, 1], 0.34, 1),
        ([4, 3, 2, 0], [9, 2, 1, 1], 0.5, 2),  # on the band's edge
        ([4, 3, 2, 1], [9, 2, 1, 1], 0.7, 2),
        ([4, 3, 2, 1], [9, 2, 1, 1], 0.999, 2),  # the worst is never chosen
        ([4, 3.8, 1, 0], [5, 5, 5, 5], 0.1, 0),  # no shorter one: the first
        ([3.8, 4, 1, 0], [5, 5, 5, 5], 0.1, 0),
        ([4, 4, 4, 0], [5, 3, 4, 1], 0.0, 0),
        ([4, 4, 4, 0], [5, 3, 4, 1], 0.01, 1),  # of several best, too
        ([None, 4, 3.9, 0], [1, 5, 3, 1], 0.1, 2),
    ],
)
def test_the_length_guard_takes_the_shortest_of_the_top_band(points, lengths, guard, chosen):
    tokens = [[k + 10] * n for k, n in enumerate(lengths)]
    rows = [{"id": 0, "k": k, "response": f"text {k}", "tokens": tokens[k]} for k in range(4)]
    scores = {(0, k): p for k, p in enumerate(points) if p is not None}
    (pair,), _ = prefer([{"id": 0, "prompt": "Why?"}], rows, scores, guard)
    worst = points.index(min(p for p in points if p is not None))
    assert (pair["chosen"], pair["chosen_score"]) == (f"text {chosen}", points[chosen])
    assert (pair["rejected"], pair["rejected_score"]) == (f"text {worst}", points[worst])
    assert pair["chosen_tokens"] == tokens[chosen]


def test_a_length_guard_shortens_what_is_chosen_and_changes_nothing_else():
    rng = random.Random(0)
    prompts = [{"id": i, "prompt": "p"} for i in range(300)]
    rows = [{"id": i, "k": k, "response": f"{i} {k}", "tokens": [i, k] * rng.randrange(1, 30)}
            for i in range(300) for k in range(4)]  # fmt: skip
    scores = {(r["id"], r["k"]): rng.randrange(16) / 3 for r in rows}
    runs = [prefer(prompts, rows, scores, guard) for guard in (0.0, 0.1, 0.3, 0.6)]
    assert prefer(prompts, rows, scores) == runs[0]
    total = [sum(len(p["chosen_tokens"]) for p in pairs) for pairs, _ in runs]
    assert total == sorted(total, reverse=True) and len(set(total)) == 4
    for pairs, tally in runs:
        assert tally == runs[0][1]
        assert [(p["id"], p["rejected"]) for p in pairs] == [(p["id"], p["rejected"]) for p in runs[0][0]]
        assert all(p["chosen_score"] > p["rejected_score"] for p in pairs)


def test_without_a_guard_length_decides_nothing():
    (pair,), _ = preferred([4, 4, 1, 1], tokens=[[1] * 9, [2], [3] * 9, [4]])
    assert (pair["chosen"], pair["rejected"]) == ("text 0", "text 2")


# ---- health

ZOO = [  # the two rounds of the zoo's default run, seed 0: a healthy run
    {"prompts": 300, "pairs": 298, "parse_rate": 0.9978, "truncated": 0.0, "length": 16.94,
     "scores": {"0": 182, "1": 257, "2": 698, "3": 1264, "4": 968, "5": 217}, "score_length_correlation": 0.083,
     "repeats": 0.013, "openings": 0.14, "copies": 0.0, "short": 0.0, "chosen_fall": -0.067},
    {"prompts": 600, "pairs": 596, "parse_rate": 0.9947, "truncated": 0.0, "length": 21.42,
     "scores": {"0": 72, "1": 298, "2": 1064, "3": 2207, "4": 2606, "5": 912}, "score_length_correlation": -0.02,
     "repeats": 0.004, "openings": 0.14, "copies": 0.0, "short": 0.0, "chosen_fall": 0.014},
]  # fmt: skip


def test_a_healthy_run_has_no_warnings():
    assert warnings(ZOO[0]) == warnings(*ZOO[::-1]) == []


@pytest.mark.parametrize(
    "sick, well, words",
    [
        ({"scores": {"3": 5, "4": 95}}, {"scores": {"3": 10, "4": 90}}, ["one and the same score: 95.0%", "90%"]),
        ({"scores": {"4": 7}}, {"scores": {"4": 7, "5": 1}}, ["one and the same score: 100.0%"]),
        (
            {"parse_rate": 0.85, "before": 0.89},
            {"parse_rate": 0.9, "before": 0.95},
            ["cannot be read: 15.0%", "more than 10%", "EFT"],
        ),
        ({"parse_rate": 0.93}, {"parse_rate": 0.95}, ["fall of readable judgements since the round before: 6.8%"]),
        ({"pairs": 100}, {"pairs": 300}, ["prompts without a pair: 83.3%", "--candidates"]),
        ({"length": 25.0}, {"length": 23.0}, ["growth", "47.6%", "by +0.08 there"]),
        ({"truncated": 0.2}, {"truncated": 0.05}, ["cut by the length limit: 20.0%", "more than 5%"]),
        ({"repeats": 0.6}, {"repeats": 0.5}, ["nearly copy another of their prompt: 60.0%", "--temperature"]),
        ({"openings": 0.7}, {"openings": 0.5}, ["same three words: 70.0%"]),
        ({"copies": 0.1}, {"copies": 0.05}, ["stand there twice: 10.0%"]),
        ({"short": 0.5}, {"short": 0.2}, ["fewer than 15 characters: 50.0%"]),
        ({"chosen_fall": 0.2}, {"chosen_fall": 0.1}, ["lost under DPO: 20.0%", "--nll 1"]),
    ],
)
def test_each_illness_has_one_warning_with_its_figure(sick, well, words):
    (line,) = warnings(ZOO[1] | sick, ZOO[0] | {"parse_rate": sick.get("before", ZOO[0]["parse_rate"])})
    assert all(word in line for word in words), line
    assert warnings(ZOO[1] | well, ZOO[0] | {"parse_rate": well.get("before", ZOO[0]["parse_rate"])}) == []


def test_what_is_not_known_is_no_illness():
    unknown = dict.fromkeys(("repeats", "chosen_fall", "score_length_correlation"))
    assert warnings(ZOO[1] | unknown, ZOO[0] | unknown) == []
    silent = {"scores": {}, "parse_rate": None}
    assert [line.split(":")[0] for line in warnings(ZOO[1] | silent)] == ["judgements that cannot be read"]


def test_a_remedy_names_flags_and_files_that_exist():
    sick = {"scores": {"4": 7}, "parse_rate": 0.5, "pairs": 0, "length": 99.0, "truncated": 1.0, "repeats": 1.0,
            "openings": 1.0, "copies": 1.0, "short": 1.0, "chosen_fall": 1.0}  # fmt: skip
    lines = warnings(ZOO[1] | sick, ZOO[0])
    assert len(lines) == 11
    known = set(re.findall(r"^    (\w+): \w+ = ", (ROOT / "train.py").read_text(), re.MULTILINE))
    named = {flag.replace("-", "_") for line in lines for flag in re.findall(r"--([a-z-]+)", line)}
    assert named and named <= known
    for file in {file for line in lines for file in re.findall(r"\w+\.(?:jsonl|txt)", line)}:
        assert (ROOT / "data" / "zoo" / file).exists(), file


def said(*texts, ident=0):
    return [{"id": ident, "k": k, "response": text} for k, text in enumerate(texts)]


def test_repeats_are_copies_of_an_earlier_candidate_of_the_same_prompt():
    ten = "a b c d e f g h i j k"
    assert repeats(said(ten, ten, "x y", ten)) == pytest.approx(2 / 3)
    assert repeats(said(ten, "x y z") + said(ten, "u v", ident=1)) == 0, "of another prompt it is none"
    assert repeats(said(ten, ten.replace("k", "z"))) == 1, "ROUGE-L of 10 in 11 words is 0.909"
    assert repeats(said("a b c d e f g h i j", "a b c d e f g h i z")) == 0, "9 in 10 words is not over 0.9"
    assert repeats(said("\u5929\u6c14", "\u72d0\u72f8", "\u5929\u6c14")) == 0.5, "in any script"
    assert repeats(said("", "")) == 1
    assert repeats(said("one")) is None


def test_the_fall_of_the_chosen_log_prob_is_that_of_the_last_fifth():
    """Rewards of the last 2 of 10 steps: -0.3 and -0.1, so the log-prob fell by 2 of 8 nats a response."""
    curve = [{"reward_chosen": 5.0, "logp_chosen": -1.0}] * 8
    curve += [{"reward_chosen": -0.3, "logp_chosen": -12.0}, {"reward_chosen": -0.1, "logp_chosen": -8.0}]
    assert chosen_fall(curve, beta=0.1) == pytest.approx(4 / 16)
    assert chosen_fall(curve[-1:], beta=0.1) == pytest.approx(1 / 7)
    assert chosen_fall(curve[:8], beta=0.1) < 0, "a rise is no fall"
    assert chosen_fall([{"loss": 1.0}], beta=0.1) is chosen_fall([], beta=0.1) is None


# ---- a run with real models and nasty texts

SVG = "http://www.w3.org/2000/svg"
NASTY = ["<script>alert(1)</script>", "</td></table><img src=http://x.y/z.png onerror=alert(2)>", "a | b\n|---|\n- c",
         "```\n# not a title\n```", "![pixel](http://x.y/p.png) [go](http://x.y)", "&amp; \\| `code` *b* _i_ ~s~ $x$",
         "<!--body--> {prompt} \u202eright to left \u2028line 😀"]  # fmt: skip
ORACLE = """
def grade(prompt, response):
    if "Tell" in prompt:
        raise ValueError("not of this world")
    return len(response) % 6
"""


def put(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def logps(net, tok, prompt, tokens):
    with torch.no_grad():
        return sequence_logps(net, *collate([(tok.chat(prompt), tokens)])).item()


@pytest.fixture(scope="module")
def made(tmp_path_factory, cfg, tok):
    """SFT, M1, M2 with their weights; six prompts with three candidates each, judged twice, and DPO's log."""
    base = tmp_path_factory.mktemp("report")
    data, run = base / "data", base / "<run>"
    put(data / "eft_eval.jsonl", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]})
    (data / "oracle.py").write_text(ORACLE)
    put(run / "config.json", {"data": str(data), "init": "some/base", "writer": "", "beta": 0.2, "note": NASTY[0]})
    nets = {name: random_net(cfg, seed).eval() for seed, name in enumerate(("SFT", "M1", "M2"))}
    for name, net in nets.items():
        save(net, tok, run / name)
        rows = [{"id": i, "prompt": f"Why? {t}", "response": f"{name}: {t}", "tokens": [5] * (i + 3),
                 "truncated": False} for i, t in enumerate(NASTY * 2)]  # fmt: skip
        put(run / name / "test.jsonl", *rows)
        exam = [{"id": 0, "k": k, "vote": 0, "text": "", "score": s} for k, s in enumerate([1, 4, 3])]
        put(run / name / "exam.jsonl", *exam)
    prompts = [{"id": i, "prompt": p} for i, p in enumerate(["Tell me", *NASTY[:5]])]
    texts = {5: ["same"] * 3}
    candidates = [{"id": i, "k": k, "response": texts.get(i, [f"{i}{k} {t}" for t in NASTY])[k],
                   "tokens": [*tok.encode(f"{i} {k}" if i != 5 else "same"), 2], "truncated": (i, k) == (0, 1)}
                  for i in range(6) for k in range(3)]  # fmt: skip
    points = {0: "413", 1: "222", 2: "5x0", 3: "xxx", 4: "121", 5: "135"}
    judgements = [{"id": c["id"], "k": c["k"], "vote": v, "text": f"Vote {v} on {c['id']}.{c['k']} {NASTY[c['id']]}",
                   "score": None if (s := points[c["id"]][c["k"]]) == "x" else float(s)}
                  for c in candidates for v in range(2)]  # fmt: skip
    pairs, tally = prefer(prompts, candidates, mean_scores(judgements))
    assert tally == {"pair": 3, "tie": 1, "fewer than two scored responses": 1, "identical texts": 1}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            pair[f"reference_{side}"] = logps(nets["M1"], tok, pair["prompt"], pair[f"{side}_tokens"])
    for name, rows in zip(("prompts", "candidates", "judgements", "pairs"), (prompts, candidates, judgements, pairs),
                          strict=True):  # fmt: skip
        put(run / "M2" / f"{name}.jsonl", *rows)
    sft = [{"model": m, "step": i, "loss": 3 / (i + 1)} for m in ("SFT", "M1") for i in range(30)]
    keys = ("loss", "margin", "reward_chosen", "reward_rejected", "logp_chosen")
    values = [(0.69 - i / 99, i / 50, -i / 100, -i / 30, -10 - i / 20) for i in range(30)]
    log = [{"model": "M2", "step": i, **dict(zip(keys, v, strict=True))} for i, v in enumerate(values)]
    put(run / "metrics.jsonl", *sft, *log)
    return run, nets


@pytest.fixture(scope="module")
def oracle(made):
    return judge.load_module(made[0].parent / "data" / "oracle.py")


def test_the_figures_behind_the_warnings_by_hand(made, oracle):
    h = round_health(made[0] / "M2", oracle)
    assert h["repeats"] == pytest.approx(2 / 12), "both copies of the last prompt's first candidate"
    assert (h["openings"], h["copies"], h["short"]) == (pytest.approx(1 / 6), 0, pytest.approx(1 / 6))
    change = sum(-i / 100 for i in range(24, 30)) / 0.2
    assert h["chosen_fall"] == pytest.approx(change / (sum(-10 - i / 20 for i in range(24, 30)) - change))
    known = [len(c["response"]) % 6 for c in judge.read_rows(made[0] / "M2" / "candidates.jsonl")
             if c["id"] not in (0, 3) and (c["id"], c["k"]) != (2, 1)]  # fmt: skip
    assert h["true_score"] == pytest.approx(np.mean(known)), "of the scored ones, as the judged mean is"


def test_a_report_warns_by_round_and_shows_it_on_top(made, oracle):
    r = report(made[0], oracle)
    assert r["warnings"] == [f"M2: {line}" for line in warnings(r["health"]["M2"])] != []
    assert show(r).startswith("Warnings\n  M2: ")
    assert show(r | {"warnings": []}).startswith("Head to head")


# ---- the pages


class Reader(HTMLParser):
    """Checks that tags are balanced and that nothing is loaded; collects the text of cells, captions and titles."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

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
            if name.split(":")[-1] in ("src", "href", "srcset", "data", "poster", "action"):
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
def pages(request, made, oracle):
    run, r = made[0], report(made[0], oracle)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without":
            patch.setitem(sys.modules, "matplotlib", None)
        else:
            pytest.importorskip("matplotlib")
        assert write_pages(run, r, oracle) == (request.param == "with figures")
    return (run / "report.html").read_text(), (run / "report.md").read_text(), r


def test_the_page_loads_nothing_and_runs_nothing(pages):
    page = Reader(pages[0])
    assert all(link.startswith("#") for link in page.links)
    assert not page.tags.keys() & {"script", "img", "link", "iframe", "object", "embed", "audio", "video", "base"}
    styles = "".join(re.findall(r"<style.*?</style>|style=\"[^\"]*\"", pages[0], re.DOTALL))
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
    assert page.tags["title"] == page.tags["h1"] == 1 and "viewport" in pages[0]
    for media in ("prefers-color-scheme: dark", "print", "max-width"):
        assert media in styles


def test_the_page_shows_every_text_as_the_model_wrote_it(pages):
    cells = Reader(pages[0]).cells
    for text in [f"{name}: {t}" for name in ("SFT", "M1", "M2") for t in NASTY]:
        assert text in cells
    assert "Vote 0 on 2.0 " + NASTY[2] in cells and "some/base" in cells and NASTY[0] in cells
    assert not any("Vote 1" in cell for cell in cells)


def test_only_a_run_with_warnings_has_the_box_of_warnings(pages, made, tmp_path):
    page, text, r = pages
    assert page.count("<li>Warning, ") == text.count("- Warning, ") == len(r["warnings"]) > 0
    module = judge.load_module(ROOT / "data" / "report" / "pages.py")
    module.write(tmp_path, r | {"warnings": []}, [], [])
    for file in ("report.html", "report.md"):
        calm = (tmp_path / file).read_text()
        assert "No warnings" in calm and "<ul>" not in calm and "Knobs of the run" in calm


def test_every_table_of_the_report_is_in_both_pages(pages):
    page, text, r = pages
    for title, columns, rows in tables(r):
        assert f">{title.replace('<', '&lt;')}</h2>" in page
        head, *body = text.split(f"## {title.replace('(', chr(92) + '(').replace(')', chr(92) + ')')}\n\n")[1].split(
            "\n"
        )
        assert len(re.findall(r"(?<!\\)\|", head)) == len(columns) + 1
        assert body[len(rows)].startswith(f"| {rows[-1][0]} ")
    for line in r["warnings"]:
        assert line in page and line.split(":")[2] in text


def test_markdown_holds_no_tag_no_link_and_no_broken_row(pages):
    text = pages[1]
    assert set(re.findall(r"<[^>]*>", text)) == {"<br>"}
    assert all(path.startswith("figures/") for path in re.findall(r"(?<!\\)\]\(([^)]*)", text))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    assert "```" not in text and "\\`\\`\\`<br>\\# not a title" in text
    assert len([line for line in text.split("\n") if line.startswith("# ")]) == 1
    assert "\u2028" not in text and "\\| b<br>\\|---" in text


def test_ten_test_prompts_stand_for_all(pages, made):
    assert pages[0].count("Test prompt: ") == pages[1].count("Test prompt: ") == 7, (
        "two of each text, one of each shown"
    )
    rows = [{"id": i, "prompt": f"Q{i}?", "response": "r", "tokens": [5], "truncated": False} for i in range(256)]
    module = judge.load_module(ROOT / "data" / "report" / "pages.py")
    folder = made[0].parent / "many"
    put(folder / "M1" / "test.jsonl", *rows)
    shown = [t[0] for t in module.examples(folder, {"models": {"M1": {}, "M2": {}}, "health": {}})]
    assert shown == [f"Test prompt: Q{i}?" for i in range(0, 250, 25)]


# ---- the figures


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    return judge.load_module(ROOT / "data" / "report" / "figures.py").draw


def test_every_figure_has_a_caption_units_and_colours_for_any_background(figures, made, oracle):
    r, curves = report(made[0], oracle), judge.read_metrics(made[0])
    drawn = figures(r, curves)
    assert len(drawn) == 10 == len({f["name"] for f in drawn})
    for f in drawn:
        root = ET.fromstring(f["svg"])
        assert f["title"] and f["caption"].endswith(".") and root.get("aria-label") == f["caption"]
        assert float(root.get("viewBox").split()[2]) < 330, "text is shrunk on a telephone by a fifth at most"
        texts = {"".join(t.itertext()).strip(): t.get("style") for t in root.iter(f"{{{SVG}}}text")}
        assert any(re.search(r"\((%|nats.*|tokens|0 to 5)\)|new prompts", text) for text in texts), (f["name"], texts)
        for text, style in texts.items():
            assert "fill: currentColor" in style or re.fullmatch(r"[\d.,]+", text), (f["name"], text)
        for shape in itertools.chain(*(root.iter(f"{{{SVG}}}{kind}") for kind in ("path", "rect", "use"))):
            assert not re.search("(fill|stroke): (#000000|#ffffff|black|white)", shape.get("style", "")), f["name"]
        assert "<metadata" not in f["svg"] and len(f["svg"]) < 60_000
    assert figures(r, curves) == drawn, "the same run gives the same figures"


def test_a_small_batch_weighs_little_in_the_running_mean(figures):
    module = judge.load_module(ROOT / "data" / "report" / "figures.py")
    rows = [{"loss": 0.5 if i != 7 else 9.0, "tokens": 100 if i != 7 else 2} for i in range(20)]
    ax = module.axes("update", "loss")
    module.by_step(ax, {"M2": rows}, ["M2"], "loss")
    faint, strong = (line.get_ydata() for line in ax.lines)
    assert max(faint) == 9 and max(strong) == pytest.approx((4 * 50 + 18) / 402)


def test_no_point_touches_the_upper_edge(figures, made):
    r = report(made[0])
    _, _, ax = judge.load_module(ROOT / "data" / "report" / "figures.py").lengths(r, {})
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 1.05 * max(m["tokens"] for m in r["models"].values())


def test_bars_are_as_long_as_the_shares(figures, made):
    """The six rows of the paper: widths in the SVG are proportional to the printed percentages."""
    rows = {f"M{i} vs SFT": head_to_head(*grades(*counts)) for i, (counts, _) in enumerate(PAPER)}
    r = report(made[0]) | {"head_to_head": rows, "health": {}, "agreement": {}}
    drawn = {f["name"]: f["svg"] for f in figures(r, {})}
    assert "votes" not in drawn and "agreement" not in drawn and "dpo_loss" not in drawn and "scores" not in drawn
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*style="fill: #(0072b2|8a8a8a|d55e00)',
                      drawn["head_to_head"])  # fmt: skip
    widths = {
        c: [float(b) - float(a) for a, b, colour in bars if colour == c][:6] for c in ("0072b2", "8a8a8a", "d55e00")
    }
    shares = {c: [100 * counts[i] / 256 for counts, _ in PAPER] for i, c in enumerate(widths)}
    edges = [[float(x) for x in bar[:2]] for bar in bars]
    for win, tie, lose in zip(edges[:6], edges[6:12], edges[12:18], strict=True):
        assert (win[1], tie[1]) == pytest.approx((tie[0], lose[0])), "each bar begins where the one before it ends"
    scale = widths["0072b2"][0] / shares["0072b2"][0]
    for c in widths:
        assert widths[c] == pytest.approx([s * scale for s in shares[c]], rel=1e-3)
    for _, decimals in PAPER:
        assert all(f">{d}<" in drawn["head_to_head"] for d in decimals if float(d) >= 7)


def test_five_iterations_and_a_run_without_an_oracle_are_drawn(figures, made):
    r, curves = report(made[0]), judge.read_metrics(made[0])
    assert {f["name"] for f in figures(r, curves)} >= {"scores", "lengths", "votes", "log_probs"}
    rounds = {f"M{i}": r["health"]["M2"] for i in range(2, 9)}
    longer = curves | dict.fromkeys(rounds, curves["M2"])
    names = dict.fromkeys(("SFT", "M1", *rounds), r["models"]["M1"])
    drawn = {f["name"]: f["svg"] for f in figures(r | {"health": rounds, "models": names}, longer)}
    for name in ("votes", "pairs", "margin", "log_probs"):
        assert ">M8" in drawn[name] or ">for M8" in drawn[name], name


def test_matplotlib_is_asked_for_by_the_figures_alone():
    for file in ("judge.py", "data/report/pages.py"):
        roots = set(re.findall(r"^ *(?:import|from) (\w+)", (ROOT / file).read_text(), re.MULTILINE))
        assert {r for r in roots if r not in sys.stdlib_module_names} <= {
            "numpy",
            "torch",
            "tqdm",
            "model",
            "sample",
        }, file


# ---- the life of one prompt


def test_a_prompts_life_by_hand(made, oracle, tok):
    run, nets = made
    text = life(run, "M2:2", oracle)
    assert text.startswith(
        f"Prompt M2:2, by the writer some/base:\n  {NASTY[1]}\n\nResponse 0 of M1: mean score 5.00, "
    )
    (pair,) = [p for p in judge.read_rows(run / "M2" / "pairs.jsonl") if p["id"] == 2]
    first, second, third, why, margins = text.split("\n\n")[1:]
    assert "CHOSEN" in first and "REJECTED" in third and "CHOSEN" not in second + third
    assert "no readable vote" in second and "vote 0: unreadable\n" in second and "vote 1: 0\n" in third
    for k, block in enumerate((first, second, third)):
        assert all(f"Vote {v} on 2.{k} " in block for v in range(2)) and f"2{k} {NASTY[k]}".split("\n")[0] in block
        assert f"true score {len(f'2{k} {NASTY[k]}') % 6}, {len(tok.encode(f'2 {k}')) + 1} tokens" in block
    assert why == "Pair: the best mean score against the worst"
    rows = [line.split() for line in margins.split("\n")[2:]]
    assert [row[0] for row in rows] == ["reference,", "M1", "M2"]
    for name, *figures in rows[1:]:
        sides = [logps(nets[name], tok, pair["prompt"], pair[f"{side}_tokens"]) for side in ("chosen", "rejected")]
        reference = [pair["reference_chosen"], pair["reference_rejected"]]
        margin = dpo_loss(*(torch.tensor([x]) for x in sides + reference), beta=0.2)[1]["margin"].item()
        assert [float(x) for x in figures] == pytest.approx([*sides, margin], abs=0.006)
    assert float(rows[1][-1]) == 0 != float(rows[2][-1]), "before DPO the policy is the reference"


@pytest.mark.parametrize("ident, why", [(1, "tie"), (3, "fewer than two scored responses"), (5, "identical texts")])
def test_a_prompt_without_a_pair_says_why(made, ident, why):
    text = life(made[0], str(ident))
    assert text.endswith(f"No pair: {why}") and "CHOSEN" not in text and "true score" not in text
    assert text.startswith(f"Prompt M2:{ident}, "), "the last round is the default"


def test_cut_responses_guards_and_shuffled_scores_are_named(made, tmp_path):
    assert "cut by the length limit" in life(made[0], "0").split("\n\n")[2]
    config = read_json(made[0] / "config.json")
    (tmp_path / "M2").mkdir()
    for file in (made[0] / "M2").glob("*.jsonl"):
        (tmp_path / "M2" / file.name).write_bytes(file.read_bytes())
    put(tmp_path / "config.json", config | {"length_guard": 0.25})
    text = life(tmp_path, "0")
    assert "with a length guard of 0.25" in text and "reference, stored" in text
    assert not re.search(r"^  M[12] ", text, re.MULTILINE), "models whose weights are gone are left out"
    put(tmp_path / "config.json", config | {"control": "shuffle"})
    assert "the scores were shuffled" in life(tmp_path, "M2:0")
    pairs = [p for p in judge.read_rows(tmp_path / "M2" / "pairs.jsonl") if p["id"] != 0]
    put(tmp_path / "M2" / "pairs.jsonl", *pairs)  # dealt anew, best and worst score had met in two identical texts
    assert life(tmp_path, "M2:0").endswith("No pair: identical texts")


def test_of_two_equal_candidates_the_one_with_the_pairs_score_is_marked(made, tmp_path):
    folder, row = tmp_path / "M2", {"response": "twin", "tokens": [7, 2], "truncated": False}
    candidates = [{"id": 0, "k": k} | row for k in range(2)] + [
        {"id": 0, "k": 2} | row | {"tokens": [8, 2], "response": "x"}
    ]
    judgements = [{"id": 0, "k": k, "vote": 0, "text": "", "score": s} for k, s in enumerate([3, 4, 1])]
    prompts = [{"id": 0, "prompt": "Why?"}]
    pairs, _ = prefer(prompts, candidates, mean_scores(judgements))
    put(tmp_path / "config.json", {"beta": 0.1})
    for name, rows in (("prompts", prompts), ("candidates", candidates), ("judgements", judgements)):
        put(folder / f"{name}.jsonl", *rows)
    put(folder / "pairs.jsonl", pairs[0] | {"reference_chosen": -1.0, "reference_rejected": -2.0})
    blocks = life(tmp_path, "0").split("\n\n")
    assert ["CHOSEN" in b for b in blocks[1:4]] == [False, True, False] and "REJECTED" in blocks[3]


def test_a_margin_of_nothing_has_no_sign():
    assert judge.cells(["a"], [(-0.001,), (0.0,), (None,), (-0.5,), (3,)])[1:] == [
        ["0.00"],
        ["0.00"],
        ["-"],
        ["-0.50"],
        ["3"],
    ]


@pytest.mark.parametrize("at", ["M2:77", "77", "M3:0", "M1:0", "x", "M2:", ":0x", ""])
def test_a_prompt_that_is_not_there_is_refused_with_what_is(made, at):
    with pytest.raises(BadInput, match="M2:17.*M2"):
        life(made[0], at)


def test_a_life_is_of_one_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["judge.py", "a", "b", "--oracle", "c.py", "--show", "M2:0"])
    with pytest.raises(BadInput, match="--show is for one run"):
        judge.main()


@pytest.mark.parametrize("flags", [["--show", "M2:0"], []])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(made, flags):
    """As `| head` does: the pipe is closed before the first line comes."""
    process = subprocess.Popen([sys.executable, ROOT / "judge.py", made[0], *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert flags or (made[0] / "report.html").exists()


def test_an_exam_that_is_another_now_is_not_reported(made, tmp_path):
    """Judgements are matched with people's ranks by their place."""
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    config = read_json(run / "config.json")
    exam = Path(config["data"]) / "eft_eval.jsonl"
    put(run / "config.json", config | {"files": {exam.name: digest(exam.read_bytes())}})
    assert report(run)["agreement"] == report(made[0])["agreement"]
    write_pages(run, report(run))
    assert "files" not in (run / "report.md").read_text().split("## Knobs of the run")[1]  # a fingerprint is no knob
    put(run / "config.json", config | {"files": {exam.name: "another"}})
    with pytest.raises(BadInput, match="eft_eval.jsonl: has changed since .*run was made; bring the old file back"):
        report(run)


def test_what_cannot_be_written_is_told_in_one_line(made):
    argv = [sys.executable, ROOT / "judge.py", made[0] / "M1", made[0] / "M2", "--oracle",
            made[0].parent / "data" / "oracle.py", "--out", "/proc/x.json"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: /proc/x\.json.*: .+\n", done.stderr), done.stderr


def test_a_models_folder_is_no_run(made, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["judge.py", str(made[0] / "M2")])
    with pytest.raises(BadInput, match="M2: a model's folder"):
        judge.main()


def test_a_test_prompt_that_the_oracle_does_not_know_is_named(made, oracle, tmp_path):
    put(tmp_path / "config.json", read_json(made[0] / "config.json"))
    put(tmp_path / "M1" / "config.json", {})
    row = {"response": "r", "tokens": [5], "truncated": False}
    put(tmp_path / "M1" / "test.jsonl", {"prompt": "Why?"} | row, {"prompt": "Tell me"} | row)
    with pytest.raises(BadInput, match="test.jsonl: row 2 .*remove .*oracle.py"):
        report(tmp_path, oracle)
    assert report(tmp_path)["models"]["M1"]["answers"] == 2


def test_the_command_shows_a_prompt_or_writes_the_report(made, monkeypatch, capsys):
    run, _ = made
    for file in ("report.json", "report.md", "report.html"):
        (run / file).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["judge.py", str(run), "--show", "M2:0"])
    judge.main()
    assert capsys.readouterr().out.startswith("Prompt M2:0, ") and not (run / "report.json").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["judge.py", str(run)])
    judge.main()
    out = capsys.readouterr().out
    assert out.startswith("Warnings\n") and "no figures, as matplotlib is missing" in out
    assert all((run / file).stat().st_size > 1000 for file in ("report.json", "report.md", "report.html"))
