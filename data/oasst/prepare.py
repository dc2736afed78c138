"""Open Assistant exports -> a data folder for train.py: instruction pairs and human rankings
(paper, section 2.1).

    python data/oasst/prepare.py FILE [FILE ...] --out DIR [--valid FILE ... | --holdout 0.1]
                                 [--exclude FILE ...]

Every shape of export becomes flat messages first (trees, nested or flat messages, rows of the
Hugging Face dataset; nulls kept or dropped; plain or gzip), so that each rule below exists once.
Only the first turn counts: a root prompt and the assistant's direct replies. A prompt is for IFT
(its best-ranked reply makes a row of ift.jsonl) or for EFT (two or more ranked replies make a row
of eft_ranked.jsonl), never for both.
Held-out prompts (--valid, --holdout) go to eft_eval.jsonl and test.jsonl instead and are never
trained on, nor are those of --exclude. Drops are counted by reason and printed. What cannot be
read ends the run before any file is touched.

Left out: the judgements of eft.jsonl (train.py has the SFT baseline write them), valid.jsonl,
later turns, labels.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
TEMPLATES = ("judge.txt", "propose.txt")
ALLOWANCE = 2  # EFT prompts for each that --eft-size needs: half of the judgements may be dropped
GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
PARQUET_MAGIC = b"PAR1"

# What the rules below read of a message.
FIELDS = ("role", "text", "lang", "rank", "deleted", "review_result", "synthetic")


class UserError(Exception):
    """Input that a person has to mend. Its text is one line: WHERE: what; what to do."""


@dataclass
class Prompt:
    id: str
    text: str
    replies: list[dict]  # the usable ones with a rank, best first


# ---- files -> flat messages


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON: a data frame writes it in place of null")


EXPORT_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line. Gzip is known by its first bytes; only "\\n" ends a line."""
    number = 0
    with open(path, "rb") as file:
        is_gzip = file.peek(2)[:2] == GZIP_MAGIC
        try:
            with gzip.open(file) if is_gzip else file as lines:
                for number, line in enumerate(lines, 1):
                    if number == 1 and line.startswith(PARQUET_MAGIC):
                        remedy = "write its rows as JSON lines, such as by to_json of datasets"
                        raise UserError(f"{path}: a Parquet file; {remedy}")
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"gzip data cut short or damaged ({error})"
            raise UserError(f"{path}:{number + 1}: {what}; fetch the file again") from None


def read_rows(path: str, parse=EXPORT_DECODER.decode) -> Iterator[tuple[str, object]]:
    """("FILE:LINE", object) of each JSON line. Blank lines are skipped; no row is an error."""
    where = None
    for number, line in read_lines(path):
        if where is None and line.removeprefix(UTF8_BOM).lstrip().startswith(b"["):
            remedy = "write one object a line, such as by jq -c '.[]'"
            raise UserError(f"{path}:{number}: begins a JSON list; {remedy}")
        if line.strip():
            where = f"{path}:{number}"
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield where, parse_line(line, where, encoding, parse)
    if where is None:
        raise UserError(f"{path}:1: no rows in the file; fetch it again")


def parse_line(line: bytes, where: str, encoding: str, parse) -> object:
    try:
        return parse(line.decode(encoding))
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} of the line is not UTF-8"
        raise UserError(f"{where}: {what}; give a .jsonl or .jsonl.gz export") from None
    except (ValueError, RecursionError) as error:
        what = f"malformed JSON ({getattr(error, 'msg', error)})"
        raise UserError(f"{where}: {what}; mend the line or fetch the file again") from None


def expect(condition: bool, where: str, what: str):
    if not condition:
        raise UserError(f"{where}: {what}; give a tree or message export of Open Assistant")


def flatten(row: object, where: str) -> list[dict]:
    """The messages of one line, parents first."""
    expect(isinstance(row, dict), where, "not a JSON object")
    if "message_id" in row:  # asked first: a flat message names its tree as well
        root = row
    else:
        is_tree = "message_tree_id" in row
        what = "an object of unknown kind, without message_id and message_tree_id"
        expect(is_tree, where, what)
        root = row.get("prompt")
    messages = []
    stack = [] if root is None else [(root, None)]
    while stack:
        node, parent = stack.pop()
        check_message(node, parent, where)
        message = {"id": node["message_id"], "tree_state": row.get("tree_state")}
        message["parent"] = parent or node.get("parent_id") or None
        for field in FIELDS:  # exports drop nulls or keep them: a missing key is a null
            message[field] = node.get(field)
        messages.append(message)
        for reply in reversed(node.get("replies") or []):
            stack.append((reply, message["id"]))
    return messages


