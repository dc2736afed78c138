"""Open Assistant exports -> a data folder for train.py: instruction pairs and human rankings (paper, 2.1).

    python data/oasst/prepare.py FILE [FILE ...] --out DIR [--valid FILE ... | --holdout 0.1] [--exclude FILE ...]

Every shape of export becomes flat messages first (trees, nested or flat messages, HF rows; nulls kept or dropped;
plain or gzip), so each rule below exists once. Only the first turn counts: a root prompt and the assistant's
direct replies. A prompt is for IFT (its best-ranked reply makes a row of ift.jsonl) or for EFT (two or more ranked
replies make a row of eft_ranked.jsonl), never for both.
Held-out prompts (--valid, --holdout) go to eft_eval.jsonl and test.jsonl instead and are never trained on, nor are
those of --exclude. Drops are counted by reason and printed; what cannot be read ends the run before any file is
touched.

Left out: the judgements of eft.jsonl (train.py has the SFT baseline write them), valid.jsonl, later turns, labels.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = ("judge.txt", "propose.txt")
ALLOWANCE = 2  # EFT prompts set aside, in times of what --eft-size needs: half of the judgements may be dropped
FIELDS = ("role", "text", "lang", "rank", "deleted", "review_result", "synthetic")  # what the rules read


class BadInput(Exception):
    """Input that a person has to mend; its text is the line to print, `WHERE: what; what to do`."""


@dataclass
class Prompt:
    id: str
    text: str
    replies: list[dict]  # the usable ones with a rank, best first


# ---- files -> flat messages


def read_lines(path: str):
    """Yield (number, bytes) of each line. Gzip is known by its first bytes; only "\\n" ends a line."""
    number = 0
    with open(path, "rb") as file:
        try:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if packed else file as lines:
                for number, line in enumerate(lines, 1):
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            what = f"gzip data cut short or damaged ({err})"
            raise BadInput(f"{path}:{number + 1}: {what}; fetch the file again") from None


def read_rows(path: str, parse=json.loads):
    """Yield ("FILE:LINE", object) of each JSON line. Blank lines are skipped; no row at all is an error."""
    where = None
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as err:
            what = f"byte {err.start + 1} of the line is not UTF-8"
            raise BadInput(f"{where}: {what}; give a .jsonl or .jsonl.gz export") from None
        except (ValueError, RecursionError) as err:
            what = f"malformed JSON ({getattr(err, 'msg', err)})"
            raise BadInput(f"{where}: {what}; mend the line or fetch the file again") from None
        yield where, row
    if where is None:
        raise BadInput(f"{path}:1: no rows in the file; fetch it again")


def unfold(row: dict, where: str) -> list[dict]:
    """The messages of one line, parents first. Exports drop nulls or keep them: a missing key is a null."""

    def expect(good: bool, what: str) -> None:
        if not good:
            raise BadInput(f"{where}: {what}; give a tree or message export of Open Assistant")

    expect(isinstance(row, dict), "not a JSON object")
    known = "message_id" in row or "message_tree_id" in row
    expect(known, "an object of unknown kind, without message_id and message_tree_id")
    top = row if "message_id" in row else row.get("prompt")  # in this order: a flat row names its tree as well
    messages, stack = [], [] if top is None else [(top, None)]
    while stack:
        node, parent = stack.pop()
        expect(isinstance(node, dict), "a message is not a JSON object")
        ident, rank, replies = node.get("message_id"), node.get("rank"), node.get("replies")
        parent = parent or node.get("parent_id")
        expect(isinstance(ident, str) and ident, "message_id is not a string")
        expect(isinstance(parent, str | None), "parent_id is not a string")
        expect(rank is None or isinstance(rank, int | float) and rank % 1 == 0, "rank is not a whole number")
        expect(isinstance(replies, list | None), "replies is not a list")
        stack.extend((reply, ident) for reply in reversed(replies or []))
        message = {"id": ident, "parent": parent or None, "tree_state": row.get("tree_state")}
        messages.append(message | {field: node.get(field) for field in FIELDS})
    return messages


def gather(paths: list[str], counts: Counter) -> dict[str, dict]:
    """All messages by id, in file order. A nested tree met again is dropped whole, lest two rankings mix."""
    messages = {}
    for path in paths:
        for where, row in read_rows(path):
            found = unfold(row, where)
            counts["messages read"] += len(found)
            counts["trees read"] += not found or found[0]["parent"] is None
            if not found:
                counts["trees dropped: no prompt"] += 1
            elif found[0]["id"] in messages:
                counts[f"{'messages' if found[0]['parent'] else 'trees'} dropped: duplicate"] += 1
                continue
            for message in found:
                if messages.setdefault(message["id"], message) is not message:
                    counts["messages dropped: duplicate"] += 1
    return messages


# ---- messages -> prompts with ranked replies


def fault(message: dict, role: str, args: argparse.Namespace) -> str | None:
    """The first reason not to use a message as the prompter's or the assistant's turn; None: it is fine."""
    text, lang = message["text"], str(message["lang"]).lower()
    checks = {
        "unknown role": message["role"] not in ("prompter", "assistant"),
        f"not by the {role}": message["role"] != role,
        "deleted": message["deleted"],
        "negative review": message["review_result"] is False,  # null means too few reviews, not a refusal
        "synthetic": message["synthetic"] and not args.keep_synthetic,
        f"language not {args.lang}": not f"{lang}-".startswith(f"{args.lang.lower()}-"),  # en-GB is en
        "no text": not isinstance(text, str) or not text.strip(),
        "broken text": any("\ud800" <= char <= "\udfff" for char in str(text)),  # half a pair: not in UTF-8
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def rootless(message: dict, messages: dict[str, dict]) -> str | None:
    """Why no root leads to a message: files cut by language lack some parents. None: one does."""
    seen, ident = set(), message["id"]
    while ident in messages and ident not in seen:
        seen.add(ident)
        ident = messages[ident]["parent"]
    return None if ident is None else "parents in a circle" if ident in seen else "orphan"


def key(text: str) -> str:
    """Two prompts with the same key are the same prompt: blanks and capitals do not count."""
    return " ".join(text.casefold().split())


def either(line: str) -> dict | str:
    """A line of JSON, an object or a string, or of plain text."""
    try:
        row = json.loads(line)
    except ValueError:
        if line.lstrip().startswith("{"):
            raise
        return line
    return row if isinstance(row, dict | str) else line


def excluded(path: str) -> set[str]:
    """Keys of the prompts in a file: a JSON list, or lines of JSON (both of objects or strings) or of plain text."""
    whole = b"".join(line for _, line in read_lines(path)).removeprefix(b"\xef\xbb\xbf").lstrip()
    if whole.startswith(b"["):
        try:
            rows = [(f"{path}: item {i}", row) for i, row in enumerate(json.loads(whole.decode()), 1)]
        except (ValueError, RecursionError) as err:
            what = f"begins with [ but is no JSON list in UTF-8 ({getattr(err, 'msg', err)})"
            raise BadInput(f"{path}: {what}; mend the file or fetch it again") from None
    else:
        rows = read_rows(path, either)
    keys = set()
    for where, row in rows:
        text = (row.get("instruction") or row.get("prompt")) if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{where}: no text in instruction or prompt; give a list of prompts, or one a line")
        keys.add(key(text))
    if not keys:
        raise BadInput(f"{path}: no prompt in the file; fetch it again")
    print(f"{path}: {len(keys)} different prompts to leave out")
    return keys


def select(messages: dict[str, dict], counts: Counter, args: argparse.Namespace, taken: dict) -> list[Prompt]:
    """Usable root prompts in file order, with usable ranked replies. `taken`: ids and keys to leave alone -> why."""
    children = {}
    for message in messages.values():
        children.setdefault(message["parent"], []).append(message)
        if reason := rootless(message, messages):
            counts[f"messages dropped: {reason}"] += 1
    prompts = []
    for root in children.get(None, []):
        reason = fault(root, "prompter", args)
        if reason is None and root["tree_state"] not in (None, "ready_for_export"):
            reason = "not ready for export"  # still growing, given up, halted by a moderator
        if reason is None:
            reason = taken.get(root["id"]) or taken.get(key(root["text"]))
        if reason:
            counts[f"trees dropped: {reason}"] += 1
            continue
        replies = []
        for reply in children.get(root["id"], []):
            if reason := fault(reply, "assistant", args) or ("no rank" if reply["rank"] is None else None):
                counts[f"replies dropped: {reason}"] += 1
            else:
                replies.append(reply)
        replies.sort(key=lambda reply: reply["rank"])  # ranks are never indices: siblings may have been removed
        prompts.append(Prompt(root["id"], root["text"], replies))
        counts["prompts without a ranked reply, no row"] += not replies
        counts["prompts with one ranked reply, no ranking"] += len(replies) == 1
        counts["pairs whose best reply is not rank 0"] += bool(replies) and replies[0]["rank"] > 0
        counts["rankings with ties"] += len({reply["rank"] for reply in replies}) < len(replies)
    return prompts


def load(paths: list[str], args: argparse.Namespace, taken: dict) -> list[Prompt]:
    """Files -> prompts, with a printed account of what was read, dropped and found."""
    counts = Counter({f"trees dropped: {reason}": 0 for reason in taken.values()})
    prompts = select(gather(paths, counts), counts, args, taken)
    print(*paths, sep=", ")
    for what, number in counts.items():
        if number or "files" in what:  # 0 says that --exclude met none: is it the right file?
            print(f"  {number:7} {what}")
    print(f"  found: {summary(prompts)}")
    return prompts


# ---- prompts -> rows -> files


def ift_rows(prompts: list[Prompt]) -> list[dict]:
    return [{"prompt": p.text, "response": p.replies[0]["text"]} for p in prompts if p.replies]


def ranked_rows(prompts: list[Prompt]) -> list[dict]:
    """Rankings of two or more replies. Ranks become dense (0, 2 -> 0, 1); equal ranks stay equal."""
    rows = []
    for prompt in (p for p in prompts if len(p.replies) > 1):
        levels = sorted({reply["rank"] for reply in prompt.replies})
        ranks = [levels.index(reply["rank"]) for reply in prompt.replies]
        rows.append({"prompt": prompt.text, "responses": [r["text"] for r in prompt.replies], "ranks": ranks})
    return rows


def summary(prompts: list[Prompt]) -> str:
    ranked = [len(row["ranks"]) for row in ranked_rows(prompts)]
    return f"{len(ift_rows(prompts))} IFT pairs, {len(ranked)} ranked prompts with {sum(ranked)} replies"


def test_rows(prompts: list[Prompt], size: int, seed: int) -> list[dict]:
    """Up to `size` different prompts drawn with the seed, in file order. They need no ranked reply."""
    texts = list({key(p.text): p.text for p in reversed(prompts)}.values())[::-1]  # of twins, the first
    drawn = random.Random(seed).sample(range(len(texts)), min(size, len(texts)))
    return [{"prompt": texts[i]} for i in sorted(drawn)]


def draw(prompt: Prompt, seed: int) -> float:
    """A number in [0, 1) by a hash of the text, not of the id: a prompt asked twice must not land on both sides."""
    digest = hashlib.sha256(f"{seed}:{key(prompt.text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def divide(prompts: list[Prompt], args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for IFT and prompts for EFT, none in both (paper, 3.1). Only rankings serve EFT, all serve IFT.

    EFT wants as many as --eft-size judgements take; where prompts are too few for both, both shrink alike.
    """
    usable, ranked = ([p for p in prompts if len(p.replies) >= least] for least in (1, 2))
    mean = sum(len(p.replies) for p in ranked) / max(1, len(ranked))
    wanted = math.ceil(ALLOWANCE * args.eft_size / mean) if ranked else 0
    count = round(wanted * min(1, len(usable) / (args.ift_size + wanted)))
    drawn = {key(p.text) for p in sorted(ranked, key=lambda p: draw(p, args.seed))[:count]}
    eft = [p for p in ranked if key(p.text) in drawn]
    rest = [p for p in usable if key(p.text) not in drawn]
    ift = {p.id for p in sorted(rest, key=lambda p: draw(p, args.seed))[: args.ift_size]}
    ift = [p for p in rest if p.id in ift]
    print(f"  wanted: {args.ift_size} prompts for IFT and {wanted} for EFT (enough for {args.eft_size} judgements:")
    print(f"  {mean:.2f} replies a prompt, and {ALLOWANCE} times as many, since some judgements will be dropped)")
    left = len(usable) - len(ift) - len(eft)
    print(f"  divided: {len(ift)} prompts for IFT and {len(eft)} for EFT, {left} left over")
    return ift, eft


