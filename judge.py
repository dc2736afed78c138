"""judge.py: text -> preferences. The judge's prompt, its parser, scores, pairs; and how good judge and models are.

Paper section 2.2: the model that wrote the responses also grades them. Its judgement argues first and ends in
`Score: n`; three judgements are averaged; the best response of a prompt against the worst one is a preference.

    python judge.py runs/zoo                   the report of a run: report.json, report.md, report.html
    python judge.py runs/zoo --show M2:17      the life of one prompt, from its writer to DPO's margin
    python judge.py runs/zoo/M3 runs/zoo/M1 --judge-url URL --judge-model NAME  two sets of answers, by an outsider

A head-to-head needs somebody outside the loop: a model that sees both answers, in both orders (section 3.1), or in a
toy world `oracle.py` of the data folder, which knows the true quality. Training reads neither.

Left out: win rates corrected for length, several judges at once, APIs other than OpenAI's chat completions.
"""

import argparse
import hashlib
import http.client
import importlib.util
import json
import math
import os
import random
import re
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import BadInput, Llama, Tokenizer, read_json, write_json
from sample import digest, generate, load_here, optional, read_questions, read_rows, rouge_l

# ---- the judge's prompt and its verdict --------------------------------------------------------------------


def check_template(template: str, path) -> str:
    if template.count("{prompt}") != 1 or template.count("{response}") != 1:
        raise BadInput(f"{path}: a judge template holds {{prompt}} and {{response}} once each")
    return template


def fill(template: str, **texts: str) -> str:
    """Fill the places {name} in one pass, so that braces and placeholders in the texts themselves survive."""
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda m: texts[m[1]], template)


def judge_prompt(template: str, prompt: str, response: str) -> str:
    return fill(template, prompt=prompt, response=response)


MARKER = re.compile(r"score[\s*_]*:[\s*_<\[(`$]*", re.IGNORECASE)
POINTS = re.compile(r"(\d+(?:\.\d+)?)(?![.,]?\d)(?:\s*\(?(?:points?\s+)?(?:/|out of|of)\s*(\d+)\)?)?", re.IGNORECASE)
MORE = re.compile(r"[ \t]*(?:\([^)\n]*\))?[ \t]*(?:[-\u2013\u2014~+=]|(?:or|to|and)\b)\s*\d", re.IGNORECASE)


def find_verdict(text: str) -> re.Match | None:
    """Where the points of the last `Score:` stand, if they are readable, of 0 to 5, and no part of a sum or a range."""
    ends = [m.end() for m in MARKER.finditer(text)]
    found = POINTS.match(text, ends[-1]) if ends else None
    if not found or MORE.match(text, found.end()):
        return None
    return found if found[2] in (None, "5") and float(found[1]) <= 5 else None


def parse_score(text: str) -> float | None:
    """The verdict of a judgement: 0 to 5, or None where it cannot be read, which is never the same as a 0.

    Give it generated text only. The last `Score:` decides: "Score: 2 ... Score: 4" is 4.0, "**Score:** 4/5" is
    4.0, "Score: 10", "Score: five", "Score: 4/10" and "Score: 1 + 1 = 2" are None.
    """
    found = find_verdict(text)
    return float(found[1]) if found else None


def score(
    model: Llama, tok: Tokenizer, template: str, rows: list[dict], *, key: tuple, votes: int = 3, max_new: int, **knobs
) -> list[dict]:
    """Judge rows {"id", "k", "prompt", "response"}: `votes` judgements each {"id", "k", "vote", "text", "score"}.

    An empty response is not judged, nor is one that does not fit the context: it has no judgement and no score.
    """
    asked = [(r, tok.chat(judge_prompt(template, r["prompt"], r["response"]))) for r in rows if r["response"]]
    fit = [(r, ids) for r, ids in asked if len(ids) + max_new <= model.cfg.max_len]
    prompts, keys = [ids for _, ids in fit], [(*key, r["id"], r["k"]) for r, _ in fit]
    drawn = generate(model, prompts, keys, n=votes, stop=[tok.eos], max_new=max_new, **knobs)
    out = []
    for (row, _), judgements in zip(fit, drawn, strict=True):
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