def check_message(node: object, parent: str | None, where: str):
    """UserError where a message does not have the types that the rules rely on."""
    expect(isinstance(node, dict), where, "a message is not a JSON object")
    ident = node.get("message_id")
    expect(isinstance(ident, str) and ident, where, "message_id is not a string")
    parent = parent or node.get("parent_id")
    expect(isinstance(parent, str | None), where, "parent_id is not a string")
    rank = node.get("rank")
    is_whole = isinstance(rank, int | float) and rank % 1 == 0
    expect(rank is None or is_whole, where, "rank is not a whole number")
    expect(isinstance(node.get("replies"), list | None), where, "replies is not a list")


def read_messages(paths: list[str], counts: Counter) -> dict[str, dict]:
    """All messages by id, in file order."""
    messages = {}
    for path in paths:
        for where, row in read_rows(path):
            tree = flatten(row, where)
            counts["messages read"] += len(tree)
            counts["trees read"] += not tree or tree[0]["parent"] is None
            add_messages(messages, tree, counts)
    return messages


def add_messages(messages: dict[str, dict], tree: list[dict], counts: Counter):
    """Add those of one line. A nested tree met again is dropped whole, lest two rankings mix."""
    if not tree:
        counts["trees dropped: no prompt"] += 1
        return
    if tree[0]["id"] in messages:
        what = "messages" if tree[0]["parent"] else "trees"
        counts[f"{what} dropped: duplicate"] += 1
        return
    for message in tree:
        if message["id"] in messages:
            counts["messages dropped: duplicate"] += 1
        else:
            messages[message["id"]] = message


# ---- messages -> prompts with ranked replies


def why_unusable(message: dict, role: str, args: argparse.Namespace) -> str | None:
    """The first reason not to take a message as the turn of that role; None: it is fine."""
    text = message["text"]
    lang = str(message["lang"]).lower()
    reasons = {
        "unknown role": message["role"] not in ("prompter", "assistant"),
        f"not by the {role}": message["role"] != role,
        "deleted": message["deleted"],
        "negative review": message["review_result"] is False,  # null: too few reviews, no refusal
        "synthetic": message["synthetic"] and not args.keep_synthetic,
        f"language not {args.lang}": not f"{lang}-".startswith(f"{args.lang.lower()}-"),  # en-GB
        "no text": not isinstance(text, str) or not text.strip(),
        "broken text": has_lone_surrogate(str(text)),
    }
    for reason, applies in reasons.items():
        if applies:
            return reason
    return None


def has_lone_surrogate(text: str) -> bool:
    """Half of a surrogate pair, which JSON can escape and UTF-8 cannot hold?"""
    return any("\ud800" <= char <= "\udfff" for char in text)


def why_rootless(message: dict, messages: dict[str, dict]) -> str | None:
    """Why no root leads to a message: files cut by language lack some parents. None: one does."""
    ident, path = message["id"], set()
    while ident in messages and ident not in path:
        path.add(ident)
        ident = messages[ident]["parent"]
    if ident is None:
        return None
    return "parents in a circle" if ident in path else "orphan"


def group_by_parent(messages: dict[str, dict], counts: Counter) -> dict[str | None, list[dict]]:
    """Parent id -> its direct replies; None -> the roots. Messages without a root are counted."""
    children = {}
    for message in messages.values():
        children.setdefault(message["parent"], []).append(message)
        reason = why_rootless(message, messages)
        if reason:
            counts[f"messages dropped: {reason}"] += 1
    return children


def why_no_prompt(root: dict, args: argparse.Namespace, reserved: dict[str, str]) -> str | None:
    """The first reason not to take a root as a prompt; None: it is fine."""
    reason = why_unusable(root, "prompter", args)
    if reason:
        return reason
    if root["tree_state"] not in (None, "ready_for_export"):
        return "not ready for export"  # still growing, given up, halted by a moderator
    return reserved.get(root["id"]) or reserved.get(key_of(root["text"]))


