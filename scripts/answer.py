"""scripts/answer.py: a file of prompts -> a file of a model's answers.

    python -m scripts.answer runs/zoo/M3 data/zoo/test.jsonl M3.json    AlpacaEval's file
    python -m scripts.answer runs/zoo/M3 data/zoo/test.jsonl M3.jsonl   rows of prompt and response
    python -m scripts.answer runs/7b/M3 question.jsonl M3.jsonl         FastChat's MT-Bench answers

The model samples as its run did: temperature and top-p stand in its generation_config.json.
MT-Bench's questions are the exception, where each category has a temperature of its own.
Flags override both.

Left out: models that need several GPUs (train.py answers the data folder's test.jsonl on all).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from model import Llama, Tokenizer, UserError, atomic_write, read_json, read_text
from sample import load_for_sampling, read_jsonl, respond, run_command, sampling_settings

# ---- prompts in ------------------------------------------------------------------------------

# FastChat's temperatures; MT-Bench's other two categories, writing and roleplay, have 0.7
MT_BENCH = {
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def read_questions(path: Path) -> list[dict]:
    """The rows of a JSON list or of JSON lines, each with "turns": what the user says in turn; and
    with "row": itself.

    A row names it "prompt", "instruction" and "input" (Alpaca, AlpacaEval) or "turns" (MT-Bench).
    Raises UserError.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no prompts; give rows with a prompt")
    questions = []
    for number, row in enumerate(rows, 1):
        turns = turns_of(row)
        if turns is None:
            raise UserError(
                f"{path}: row {number} has no text as prompt or instruction (with a text as input "
                "or none), nor a list of turns; mend it"
            )
        if len(turns) > 1 and "question_id" not in row:
            raise UserError(
                f"{path}: row {number} has {len(turns)} turns and no question_id; mend it"
            )
        questions.append(row | {"turns": turns, "row": row})
    return questions


def read_rows(path: Path) -> list:
    """A JSON list or JSON lines, whatever the file's name. Raises UserError."""
    remedy = "give a .json or .jsonl file of prompts"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; {remedy}")
    is_list = read_text(path, remedy).lstrip().startswith("[")
    rows = read_json(path, list) if is_list else read_jsonl(path)
    for number, row in enumerate(rows, 1):
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            raise UserError(
                f"{path}: row {number} holds NaN, Infinity or half of a surrogate pair, which no "
                "JSON can hold; write null or mend it"
            ) from None
    return rows


def turns_of(row) -> list[str] | None:
    """What the user says in a row of a prompt file; None where that is not one text or more."""
    if not isinstance(row, dict):
        return None
    if row.get("turns"):
        turns = row["turns"]
    elif "instruction" in row:
        turns = [with_input(row["instruction"], row.get("input"))]
    else:
        turns = [row.get("prompt")]
    if isinstance(turns, list) and all(isinstance(t, str) and t.strip() for t in turns):
        return turns
    return None


def with_input(instruction, text) -> str | None:
    """Alpaca's instruction and what it is about as one prompt; None where they are no texts."""
    if text is None:
        return instruction
    if not isinstance(instruction, str) or not isinstance(text, str):
        return None
    return f"{instruction}\n{text}" if text.strip() else instruction


def question_temperature(question: dict, default: float) -> float:
    """MT-Bench's own by category; the default for all that is no question of MT-Bench."""
    if "question_id" in question:
        return MT_BENCH.get(question.get("category"), 0.7)
    return default


# ---- answers ---------------------------------------------------------------------------------


def answer_questions(
    model: Llama,
    tok: Tokenizer,
    questions: list[dict],
    *,
    key: tuple,
    batch: int,
    max_new: int,
    top_p: float,
) -> Iterator[list[dict]]:
    """Questions {"turns", "temperature"} -> the same with "responses" and "truncated", one a turn.

    They come in groups of some batches, to be kept at once. Raises UserError before anything is
    answered where a question leaves no room for max_new tokens a turn.
    """
    check_room(questions, tok, max_new, model.cfg.max_len)
    todo = []
    for i, question in enumerate(questions):
        todo.append(question | {"number": i, "responses": [], "truncated": []})
    sampling = {"batch": batch, "max_new": max_new, "top_p": top_p}
    with tqdm(total=len(todo), unit=" prompts", disable=None) as bar:
        for start in range(0, len(todo), 4 * batch):
            group = todo[start : start + 4 * batch]
            for turn in range(max(len(q["turns"]) for q in group)):
                answer_turn(model, tok, group, turn, key=(*key, turn), **sampling)
            yield group
            bar.update(len(group))


def check_room(questions: list[dict], tok: Tokenizer, max_new: int, context: int):
    for number, question in enumerate(questions, 1):
        num_tokens = sum(len(tok.chat(text)) + max_new for text in question["turns"])
        if num_tokens > context:
            raise UserError(
                f"prompt {number} may need {num_tokens} tokens with its answers, more than the "
                f"context of {context}: shorten it or lower --max-new"
            )


def answer_turn(model: Llama, tok: Tokenizer, group: list[dict], turn: int, **sampling):
    """Add the response to one turn, by number, to the questions that have it."""
    with_turn = [q for q in group if len(q["turns"]) > turn]
    for temperature in sorted({q["temperature"] for q in with_turn}):
        questions = [q for q in with_turn if q["temperature"] == temperature]
        rows = [{"id": q["number"], "turns": conversation(q, turn)} for q in questions]
        responses = respond(model, tok, rows, n=1, temperature=temperature, **sampling)
        for question, row in zip(questions, responses, strict=True):
            question["responses"].append(row["response"])
            question["truncated"].append(row["truncated"])