def prefer(
    prompts: list[dict], candidates: list[dict], scores: dict[tuple, float], length_guard: float = 0.0
) -> tuple[list[dict], Counter]:
    """Best mean score against worst, one pair a prompt (section 2.3); also a count of what became of the prompts.

    Ties are dropped, identical texts are dropped; among several best or worst the first by index is taken. A length
    guard of g takes the shortest of those within g * (best - worst) of the best (Meta-Rewarding, Wu et al. 2024).
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
        if length_guard:
            band = max(points) - length_guard * (max(points) - min(points))
            best = min((c for c, s in zip(ranked, points, strict=True) if s >= band), key=lambda c: len(c["tokens"]))
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
                    "chosen_score": scores[best["id"], best["k"]],
                    "rejected_score": min(points),
                    "chosen_tokens": best["tokens"],
                    "rejected_tokens": worst["tokens"],
                }
            )
    return pairs, tally


# ---- judgements worth learning from: EFT (section 3.1) -----------------------------------------------------


def objection(ranks: list[int], scores: list[float]) -> str | None:
    """Why a try teaches no judging, or None: it orders no two replies against the people, and at least two with them.

    Tied scores are allowed, since six values cannot part all replies; replies of equal rank demand nothing.
    """
    if len(ranks) < 2:
        return "alone in its try"
    i, j = np.triu_indices(len(ranks), 1)
    r, s = np.asarray(ranks), np.asarray(scores)
    agree = (r[j] - r[i]) * (s[i] - s[j])  # rank 0 is best: positive where both order a pair alike, 0 for ties
    if (agree < 0).any():
        return "against the people's order"
    return None if (agree > 0).any() else "parts no replies that people part"


def accept(ranked: list[dict], judgements: list[dict]) -> tuple[list[dict], Counter]:
    """The judgements of `ranked` replies that agree with people; also a count of what became of the others.

    The paper gives no unit. Ours is a try: one judgement of each reply to a prompt, those with the same vote number.
    It counts as a whole, without its unreadable ones, and the first that agrees is its prompt's only one. A target
    ends in its verdict: one that goes on (until the length limit, maybe) would teach just that.
    """
    tries, kept, tally = defaultdict(list), {}, Counter()
    for j in judgements:
        found = find_verdict(j["text"])
        if not found or re.search(r"\w", j["text"][found.end() :]):
            tally["goes on after its verdict" if found else "no readable verdict"] += 1
        else:
            tries[j["id"], j["vote"]].append(j)
    for (i, _), group in sorted(tries.items()):
        reason = objection([ranked[i]["ranks"][j["k"]] for j in group], [j["score"] for j in group])
        reason = reason or ("an earlier try agrees" if i in kept else None)
        if reason:
            tally[reason] += len(group)
        else:
            kept[i] = group
    return [j for group in kept.values() for j in group], tally


def thin(judgements: list[dict], most: int, key: tuple) -> tuple[list[dict], Counter]:
    """Draw the most common score down to the count of the second, then all down to `most` rows; order is kept.

    The paper drops part of its most common score, 4, and names no ratio.
    """
    rng, counts = random.Random(repr(key)), Counter(j["score"] for j in judgements).most_common(2)
    common = [i for i, j in enumerate(judgements) if j["score"] == counts[0][0]]
    thinned = set(rng.sample(common, counts[0][1] - counts[-1][1])) if common else set()
    left = [j for i, j in enumerate(judgements) if i not in thinned]
    drawn = sorted(rng.sample(range(len(left)), min(most, len(left))))
    return [left[i] for i in drawn], +Counter({"most common score": len(thinned), "over --eft-size": len(left) - most})


def eft_rows(ranked: list[dict], judgements: list[dict], most: int, key: tuple) -> tuple[list[dict], dict]:
    """Judgements, beside the replies they judge -> at most `most` rows {"prompt", "response", "judgement"}, and a
    report in which kept and dropped add up to the judgements."""
    agreeing, dropped = accept(ranked, judgements)
    kept, thinned = thin(agreeing, most, key)
    before, after = (dict(sorted(Counter(f"{j['score']:g}" for j in js).items())) for js in (agreeing, kept))
    replies = sum(len(row["responses"]) for row in ranked)
    report = {
        "ranked_prompts": len(ranked),
        "replies": replies,
        "not_judged": replies - len({(j["id"], j["k"]) for j in judgements}),
        "judgements": len(judgements),
        "kept": len(kept),
        "dropped": dict((dropped + thinned).most_common()),
        "scores_before": before,
        "scores_after": after,
    }
    return [{"prompt": j["prompt"], "response": j["response"], "judgement": j["text"]} for j in kept], report


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
    both = [[(-a, b) for a, b in zip(r, s, strict=True) if b is not None] for r, s in zip(ranks, scores, strict=True)]
    orders = [[np.sign(np.subtract(x, y)) for x, y in combinations(pairs, 2)] for pairs in both]  # people's, judge's
    counts = Counter(human * judge for order in orders for human, judge in order if human)
    right, wrong, tied = counts[1], counts[-1], counts[0]
    exact, fives = 0, []
    for r, pairs, order in zip(ranks, both, orders, strict=True):
        exact += len(pairs) == len(r) and all(human == judge for human, judge in order)
        fives += [float(a == -min(r)) for a, b in pairs if b >= 5]
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
        "five_best": mean(fives),
        "spearman": mean(spearman(*pair) for pair in both),
        "kendall": mean(kendall(*pair) for pair in both),
        "pairs": total,
    }


def head_to_head(a: list[float], b: list[float], resamples: int = 10000) -> dict:
    """Grades of two models on the same prompts -> win, tie, lose of the first in percent, and counts.

    low and high bound win minus lose: a 95 % bootstrap interval over prompts, in points.
    """
    assert len(a) == len(b) and a, (len(a), len(b))
    signs = np.sign(np.subtract(a, b))
    counts = np.array([(signs == sign).sum() for sign in (1, 0, -1)])
    drawn = np.random.default_rng(0).multinomial(len(a), counts / len(a), size=resamples)  # resampled prompts
    low, high = np.percentile((drawn[:, 0] - drawn[:, 2]) / len(a) * 100, [2.5, 97.5])
    win, tie, lose = (counts / len(a) * 100).tolist()
    return {"win": win, "tie": tie, "lose": lose, "low": float(low), "high": float(high), "counts": counts.tolist()}


# ---- outside judges: which of two answers is better (section 3.1) ------------------------------------------

COMPARE = """\
Two assistants have answered the same user. Which response helps this user more? What counts is that it does what was \
asked, that it is right and complete, and that it is clear. Which one is shown first does not count, nor does length.

<user>
{prompt}
</user>

<response 1>
{first}
</response 1>

<response 2>
{second}
</response 2>