def usable_replies(replies: list[dict], counts: Counter, args: argparse.Namespace) -> list[dict]:
    """The ranked replies, best first."""
    ranked = []
    for reply in replies:
        reason = why_unusable(reply, "assistant", args)
        if reason is None and reply["rank"] is None:
            reason = "no rank"
        if reason:
            counts[f"replies dropped: {reason}"] += 1
        else:
            ranked.append(reply)
    # Ranks are no list indices: siblings may have been removed.
    return sorted(ranked, key=lambda reply: reply["rank"])


def select(
    messages: dict[str, dict], counts: Counter, args: argparse.Namespace, reserved: dict[str, str]
) -> list[Prompt]:
    """Usable root prompts in file order. `reserved`: ids and keys to leave alone -> why."""
    children = group_by_parent(messages, counts)
    prompts = []
    for root in children.get(None, []):
        reason = why_no_prompt(root, args, reserved)
        if reason:
            counts[f"trees dropped: {reason}"] += 1
            continue
        replies = usable_replies(children.get(root["id"], []), counts, args)
        ranks = [reply["rank"] for reply in replies]
        prompts.append(Prompt(root["id"], root["text"], replies))
        counts["prompts without a ranked reply, no row"] += len(ranks) == 0
        counts["prompts with one ranked reply, no ranking"] += len(ranks) == 1
        counts["pairs whose best reply is not rank 0"] += len(ranks) > 0 and ranks[0] > 0
        counts["rankings with ties"] += len(set(ranks)) < len(ranks)
    return prompts


def load(paths: list[str], args: argparse.Namespace, reserved: dict[str, str]) -> list[Prompt]:
    """Files -> prompts, with a printed account of what was read, dropped and found."""
    counts = Counter({f"trees dropped: {reason}": 0 for reason in reserved.values()})
    prompts = select(read_messages(paths, counts), counts, args, reserved)
    print(*paths, sep=", ")
    for what, number in counts.items():
        if number or "files" in what:  # 0 says that --exclude met none: is it the right file?
            print(f"  {number:7} {what}")
    print(f"  found: {summary(prompts)}")
    return prompts


# ---- prompts to leave out --------------------------------------------------------------------


def key_of(text: str) -> str:
    """Prompts with the same key are the same prompt: blanks and capitals do not count."""
    return " ".join(text.casefold().split())


def parse_json_or_text(line: str) -> dict | str:
    """A line of JSON (an object or a string) or of plain text."""
    try:
        row = json.loads(line)
    except ValueError:
        if line.lstrip().startswith("{"):
            raise
        return line
    return row if isinstance(row, dict | str) else line


def read_json_list(path: str, data: bytes) -> list[tuple[str, object]]:
    """("FILE: item I", object) of each item of a JSON list."""
    try:
        items = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        what = f"begins with [ but is no JSON list in UTF-8 ({reason})"
        raise UserError(f"{path}: {what}; mend the file or fetch it again") from None
    return [(f"{path}: item {number}", item) for number, item in enumerate(items, 1)]


def prompt_of(row: dict) -> object:
    """A row's prompt. Alpaca's instruction is joined with the input that it is about, by a line's
    end: key_of makes all blanks one."""
    instruction, text = row.get("instruction"), row.get("input")
    if not instruction:
        return row.get("prompt")
    if text is None:
        return instruction
    both_texts = isinstance(instruction, str) and isinstance(text, str)
    return f"{instruction}\n{text}" if both_texts else None


def read_keys(path: str) -> set[str]:
    """Keys of the prompts in a file: a JSON list, or lines of JSON or of plain text."""
    data = b"".join(line for _, line in read_lines(path))
    data = data.removeprefix(UTF8_BOM).lstrip()
    if data.startswith(b"["):
        rows = read_json_list(path, data)
    else:
        rows = read_rows(path, parse_json_or_text)
    keys = set()
    for where, row in rows:
        text = prompt_of(row) if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            what = "no text in instruction or prompt, or an input that is no text"
            raise UserError(f"{where}: {what}; give a list of prompts, or one a line")
        keys.add(key_of(text))
    if not keys:
        raise UserError(f"{path}: no prompt in the file; fetch it again")
    print(f"{path}: {len(keys)} different prompts to leave out")
    return keys


# ---- prompts -> rows


def ift_rows(prompts: list[Prompt]) -> list[dict]:
    """Prompts with their best reply."""
    rows = []
    for prompt in prompts:
        if prompt.replies:
            rows.append({"prompt": prompt.text, "response": prompt.replies[0]["text"]})
    return rows


