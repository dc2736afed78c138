"""scripts/ablate.py: the method with one part changed, over several seeds -> one table.

    python -m scripts.ablate                                  all VARIANTS, seeds 0, 1, 2
    python -m scripts.ablate --only shuffled --seeds 0 --args "--prompts 60,60" --out runs/trial

A variant of a seed is a run of train.py in OUT/NAME-SEED. It starts from the full run of its
seed: files that the variant cannot have changed are copied, so that most variants train no M1 of
their own. Most change a flag. Two are controls that change files: `positive` adds responses to
the seed data, `shuffled` edits the judgements that pairs are made of.
The same command goes on where it was interrupted. OUT/table.md and OUT/ablations.json hold the
result.

Left out: variants of what is the same for all runs (the seed data, the base, the prompt writer).
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from judge import MAX_SCORE, mean_scores
from model import UserError, atomic_write, read_json, write_json
from sample import read_jsonl, run_command, write_jsonl
from scripts.report import evaluate_judges, load_oracle, mean, run_models

ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ("*.jsonl", "*.txt", "recipe.json", "oracle.py")  # of a data folder
ROUND_FILES = ("candidates.jsonl", "judgements.jsonl", "pairs.jsonl")  # in the order of a round
NO_PAIRS = re.compile("gave a pair")  # in what train.py says where the method cannot go on

# ---- what the controls change ----------------------------------------------------------------


def shuffle_owners(judgements: list[dict], seed: int) -> list[dict]:
    """Each prompt keeps its judgements, but they change owner among its responses: whole ones,
    all votes of an owner together. Scores then say nothing about the response they belong to."""
    owners = {}
    for row in judgements:
        owners.setdefault(row["id"], set()).add(row["k"])
    new_owners = {}
    for prompt_id, ks in owners.items():
        shuffled_ks = sorted(ks)
        Random(repr((seed, "shuffled", prompt_id))).shuffle(shuffled_ks)
        for k, new_k in zip(sorted(ks), shuffled_ks, strict=True):
            new_owners[prompt_id, k] = new_k
    rows = [row | {"k": new_owners[row["id"], row["k"]]} for row in judgements]
    return sorted(rows, key=lambda row: (row["id"], row["k"], row["vote"]))


def shuffle_judgements(run: Path, seed: int):
    path = run / "M2" / "judgements.jsonl"
    judgements = read_jsonl(path, allow_empty=True)
    write_jsonl(path, shuffle_owners(judgements, seed))


def copy_data(data: Path, out: Path):
    out.mkdir(parents=True, exist_ok=True)
    for pattern in DATA_FILES:
        for path in data.glob(pattern):
            shutil.copy(path, out)


def best_responses(run: Path) -> list[dict]:
    """The responses of the round that makes M2 whose mean score is the highest there is (paper,
    appendix A.4). Truncated ones have no end to learn, and are left out."""
    judgements = read_jsonl(run / "M2" / "judgements.jsonl", allow_empty=True)
    scores = mean_scores(judgements)
    rows = []
    for row in read_jsonl(run / "M2" / "candidates.jsonl", allow_empty=True):
        if scores.get((row["id"], row["k"])) == MAX_SCORE and not row["truncated"]:
            rows.append({"prompt": row["prompt"], "response": row["response"]})
    return rows


def make_positive_data(data: Path, full_run: Path, out: Path):
    """The data folder again, with the full run's best responses added to the seed data."""
    copy_data(data, out)
    seed_rows = read_jsonl(data / "ift.jsonl")
    positives = best_responses(full_run)
    write_jsonl(out / "positives.jsonl", positives)  # for the table; train.py does not read it
    write_jsonl(out / "ift.jsonl", seed_rows + positives)


# ---- the variants ----------------------------------------------------------------------------


class Variant(NamedTuple):
    """A row of the table: a run of train.py with a part of the method changed.

    first is the first file of a run that the change can have changed: the files before it are
    copied. opponent is the model of the full run that its last model is compared with.
    """

    name: str
    flags: str  # of train.py
    first: str
    paper: str  # what the paper found, wins minus losses in points
    iters: int = 3  # 2 where a second round would add little to what it costs
    opponent: str = "M3"
    note: str = ""  # the change, where it is not in the flags
    remark: str = ""  # what a reader of the table must know
    same_judge: bool = True  # does it judge the held-out rankings as the full run does?
    make_data: Callable[[Path, Path, Path], None] | None = None  # data, full run -> data folder
    edit_run: Callable[[Path, int], None] | None = None  # changes the copied files of a run


