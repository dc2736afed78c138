"""The ablations: train.py with other flags, over several seeds, in one table.

    python data/zoo/ablate.py                                   all of VARIANTS, seeds 0, 1, 2; from the top folder
    python data/zoo/ablate.py --only shuffled --seeds 0 --args "--prompts 60,60" --out runs/trial

A variant of a seed is a run folder OUT/NAME-SEED. It starts from the full run of its seed: files that its flags cannot
have changed are copied (what comes before `first` below), so most variants train no M1 of their own. The same command
goes on where it was stopped. OUT/table.md and OUT/ablations.json hold the result.

Left out: variants of what is drawn once for all (the rows, the base, the prompt writer).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # judge.py and model.py lie on top of the repository

import judge  # noqa: E402
from model import BadInput, read_json, write_json, write_text  # noqa: E402
from sample import read_rows  # noqa: E402

# ---- what is tried -----------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A row of the table. `first` is the first file of a run that its flags change."""

    name: str
    flags: str
    first: str
    paper: str  # what the paper found, wins minus losses in points
    iters: int = 3  # 2 where a second round would add little to what it costs


VARIANTS = (
    Variant("full", "", "SFT/config.json", "against SFT: M2 +34.7, M3 +52.7 (figure 3)"),
    Variant("ift-only", "--eft-size 0", "M1/config.json",
            "scores collapse to 4; 541 and 429 pairs, not 3,964 and 6,942; better than SFT, worse than full (A.3)"),
    Variant("positive", "--control positive", "M2/pairs.jsonl", "no gain: 29 % wins against SFT, M1 30 % (A.4)", 2),
    Variant("shuffled", "--control shuffle", "M2/pairs.jsonl", "not tried"),
    Variant("judge-M1", "--judge M1", "M3/judgements.jsonl", "not tried; M1 to M3 judge 78.7, 80.4, 81.7 % right"),
    Variant("reference-M1", "--reference M1", "M3/pairs.jsonl", "not tried, and its own reference is not named"),
    Variant("votes-1", "--votes 1", "M2/judgements.jsonl", "not tried; it takes 3"),
    Variant("candidates-2", "--candidates 2", "M2/candidates.jsonl", "not tried; it takes 4", 2),
    Variant("candidates-8", "--candidates 8", "M2/candidates.jsonl", "not tried; it takes 4", 2),
    Variant("multiple-choice", "--data {multiple_choice}", "M1/config.json",
            "the untaught judge orders 26.6 % of pairs right, with the additive one 65.1 % (table 5)"),
    Variant("length-guard", "--length-guard 0.2", "M2/pairs.jsonl", "not tried; answers grow from 1,092 to 2,552"),
    Variant("five-iterations", "", "M4/candidates.jsonl", "not tried; it stops at M3", 5),
)  # fmt: skip
FULL = VARIANTS[0]

JUDGE = """Pick one grade for the answer. 1: off the question, or nothing in it is right. 2: much is wrong or not \
there. 3: of use, but some of it is wrong or not there. 4: a good answer, one thing is wrong or not there. 5: all that \
was asked, right and clear, and one more right fact. Explain in one sentence, then end with the line Score: <n>
Question: {prompt}
Answer: {response}
"""
GRADES = {
    1: "It is off the question, or nothing in it is right.",
    2: "Much is wrong or not there.",
    3: "It is of use, but some of it is wrong or not there.",
    4: "It is a good answer, but one thing is wrong or not there.",
    5: "It has all that was asked, right and clear, and one more right fact.",
}


def multiple_choice(judgement: str) -> str:
    """The same verdict by a judge who picks one of five grades (paper, figure 7): a sentence for the walk through the
    criteria. The format begins at 1, so a 0 becomes a 1."""
    grade = max(1, round(judge.parse_score(judgement)))
    return f"{GRADES[grade]}\nScore: {grade}"


