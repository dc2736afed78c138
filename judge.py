"""judge.py: text -> preferences. The judge's prompt, its parser, scores, pairs; EFT rows.

Paper section 2.2: the model that wrote the responses also grades them. Its judgement argues first
and ends in `Score: n`; three judgements of each response are averaged, since a single one is
noisy (4 responses x 3 votes are 12 judge calls a prompt); the best response of a prompt against
the worst is a preference pair.

    python judge.py runs/zoo/M3 "Where does the owl live?" "The owl lives in woods."

Left out: agreement with people and head-to-head (scripts/report.py, scripts/compare.py); judges
that think aloud between tags before they judge (scripts/compare.py's may).
"""

import argparse
import math
import random
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

from model import Llama, Tokenizer, UserError, read_json, read_text
from sample import fingerprint, generate, load_for_sampling, read_jsonl, run_command

SAMPLING = {"temperature": 0.7, "top_p": 0.9}  # of judgements, as the paper samples responses
MAX_SCORE = 5  # the paper's additive scale: 0 to 5; the judge's template must say the same

# ---- the judge's prompt and its verdict ------------------------------------------------------


def read_template(path: Path) -> str:
    template = read_text(path, "copy it from data/zoo or data/oasst and edit it")
    if template.count("{prompt}") != 1 or template.count("{response}") != 1:
        raise UserError(f"{path}: a judge template holds {{prompt}} and {{response}} once each")
    return template


def fill(template: str, **texts: str) -> str:
    """Fill the places {name} in one pass, so that braces in the texts themselves survive."""
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda match: texts[match[1]], template)


def judge_prompt(template: str, prompt: str, response: str) -> str:
    return fill(template, prompt=prompt, response=response)


MARKER = re.compile(r"(?<![^\W_])score[\s*_]*[:\uff1a][\s*_<\[(`$]*", re.IGNORECASE)
# words before "score:" that make it another score than the verdict
OTHER_SCORE = re.compile(
    r"\b(max(imum)?|highest|lowest|higher|lower|possible|perfect|(previous|earlier)( \S+)?)"
    r"[ *_]*\Z",
    re.IGNORECASE,
)
OUT_OF = r"\s*\(?(?:points?\s+)?(?:/|out of|of)\s*(\d+)\)?"
POINTS = re.compile(rf"(\d+(?:\.\d+)?)(?![.,]?\d)(?:{OUT_OF})?(?:\s*points?\b)?", re.IGNORECASE)
# what follows makes the number part of a sum or a range
CONTINUES = re.compile(
    r"[ \t]*(?:\([^)\n]*\))?[ \t]*(?:[-\u2013\u2014~+=]|(?:or|to|and)\b)\s*\d", re.IGNORECASE
)


def find_verdict(text: str) -> re.Match | None:
    """The points behind the last `Score:`, if they are readable, on the scale, and no part of a
    sum or a range."""
    markers = [m for m in MARKER.finditer(text) if text[m.end() :].strip()]
    verdicts = [m for m in markers if not OTHER_SCORE.search(text[: m.start()][-30:])]
    points = POINTS.match(text, verdicts[-1].end()) if verdicts else None
    if not points or CONTINUES.match(text, points.end()):
        return None
    right_scale = points[2] in (None, str(MAX_SCORE)) and float(points[1]) <= MAX_SCORE
    return points if right_scale else None


def parse_score(text: str) -> float | None:
    """The verdict of a judgement: 0 to MAX_SCORE, or None where it cannot be read, which is never
    the same as a 0.

    Give it generated text only. The last `Score:` decides: "Score: 2 ... Score: 4" is 4.0,
    "**Score:** 4/5" is 4.0; "Score: 10", "Score: five", "Score: 4/10", "Score: 1 + 1 = 2" are
    None.
    """
    points = find_verdict(text)
    return float(points[1]) if points else None