FULL = Variant(
    name="full",
    flags="",
    first="SFT/config.json",
    paper="against SFT: M2 +34.7, M3 +52.7 (figure 3)",
)
VARIANTS = [
    FULL,
    Variant(
        name="ift-only",
        flags="--eft-size 0",
        first="M1/config.json",
        paper="scores collapse to 4; 541 and 429 pairs, not 3,964 and 6,942; "
        "better than SFT, worse than full (A.3)",
    ),
    Variant(
        name="positive",
        flags="",
        first="M1/config.json",
        paper="no gain: 29 % wins against SFT, M1 30 % (A.4)",
        iters=1,
        opponent="M2",
        note=f"responses of score {MAX_SCORE} in the seed data, no DPO",
        remark="`positive` makes one model of M0, by SFT: it stands beside the full method's M2, "
        "whose round gave it the responses.",
        make_data=make_positive_data,
    ),
    Variant(
        name="shuffled",
        flags="",
        first="M2/pairs.jsonl",
        paper="not tried",
        iters=2,
        opponent="M2",
        note="judgements change owner within each prompt",
        edit_run=shuffle_judgements,
    ),
    Variant(
        name="votes-1",
        flags="--votes 1",
        first="M2/judgements.jsonl",
        paper="not tried; it takes 3",
        remark="`votes-1` judges the held-out rankings with 1 vote too.",
        same_judge=False,
    ),
    Variant(
        name="candidates-2",
        flags="--candidates 2",
        first="M2/candidates.jsonl",
        paper="not tried; it takes 4",
        iters=2,
        opponent="M2",
    ),
    Variant(
        name="candidates-8",
        flags="--candidates 8",
        first="M2/candidates.jsonl",
        paper="not tried; it takes 4",
        iters=2,
        opponent="M2",
    ),
    Variant(
        name="five-iterations",
        flags="",
        first="M4/candidates.jsonl",
        paper="not tried; it stops at M3",
        iters=5,
        note="M4 and M5",
    ),
]


# ---- run folders that start from the full run ------------------------------------------------


def model_number(name: str) -> int:
    """SFT, M1, M2 ...  ->  0, 1, 2 ..."""
    return 0 if name == "SFT" else int(name[1:])


def write_order(file: str) -> tuple[int, int]:
    """When a run writes a file, such as M2/pairs.jsonl: what is written later is greater."""
    model_name, file_name = file.split("/")
    if file_name == "prompts.jsonl":  # those of all rounds are written between SFT and M1
        return 0, len(ROUND_FILES) + 1
    if file_name in ROUND_FILES:
        return model_number(model_name), ROUND_FILES.index(file_name)
    return model_number(model_name), len(ROUND_FILES)  # the model and what it is evaluated by


def unchanged_files(full_run: Path, v: Variant) -> list[str]:
    """The files of the full run that the variant would only write again, byte for byte."""
    files = []
    for name in ["SFT", *(f"M{t}" for t in range(1, v.iters + 1))]:
        for path in (full_run / name).glob("*"):
            file = f"{name}/{path.name}"
            same_exam = v.same_judge or path.name != "exam.jsonl"
            if path.is_file() and same_exam and write_order(file) < write_order(v.first):
                files.append(file)
    return files


def copy_run(full_run: Path, out: Path, v: Variant, seed: int):
    """Start a variant's run folder with its files of the full run; the folder appears whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = unchanged_files(full_run, v)
    for file in files:
        (part / file).parent.mkdir(exist_ok=True)
        shutil.copy(full_run / file, part / file)
    metrics = read_jsonl(full_run / "metrics.jsonl", allow_empty=True)
    metrics = [row for row in metrics if f"{row['model']}/config.json" in files]
    write_jsonl(part / "metrics.jsonl", metrics)
    if v.edit_run:
        v.edit_run(part, seed)
    part.rename(out)


# ---- training --------------------------------------------------------------------------------

PROCESSES: list[subprocess.Popen] = []  # all that were started, to end them where one fails


def run_program(argv: list[str], log: Path) -> tuple[int, str]:
    """Run a Python program on one thread; its exit status and the last line of its log."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *argv], stdout=file, stderr=file, env=env)
        PROCESSES.append(process)
        status = process.wait()
    return status, log.read_text(encoding="utf-8").rstrip().split("\n")[-1]


def train(flags: list[str], log: Path) -> str:
    """Run train.py. Returns its last line if the method cannot go on, else ""."""
    status, last_line = run_program([str(ROOT / "train.py"), *flags], log)
    if status == 0:
        return ""
    if status != 1 or not NO_PAIRS.search(last_line):
        raise UserError(f"{log}: train.py ended with status {status}: {last_line}")
    return last_line.removeprefix("error: ")


