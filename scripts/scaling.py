"""scripts/scaling.py: bases of several widths, five iterations -> one table and one figure.

    python -m scripts.scaling                                   widths 96, 192, 288, seeds 0, 1, 2
    python -m scripts.scaling --dims 96 --seeds 0 --steps 2000 --args "--prompts 60" --out runs/try

They show what a larger base gains, where iterations cease to gain, and whether the judge or the
answers give out first. A base is the zoo's own if that has the width; else data.zoo.prepare makes
it in OUT/base-DIM: the first of up to four that compares (see there), with --steps just one. A
run of train.py is in OUT/dDIM-seed-SEED, its log beside it. The same command goes on where it was
interrupted, and tries again what failed. OUT/scaling.md and OUT/scaling.json hold the result.
Needs matplotlib.

Left out: a recipe for each width; all get that of the zoo.
"""

import argparse
import shlex
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from judge import read_ranked
from model import UserError, atomic_write, read_json, read_shape, write_json
from sample import read_jsonl, run_command
from scripts import ablate, figures
from scripts.ablate import bootstrap_ratio, compare_runs, interval_cell, points_cell
from scripts.plan import num_parameters
from scripts.report import judge_eval, load_oracle

TRIES = 4  # bases made of a width at most, until one has learned to compare (data.zoo.prepare)

# ---- bases and runs --------------------------------------------------------------------------


def find_base(dim: int, args: argparse.Namespace) -> Path:
    """The base of a width: the data folder's own where that has the width, else one in OUT."""
    base = args.data / "base"
    if (base / "config.json").exists() and read_shape(base)[0].dim == dim:
        return base
    return args.out / f"base-{dim}" / "base"


def make_base(dim: int, args: argparse.Namespace):
    base = find_base(dim, args)
    if (base / "config.json").exists():
        return
    argv = ["-m", "data.zoo.prepare", "--dim", str(dim), "--out", str(base.parent)]
    # a trial's base of few steps compares nothing, however often it is tried
    argv += ["--steps", str(args.steps)] if args.steps else ["--tries", str(TRIES)]
    log = args.out / f"base-{dim}.log"
    status, last_line = ablate.run_program(argv, log)
    if status:
        raise UserError(f"{log}: data.zoo.prepare ended with status {status}: {last_line}")


def make_run(dim: int, seed: int, args: argparse.Namespace, base_job: Future):
    """Make one run folder, after its base."""
    base_job.result()
    flags = f"--init {shlex.quote(str(find_base(dim, args)))}"
    width = ablate.Variant(f"d{dim}-seed", flags, first="", paper="", iters=args.iters)
    ablate.make_run(width, seed, args, None)


def make_all_runs(args: argparse.Namespace) -> dict[str, str]:
    """All bases and runs, `workers` side by side; -> runs that failed, and why."""
    jobs, failures = {}, {}
    with ablate.worker_pool(args.workers) as pool:
        base_jobs = {dim: pool.submit(make_base, dim, args) for dim in args.dims}
        for dim, base_job in base_jobs.items():
            for seed in args.seeds:
                jobs[f"d{dim}-seed-{seed}"] = pool.submit(make_run, dim, seed, args, base_job)
        for name, job in jobs.items():
            try:
                job.result()
            except UserError as e:
                failures[name] = str(e)
    return failures


# ---- what the table needs of the runs --------------------------------------------------------


def count_judgements(run: Path, model_name: str) -> np.ndarray:
    """By held-out prompt: pairs ordered right, pairs ordered at all, judgements with a score,
    judgements.  (4, prompts)"""
    ranked = read_ranked(Path(read_json(run / "config.json")["data"]) / "eft_eval.jsonl")
    judgements = [[] for _ in ranked]
    for row in read_jsonl(run / model_name / "exam.jsonl", allow_empty=True):
        judgements[row["id"]].append(row | {"id": 0})
    counts = []
    for ranked_row, rows in zip(ranked, judgements, strict=True):
        result = judge_eval([ranked_row], rows)
        pairs = result["pairs_without_ties"]
        right = pairs * (result["pairwise"] or 0)
        parsed = len(rows) * (result["parse_rate"] or 0)
        counts.append((right, pairs, parsed, len(rows)))
    return np.array(counts).T