def score(
    model: Llama,
    tok: Tokenizer,
    template: str,
    rows: list[dict],
    *,
    key: tuple,
    votes: int = 3,
    max_new: int,
    **settings,
) -> list[dict]:
    """Judge rows {"id", "k", "prompt", "response"} (paper section 2.2, step 3): `votes` judgements
    of each, {"id", "k", "vote", "text", "score", "truncated"}. key begins the keys of their random
    numbers (sample.uniforms).

    An empty response is not judged, nor is one that leaves no room in the context: it has no
    judgement and no score. A judgement that met the length limit gave no verdict, whatever it has
    mentioned on its way.
    """
    judged_rows, prompts = [], []
    for row in rows:
        ids = tok.chat(judge_prompt(template, row["prompt"], row["response"]))
        if row["response"] and len(ids) + max_new <= model.cfg.max_len:
            judged_rows.append(row)
            prompts.append(ids)
    keys = [(*key, row["id"], row["k"]) for row in judged_rows]
    samples = generate(model, prompts, keys, n=votes, stop=[tok.eos], max_new=max_new, **settings)
    judgements = []
    for row, id_lists in zip(judged_rows, samples, strict=True):
        for vote, ids in enumerate(id_lists):
            text = tok.decode([i for i in ids if i != tok.eos])
            truncated = ids[-1] != tok.eos
            points = None if truncated else parse_score(text)
            judgement = {"id": row["id"], "k": row["k"], "vote": vote, "text": text}
            judgements.append(judgement | {"score": points, "truncated": truncated})
    return judgements


# ---- scores -> pairs -------------------------------------------------------------------------


def mean_scores(judgements: list[dict]) -> dict[tuple, float]:
    """(id, k) -> the mean of its readable votes; a response without one is absent."""
    votes = defaultdict(list)
    for j in judgements:
        if j["score"] is not None:
            votes[j["id"], j["k"]].append(j["score"])
    return {response: math.fsum(scores) / len(scores) for response, scores in votes.items()}


def parse_rate(judgements: list[dict]) -> float | None:
    """The share of judgements whose score can be read."""
    if not judgements:
        return None
    return sum(j["score"] is not None for j in judgements) / len(judgements)


def why_unreadable(judgement: dict) -> str | None:
    """Why a judgement has no score, or None."""
    if judgement["score"] is not None:
        return None
    if judgement["truncated"]:
        return "cut by the length limit"
    return "no readable verdict" if judgement["text"].strip() else "empty"


def judging_remedy(judgements: list[dict]) -> str:
    """What to do when too few judgements can be read."""
    if not judgements:
        return (
            "no response could be judged, they are empty or leave the judge no room: give more "
            "SFT, or shorten judge.txt or the responses"
        )
    reasons = Counter(why_unreadable(j) for j in judgements)
    if reasons["cut by the length limit"] > len(judgements) / 2:
        return "most judgements are cut: raise --max-judgement, or teach shorter ones"
    if reasons["empty"] > len(judgements) / 2:
        return "most judgements are empty: give a better --init or more SFT"
    return "the model cannot judge yet: give it EFT rows, more SFT or a better --init"


def prefer(
    prompts: list[dict], candidates: list[dict], scores: dict[tuple, float]
) -> tuple[list[dict], Counter]:
    """Best mean score against worst, one pair a prompt (paper section 2.3); also a count of what
    became of the prompts.

    Ties are dropped, identical texts are dropped; of several best or worst the first is taken.
    """
    scored = defaultdict(list)
    for c in sorted(candidates, key=lambda c: c["k"]):
        if (c["id"], c["k"]) in scores:
            scored[c["id"]].append(c | {"score": scores[c["id"], c["k"]]})
    pairs, tally = [], Counter()
    for prompt in prompts:
        responses = scored[prompt["id"]]
        if len(responses) < 2:
            tally["fewer than two scored responses"] += 1
            continue
        best = max(responses, key=lambda c: c["score"])
        worst = min(responses, key=lambda c: c["score"])
        if best["score"] == worst["score"]:
            tally["tie"] += 1
        elif best["response"] == worst["response"]:
            tally["identical texts"] += 1
        else:
            tally["pair"] += 1
            pairs.append(
                {
                    "id": prompt["id"],
                    "prompt": prompt["prompt"],
                    "chosen": best["response"],
                    "rejected": worst["response"],
                    "chosen_score": best["score"],
                    "rejected_score": worst["score"],
                    "chosen_tokens": best["tokens"],
                    "rejected_tokens": worst["tokens"],
                }
            )
    return pairs, tally