@contextmanager
def worker_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that run programs; these end where the block does not. UserError on Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in PROCESSES:  # they would go on without us, and meet those of a restart
                process.terminate()
            if isinstance(e, KeyboardInterrupt):
                raise UserError("interrupted; the same command goes on") from None
            raise


def make_run(v: Variant, seed: int, args: argparse.Namespace, full_job: Future | None):
    """Make one run folder, after the full run of its seed.

    That the method cannot go on (no judgement can be parsed, so there are no pairs) is a result
    as well: the reason is kept, and the models that there are get evaluated.
    """
    if full_job:
        full_job.result()
    out = args.out / f"{v.name}-{seed}"
    full_run = args.out / f"{FULL.name}-{seed}"
    data = args.out / "data" / out.name if v.make_data else args.data
    flags = [*shlex.split(args.args), *shlex.split(v.flags), "--seed", str(seed)]
    flags += ["--data", str(data), "--out", str(out)]
    outcome = out / "outcome.json"
    if outcome.exists() and read_json(outcome)["flags"] == [*flags, v.iters]:
        return
    began = time.time()
    if v.make_data:
        v.make_data(args.data, full_run, data)
    if full_job and not out.exists():
        copy_run(full_run, out, v, seed)
    log = args.out / f"{out.name}.log"
    error = train([*flags, "--iters", str(v.iters)], log)
    if error:
        last_model = run_models(out)[-1]
        train([*flags, "--iters", str(model_number(last_model))], log)
    write_json(outcome, {"flags": [*flags, v.iters], "error": error})
    print(f"{out.name}: {time.time() - began:.0f} s; {error or 'finished'}", flush=True)


def make_all_runs(variants: list[Variant], args: argparse.Namespace):
    """Full runs first, then what starts from them, `workers` side by side; one failure ends all.

    Seed by seed: else a worker would wait for the last full run while others could be used.
    """
    with worker_pool(args.workers) as pool:
        full_jobs = {seed: pool.submit(make_run, FULL, seed, args, None) for seed in args.seeds}
        jobs = list(full_jobs.values())
        for seed in args.seeds:
            for v in variants[1:]:
                jobs.append(pool.submit(make_run, v, seed, args, full_jobs[seed]))
        for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
            job.result()


# ---- what the table needs of the runs --------------------------------------------------------


def read_run(run: Path, oracle) -> dict:
    """grades: model -> prompt id -> true grade of its answer; tokens: mean of a model's answers;
    judges: model -> agreement with people; examples: model -> pairs or positives it learned."""
    config = read_json(run / "config.json")
    data = Path(config["data"])
    models = run_models(run)
    grades, tokens = {}, {}
    for name in models:
        answers = read_jsonl(run / name / "test.jsonl", "prompt")
        grades[name] = {row["id"]: oracle.grade(row["prompt"], row["response"]) for row in answers}
        tokens[name] = mean(len(row["tokens"]) for row in answers)
    return {
        "models": models,
        "grades": grades,
        "tokens": tokens,
        "judges": evaluate_judges(run, models, config, data),
        "examples": count_examples(run, data),
        "error": read_json(run / "outcome.json")["error"],
    }


def count_examples(run: Path, data: Path) -> dict[str, int]:
    """Model -> how many pairs (or positives) it learned from, 0 where its round gave none."""
    counts = {}
    if (data / "positives.jsonl").exists():
        counts["M1"] = len(read_jsonl(data / "positives.jsonl", allow_empty=True))
    for path in sorted(run.glob("M*/judgements.jsonl")):
        pairs = read_jsonl(path.with_name("pairs.jsonl"), allow_empty=True, missing_ok=True)
        counts[path.parent.name] = len(pairs)
    return counts


def bootstrap_ratio(parts, wholes, resamples: int = 10000) -> dict | None:
    """sum(parts) / sum(wholes), each a number a prompt, and its 95 % bootstrap interval over
    prompts; None where nothing was counted.

    A number counts a prompt's answers of all seeds: a prompt is resampled with all of them. They
    are no new prompts, and to count them as such would make the interval too narrow.
    """
    if not np.any(wholes):
        return None
    kinds, counts = np.unique([parts, wholes], axis=1, return_counts=True)
    rng = np.random.default_rng(0)
    drawn_counts = rng.multinomial(len(parts), counts / len(parts), size=resamples)
    part_sums, whole_sums = kinds @ drawn_counts.T  # (resamples) each
    is_defined = whole_sums > 0
    ratios = part_sums[is_defined] / whole_sums[is_defined]
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return {"value": float(np.sum(parts) / np.sum(wholes)), "low": low, "high": high}