Give your reason in at most 60 words. Then end with one last line, which is "Verdict: 1" if response 1 is better, \
"Verdict: 2" if response 2 is better, or "Verdict: tie" if neither is.
"""
VERDICT = re.compile(r"verdict[\s*_]*:[\s*_<\[(`$\"]*", re.IGNORECASE)
GAP = r"[^\w\n.]*"
SIDE = re.compile(rf"(1|2|tie)(?![.,]?\d|[^\W_]|{GAP}(?:(?:or|and|vs\.?){GAP})?(?:1|2|tie)\b)", re.IGNORECASE)


def parse_verdict(text: str) -> int | None:
    """1 where the first response is better, -1 where the second is, 0 for a tie, None where it cannot be read.

    Give it generated text only. The last `Verdict:` decides: "Verdict: 1 ... **Verdict:** 2" is -1, "Verdict: 1 or 2"
    and "Verdict: 3" are None.
    """
    *before, after = VERDICT.split(text)
    found = SIDE.match(after) if before else None
    return {"1": 1, "2": -1, "tie": 0}[found[1].lower()] if found else None


def read_answers(path: Path) -> dict[tuple, str]:
    """(prompt, how often it came before) -> response: of a model's folder, of alpaca_eval.json, or of JSON lines."""
    path = path / "test.jsonl" if path.is_dir() else path
    answers, seen = {}, Counter()
    for number, row in enumerate(read_questions(path), 1):
        prompt, response = row["turns"][0], row.get("output", row.get("response"))
        if not isinstance(response, str) or len(row["turns"]) > 1:
            raise BadInput(f"{path}: row {number} has no text as response or output, or several turns; mend it")
        answers[prompt, seen[prompt]] = response
        seen[prompt] += 1
    return answers


def compare(a: dict[tuple, str], b: dict[tuple, str], ask: Callable[[list[str]], dict[str, str]]) -> list[dict]:
    """Rows {"prompt", "a", "b", "outcome", "a_first", "b_first"}: both orders are asked, ask(questions) -> answers.

    outcome is 1 where both verdicts are for a, -1 where both are for b, 0 where they differ or tie, and None
    where one of them cannot be read.
    """
    both = {at: [fill(COMPARE, prompt=at[0], first=x, second=y) for x, y in ((a[at], b[at]), (b[at], a[at]))]
            for at in a if at in b}  # fmt: skip
    said, rows = ask([question for orders in both.values() for question in orders]), []
    for at, orders in both.items():
        texts = [said[question] for question in orders]
        first, second = map(parse_verdict, texts)  # in the second, b stands first
        outcome = None if None in (first, second) else first if first == -second else 0
        row = {"prompt": at[0], "a": a[at], "b": b[at], "outcome": outcome}
        rows.append(row | {"a_first": texts[0], "b_first": texts[1]})
    return rows


def by_oracle(a: dict[tuple, str], b: dict[tuple, str], oracle) -> list[dict]:
    """The same rows by the true grades: no orders, no texts."""
    rows = []
    for at in [at for at in a if at in b]:
        x, y = (true_grade(oracle, at[0], side[at]) for side in (a, b))
        outcome = None if None in (x, y) else int(np.sign(x - y))
        rows.append({"prompt": at[0], "a": a[at], "b": b[at], "outcome": outcome, "a_grade": x, "b_grade": y})
    return rows


def read_cache(path: Path) -> dict[str, str]:
    """key -> answer. A line that a killed process left half-written counts as not asked."""
    known, start = {}, '{"key": "'
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[row["key"]] = row["text"]
        except (ValueError, LookupError, TypeError):
            if not line.startswith(start[: len(line)]):
                raise BadInput(f"{path}:{number}: no answer of a judge; give another --cache") from None
    return known


def through_cache(questions: list[str], judge: list, cache: Path, ask: Callable[[list[str], Callable], None]) -> dict:
    """Question -> answer, asking only what the cache file lacks; `judge` is all that an answer depends on besides.

    ask(questions, keep) calls keep(question, text), from any thread, as soon as there is an answer: then it is on
    disk. What it leaves out has an empty answer.
    """
    lock, keys = threading.Lock(), {q: hashlib.sha256(json.dumps([judge, q]).encode()).hexdigest() for q in questions}
    try:
        known = read_cache(cache)
        todo = [q for q, key in keys.items() if key not in known]
        print(f"{len(todo)} of {len(keys)} questions to ask; answers are kept in {cache}", flush=True)
        with cache.open("ab") as f, tqdm(total=len(todo), unit=" answers", disable=None) as bar:

            def keep(question: str, text: str):
                row = {"key": keys[question], "text": text}
                with lock:
                    f.write(b"\n" + json.dumps(row).encode())  # the line's end comes first: it ends a half-written one
                    f.flush()
                    known[keys[question]] = text
                    bar.update()

            if todo:
                ask(todo, keep)
    except (KeyboardInterrupt, OSError) as e:
        raise BadInput(f"{str(e) or 'interrupted'}; answers so far are in {cache}, the same command goes on") from None
    return {q: known.get(key, "") for q, key in keys.items()}


def fetch(request: urllib.request.Request, timeout: float) -> tuple[int, str, bytes]:
    """Status, Retry-After and body of an answer; urllib's time-out is for one read, this one for all of them."""
    end, body = time.monotonic() + timeout, b""
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        answer = e  # an answer too
    with answer:
        while part := answer.read1(1 << 16):
            body += part
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {timeout:g} s")
    return answer.status, answer.headers.get("Retry-After", ""), body