def read_run(folder: Path, oracle) -> dict:
    """As ablate.read_run has it; exams: model -> `count_judgements`."""
    run = ablate.read_run(folder, oracle)
    exams = {name: count_judgements(folder, name) for name in run["models"]}
    return run | {"name": folder.name, "exams": exams}


def model_row(runs: list[dict], name: str, name_before: str | None) -> dict:
    """A model's figures; runs: all that have made it, one for each seed."""
    grades = [list(run["grades"][name].values()) for run in runs]  # (seeds, prompts)
    sums = np.sum(grades, axis=0)
    right, pairs, parsed, judgements = sum(run["exams"][name] for run in runs)
    return {
        "model": name,
        "seeds": len(runs),
        "true_mean": bootstrap_ratio(sums, np.full(len(sums), len(runs))),
        "vs_before": name_before and compare_runs(runs, name, runs, name_before),
        "vs_sft": name_before and compare_runs(runs, name, runs, "SFT"),
        "pairs_right": bootstrap_ratio(right, pairs),
        "parse_rate": bootstrap_ratio(parsed, judgements),
    }


def width_rows(dim: int, base: Path, runs: list[dict]) -> list[dict]:
    """A row of the table for each model that runs from this base have made."""
    if not runs:
        return []
    shape, _ = read_shape(base)
    size = {"dim": dim, "parameters": num_parameters(shape)[0]}
    rows = []
    names = max((run["models"] for run in runs), key=len)
    for name, name_before in zip(names, [None, *names], strict=False):
        finished_runs = [run for run in runs if name in run["models"]]
        rows.append(size | model_row(finished_runs, name, name_before))
    return rows


# ---- the table -------------------------------------------------------------------------------


def table_text(rows: list[dict], notes: list[str]) -> str:
    title = (
        "By width of the base and by model, seeds pooled [95 % interval over prompts]: true mean "
        "score (0 to 5) of the answers to the test prompts; wins minus losses in points against "
        "another model; held-out pairs of responses that the model orders as people do, ties left "
        "out; judgements of them that can be read."
    )
    columns = ["width", "parameters", "model", "seeds", "true mean", "vs the one before"]
    columns += ["vs SFT", "pairs right", "parse rate"]
    lines = []
    for row in rows:
        line = [str(row["dim"]), f"{row['parameters']:,}", row["model"], str(row["seeds"])]
        line += [interval_cell(row["true_mean"], ".2f"), points_cell(row["vs_before"])]
        line += [points_cell(row["vs_sft"]), interval_cell(row["pairs_right"], ".1%")]
        lines.append([*line, interval_cell(row["parse_rate"], ".1%")])
    note_list = "".join(f"- {note}\n" for note in notes)
    return f"{ablate.markdown_table(title, columns, lines)}\n\n{note_list}"


# ---- the command -----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ablate.make_parser("The method by size of the base.", out="runs/scaling")
    add = parser.add_argument
    figure = Path("docs/figures/scaling.svg")
    parser.set_defaults(workers=2)
    add("--dims", type=int, nargs="+", default=[96, 192, 288], help="widths of the bases")
    add("--iters", type=int, default=5, help="models to make, SFT not counted")
    add("--steps", type=int, help="training steps of a base (default: those of the zoo's)")
    add("--figure", type=Path, default=figure, help="where to write it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    oracle = load_oracle(args.data / "oracle.py")
    args.out.mkdir(parents=True, exist_ok=True)
    failures = make_all_runs(args)
    rows = []
    notes = [f"`{name}` failed: {error}" for name, error in failures.items()]
    for dim in args.dims:
        folders = [args.out / f"d{dim}-seed-{seed}" for seed in args.seeds]
        runs = [read_run(folder, oracle) for folder in folders if folder.name not in failures]
        rows += width_rows(dim, find_base(dim, args), runs)
        for run in runs:
            if run["error"]:
                notes.append(f"`{run['name']}` ended with {run['models'][-1]}: {run['error']}")
    text = table_text(rows, notes)
    result = {"seeds": args.seeds, "args": args.args, "rows": rows, "failures": failures}
    write_json(args.out / "scaling.json", result)
    atomic_write(args.out / "scaling.md", text)
    print("\n" + text)
    if rows:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.figure, figures.scaling(rows))
    if failures:
        raise UserError(f"{', '.join(failures)} failed; the same command tries again")


if __name__ == "__main__":
    run_command(main)