def write(out: Path, files: dict[str, bytes]) -> None:
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


def prepare(args: argparse.Namespace) -> None:
    """The whole run: read, hold out, write. A table without rows is not written; train.py can do without some."""
    out, split = Path(args.out), bool(args.valid or args.holdout)
    files = {name: (HERE / name).read_bytes() for name in TEMPLATES}
    taken = {k: "in the --exclude files" for path in args.exclude for k in excluded(path)}
    held = load(args.valid, args, {}) if args.valid else []
    taken |= {k: "in the --valid files too" for p in held for k in (p.id, key(p.text))}
    prompts = load(args.files, args, taken)
    if args.holdout:
        held = [p for p in prompts if draw(p, args.seed) < args.holdout]
        prompts = [p for p in prompts if draw(p, args.seed) >= args.holdout]
        print(f"  held out: {summary(held)}")
    ift, eft = divide(prompts, args)
    tables = {
        "ift.jsonl": ift_rows(ift),
        "eft_ranked.jsonl": ranked_rows(eft),
        "eft_eval.jsonl": ranked_rows(held),
        "test.jsonl": test_rows(held, args.test_size, args.seed),
    }
    for name, rows in tables.items():
        if rows:
            files[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        elif name == "ift.jsonl" or name == "test.jsonl" and split:
            raise BadInput(f"{out / name}: would have no row; see the counts above, --lang, --exclude and --holdout")
        elif (out / name).exists():
            what = "is of another run, and its prompts might be on both sides now"
            raise BadInput(f"{out / name}: {what}; remove it, or give --valid or --holdout")
    write(out, files)
    for name, rows in tables.items():
        replies = sum(len(row["ranks"]) for row in rows if "ranks" in row)
        extra = f", {replies} replies" if name.startswith("eft") else ""
        print(f"wrote {out / name}: {len(rows)} rows{extra}" if rows else f"not written, no rows: {out / name}")
    if not split:
        print("nothing is held out: every prompt may be trained on, and there is nothing to examine the models with;")
        print(
            "give --valid FILE ... (an export of other prompts) or --holdout 0.1 to get eft_eval.jsonl and test.jsonl"
        )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="exports to train on")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--valid", nargs="+", default=[], metavar="FILE", help="exports to examine on")
    split.add_argument("--holdout", type=float, default=0.0, help="or: the share of the prompts to examine on")
    parser.add_argument("--ift-size", type=int, default=3200, help="most rows of ift.jsonl")
    parser.add_argument("--eft-size", type=int, default=1630, help="judgements to make of eft_ranked.jsonl")
    exclude = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    parser.add_argument("--exclude", **exclude, help="prompts never to train on: JSON (lines) or a prompt a line")
    parser.add_argument("--keep-synthetic", action="store_true", help="keep messages that a model wrote")
    parser.add_argument("--lang", default="en", help="language of prompts and replies")
    parser.add_argument("--test-size", type=int, default=256, help="most prompts in test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
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
    except BadInput as err:
        print(f"error: {err}", file=sys.stderr)
    except OSError as err:
        print(f"error: {err.filename or args.out}: {err.strerror or err}; check the path", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
