"""scripts/pick_checkpoint.py: the models that were kept during a training -> the one to take.

    python train.py --iters 2 --keep-every 200 --out runs/7b     leaves M2/step-200, step-400, ...
    python -m scripts.pick_checkpoint runs/7b M2 --judge-url https://host/v1 --judge-model NAME
    python -m scripts.pick_checkpoint runs/7b M2 ... --take      the picked one is M2 from now on
    python train.py --iters 3 --keep-every 200 --out runs/7b     makes M3 of it

The paper's early stopping (section 3.1): every 200 updates the model answers 253 validation
prompts, a judge outside the loop (Claude 2) compares its answers with those of 200 updates before,
and training stops when they are no longer better. Here training goes on to its end, and the same
rule picks one of the models that it kept. M2 itself, the model after the last update, is one too;
--take exchanges it and the picked one. Every judge of scripts/compare.py will do.

The prompts are valid.jsonl of the run's data folder. Answers stay in M2/step-200/valid.jsonl,
judgements in M2/judge_cache.jsonl: the same command goes on where it was interrupted.

Left out: models that need several GPUs.
"""

import argparse
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from model import Tokenizer, UserError, first_names, read_json, write_json
from sample import load_for_sampling, read_jsonl, respond, run_command, write_jsonl
from scripts.compare import (
    add_judge_flags,
    check_judge_flags,
    explain_problems,
    judge_name,
    open_judge,
    read_answers,
    win_rate,
    win_rate_text,
)
from scripts.report import read_metrics, read_run_config

# ---- the models of a training ----------------------------------------------------------------


def step_dir(model_dir: Path, step: int) -> Path:
    return model_dir / f"step-{step}"


def kept_steps(model_dir: Path) -> list[int]:
    """The updates after which a model was kept in step-N; config.json marks it as complete."""
    paths = model_dir.glob("step-*/config.json")
    return [int(path.parent.name.removeprefix("step-")) for path in paths]


def current_step(model_dir: Path) -> int | None:
    """The update after which the model in M2 itself was saved; None where it is not complete.

    That is the last update, or the one in picked.json, where --take has put another model there.
    """
    if not (model_dir / "config.json").exists():
        return None
    if (model_dir / "picked.json").exists():
        return read_json(model_dir / "picked.json")["step"]
    updates = read_metrics(model_dir.parent).get(model_dir.name)
    if not updates:
        raise UserError(f"{model_dir.parent}/metrics.jsonl: has no updates of {model_dir.name}")
    return max(row["step"] for row in updates)


def find_steps(model_dir: Path) -> list[int]:
    """All updates of which there is a model. Raises UserError where there are not two."""
    steps = {*kept_steps(model_dir), current_step(model_dir)} - {None}
    if len(steps) < 2:
        raise UserError(
            f"{model_dir}: has {len(steps)} models, and it takes two to compare; train with "
            "--keep-every N for an N smaller than the number of updates"
        )
    return sorted(steps)


# ---- their answers to the validation prompts -------------------------------------------------


def valid_file(model_dir: Path, step: int) -> Path:
    return step_dir(model_dir, step) / "valid.jsonl"