def complete(url: str, key: str, body: dict, stop: threading.Event, *, timeout: float, tries=6, pause=1.0) -> str:
    """The text that an OpenAI-compatible endpoint answers; one without text (a refusal) is empty.

    What may pass is tried again, each time after twice the pause or when the server says: no connection, time-outs,
    408, 429, 5xx, an answer that is no chat completion. Raises BadInput for the rest, and after the last try.
    """
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", "User-Agent": "judge.py"})  # fmt: skip
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # for this host, not where it may send us
    for attempt in range(tries):
        wait, status, problem, answer = pause * 2**attempt * random.uniform(0.5, 1), 200, "no chat completion", b""
        try:
            status, after, answer = fetch(request, timeout)
            if status == 200:
                text = json.loads(answer)["choices"][0]["message"]["content"]
                if text is None or isinstance(text, str):
                    return text or ""
            else:
                problem = f"HTTP {status}"
                wait += min(int(after), 60) if after.isdecimal() else 0
        except (OSError, http.client.HTTPException) as e:
            problem = str(e) or type(e).__name__
        except (ValueError, LookupError, TypeError):
            pass
        said = " ".join(f"{problem}: {answer.decode('utf-8', 'replace')}".split()).strip(":")
        said = said.replace(key, "(key)") if key else said
        problem = f"{request.full_url}: {said[:300]}"
        if status not in (200, 408, 429) and status < 500:
            raise BadInput(f"{problem}; check --judge-url, --judge-model and JUDGE_API_KEY")
        if attempt + 1 == tries or stop.wait(wait):
            break
    raise BadInput(f"{problem}; given up after {attempt + 1} tries: answers are kept, the same command goes on")


def ask_endpoint(questions: list[str], keep: Callable, *, url: str, params: dict, timeout: float, parallel: int):
    """Ask an HTTP endpoint, `parallel` requests at a time; keep(question, text) for each answer."""
    key = (os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise BadInput("JUDGE_API_KEY or OPENAI_API_KEY: holds characters that no key has; set it again")
    stop = threading.Event()

    def work(question: str):
        body = params | {"messages": [{"role": "user", "content": question}]}
        try:
            if not stop.is_set():
                keep(question, complete(url, key, body, stop, timeout=timeout))
        except Exception:
            if not stop.is_set():  # else the first failure is the one to tell of
                stop.set()
                raise

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(work, question) for question in questions]):
                future.result()
        finally:  # after an error or Ctrl-C nothing new is asked; what is being answered is waited for and kept
            stop.set()


def ask_checkpoint(questions: list[str], keep: Callable, *, folder: Path, max_new: int, batch: int = 32):
    """Ask a local checkpoint, greedily; what leaves no room for an answer in its context is not asked, and said."""
    model, tok = load_here(folder)
    asked = [(q, tok.chat(q)) for q in sorted(questions, key=len)]
    fit = [(q, ids) for q, ids in asked if len(ids) + max_new <= model.cfg.max_len]
    if len(fit) < len(asked):
        print(f"{len(asked) - len(fit)} questions leave no room for {max_new} tokens in the judge's context of "
              f"{model.cfg.max_len}: they have no verdict")  # fmt: skip
    for at in range(0, len(fit), batch):
        texts, prompts = zip(*fit[at : at + batch], strict=True)
        drawn = generate(model, prompts, [()] * len(prompts), stop=[tok.eos], max_new=max_new, temperature=0)
        for question, (ids,) in zip(texts, drawn, strict=True):
            keep(question, tok.decode([i for i in ids if i != tok.eos]))


def duel(a: dict[tuple, str], b: dict[tuple, str], rows: list[dict]) -> dict:
    """head_to_head of the rows with a verdict (win is a's), and what else is to be known of them."""
    outcomes = [r["outcome"] for r in rows if r["outcome"] is not None]
    if not outcomes:
        raise BadInput(f"none of {len(rows)} prompts has a verdict that can be read (in both orders; --out FILE shows "
                       "what was said): take another judge or another --max-tokens")  # fmt: skip
    verdicts = [parse_verdict(r[order]) for r in rows for order in ("a_first", "b_first") if order in r]
    sides = [v for v in verdicts if v]
    return head_to_head(outcomes, [0] * len(outcomes)) | {
        "prompts": len(rows),
        "unmatched": len(a) + len(b) - 2 * len(rows),
        "no_verdict": len(rows) - len(outcomes),
        "sides": len(sides),
        "first_share": mean(float(v == 1) for v in sides),
        "characters": [mean(len(r[side]) for r in rows) for side in "ab"],
    }


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


def load_module(path: Path):
    """Run a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_oracle(path: Path):
    """The toy world's oracle.py: grade(prompt, response) -> 0..5, and, if it likes, criteria(...) -> {name: 0 or 1}."""
    if not path.is_file() or path.suffix != ".py":
        raise BadInput(f"{path}: no such Python file; an oracle is like data/zoo/oracle.py")
    module = load_module(path)
    if not hasattr(module, "grade"):
        raise BadInput(f"{path}: has no grade(prompt, response); an oracle is like data/zoo/oracle.py")
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


def read_metrics(run: Path) -> dict[str, list[dict]]:
    """What training logged, by model: a row for each update that is in it (a selection throws the last ones away)."""
    curves = defaultdict(list)
    for row in optional(run / "metrics.jsonl", empty=True):
        curves[row["model"]].append(row)
    for path in run.glob("*/selected.json"):
        curves[path.parent.name] = curves[path.parent.name][: read_json(path)["step"]]
    return dict(curves)


def repeats(candidates: list[dict]) -> float | None:
    """The share of the candidates that nearly copy (ROUGE-L over 0.9) an earlier one to the same prompt."""
    earlier, found = defaultdict(list), []
    for c in candidates:
        text, others = c["response"].split(), earlier[c["id"]]
        if others:
            found.append(float(any(text == old or rouge_l(text, old) > 0.9 for old in others)))
        others.append(text)
    return mean(found)