def ranked_rows(prompts: list[Prompt]) -> list[dict]:
    """Rankings of two or more replies. Ranks become dense (0, 2 -> 0, 1); ties stay ties."""
    rows = []
    for prompt in prompts:
        if len(prompt.replies) < 2:
            continue
        levels = sorted({reply["rank"] for reply in prompt.replies})
        ranks = [levels.index(reply["rank"]) for reply in prompt.replies]
        responses = [reply["text"] for reply in prompt.replies]
        rows.append({"prompt": prompt.text, "responses": responses, "ranks": ranks})
    return rows


def num_replies(rows: list[dict]) -> int:
    return sum(len(row["ranks"]) for row in rows)


def summary(prompts: list[Prompt]) -> str:
    num_pairs = len(ift_rows(prompts))
    ranked = ranked_rows(prompts)
    ranked_text = f"{len(ranked)} ranked prompts with {num_replies(ranked)} replies"
    return f"{num_pairs} IFT pairs, {ranked_text}"


def test_rows(prompts: list[Prompt], size: int, seed: int) -> list[dict]:
    """Up to `size` different prompts drawn with the seed, in file order; without replies too."""
    texts = {}
    for prompt in prompts:
        texts.setdefault(key_of(prompt.text), prompt.text)  # of twins, the first
    numbers = Random(seed).sample(range(len(texts)), min(size, len(texts)))
    texts = list(texts.values())
    return [{"prompt": texts[i]} for i in sorted(numbers)]