def answer_prompts(model_dir: Path, step: int, prompts: list[str], config: dict):
    """Write the answers of the model after `step` updates, unless they are there.

    It samples as the run did, with the same random numbers at every step. Every batch of answers
    is kept in valid.jsonl.part, and a later start goes on with the rest.
    """
    path = valid_file(model_dir, step)
    if path.exists():
        read_validation_answers(path, prompts)
        return
    part = path.with_name(path.name + ".part")
    rows = read_validation_answers(part, prompts) if part.exists() else []
    folder = path.parent if step in kept_steps(model_dir) else model_dir
    model, tok = load_for_sampling(folder)
    max_new = min(config["max_response"], model.cfg.max_len // 2)
    todo = unanswered(prompts, rows, tok, model.cfg.max_len - max_new)
    if not rows and not todo:
        raise UserError(f"valid.jsonl: no prompt leaves room for a response of {max_new} tokens")
    batch = config["sample_batch"]
    sampling = {"temperature": config["temperature"], "top_p": config["top_p"]}
    sampling |= {"key": (config["seed"], "valid"), "max_new": max_new, "batch": batch}
    path.parent.mkdir(exist_ok=True)  # M2 itself has none yet
    with tqdm(total=len(todo), desc=f"step {step}", unit=" answers", disable=None) as bar:
        for start in range(0, len(todo), batch):
            group = todo[start : start + batch]
            rows += respond(model, tok, group, n=1, **sampling)
            write_jsonl(part, rows)
            bar.update(len(group))
    os.replace(part, path)


def unanswered(prompts: list[str], rows: list[dict], tok: Tokenizer, room: int) -> list[dict]:
    """The prompts of at most `room` tokens that have no row yet, as rows for respond."""
    answered_ids = {row["id"] for row in rows}
    todo = []
    for i, prompt in enumerate(prompts):
        if i not in answered_ids and len(tok.chat(prompt)) <= room:
            todo.append({"id": i, "prompt": prompt})
    return todo


def read_validation_answers(path: Path, prompts: list[str]) -> list[dict]:
    """The rows of a file of answers. Raises UserError where they are answers to other prompts."""
    rows = read_jsonl(path, "prompt", allow_empty=True)
    for row in rows:
        if prompts[row["id"] : row["id"] + 1] != [row["prompt"]]:
            raise UserError(
                f"{path}: answers other prompts than those of valid.jsonl; remove it, or bring "
                "the old valid.jsonl back"
            )
    return rows


# ---- the rule --------------------------------------------------------------------------------


def pick_step(steps: list[int], results: list[dict]) -> int:
    """The last of the models before the first that does not beat the one before it.

    results[i] is win_rate of steps[i + 1] against steps[i]. A tie is no improvement.
    """
    for step, result in zip(steps, results, strict=False):
        if result["win"] <= result["lose"]:
            return step
    return steps[-1]


# ---- --take ----------------------------------------------------------------------------------


def check_next_model(model_dir: Path):
    """Raises UserError where a later model was already made from the one in M2."""
    name = model_dir.name
    next_dir = model_dir.parent / f"M{int(name[1:]) + 1}"
    files = sorted(path.name for path in next_dir.glob("*"))
    files = [file for file in files if not file.startswith("prompts.jsonl")]  # of a fixed writer
    if files:
        raise UserError(
            f"{next_dir}: was made from the {name} that is there now ({first_names(files)}); "
            f"to take another {name}, first remove all but prompts.jsonl in {next_dir}"
        )


def take(model_dir: Path, step: int):
    """Exchange the model in M2 and that of step-N.

    A killed exchange can be repeated: config.json, which marks a model as complete, is moved last.
    M2's answers to the test prompts and its judge evaluation go with their model.
    """
    source = step_dir(model_dir, step)
    names = [path.name for path in source.iterdir() if not path.name.startswith("valid.jsonl")]
    current = current_step(model_dir)
    if current is not None:
        evaluations = [*model_dir.glob("test.jsonl*"), *model_dir.glob("exam.jsonl*")]
        names_there = names + [path.name for path in evaluations]
        move_files(names_there, model_dir, step_dir(model_dir, current))
    write_json(model_dir / "picked.json", {"step": step})
    move_files(names, source, model_dir)


def move_files(names: list[str], source: Path, target: Path):
    """Move those that are there, config.json last."""
    for name in sorted(names, key=lambda name: name == "config.json"):
        if (source / name).exists():
            os.replace(source / name, target / name)


# ---- the command -----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pick_checkpoint",
        description="Early stopping by a judge outside the loop, among the models kept.",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run folder, such as runs/7b")
    add("name", help="the model that was trained with --keep-every, such as M2")
    add("--take", action="store_true", help="exchange that model and the picked one")
    add("--data", type=Path, help="the run's data folder, where it has moved")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    check_judge_flags(args)
    if not re.fullmatch(r"M[1-9]\d*", args.name) or not (args.run / args.name).is_dir():
        raise UserError(f"{args.run}: has no model {args.name}; give the name of one, such as M2")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    config = read_run_config(args.run)
    model_dir = args.run / args.name
    steps = find_steps(model_dir)
    rows = read_jsonl((args.data or Path(config["data"])) / "valid.jsonl", "prompt")
    prompts = [row["prompt"] for row in rows]
    judge_pairs = open_judge(args, cache=model_dir / "judge_cache.jsonl")
    results = compare_steps(model_dir, steps, prompts, config, judge_pairs)
    names = [f"step {step} vs {before}" for before, step in pairwise(steps)]
    title = f"{args.name}: each kept model against the one before, by {judge_name(args)}"
    print(win_rate_text(title, dict(zip(names, results, strict=True))))
    for name, result in zip(names, results, strict=True):
        if result["problems"]:
            print(f"{name}: {explain_problems(result)}")
    step = pick_step(steps, results)
    print(explain_pick(steps, step))
    if step == current_step(model_dir):
        print(f"{args.name} is that model already.")
    elif args.take:
        check_next_model(model_dir)
        take(model_dir, step)
        print(
            f"{args.name} is now the model of step {step}. The command of train.py makes its "
            "answers to the test prompts, and the models after it."
        )
    else:
        print(f"The same command with --take puts it into {model_dir}.")


def compare_steps(
    model_dir: Path, steps: list[int], prompts: list[str], config: dict, judge_pairs: Callable
) -> list[dict]:
    """win_rate of each model against the one before it."""
    try:
        for step in steps:
            answer_prompts(model_dir, step, prompts, config)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; answers so far are in {model_dir}, the same command goes on"
        ) from None
    answers = [read_answers(valid_file(model_dir, step)) for step in steps]
    results = []
    for before, after in pairwise(answers):
        results.append(win_rate(after, before, judge_pairs(after, before)))
    return results


def explain_pick(steps: list[int], step: int) -> str:
    if step == steps[-1]:
        return f"Every model is better than the one before it: take step {step}."
    worse = steps[steps.index(step) + 1]
    return f"Step {worse} is no better than step {step}: take step {step}."


if __name__ == "__main__":
    run_command(main)