# ---- judgements worth learning from: EFT (paper section 3.1) ---------------------------------
#
# People have ranked replies to a prompt. The SFT baseline judges each of them; where it orders
# them as people do, its judgements become rows that teach M1 to judge. The paper gives no unit of
# agreement. Ours is a try: one judgement of each reply to a prompt, those with one vote number.


def read_ranked(path: Path, missing_ok: bool = False) -> list[dict]:
    """Rows of human rankings {"prompt", "responses", "ranks"}: texts, and a whole number for each
    of them, 0 for the best."""
    rows = read_jsonl(path, "prompt", "responses", "ranks", missing_ok=missing_ok)
    for number, row in enumerate(rows, 1):
        texts, ranks = row["responses"], row["ranks"]
        all_texts = all(type(text) is str for text in texts)
        all_numbers = all(type(rank) is int for rank in ranks)
        if not all_texts or not all_numbers or len(texts) != len(ranks):
            raise UserError(
                f"{path}: row {number} has not one rank (a whole number) for each response "
                "(a text); mend it"
            )
    return rows


def replies(ranked: list[dict]) -> list[dict]:
    """Rows of human rankings -> a row for each reply, as `score` takes them."""
    return [
        {"id": i, "k": k, "prompt": row["prompt"], "response": text}
        for i, row in enumerate(ranked)
        for k, text in enumerate(row["responses"])
    ]


def why_rejected(ranks: list[int], scores: list[float]) -> str | None:
    """Why a try teaches no judging, or None: its scores contradict no human ordering of two
    replies and agree with at least one.

    Equal scores are allowed, since few values cannot tell all replies apart; replies of equal
    rank ask for nothing.
    """
    if len(ranks) < 2:
        return "the only readable reply"
    agreements = []
    for i, j in combinations(range(len(ranks)), 2):
        agreements.append((ranks[j] - ranks[i]) * (scores[i] - scores[j]))  # 0 is the best rank
    if min(agreements) < 0:
        return "against the people's order"
    return None if max(agreements) > 0 else "ties all that people rank apart"


def goes_on_after_verdict(text: str) -> bool:
    return bool(re.search(r"\w", text[find_verdict(text).end() :]))


def keep_agreeing(ranked: list[dict], judgements: list[dict]) -> tuple[list[dict], Counter]:
    """The judgements of ranked replies that agree with people; a count of what became of the rest.

    Judgements that cannot be read are taken out first; the rest of a try is kept or dropped
    together, and the first that agrees is its prompt's only one. A target ends in its verdict:
    one that goes on would teach just that.
    """
    tries, tally = defaultdict(list), Counter()
    for j in judgements:
        if reason := why_unreadable(j):
            tally[reason] += 1
        elif goes_on_after_verdict(j["text"]):
            tally["goes on after its verdict"] += 1
        else:
            tries[j["id"], j["vote"]].append(j)
    agreeing = {}
    for (i, _), group in sorted(tries.items()):
        ranks = [ranked[i]["ranks"][j["k"]] for j in group]
        reason = why_rejected(ranks, [j["score"] for j in group])
        if not reason and i in agreeing:
            reason = "an earlier try agrees"
        if reason:
            tally[reason] += len(group)
        else:
            agreeing[i] = group
    return [j for group in agreeing.values() for j in group], tally