def make_multiple_choice(data: Path, out: Path) -> Path:
    """The data folder again, of the same name, with another judge.txt and the judgements of eft.jsonl to match."""
    out = out / "multiple-choice" / data.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    for path in [p for kind in ("*.jsonl", "*.txt", "recipe.json", "oracle.py") for p in data.glob(kind)]:
        shutil.copy(path, out)
    rows = [r | {"judgement": multiple_choice(r["judgement"])} for r in read_rows(data / "eft.jsonl", "judgement")]
    write_text(out / "eft.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write_text(out / "judge.txt", JUDGE)
    return out


# ---- runs --------------------------------------------------------------------------------------------------

ENDS = re.compile("gave a pair|a mean score of 5")  # what train.py says where the method itself cannot go on
STARTED: list[subprocess.Popen] = []
ROUND = ("candidates.jsonl", "judgements.jsonl", "pairs.jsonl")  # then the model and its examination


def number(name: str) -> int:
    """SFT, M1, M2 ...  ->  0, 1, 2 ..."""
    return int(name.replace("SFT", "M0")[1:])


def place(file: str) -> tuple[int, int]:
    """When a run writes a file, such as M2/pairs.jsonl: later files have greater places."""
    name, file = file.split("/")
    if file == "prompts.jsonl":  # those of all rounds are written between SFT and M1
        return 0, len(ROUND) + 1
    return number(name), ROUND.index(file) if file in ROUND else len(ROUND)


def shared(full: Path, v: Variant) -> list[str]:
    """The files of the full run that the variant would only write again, byte for byte."""
    names = ["SFT", *(f"M{t}" for t in range(1, v.iters + 1))]
    files = [f"{name}/{path.name}" for name in names for path in (full / name).glob("*") if path.is_file()]
    asked_alike = not re.search("--(votes|data)", v.flags)  # else every model's examination is another
    return [f for f in files if place(f) < place(v.first) and (asked_alike or not f.endswith("/exam.jsonl"))]


def share(full: Path, out: Path, v: Variant):
    """Start a variant's run folder with what it shares; the folder appears whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = shared(full, v)
    for file in files:
        (part / file).parent.mkdir(exist_ok=True)
        shutil.copy(full / file, part / file)
    lines = (full / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    finished = [line for line in lines if f"{json.loads(line)['model']}/config.json" in files]
    write_text(part / "metrics.jsonl", "".join(finished))
    part.rename(out)


def train(flags: list[str], log: Path) -> str:
    """Run train.py on one thread; returns its last words if the method could not go on, or nothing."""
    command, env = [sys.executable, str(ROOT / "train.py"), *flags], os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file, subprocess.Popen(command, stdout=file, stderr=file, env=env) as process:
        STARTED.append(process)
        status = process.wait()
    last = log.read_text(encoding="utf-8").rstrip().split("\n")[-1]
    if status and not (status == 1 and ENDS.search(last)):
        raise BadInput(f"{log}: train.py ended with status {status}: {last}")
    return last.removeprefix("error: ") if status else ""


def run(v: Variant, seed: int, args: argparse.Namespace, full: Future | None):
    """Make one run folder. That the method cannot go on (nobody can read the judge, so there are no pairs) is a result
    as well: the reason is kept, and the models there are get examined."""
    out, began = args.out / f"{v.name}-{seed}", time.time()
    flags = [*shlex.split(args.args), "--data", str(args.data), "--out", str(out), "--seed", str(seed)]
    flags += [flag.format(multiple_choice=args.multiple_choice) for flag in v.flags.split()]
    if full:
        full.result()
    ended, log = out / "ended.json", out.with_suffix(".log")
    if ended.exists() and read_json(ended)["flags"] == [*flags, v.iters]:
        return
    if full and not out.exists():
        share(args.out / f"{FULL.name}-{seed}", out, v)
    error = train([*flags, "--iters", str(v.iters)], log)
    if error:
        train([*flags, "--iters", str(number(judge.models_of(out)[-1]))], log)
    write_json(ended, {"flags": [*flags, v.iters], "error": error})
    print(f"{out.name}: {time.time() - began:.0f} s{error and '; ended: ' + error}", flush=True)


def run_all(variants: list[Variant], args: argparse.Namespace):
    """Full runs first, then what starts from them, `workers` side by side. The first that fails ends all.

    Seed by seed, or a worker would wait for the last full run with the variants of the others still to do.
    """
    with ThreadPoolExecutor(args.workers) as pool:
        fulls = {seed: pool.submit(run, FULL, seed, args, None) for seed in args.seeds}
        rest = [pool.submit(run, v, seed, args, fulls[seed]) for seed, v in product(args.seeds, variants[1:])]
        try:
            for job in wait([*fulls.values(), *rest], return_when=FIRST_EXCEPTION).done:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in STARTED:  # they would go on without us, and meet those of the next start
                process.terminate()
            raise


# ---- the table ---------------------------------------------------------------------------------------------


def read_run(folder: Path, oracle) -> dict:
    """What the table needs of a run. `grades`: the true ones of every model's answers, by prompt; `learned`: how many
    pairs (or positives) each further model learned from, 0 where a round gave none."""
    told, grades, learned = judge.report(folder), {}, {}
    for name in told["models"]:
        answers = read_rows(folder / name / "test.jsonl", "prompt")
        grades[name] = {a["id"]: oracle.grade(a["prompt"], a["response"]) for a in answers}
    for path in sorted(folder.glob("M*/judgements.jsonl")):
        made = [p for p in (path.with_name("pairs.jsonl"), path.with_name("positives.jsonl")) if p.exists()]
        learned[path.parent.name] = sum(len(read_rows(p)) for p in made)
    return told | {"grades": grades, "learned": learned, "error": read_json(folder / "ended.json")["error"]}


def compare(pairs: list[tuple[dict, dict]], resamples: int = 10000) -> dict:
    """Grades of two models by prompt, a pair of them for each seed -> wins minus losses of the first, in points.

    low and high bound it: a 95 % bootstrap interval over prompts. A prompt is drawn with the answers of all seeds:
    these are no new prompts, and counting them as such would make the interval too narrow.
    """
    ids = sorted(set.intersection(*(set(grades) for pair in pairs for grades in pair)))
    signs = np.sign([[a[i] - b[i] for i in ids] for a, b in pairs])  # (seeds, prompts)
    level, count = np.unique(signs.sum(0), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(ids), count / len(ids), size=resamples) @ level
    low, high = np.percentile(drawn / signs.size * 100, [2.5, 97.5])
    win, tie, lose = (float(np.mean(signs == sign) * 100) for sign in (1, 0, -1))
    return {"win": win, "tie": tie, "lose": lose, "points": win - lose, "low": float(low), "high": float(high),
            "by_seed": (signs.mean(1) * 100).tolist()}  # fmt: skip


def stands_for(run: dict, name: str) -> str:
    """The model of that name, or the last one before it that the run has made."""
    return [n for n in run["models"] if number(n) <= number(name)][-1]


def row(v: Variant, runs: list[dict], fulls: list[dict]) -> dict:
    """One variant's figures; lists have one entry for each seed."""

    def against(ours: list[dict], name: str, theirs: list[dict], other: str) -> dict:
        both = zip(ours, theirs, strict=True)
        return compare([(a["grades"][stands_for(a, name)], b["grades"][stands_for(b, other)]) for a, b in both])

    last = f"M{v.iters}"
    final = [(r, stands_for(r, last)) for r in runs]
    judged = [r["agreement"].get(name, {}) for r, name in final]
    made = [name for name in runs[0]["models"] if all(name in r["models"] for r in runs)]
    rounds = sorted({name for r in runs for name in r["learned"]})
    return {
        **v._asdict(),
        "last": [name for _, name in final],
        "errors": [r["error"] for r in runs],
        "m2_vs_sft": against(runs, "M2", runs, "SFT"),
        "last_vs_sft": against(runs, last, runs, "SFT"),
        "full_vs_m2": against(fulls, "M2", runs, "M2") if v != FULL else None,
        "full_vs_last": against(fulls, last, runs, last) if v != FULL else None,
        "steps": {f"{b} vs {a}": against(runs, b, runs, a) for a, b in pairwise(made)},
        "true_mean": [judge.mean(r["grades"][name].values()) for r, name in final],
        "tokens": [r["models"][name]["tokens"] for r, name in final],
        "pairwise": [j.get("pairwise") for j in judged],
        "readable": [j.get("parse_rate") for j in judged],
        "learned": {name: [r["learned"].get(name) for r in runs] for name in rounds},
    }


def points(c: dict | None) -> str:
    if c is None:
        return ""
    same = c["win"] == c["lose"] == 0
    return "same" if same else f"{c['points']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]"


def mean_of(values: list[float | None], form: str) -> str:
    mean = judge.mean(values)
    return "-" if mean is None else format(mean, form)


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(rows: list[dict], seeds: list[int]) -> str:
    """The rows as Markdown: who wins, what became of each variant, every step of it; and what to mind."""
    names = [f"`{r['name']}`" for r in rows]
    won = [[f"`{r['flags']}`" if r["flags"] else "", r["paper"], points(r["m2_vs_sft"]), points(r["full_vs_m2"]),
            ", ".join(sorted(set(r["last"]))), points(r["last_vs_sft"]), points(r["full_vs_last"])]
           for r in rows]  # fmt: skip
    made = [[mean_of(r["true_mean"], ".2f"), mean_of(r["tokens"], ".1f"),
             ", ".join(mean_of(counts, ".0f") for counts in r["learned"].values()),
             mean_of(r["pairwise"], ".1%"), mean_of(r["readable"], ".1%")] for r in rows]  # fmt: skip
    steps = sorted({step for r in rows for step in r["steps"]})
    moved = [[points(r["steps"].get(step)) for step in steps] for r in rows]
    won, made, moved = ([[name, *cells] for name, cells in zip(names, t, strict=True)] for t in (won, made, moved))
    return "\n\n".join((
        markdown("Wins minus losses on the test prompts by the true reward, in points [95 % interval]. The full "
                 "method's model meets the variant's of the same iteration; the last one stands for those that are not "
                 "there.",
                 ["variant", "flags", "the paper", "M2 vs SFT", "full's M2 vs its", "last", "last vs SFT",
                  "full's last vs its"], won),
        markdown("The last model: true mean score (0 to 5) and tokens of its answers; pairs (or positives) of each "
                 "round; its judgements of held-out rankings: pairs ordered right, ties left out, and judgements that "
                 "can be read. Means over the seeds.",
                 ["variant", "true mean", "tokens", "pairs", "pairwise", "readable"], made),
        markdown("Every step, wins minus losses.", ["variant", *steps], moved),
        "\n".join("- " + note for note in notes(rows, seeds)),
    )) + "\n"  # fmt: skip


def notes(rows: list[dict], seeds: list[int]) -> list[str]:
    """What a reader of the table must know: what is beaten and what is not, what ended early, how it was measured."""
    ahead = {r["name"]: r["full_vs_last"]["low"] > 0 for r in rows if r["full_vs_last"]}
    found = [", ".join(name for name, won in ahead.items() if won == wanted) or "none" for wanted in (True, False)]
    early = [f"`{r['name']}` of seed {seed} ended with {name}: {error}" for r in rows
             for seed, name, error in zip(seeds, r["last"], r["errors"], strict=True) if error]  # fmt: skip
    return [
        f"The full method's last model is better, interval above zero, than that of: {found[0]}; not of: {found[1]}.",
        f"Seeds {', '.join(map(str, seeds))}. Intervals come from drawing prompts anew, each with the answers of all "
        "seeds; how far seeds differ is in ablations.json (`by_seed`).",
        *early,
        "`votes-1` is examined with 1 vote too, and `multiple-choice` with its own template, whose scores begin at 1: "
        "judgements of 0 became 1. Its judgements name a grade and do not recall facts, so it loses those as well.",
    ]


def main():
    parser = argparse.ArgumentParser(description="The ablations on the zoo, in one table.")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs and the table")
    parser.add_argument("--data", type=Path, default=Path("data/zoo"), help="data folder with an oracle.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[v.name for v in VARIANTS], metavar="NAME",
                        choices=[v.name for v in VARIANTS], help="variants beside the full method")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, of one thread each")
    parser.add_argument("--args", default="", help='flags for every run, such as "--prompts 60,60"')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is like Ctrl-C
    oracle = judge.load_oracle(args.data / "oracle.py")
    args.multiple_choice = make_multiple_choice(args.data, args.out)
    variants = [v for v in VARIANTS if v == FULL or v.name in args.only]
    run_all(variants, args)
    runs = {v: [read_run(args.out / f"{v.name}-{seed}", oracle) for seed in args.seeds] for v in variants}
    rows = [row(v, runs[v], runs[FULL]) for v in variants]
    text = tables(rows, args.seeds)
    write_json(args.out / "ablations.json", {"seeds": args.seeds, "args": args.args, "rows": rows})
    write_text(args.out / "table.md", text)
    print("\n" + text)


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