def compare_over_seeds(grades: list[tuple[dict, dict]]) -> dict:
    """Two models' grades by prompt, a pair of them for each seed -> wins minus losses of the
    first, in points, with their interval (`bootstrap_ratio`)."""
    common_ids = set.intersection(*(set(by_id) for pair in grades for by_id in pair))
    ids = sorted(common_ids)
    signs = np.sign([[a[i] - b[i] for i in ids] for a, b in grades])  # (seeds, prompts)
    interval = bootstrap_ratio(signs.sum(0), np.full(len(ids), len(signs)))
    win, tie, lose = (100 * float(np.mean(signs == sign)) for sign in (1, 0, -1))
    points = {"points": win - lose, "low": 100 * interval["low"], "high": 100 * interval["high"]}
    by_seed = (100 * signs.mean(1)).tolist()
    return {"win": win, "tie": tie, "lose": lose} | points | {"by_seed": by_seed}


def find_model(run: dict, name: str) -> str:
    """The model of that name, or the last one before it that the run has made."""
    number = model_number(name)
    return [other for other in run["models"] if model_number(other) <= number][-1]


def compare_runs(runs: list[dict], name: str, others: list[dict], other_name: str) -> dict:
    """A model of some runs, one for each seed, against a model of other runs."""
    grades = []
    for run, other in zip(runs, others, strict=True):
        mine = run["grades"][find_model(run, name)]
        theirs = other["grades"][find_model(other, other_name)]
        grades.append((mine, theirs))
    return compare_over_seeds(grades)


def compare_steps(runs: list[dict]) -> dict[str, dict]:
    """Every model that all runs have made against the one before it."""
    models = [name for name in runs[0]["models"] if all(name in run["models"] for run in runs)]
    steps = {}
    for before, name in pairwise(models):
        steps[f"{name} vs {before}"] = compare_runs(runs, name, runs, before)
    return steps


def compare_variant(v: Variant, runs: list[dict], full_runs: list[dict]) -> dict:
    """One variant's figures; lists have one entry for each seed."""
    last = f"M{v.iters}"
    last_models = [find_model(run, last) for run in runs]
    final = list(zip(runs, last_models, strict=True))
    judges = [run["judges"].get(name, {}) for run, name in final]
    rounds = sorted({name for run in runs for name in run["examples"]})
    row = {
        "name": v.name,
        "change": f"`{v.flags}`" if v.flags else v.note,
        "paper": v.paper,
        "remark": v.remark,
        "last": last_models,
        "errors": [run["error"] for run in runs],
        "m2_vs_sft": compare_runs(runs, "M2", runs, "SFT"),
        "last_vs_sft": compare_runs(runs, last, runs, "SFT"),
        "full_vs_m2": None,
        "full_vs_last": None,
        "steps": compare_steps(runs),
        "true_mean": [mean(run["grades"][name].values()) for run, name in final],
        "tokens": [run["tokens"][name] for run, name in final],
        "pairwise": [judge.get("pairwise") for judge in judges],
        "parse_rate": [judge.get("parse_rate") for judge in judges],
        "examples": {name: [run["examples"].get(name) for run in runs] for name in rounds},
    }
    if v != FULL:
        row["full_vs_m2"] = compare_runs(full_runs, "M2", runs, "M2")
        row["full_vs_last"] = compare_runs(full_runs, v.opponent, runs, last)
    return row


# ---- the table -------------------------------------------------------------------------------


def points_cell(result: dict | None) -> str:
    """+25.0 [+21.1, +28.7]"""
    if result is None:
        return ""
    if result["win"] == result["lose"] == 0:
        return "same"
    return f"{result['points']:+.1f} [{result['low']:+.1f}, {result['high']:+.1f}]"