def rebalance(judgements: list[dict], max_rows: int, key: tuple) -> tuple[list[dict], Counter]:
    """Draw the most common score down to the count of the second, then all down to max_rows;
    order is kept.

    The paper drops part of its most common score, 4, and names no ratio.
    """
    if not judgements:
        return [], Counter()
    rng = random.Random(repr(key))
    counts = Counter(j["score"] for j in judgements).most_common(2)
    # where there is one score alone both are the same, and nothing is dropped
    (most_common, count), (_, second_count) = counts[0], counts[-1]
    common = [i for i, j in enumerate(judgements) if j["score"] == most_common]
    dropped = set(rng.sample(common, count - second_count))
    balanced = [j for i, j in enumerate(judgements) if i not in dropped]
    order = sorted(rng.sample(range(len(balanced)), min(max_rows, len(balanced))))
    tally = Counter({"most common score": len(dropped)})
    tally["over --eft-size"] = len(balanced) - len(order)
    return [balanced[i] for i in order], +tally  # without counts of 0


def eft_rows(
    ranked: list[dict], judgements: list[dict], max_rows: int, key: tuple
) -> tuple[list[dict], dict]:
    """Judgements of ranked replies -> at most max_rows rows {"prompt", "response", "judgement"},
    and a report in which kept and dropped add up to the judgements."""
    agreeing, tally = keep_agreeing(ranked, judgements)
    chosen, thinned = rebalance(agreeing, max_rows, key)
    num_replies = sum(len(row["responses"]) for row in ranked)
    num_judged = len({(j["id"], j["k"]) for j in judgements})
    report = {
        "ranked_prompts": len(ranked),
        "replies": num_replies,
        "not_judged": num_replies - num_judged,
        "judgements": len(judgements),
        "kept": len(chosen),
        "dropped": dict((tally + thinned).most_common()),
        "scores_before": score_histogram(agreeing),
        "scores_after": score_histogram(chosen),
    }
    rows = []
    for j in chosen:
        prompt, response = ranked[j["id"]]["prompt"], ranked[j["id"]]["responses"][j["k"]]
        rows.append({"prompt": prompt, "response": response, "judgement": j["text"]})
    return rows, report


def score_histogram(judgements: list[dict]) -> dict[str, int]:
    """Score -> how many judgements gave it, of those that can be read."""
    counts = Counter(j["score"] for j in judgements if j["score"] is not None)
    return {f"{points:g}": count for points, count in sorted(counts.items())}


# ---- one answer, in the terminal -------------------------------------------------------------


def template_of_run(folder: str) -> Path:
    """judge.txt of the data folder that the model's run was made with; the zoo's without a run."""
    for parent in Path(folder).parents[:2]:  # of RUN/M2, or of RUN/M2/step-100
        path = parent / "config.json"
        config = read_json(path) if path.exists() else {}
        if "data" in config:
            return Path(config["data"]) / "judge.txt"
    return Path("data/zoo/judge.txt")


def main():
    parser = argparse.ArgumentParser(description="Let a model judge one response to a prompt.")
    parser.add_argument("folder", help="folder of the model that judges, such as runs/zoo/M3")
    parser.add_argument("prompt")
    parser.add_argument("response")
    parser.add_argument(
        "--template",
        type=Path,
        help="judge's prompt, with {prompt} and {response} (the run's own)",
    )
    parser.add_argument("--votes", type=int, default=3, help="judgements to average")
    parser.add_argument("--max-new", type=int, default=256, help="most tokens of a judgement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    template = read_template(args.template or template_of_run(args.folder))
    model, tok = load_for_sampling(args.folder)
    row = {"id": 0, "k": 0, "prompt": args.prompt, "response": args.response.strip()}
    judgements = score(
        model,
        tok,
        template,
        [row],
        key=(args.seed, fingerprint(args.prompt, args.response)),
        votes=args.votes,
        max_new=min(args.max_new, model.cfg.max_len // 2),
        **SAMPLING,
    )
    if not judgements:
        raise UserError("the response is empty or leaves no room for a judgement: shorten it")
    for j in judgements:
        points = "no readable score" if j["score"] is None else f"{j['score']:g}"
        print(f"vote {j['vote']}: {points}\n{j['text']}\n")
    mean = mean_scores(judgements).get((0, 0))
    print("no readable score" if mean is None else f"mean score {mean:.2f} of {MAX_SCORE}")


if __name__ == "__main__":
    run_command(main)