def hash_prompt(prompt: Prompt, seed: int) -> float:
    """A number in [0, 1) that a prompt asked twice has twice, so that both go to one side."""
    digest = hashlib.sha256(f"{seed}:{key_of(prompt.text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def eft_prompt_count(num_usable: int, ranked: list[Prompt], args: argparse.Namespace) -> int:
    """How many prompts EFT gets: what --eft-size judgements take, one for each reply. Where there
    are too few prompts for IFT and EFT, both get the same part of what they want."""
    if not ranked:
        mean_replies, target = 0, 0
    else:
        mean_replies = sum(len(prompt.replies) for prompt in ranked) / len(ranked)
        target = math.ceil(ALLOWANCE * args.eft_size / mean_replies)
    ift = f"{args.ift_size} prompts for IFT"
    print(f"  wanted: {ift} and {target} for EFT (enough for {args.eft_size} judgements:")
    reason = "since some judgements will be dropped"
    print(f"  {mean_replies:.2f} replies a prompt, and {ALLOWANCE} times as many, {reason})")
    return round(target * min(1, num_usable / (args.ift_size + target)))


def divide(prompts: list[Prompt], args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for IFT and prompts for EFT, none in both (paper, section 3.1). Only rankings serve
    EFT, all serve IFT; a hash decides, so that more trees do not move the others."""

    def in_hash_order(candidates: list[Prompt]) -> list[Prompt]:
        return sorted(candidates, key=lambda prompt: hash_prompt(prompt, args.seed))

    usable = [prompt for prompt in prompts if prompt.replies]
    ranked = [prompt for prompt in prompts if len(prompt.replies) > 1]
    count = eft_prompt_count(len(usable), ranked, args)
    eft_keys = {key_of(prompt.text) for prompt in in_hash_order(ranked)[:count]}
    eft = [prompt for prompt in ranked if key_of(prompt.text) in eft_keys]
    rest = [prompt for prompt in usable if key_of(prompt.text) not in eft_keys]
    ift_ids = {prompt.id for prompt in in_hash_order(rest)[: args.ift_size]}
    ift = [prompt for prompt in rest if prompt.id in ift_ids]
    left = len(usable) - len(ift) - len(eft)
    print(f"  divided: {len(ift)} prompts for IFT and {len(eft)} for EFT, {left} left over")
    return ift, eft


# ---- the data folder -------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and prompts held out."""
    reserved = {}
    for path in args.exclude:
        for key in read_keys(path):
            reserved[key] = "in the --exclude files"
    held_out = load(args.valid, args, {}) if args.valid else []
    for prompt in held_out:
        reserved[prompt.id] = "in the --valid files too"
        reserved[key_of(prompt.text)] = "in the --valid files too"
    prompts = load(args.files, args, reserved)
    if args.holdout:
        hashes = [hash_prompt(prompt, args.seed) for prompt in prompts]
        rows = list(zip(prompts, hashes, strict=True))
        held_out = [prompt for prompt, number in rows if number < args.holdout]
        prompts = [prompt for prompt, number in rows if number >= args.holdout]
        print(f"  held out: {summary(held_out)}")
    return prompts, held_out


def check_tables(tables: dict[str, list[dict]], out: Path, has_holdout: bool):
    """UserError where a table without rows is one that train.py needs, or lies in `out` from an
    earlier run: its prompts might be on both sides."""
    for name, rows in tables.items():
        if rows:
            continue
        if name == "ift.jsonl" or name == "test.jsonl" and has_holdout:
            remedy = "see the counts above, --lang, --exclude and --holdout"
            raise UserError(f"{out / name}: would have no row; {remedy}")
        if (out / name).exists():
            what = "is of another run, and its prompts might be on both sides now"
            raise UserError(f"{out / name}: {what}; remove it, or give --valid or --holdout")


def write_files(out: Path, files: dict[str, bytes]):
    """Write every file under a temporary name, then rename all: a failure changes nothing."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in files.items():
            (out / f"{name}.tmp").write_bytes(data)
        for name in files:
            os.replace(out / f"{name}.tmp", out / name)
    finally:
        for name in files:
            (out / f"{name}.tmp").unlink(missing_ok=True)


def print_tables(tables: dict[str, list[dict]], out: Path):
    for name, rows in tables.items():
        if not rows:
            print(f"not written, no rows: {out / name}")
        elif name.startswith("eft"):
            print(f"wrote {out / name}: {len(rows)} rows, {num_replies(rows)} replies")
        else:
            print(f"wrote {out / name}: {len(rows)} rows")


def prepare(args: argparse.Namespace):
    """The whole run: read, hold out, divide, write. A table without rows is not written."""
    out = Path(args.out)
    has_holdout = bool(args.valid or args.holdout)
    files = {name: (HERE / name).read_bytes() for name in TEMPLATES}
    prompts, held_out = read_prompts(args)
    ift, eft = divide(prompts, args)
    tables = {
        "ift.jsonl": ift_rows(ift),
        "eft_ranked.jsonl": ranked_rows(eft),
        "eft_eval.jsonl": ranked_rows(held_out),
        "test.jsonl": test_rows(held_out, args.test_size, args.seed),
    }
    check_tables(tables, out, has_holdout)
    for name, rows in tables.items():
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            files[name] = "".join(lines).encode()
    write_files(out, files)
    print_tables(tables, out)
    if not has_holdout:
        print(
            "nothing is held out: every prompt may be trained on, and no model can be evaluated;"
        )
        print("give --valid FILE ... (an export of other prompts) or --holdout 0.1")
        print("to get eft_eval.jsonl and test.jsonl")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="exports to train on")
    add("--out", required=True, metavar="DIR", help="the data folder to write")
    held_out = parser.add_mutually_exclusive_group()
    valid_help = "exports to evaluate on"
    held_out.add_argument("--valid", nargs="+", default=[], metavar="FILE", help=valid_help)
    holdout_help = "or: the part of the prompts to evaluate on"
    held_out.add_argument("--holdout", type=float, default=0.0, help=holdout_help)
    add("--ift-size", type=int, default=3200, help="most rows of ift.jsonl")
    add("--eft-size", type=int, default=1630, help="judgements to make of eft_ranked.jsonl")
    exclude_help = "prompts never to train on: JSON (lines) or a prompt a line"
    files = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    add("--exclude", **files, help=exclude_help)
    add("--keep-synthetic", action="store_true", help="keep messages that a model wrote")
    add("--lang", default="en", help="language of prompts and replies")
    add("--test-size", type=int, default=256, help="most prompts in test.jsonl")
    add("--seed", type=int, default=0, help="of all draws")
    args = parser.parse_args(argv)
    if not 0 <= args.holdout < 1:
        parser.error("--holdout must be at least 0 and below 1")
    if min(args.test_size, args.ift_size) < 1 or args.eft_size < 0:
        parser.error("--test-size and --ift-size must be 1 or more, --eft-size 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        prepare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        path = error.filename or args.out
        reason = error.strerror or error
        print(f"error: {path}: {reason}; check the path", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