def interval_cell(result: dict | None, form: str) -> str:
    """3.31 [3.20, 3.42]"""
    if result is None:
        return "-"
    value, low, high = (format(result[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def mean_cell(values: list[float | None], form: str) -> str:
    value = mean(values)
    return "-" if value is None else format(value, form)


def markdown_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def win_table(rows: list[dict]) -> str:
    title = (
        "Wins minus losses on the test prompts by the true reward, in points [95 % interval]. "
        "Where a run has not made a model, its last one before that takes the model's place."
    )
    columns = ["variant", "change", "the paper", "M2 vs SFT", "full's M2 vs its", "last"]
    columns += ["last vs SFT", "full's last vs its"]
    lines = []
    for row in rows:
        last_models = ", ".join(sorted(set(row["last"])))
        line = [f"`{row['name']}`", row["change"], row["paper"]]
        line += [points_cell(row["m2_vs_sft"]), points_cell(row["full_vs_m2"]), last_models]
        line += [points_cell(row["last_vs_sft"]), points_cell(row["full_vs_last"])]
        lines.append(line)
    return markdown_table(title, columns, lines)


def last_model_table(rows: list[dict]) -> str:
    title = (
        "The last model: true mean score (0 to 5) and tokens of its answers; pairs (or positives) "
        "of each round; its judgements of held-out rankings: pairs ordered right, ties left out, "
        "and parse rate. Means over the seeds."
    )
    columns = ["variant", "true mean", "tokens", "pairs", "pairwise", "parse rate"]
    lines = []
    for row in rows:
        counts = [mean_cell(values, ".0f") for values in row["examples"].values()]
        line = [f"`{row['name']}`", mean_cell(row["true_mean"], ".2f")]
        line += [mean_cell(row["tokens"], ".1f"), ", ".join(counts)]
        line += [mean_cell(row["pairwise"], ".1%"), mean_cell(row["parse_rate"], ".1%")]
        lines.append(line)
    return markdown_table(title, columns, lines)


def step_table(rows: list[dict]) -> str:
    steps = sorted({step for row in rows for step in row["steps"]})
    lines = []
    for row in rows:
        cells = [points_cell(row["steps"].get(step)) for step in steps]
        lines.append([f"`{row['name']}`", *cells])
    return markdown_table("Every step, wins minus losses.", ["variant", *steps], lines)


def notes(rows: list[dict], seeds: list[int]) -> list[str]:
    """What a reader of the table must know: what is beaten, how sure that is, what ended early,
    what differs."""
    variants = [row for row in rows if row["full_vs_last"]]
    worse = [row["name"] for row in variants if row["full_vs_last"]["low"] > 0]
    others = [row["name"] for row in variants if row["name"] not in worse]
    lines = [
        "The full method's model is better, interval above zero, than the last one of: "
        f"{', '.join(worse) or 'none'}; not of: {', '.join(others) or 'none'}.",
        f"Seeds {', '.join(map(str, seeds))}. Intervals come from resampling prompts, each with "
        "its answers of all seeds; how far seeds differ is in ablations.json (`by_seed`).",
    ]
    for row in rows:
        for seed, name, error in zip(seeds, row["last"], row["errors"], strict=True):
            if error:
                lines.append(f"`{row['name']}` of seed {seed} ended with {name}: {error}")
    return lines + [row["remark"] for row in rows if row["remark"]]


def table_text(rows: list[dict], seeds: list[int]) -> str:
    """The rows as Markdown: who wins, what became of each variant, every step; and notes."""
    note_list = "\n".join("- " + line for line in notes(rows, seeds))
    parts = [win_table(rows), last_model_table(rows), step_table(rows), note_list]
    return "\n\n".join(parts) + "\n"


# ---- the command -----------------------------------------------------------------------------


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """The flags of a program that makes many runs."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    add("--args", default="", help='flags for every run, such as "--prompts 60,60"')
    add("--out", type=Path, default=Path(out), help="folder of the runs and the table")
    add("--data", type=Path, default=Path("data/zoo"), help="data folder with an oracle.py")
    add("--workers", type=int, default=os.cpu_count(), help="runs side by side, of one thread")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("The ablations on the zoo, in one table.", out="runs/ablations")
    names = [v.name for v in VARIANTS]
    only_help = "variants beside the full method"
    choices = {"default": names, "choices": names}
    parser.add_argument("--only", nargs="+", metavar="NAME", help=only_help, **choices)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    oracle = load_oracle(args.data / "oracle.py")
    variants = [v for v in VARIANTS if v == FULL or v.name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    make_all_runs(variants, args)
    runs = {}
    for v in variants:
        runs[v.name] = [read_run(args.out / f"{v.name}-{seed}", oracle) for seed in args.seeds]
    rows = [compare_variant(v, runs[v.name], runs[FULL.name]) for v in variants]
    text = table_text(rows, args.seeds)
    write_json(args.out / "ablations.json", {"seeds": args.seeds, "args": args.args, "rows": rows})
    atomic_write(args.out / "table.md", text)
    print("\n" + text)


if __name__ == "__main__":
    run_command(main)