def conversation(question: dict, turn: int) -> list[str]:
    """User, model, user and so on: all up to a turn, which sees the responses to those before."""
    texts = []
    for said, response in zip(question["turns"][:turn], question["responses"], strict=True):
        texts += [said, response]
    return [*texts, question["turns"][turn]]


# ---- answers out -----------------------------------------------------------------------------


def alpaca_eval_row(question: dict, name: str, dataset: str) -> dict:
    return {
        "instruction": question["turns"][0],
        "output": question["responses"][0],
        "generator": name,
        "dataset": question.get("dataset", dataset),
    }


def mt_bench_row(question: dict, name: str) -> dict:
    return {
        "question_id": question["question_id"],
        "answer_id": f"{name}-{question['question_id']}",
        "model_id": name,
        "choices": [{"index": 0, "turns": question["responses"]}],
        "tstamp": time.time(),
    }


PROMPT_KEYS = ("prompt", "instruction", "input", "turns")
# What a row of a prompt file may hold of another's answer.
ANSWER_KEYS = ("output", "response", "generator", "k", "tokens", "truncated")


def plain_row(question: dict) -> dict:
    """The prompt and the response, with what else the row of the prompt file holds, as its id."""
    others = dict(question["row"])
    for key in PROMPT_KEYS + ANSWER_KEYS:
        others.pop(key, None)
    return others | {
        "prompt": question["turns"][0],
        "response": question["responses"][0],
        "truncated": question["truncated"][0],
    }


def answer_file(questions: list[dict], name: str, dataset: str, suffix: str) -> str:
    """The text of a file: AlpacaEval's .json, or a .jsonl of MT-Bench's answers or plain rows."""
    if suffix == ".json":
        rows = [alpaca_eval_row(question, name, dataset) for question in questions]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    lines = []
    for question in questions:
        row = mt_bench_row(question, name) if "question_id" in question else plain_row(question)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


# ---- the command -----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.answer", description="Answer a file of prompts with a checkpoint."
    )
    add = parser.add_argument
    add("folder", type=Path, help="the model: config.json, model*.safetensors, tokenizer.model")
    add("prompts", type=Path, help=".json list or .jsonl with prompt, instruction or turns")
    add("out", type=Path, help=".json for AlpacaEval; .jsonl for rows and MT-Bench's answers")
    add("--name", help="what to call the model in the file (the name of its folder)")
    add("--batch", type=int, default=64, help="prompts answered side by side (64)")
    add("--temperature", type=float, help="0 is greedy (that of the model's run)")
    add("--top-p", type=float, help="(that of the model's run)")
    add("--max-new", type=int, default=256, help="most tokens of an answer (256)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.name = args.name or args.folder.resolve().name
    check_args(args)
    return args


def check_args(args: argparse.Namespace):
    out = args.out
    if out.suffix not in (".json", ".jsonl"):
        raise UserError(f"{out}: name it .json (AlpacaEval) or .jsonl (rows, MT-Bench)")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: its folder is not there or may not be written; make it first")
    if out.resolve() == args.prompts.resolve():
        raise UserError(f"{out}: is the file of prompts; name another file for the answers")
    if args.batch < 1:
        raise UserError("--batch is at least 1")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    questions = read_questions(args.prompts)
    if args.out.suffix == ".json" and any(len(q["turns"]) > 1 for q in questions):
        raise UserError(
            f"{args.prompts}: has questions of several turns, for which AlpacaEval has no place; "
            f"name the answers {args.out.with_suffix('.jsonl')}"
        )
    set_sampling(args, questions)
    num_answers = write_answers(args, questions)
    if num_answers < len(questions):
        sys.exit(
            f"interrupted: {args.out} has the first {num_answers} of {len(questions)} answers"
        )
    temperatures = sorted({q["temperature"] for q in questions})
    text = ", ".join(f"{t:g}" for t in temperatures)
    if len(temperatures) > 1:
        text += " by category"
    print(
        f"{num_answers} answers written to {args.out} (temperature {text}, top-p {args.top_p:g})"
    )


def set_sampling(args: argparse.Namespace, questions: list[dict]):
    """Give every question its temperature, and args.top_p its value where no flag did."""
    settings = sampling_settings(args.folder)
    if args.top_p is None:
        args.top_p = settings["top_p"]
    for question in questions:
        if args.temperature is None:
            question["temperature"] = question_temperature(question, settings["temperature"])
        else:
            question["temperature"] = args.temperature


def write_answers(args: argparse.Namespace, questions: list[dict]) -> int:
    """Write the file anew after every group; Ctrl-C ends it. Returns how many there are."""
    questions_so_far = []
    with suppress(KeyboardInterrupt):
        model, tok = load_for_sampling(args.folder)
        sampling = {"batch": args.batch, "max_new": args.max_new, "top_p": args.top_p}
        for group in answer_questions(model, tok, questions, key=(args.seed,), **sampling):
            questions_so_far += group
            text = answer_file(questions_so_far, args.name, args.prompts.stem, args.out.suffix)
            atomic_write(args.out, text)
    if not questions_so_far:
        sys.exit(f"interrupted before the first answers; {args.out} is not written")
    return len(questions_so_far)


if __name__ == "__main__":
    run_command(main)