def chosen_fall(curve: list[dict], beta: float) -> float | None:
    """The share of its log-prob that the chosen response has lost against the reference by the last fifth of DPO."""
    tail = [row for row in curve if "reward_chosen" in row][-max(1, len(curve) // 5) :]
    change = sum(row["reward_chosen"] for row in tail) / beta
    reference = sum(row["logp_chosen"] for row in tail) - change
    return change / reference if reference else None


def round_health(folder: Path, oracle=None) -> dict:
    """What one self-rewarding round was made of: votes, scores, pairs, lengths; with an oracle, their true worth."""
    candidates, judgements = (read_rows(folder / f"{name}.jsonl") for name in ("candidates", "judgements"))
    prompts = {p["id"]: p["prompt"] for p in read_rows(folder / "prompts.jsonl")}
    texts, curve = list(prompts.values()), read_metrics(folder.parent).get(folder.name, [])
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
        "repeats": repeats(candidates[:2000]),
        "openings": Counter(tuple(t.split()[:3]) for t in texts).most_common(1)[0][1] / len(texts),
        "copies": 1 - len(set(texts)) / len(texts),
        "short": mean(float(len(t) < 15) for t in texts),
        "chosen_fall": chosen_fall(curve, read_json(folder.parent / "config.json").get("beta", 0.1)),
    }
    if oracle:
        health["true_score"] = mean(true_grade(oracle, prompts[c["id"]], c["response"]) for c in scored)
        both = [[true_grade(oracle, p["prompt"], p[side]) for side in ("chosen", "rejected")] for p in pairs]
        known = [(a, b) for a, b in both if a is not None]
        health["true_chosen"], health["true_rejected"] = mean(a for a, _ in known), mean(b for _, b in known)
        health["true_agree"], health["true_equal"], health["true_disagree"] = (
            mean(float(np.sign(a - b) == sign) for a, b in known) for sign in (1, 0, -1)
        )
    return health


def warnings(now: dict, before: dict | None = None) -> list[str]:
    """What looks wrong in a round's health, given that of the round before: a line each, none for a healthy round."""
    before, votes, readable = before or now, now["scores"].values(), now["parse_rate"] or 0
    checks = (
        (max(votes, default=0) / max(1, sum(votes)), 0.9, "votes that are one and the same score",
         "the judge has collapsed: balance the scores in eft.jsonl, or change the judge's template"),
        (1 - readable, 0.1, "judgements that cannot be read", "add EFT rows, or raise --max-judgement"),
        ((before["parse_rate"] or 0) - readable, 0.05, "fall of readable judgements since the round before",
         "DPO unlearns judging: lower --dpo-lr"),
        (1 - now["pairs"] / now["prompts"], 0.5, "prompts without a pair", "raise --candidates or --votes"),
        (now["length"] / before["length"] - 1, 0.4, "growth of the responses since the round before",
         f"score and length correlated by {before['score_length_correlation'] or 0:+.2f} there; --length-guard 0.1"),
        (now["truncated"], 0.05, "responses cut by the length limit", "raise --max-response"),
        (now["repeats"], 0.5, "candidates that nearly copy another of their prompt", "raise --temperature or --top-p"),
        (now["openings"], 0.5, "new prompts that begin with the same three words", "vary ift.jsonl or propose.txt"),
        (now["copies"], 0.05, "new prompts that stand there twice", "lower --rouge"),
        (now["short"], 0.2, "new prompts of fewer than 15 characters", "take another --writer or propose.txt"),
        (now["chosen_fall"], 0.1, "log-prob that chosen responses lost under DPO", "try --nll 1 or a lower --dpo-lr"),
    )  # fmt: skip
    return [f"{what}: {x:.1%}, more than {most:.0%}; {remedy}" for x, most, what, remedy in checks if (x or 0) > most]


def round_warnings(run: Path, name: str) -> list[str]:
    """`warnings` of the round that made a model."""
    before = run / f"M{int(name[1:]) - 1}"
    return warnings(round_health(run / name), round_health(before) if (before / "pairs.jsonl").exists() else None)


def report(run: Path, oracle=None) -> dict:
    """Everything that can be said of a run from its files; head-to-head and true grades need an oracle."""
    config, names = read_json(run / "config.json"), models_of(run)
    if not names:
        raise BadInput(f"{run}: holds no finished model yet; start the run again to go on with it")
    out = {"config": config, "warnings": [], "models": {}, "agreement": {}, "health": {}, "head_to_head": {}}
    data, grades = Path(config["data"]), {}
    for name in names:
        folder = run / name
        answers = optional(folder / "test.jsonl", "prompt", empty=True)
        out["models"][name] = {
            "answers": len(answers),
            "characters": mean(len(a["response"]) for a in answers),
            "tokens": mean(len(a["tokens"]) for a in answers),
            "truncated": mean(float(a["truncated"]) for a in answers),
        }
        if oracle and answers:
            grades[name] = [true_grade(oracle, a["prompt"], a["response"]) for a in answers]
            if None in grades[name]:
                raise BadInput(f"{folder}/test.jsonl: row {grades[name].index(None) + 1} is no prompt of the oracle's "
                               f"world; remove {data}/oracle.py for a report without true scores")  # fmt: skip
            out["models"][name]["true_mean"] = mean(grades[name])
            out["models"][name]["true_error"] = 1.96 * float(np.std(grades[name])) / len(answers) ** 0.5
            if hasattr(oracle, "criteria"):
                points = [oracle.criteria(a["prompt"], a["response"]) for a in answers]
                out["models"][name]["criteria"] = {c: mean(float(p[c]) for p in points) for c in points[0]}
        if (folder / "exam.jsonl").exists():
            exam, known = read_ranked(data / "eft_eval.jsonl"), config.get("files", {}).get("eft_eval.jsonl")
            if known not in (None, digest((data / "eft_eval.jsonl").read_bytes())):
                raise BadInput(f"{data}/eft_eval.jsonl: has changed since {run} was made; bring the old file back")
            out["agreement"][name] = examined(exam, read_rows(folder / "exam.jsonl", empty=True))
        if (folder / "pairs.jsonl").exists():
            before = next(reversed(out["health"].values()), None)
            out["health"][name] = round_health(folder, oracle)
            out["warnings"] += [f"{name}: {line}" for line in warnings(out["health"][name], before)]
    for b, a in combinations(grades, 2):
        out["head_to_head"][f"{a} vs {b}"] = head_to_head(grades[a], grades[b])
    return out


def cells(columns: list[str], rows: list[tuple]) -> list[list[str]]:
    """Header and rows of a table as text: two decimals, None as a dash."""
    rows = [columns, *rows]
    return [["-" if c is None else f"{c:z.2f}" if isinstance(c, float) else str(c) for c in r] for r in rows]


def table(title: str, columns: list[str], rows: list[tuple]) -> str:
    """Plain text columns, numbers on the right."""
    lines = cells(columns, rows)
    widths = [max(len(r[i]) for r in lines) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in lines]  # fmt: skip
    return "\n".join([title, *("  " + line.rstrip() for line in lines)])


def percent(x: float | None) -> str | None:
    return None if x is None else f"{100 * x:.1f}"


def duels(title: str, found: dict[str, dict]) -> tuple[str, list[str], list[tuple]]:
    return (
        f"{title} (percent; interval: 95 % of win - lose)", ["", "win", "tie", "lose", "win - lose", "interval"],
        [(k, f"{h['win']:.1f}", f"{h['tie']:.1f}", f"{h['lose']:.1f}", f"{h['win'] - h['lose']:+.1f}",
          f"[{h['low']:+.1f}, {h['high']:+.1f}]") for k, h in found.items()],
    )  # fmt: skip


def tables(r: dict) -> Iterator[tuple[str, list[str], list[tuple]]]:
    """The report's (title, columns, rows): the paper's Figure 3 and Table 4 in miniature."""
    if r["head_to_head"]:
        yield duels("Head to head on the test prompts, by the true reward", r["head_to_head"])
        graded = {k: m for k, m in r["models"].items() if "true_mean" in m}
        names = list(next(iter(graded.values())).get("criteria", {}))
        yield (
            "True quality of the answers (0 to 5, and the share that earns each point)",
            ["", "mean", *names, "tokens", "truncated %"],
            [(k, m["true_mean"], *(m["criteria"][c] for c in names), f"{m['tokens']:.1f}", percent(m["truncated"]))
             for k, m in graded.items()],
        )  # fmt: skip
    elif any(m["answers"] for m in r["models"].values()):
        yield (
            "Answers to the test prompts", ["", "tokens", "characters", "truncated %"],
            [(k, m["tokens"], m["characters"], percent(m["truncated"])) for k, m in r["models"].items()],
        )  # fmt: skip
    if r["agreement"]:
        yield (
            "The judge against held-out human rankings (percent; pairwise without ties; 5-best: fives ranked first)",
            ["", "pairwise", "ties", "exact", "5-best", "spearman", "kendall", "readable"],
            [(k, percent(a["pairwise"]), percent(a["tie_rate"]), percent(a["exact_match"]), percent(a["five_best"]),
              a["spearman"], a["kendall"], percent(a["parse_rate"])) for k, a in r["agreement"].items()],
        )  # fmt: skip
    if r["health"]:
        yield (
            "What each self-rewarding round learned from (chosen, rejected: true mean; len: their tokens; r(len): rank "
            "correlation of score and length)",
            ["for", "prompts", "pairs", "ties", "readable", "score", "chosen", "rejected", "len +", "len -", "r(len)",
             "cut %"],
            [(k, h["prompts"], h["pairs"], h["ties"], percent(h["parse_rate"]), h["score_mean"], h.get("true_chosen"),
              h.get("true_rejected"), f"{h['length_chosen']:.1f}", f"{h['length_rejected']:.1f}",
              h["score_length_correlation"], percent(h["truncated"])) for k, h in r["health"].items()],
        )  # fmt: skip
        scores = sorted({s for h in r["health"].values() for s in h["scores"]}, key=float)
        yield (
            "The votes of each round by score, of those that could be read (percent)", ["for", *scores],
            [(k, *(f"{100 * h['scores'].get(s, 0) / max(1, sum(h['scores'].values())):.1f}" for s in scores))
             for k, h in r["health"].items()],
        )  # fmt: skip


def show(r: dict) -> str:
    """The report as text."""
    warned = ["\n  ".join(["Warnings", *r["warnings"]])] if r["warnings"] else []
    return "\n\n".join(warned + [table(*t) for t in tables(r)])


def write_pages(run: Path, r: dict, oracle=None) -> bool:
    """report.md and report.html; False where matplotlib is not installed, so that they hold no figures."""
    here, figures = Path(__file__).resolve().parent / "data" / "report", None
    with suppress(ModuleNotFoundError):
        figures = load_module(here / "figures.py").draw(r, read_metrics(run))
    filled = [(title, *cells(*rest)) for title, *rest in tables(r)]
    load_module(here / "pages.py").write(run, r, figures or [], filled, partial(true_grade, oracle) if oracle else None)
    return figures is not None


# ---- the life of one prompt --------------------------------------------------------------------------------


@torch.no_grad()
def log_prob(model: Llama, prompt: list[int], response: list[int]) -> float:
    """log pi(response | prompt), summed over its tokens: dpo.sequence_logps for one row, to look at."""
    device = model.embed_tokens.weight.device
    logits = model(torch.tensor([prompt + response[:-1]], device=device))[0, len(prompt) - 1 :]  # (T, V)
    return logits.log_softmax(-1).gather(1, torch.tensor(response, device=device)[:, None]).sum().item()


def margins(run: Path, names: list[str], pair: dict, beta: float) -> list[tuple]:
    """(model, log-prob of chosen, of rejected, DPO's margin): the stored reference and the models that are there."""
    base = pair["reference_chosen"], pair["reference_rejected"]
    rows = [("reference, stored", *base, 0.0)]
    for name in names:
        if any((run / name).glob("model*.safetensors")) and (run / name / "config.json").exists():
            model, tok = load_here(run / name)
            prompt = tok.chat(pair["prompt"])
            found = [log_prob(model, prompt, pair[f"{side}_tokens"]) for side in ("chosen", "rejected")]
            rows.append((name, *found, beta * (found[0] - base[0] - found[1] + base[1])))
    return rows


def read_life(run: Path, at: str) -> tuple[str, list[list[dict]]]:
    """The round and the rows of one prompt, `M2:17` or, of the last round, `17`."""
    rounds = [name for name in (f"M{i}" for i in range(2, 100)) if (run / name / "pairs.jsonl").exists()]
    name, _, number = at.rpartition(":")
    name = name or (rounds or [""])[-1]
    files = ("prompts", "candidates", "judgements", "pairs") if name in rounds else ()
    found = [[r for r in read_rows(run / name / f"{f}.jsonl") if str(r["id"]) == number] for f in files]
    if not found or not found[0]:
        raise BadInput(
            f"{run}: no prompt {at!r}; give --show ROUND:ID, such as M2:17, of a finished round ({', '.join(rounds)})"
        )
    return name, found


def life(run: Path, at: str, oracle=None) -> str:
    """The life of one prompt: its writer, its candidates, every vote, the pair and why, DPO's margin."""
    config, (name, ((prompt,), candidates, judgements, pairs)) = read_json(run / "config.json"), read_life(run, at)
    start, scores, sides = f"M{int(name[1:]) - 1}", mean_scores(judgements), {}
    for pair, side in ((pair, side) for pair in pairs for side in ("chosen", "rejected")):
        same = [c for c in candidates if c["tokens"] == pair[f"{side}_tokens"]]
        sides[min(same, key=lambda c: scores.get((c["id"], c["k"])) != pair[f"{side}_score"])["k"]] = side
    writer = config.get("writer") or config.get("init")
    parts = [f"Prompt {name}:{prompt['id']}, by the writer {writer}:\n" + textwrap.indent(prompt["prompt"], "  ")]
    for c in candidates:
        mean_score = scores.get((c["id"], c["k"]))
        facts = ["no readable vote" if mean_score is None else f"mean score {mean_score:.2f}"]
        facts += [f"true score {true_grade(oracle, prompt['prompt'], c['response'])}"] if oracle else []
        facts += [f"{len(c['tokens'])} tokens"] + ["cut by the length limit"] * c["truncated"]
        facts += [side.upper() for k, side in sides.items() if k == c["k"]]
        votes = [f"vote {j['vote']}: {'unreadable' if j['score'] is None else format(j['score'], 'g')}\n"
                 + textwrap.indent(j["text"], "  ") for j in judgements if j["k"] == c["k"]]  # fmt: skip
        text = textwrap.indent("\n".join([c["response"], *votes]), "  ")
        parts.append(f"Response {c['k']} of {start}: {', '.join(facts)}\n{text}")
    guard = config.get("length_guard", 0.0)
    _, tally = prefer([prompt], candidates, scores, guard)
    why = "the best mean score against the worst" + f", with a length guard of {guard:g}" * bool(guard)
    why = "the scores were shuffled among the candidates" if config.get("control") else why
    # a pair by the scores and none in the file: shuffled scores had put two identical texts against each other
    parts.append(f"Pair: {why}" if pairs else f"No pair: {'identical texts' if 'pair' in tally else ', '.join(tally)}")
    for pair in pairs:
        title = f"DPO from {start} to {name}: log-probs in nats, and the margin (times beta = {config['beta']})"
        rows = margins(run, [start, name], pair, config["beta"])
        parts.append(table(title, ["", "chosen", "rejected", "margin"], rows))
    return "\n\n".join(parts)


def report_run(run: Path, show_id: str | None = None):
    """Print and write the report of a run, or print the life of one of its prompts."""
    config = read_json(run / "config.json")
    if "data" not in config:
        raise BadInput(f"{run}: a model's folder; give its run's folder, or two sets of answers to compare")
    path = Path(config["data"]) / "oracle.py"
    oracle = load_oracle(path) if path.exists() else None
    if show_id is not None:
        print(life(run, show_id, oracle))
        return
    r = report(run, oracle)
    write_json(run / "report.json", r)
    drawn = write_pages(run, r, oracle)
    print(show(r))
    if not oracle:
        print(f"\nNo {path}: nobody outside the loop grades the answers, so there is no head-to-head.")
    without = "" if drawn else "; no figures, as matplotlib is missing (requirements-dev.txt)"
    print(f"\nWritten to {run}: report.json, report.md, report.html{without}")


def outcomes(
    a: dict[tuple, str], b: dict[tuple, str], *, cache: Path, judge_url="", judge_model="",
    judge_checkpoint: Path | None = None, oracle: Path | None = None, max_tokens=512, timeout=60.0, parallel=8,
) -> list[dict]:  # fmt: skip
    """Rows of `compare` or `by_oracle`, by the one judge that is given: an endpoint, a checkpoint or an oracle."""
    if oracle:
        return by_oracle(a, b, load_oracle(oracle))
    if judge_url:
        params = {"model": judge_model, "temperature": 0, "max_tokens": max_tokens}
        url = judge_url.rstrip("/")
        judge = [url, params]
        ask = partial(ask_endpoint, url=url, params=params, timeout=timeout, parallel=parallel)
    else:
        files = sorted(f for f in judge_checkpoint.glob("*") if f.suffix in (".safetensors", ".pth"))
        judge = [str(judge_checkpoint.resolve()), max_tokens, *(f.stat().st_mtime_ns for f in files)]
        ask = partial(ask_checkpoint, folder=judge_checkpoint, max_new=max_tokens)
    return compare(a, b, lambda questions: through_cache(questions, judge, cache, ask))


def compare_answers(a: Path, b: Path, *, cache: Path | None = None, out: Path | None = None, **judge):
    """Two sets of answers, head to head: `judge` is who compares them, as `outcomes` takes it."""
    x, y = read_answers(a), read_answers(b)
    if not x.keys() & y.keys():
        raise BadInput(f"{a} and {b} answer no prompt in common; prompts are matched by their text")
    rows = outcomes(x, y, cache=cache or a.parent / "judge_cache.jsonl", **judge)
    if out:
        write_json(out, rows)
    h, name = duel(x, y, rows), next(judge[k] for k in ("judge_model", "judge_checkpoint", "oracle") if k in judge)
    print(table(*duels(f"Head to head by {name}", {f"{a} vs {b}": h})))
    print(f"Of {h['prompts']} prompts in common {h['no_verdict']} have no verdict and are not in the table; "
          f"{h['unmatched']} more are in one set only.\n"
          f"Mean length: {h['characters'][0]:.0f} and {h['characters'][1]:.0f} characters.")  # fmt: skip
    if h["sides"]:
        print(f"Of {h['sides']} verdicts for one response {percent(h['first_share'])} % are for the one shown first "
              "(50 without a bias).")  # fmt: skip


def parse_args() -> dict:
    parser = argparse.ArgumentParser(
        description="The report of a run; or two sets of answers, head to head.", argument_default=argparse.SUPPRESS
    )
    flag = parser.add_argument
    flag("paths", type=Path, nargs="+", metavar="PATH", help="a run, such as runs/zoo; or two sets of answers: model "
         "folders (runs/zoo/M3), files like alpaca_eval.json, JSON lines of prompt and response")  # fmt: skip
    flag("--show", metavar="ID", help="of a run: the life of one prompt instead of the report, such as M2:17")
    flag("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint compares: https://host/v1; its key is taken "
         "from JUDGE_API_KEY or OPENAI_API_KEY")  # fmt: skip
    flag("--judge-model", metavar="NAME", help="the model to ask there")
    flag("--judge-checkpoint", type=Path, metavar="FOLDER", help="a local checkpoint compares")
    flag("--oracle", type=Path, metavar="FILE", help="a toy world's oracle.py compares")
    flag("--max-tokens", type=int, help="most tokens of a judge's answer (512)")
    flag("--cache", type=Path, metavar="FILE", help="where its answers are kept (judge_cache.jsonl beside A)")
    flag("--timeout", type=float, help="seconds an endpoint has for an answer (60)")
    flag("--parallel", type=int, help="requests at a time (8)")
    flag("--out", type=Path, metavar="FILE", help="write the outcome of every prompt there, as JSON")
    given = vars(parser.parse_args())
    flags = " ".join("--" + k.replace("_", "-") for k in given if k not in ("paths", "show"))
    judges = [k for k in ("judge_url", "judge_checkpoint", "oracle") if k in given]
    for ok, what in (
        (len(given["paths"]) < 3, "give one run for its report, or two sets of answers to compare"),
        (len(given["paths"]) == 2 or not flags, f"{flags}: for two sets of answers, as in python judge.py A B {flags}"),
        (len(given["paths"]) == 1 or "show" not in given, "--show is for one run: python judge.py RUN --show M2:17"),
        (len(given["paths"]) == 2 or not given["paths"][0].is_file(),
         f"{given['paths'][0]}: a file; give a run folder for its report, or two sets of answers to compare"),
        (len(given["paths"]) == 1 or len(judges) == 1,
         "two sets of answers need one judge: --judge-url, --judge-checkpoint or --oracle"),
        (("judge_url" in given) == ("judge_model" in given), "--judge-url and --judge-model belong together"),
        (re.fullmatch(r"https?://[!-~]+", given.get("judge_url", "http://-")), "--judge-url is like https://host/v1"),
        (min(given.get("max_tokens", 1), given.get("parallel", 1)) >= 1, "--max-tokens and --parallel are at least 1"),
        (0 < given.get("timeout", 1) < 1e6, "--timeout is a positive number of seconds"),
        (given.get("out", Path()).parent.is_dir(), "--out is a file in a folder that is there"),
    ):  # fmt: skip
        if not ok:
            raise BadInput(what)
    return given


def main():
    given = parse_args()
    paths = given.pop("paths")
    report_run(*paths, given.get("show")) if len(paths) == 1 else compare_answers(*paths, **given)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BadInput as e:
        sys.exit(f"error: {e}")
    except BrokenPipeError:  # the reader has seen enough, as in `| head`; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        sys.exit(f"error: {e.filename or 'output'}: {e.strerror}")
