"""scripts/compare.py: two sets of answers -> how often each wins, by a judge outside the loop.

    python -m scripts.compare runs/7b/M3 runs/7b/M2 --judge-url https://host/v1 --judge-model NAME
    python -m scripts.compare runs/7b/M3 gpt4.json --judge-checkpoint FOLDER
    python -m scripts.compare runs/zoo/M3 runs/zoo/M2 --oracle data/zoo/oracle.py

A set of answers is a model folder of a run (its test.jsonl), an AlpacaEval file, or JSON lines
of prompt and response. Prompts are matched by their text.

The judge sees a prompt and both responses, in both orders; a side wins where both verdicts are for
it (paper section 3.1). An oracle grades each response by itself. What an endpoint or a checkpoint
has said is kept in a cache file as soon as it is there, so the same command goes on after a
failure and pays for nothing twice.

Left out: win rates corrected for length, several judges at once, APIs other than OpenAI's chat
completions.
"""

import argparse
import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from judge import fill
from model import UserError, read_shape, write_json
from sample import generate, load_for_sampling, run_command
from scripts.answer import read_questions
from scripts.pages import head_to_head_table, table
from scripts.report import head_to_head, load_oracle, mean, true_grade

# A prompt, and how often it has come before in the file -> the response to it.
Answers = dict[tuple[str, int], str]

# ---- what the judge is asked, and its verdict ------------------------------------------------

COMPARE = """\
Two assistants have answered the same user. Which response helps this user more? What counts is \
that it does what was asked, that it is right and complete, and that it is clear. Which one is \
shown first does not count, nor does length.

<user>
{prompt}
</user>

<response 1>
{first}
</response 1>

<response 2>
{second}
</response 2>

Give your reason in at most 60 words. Then end with one last line, which is "Verdict: 1" if \
response 1 is better, "Verdict: 2" if response 2 is better, or "Verdict: tie" if neither is.
"""
VERDICT_MARKER = re.compile(r"verdict[\s*_]*:[\s*_<\[(`$\"]*", re.IGNORECASE)
# One side, and no second one behind it: "1 or 2", "1, 2", "1/2", "1.5" and "12" are no verdict.
GAP = r"[^\w\n.]*"
SECOND_SIDE = rf"{GAP}(?:(?:or|and|vs\.?){GAP})?(?:1|2|tie)\b"
SIDE = re.compile(rf"(1|2|tie)(?![.,]?\d|[^\W_]|{SECOND_SIDE})", re.IGNORECASE)
VERDICTS = {"1": 1, "2": -1, "tie": 0}


def parse_verdict(text: str) -> int | None:
    """1 where the first response is better, -1 where the second is, 0 for a tie, None: unreadable.

    Give it generated text only. The last `Verdict:` decides: "Verdict: 1 ... **Verdict:** 2" is
    -1, "Verdict: 1 or 2" and "Verdict: 3" are None.
    """
    *before, after = VERDICT_MARKER.split(text)
    if not before:
        return None
    side = SIDE.match(after)
    return VERDICTS[side[1].lower()] if side else None


# ---- two sets of answers ---------------------------------------------------------------------


def read_answers(path: Path) -> Answers:
    """The answers in a model's folder (test.jsonl), an AlpacaEval file or JSON lines."""
    if path.is_dir():
        path = path / "test.jsonl"
    answers = {}
    times_seen = Counter()
    for number, row in enumerate(read_questions(path), 1):
        prompt = row["turns"][0]
        response = row.get("output", row.get("response"))
        if not isinstance(response, str) or len(row["turns"]) > 1:
            raise UserError(
                f"{path}: row {number} has no text as response or output, or several turns; "
                "mend it"
            )
        answers[prompt, times_seen[prompt]] = response
        times_seen[prompt] += 1
    return answers


def judge_both_orders(a: Answers, b: Answers, ask: Callable[[list[str]], dict]) -> list[dict]:
    """Rows {"prompt", "a", "b", "outcome", "a_first", "b_first"} of the prompts in common.

    outcome is 1 where both verdicts are for a, -1 where both are for b, 0 where they differ or
    tie, None where one of them is unreadable. ask(judge prompts) -> {judge prompt: judgement}.
    """
    judge_prompts = {}
    for key in common_prompts(a, b):
        a_first = fill(COMPARE, prompt=key[0], first=a[key], second=b[key])
        b_first = fill(COMPARE, prompt=key[0], first=b[key], second=a[key])
        judge_prompts[key] = a_first, b_first
    judgements = ask([text for both in judge_prompts.values() for text in both])
    rows = []
    for key, (a_first, b_first) in judge_prompts.items():
        row = {"prompt": key[0], "a": a[key], "b": b[key]}
        row["outcome"] = agreed_outcome(
            parse_verdict(judgements[a_first]), parse_verdict(judgements[b_first])
        )
        rows.append(row | {"a_first": judgements[a_first], "b_first": judgements[b_first]})
    return rows


def agreed_outcome(a_first: int | None, b_first: int | None) -> int | None:
    """Verdicts of both orders -> the outcome for a."""
    if a_first is None or b_first is None:
        return None
    return a_first if a_first == -b_first else 0


def judge_by_oracle(a: Answers, b: Answers, oracle) -> list[dict]:
    """Such rows by an oracle's grades, without orders and judgements.

    outcome is None for a prompt that is none of the oracle's world.
    """
    rows = []
    for key in common_prompts(a, b):
        a_grade = true_grade(oracle, key[0], a[key])
        b_grade = true_grade(oracle, key[0], b[key])
        outcome = None
        if a_grade is not None and b_grade is not None:
            outcome = int(np.sign(a_grade - b_grade))
        row = {"prompt": key[0], "a": a[key], "b": b[key], "outcome": outcome}
        rows.append(row | {"a_grade": a_grade, "b_grade": b_grade})
    return rows


def common_prompts(a: Answers, b: Answers) -> list[tuple[str, int]]:
    return [key for key in a if key in b]


def win_rate(a: Answers, b: Answers, rows: list[dict]) -> dict:
    """How often a wins, ties and loses (percent, by head_to_head), and what the counts leave out.

    Raises UserError where no row has a verdict.
    """
    outcomes = [row["outcome"] for row in rows if row["outcome"] is not None]
    if not outcomes:
        raise UserError(
            f"none of {len(rows)} prompts has a verdict that can be read in both orders (what the "
            "judge said is in its cache): take another judge or another --max-tokens"
        )
    result = head_to_head(outcomes, [0] * len(outcomes))
    result["prompts"] = len(rows)
    result["unmatched"] = len(a) + len(b) - 2 * len(rows)
    result["no_verdict"] = len(rows) - len(outcomes)
    result["characters"] = [mean(len(row[side]) for row in rows) for side in ("a", "b")]
    return result | order_bias(rows)


def order_bias(rows: list[dict]) -> dict:
    """How many verdicts are for one response, and the ratio of them for the one shown first."""
    verdicts = []
    for row in rows:
        verdicts += [parse_verdict(row[order]) for order in ("a_first", "b_first") if order in row]
    one_sided = [verdict for verdict in verdicts if verdict]
    return {
        "one_sided": len(one_sided),
        "first_ratio": mean(float(verdict == 1) for verdict in one_sided),
    }


# ---- the cache -------------------------------------------------------------------------------


def ask_cached(judge_prompts: list[str], judge_id: list, cache: Path, ask: Callable) -> dict:
    """{judge prompt: judgement}, asking only for those that the cache file lacks.

    judge_id is what a judgement depends on besides the prompt, as a JSON list. ask(judge prompts,
    store) calls store(judge prompt, judgement), from any thread, as soon as there is one: then it
    is on disk. What it leaves out has an empty judgement.
    """
    keys = {text: cache_key(judge_id, text) for text in judge_prompts}
    try:
        judgements = read_cache(cache)
        missing = [text for text, key in keys.items() if key not in judgements]
        print(
            f"{len(missing)} of {len(keys)} judgements to ask for; they are kept in {cache}",
            flush=True,
        )
        if missing:
            fill_cache(missing, keys, judgements, cache, ask)
    except (KeyboardInterrupt, OSError) as e:
        raise UserError(
            f"{str(e) or 'interrupted'}; judgements so far are in {cache}, "
            "the same command goes on"
        ) from None
    return {text: judgements.get(key, "") for text, key in keys.items()}


def cache_key(judge_id: list, judge_prompt: str) -> str:
    return hashlib.sha256(json.dumps([judge_id, judge_prompt]).encode()).hexdigest()


def read_cache(path: Path) -> dict[str, str]:
    """{key: judgement}. A line that a killed process left half-written counts as not asked."""
    judgements = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    line_start = '{"key": "'
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
            judgements[row["key"]] = row["text"]
        except (ValueError, LookupError, TypeError):
            if not line.startswith(line_start[: len(line)]):
                raise UserError(
                    f"{path}:{number}: no judgement of a judge; give another --cache"
                ) from None
    return judgements


def fill_cache(missing: list[str], keys: dict, judgements: dict, cache: Path, ask: Callable):
    """Ask for what is missing; every judgement goes into the cache file and into `judgements`."""
    lock = threading.Lock()
    with cache.open("ab") as f, tqdm(total=len(missing), unit=" judgements", disable=None) as bar:

        def store(judge_prompt: str, judgement: str):
            row = {"key": keys[judge_prompt], "text": judgement}
            with lock:
                # The line's end comes first: it ends a line that a killed process left.
                f.write(b"\n" + json.dumps(row).encode())
                f.flush()
                judgements[row["key"]] = judgement
                bar.update()

        ask(missing, store)


# ---- a judge behind an endpoint --------------------------------------------------------------


class HTTPReply(NamedTuple):
    status: int
    retry_after: str  # the header, or ""
    body: bytes


class RequestFailed(Exception):
    """One try that brought no judgement."""

    def __init__(self, problem: str, temporary: bool, wait: int = 0):
        super().__init__(problem)
        self.temporary = temporary  # the same request may be answered later
        self.wait = wait  # seconds that the server asks for


def ask_endpoint(
    judge_prompts: list[str],
    store: Callable,
    *,
    url: str,
    params: dict,
    timeout: float,
    parallel: int,
):
    """Ask an OpenAI-compatible endpoint, `parallel` requests at a time; an error ends it."""
    api_key = read_api_key()
    stop = threading.Event()

    def work(judge_prompt: str):
        body = params | {"messages": [{"role": "user", "content": judge_prompt}]}
        try:
            if not stop.is_set():
                store(judge_prompt, chat_completion(url, api_key, body, stop, timeout=timeout))
        except Exception:
            if not stop.is_set():  # else the first failure is the one to tell of
                stop.set()
                raise

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(work, text) for text in judge_prompts]):
                future.result()
        finally:
            # After an error or Ctrl-C nothing new is asked. What is on its way is waited for.
            stop.set()


def read_api_key() -> str:
    api_key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
    api_key = api_key.strip()
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserError(
            "JUDGE_API_KEY or OPENAI_API_KEY: holds characters that no key has; set it again"
        )
    return api_key


def chat_completion(
    url: str,
    api_key: str,
    body: dict,
    stop: threading.Event,
    *,
    timeout: float,
    tries: int = 6,
    pause: float = 1.0,
) -> str:
    """The text that a chat completions endpoint answers with; "" for one without text (a refusal).

    What may pass is tried again, each time after twice the pause, or later where the server says
    so: no connection, a time-out, 408, 429, 5xx, a reply that is no chat completion. Raises
    UserError for the rest, and after the last try.
    """
    request = build_request(url, api_key, body)
    for attempt in range(tries):
        try:
            return completion_text(fetch(request, timeout))
        except RequestFailed as failure:
            problem = f"{request.full_url}: {one_line(str(failure), api_key)}"
            if not failure.temporary:
                raise UserError(
                    f"{problem}; check --judge-url, --judge-model and JUDGE_API_KEY"
                ) from None
            wait = failure.wait + pause * 2**attempt * random.uniform(0.5, 1)
        if attempt + 1 == tries or stop.wait(wait):
            break
    raise UserError(
        f"{problem}; given up after {attempt + 1} tries: judgements are kept, the same command "
        "goes on"
    )


def build_request(url: str, api_key: str, body: dict) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "User-Agent": "scripts/compare.py"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + "/chat/completions", data, headers)
    if api_key:  # for this host, not for where it may redirect to
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    return request


def fetch(request: urllib.request.Request, timeout: float) -> HTTPReply:
    """The whole reply within `timeout` seconds (urllib's own time-out is for one read)."""
    deadline = time.monotonic() + timeout
    body = b""
    try:
        reply = open_url(request, timeout)
        with reply:
            while part := reply.read1(1 << 16):
                body += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer in {timeout:g} s")
    except (OSError, http.client.HTTPException) as e:
        raise RequestFailed(str(e) or type(e).__name__, temporary=True) from None
    return HTTPReply(reply.status, reply.headers.get("Retry-After", ""), body)


def open_url(request: urllib.request.Request, timeout: float):
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:  # a reply too
        return e


def completion_text(reply: HTTPReply) -> str:
    """The text in a chat completion. Raises RequestFailed where it is something else."""
    content = reply.body.decode("utf-8", "replace")
    if reply.status != 200:
        temporary = reply.status in (408, 429) or reply.status >= 500
        wait = min(int(reply.retry_after), 60) if reply.retry_after.isdecimal() else 0
        raise RequestFailed(f"HTTP {reply.status}: {content}", temporary, wait)
    with suppress(ValueError, LookupError, TypeError):
        text = json.loads(reply.body)["choices"][0]["message"]["content"]
        if text is None or isinstance(text, str):
            return text or ""
    raise RequestFailed(f"no chat completion: {content}", temporary=True)


def one_line(text: str, api_key: str) -> str:
    """The beginning of a message, in one line and without the key."""
    line = " ".join(text.split()).strip(":")
    if api_key:
        line = line.replace(api_key, "(key)")
    return line[:300]


# ---- a judge that is a model folder ----------------------------------------------------------


def ask_checkpoint(
    judge_prompts: list[str], store: Callable, *, folder: Path, max_new: int, batch: int = 32
):
    """Ask a local model, greedily, for all that leaves room for a judgement in its context."""
    model, tok = load_for_sampling(folder)
    room = model.cfg.max_len - max_new
    texts = []
    prompts = []
    for text in sorted(judge_prompts, key=len):
        ids = tok.chat(text)
        if len(ids) <= room:
            texts.append(text)
            prompts.append(ids)
    if len(texts) < len(judge_prompts):
        print(
            f"{len(judge_prompts) - len(texts)} of {len(judge_prompts)} judgements do not fit the "
            f"judge's context of {model.cfg.max_len} tokens, {max_new} of them for the judgement"
        )
    for start in range(0, len(texts), batch):
        group = prompts[start : start + batch]
        keys = [()] * len(group)  # no random numbers at temperature 0
        samples = generate(model, group, keys, stop=[tok.eos], max_new=max_new, temperature=0)
        for text, (ids,) in zip(texts[start : start + batch], samples, strict=True):
            store(text, tok.decode([i for i in ids if i != tok.eos]))


# ---- the judge that the flags name -----------------------------------------------------------


def add_judge_flags(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("the judge, one of three").add_argument
    add(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible endpoint: https://host/v1, with its key in JUDGE_API_KEY or "
        "OPENAI_API_KEY",
    )
    add("--judge-model", metavar="NAME", help="the model to ask there")
    add("--judge-checkpoint", type=Path, metavar="FOLDER", help="a local model folder")
    add("--oracle", type=Path, metavar="FILE", help="a toy world's oracle.py")
    add = parser.add_argument_group("how it is asked").add_argument
    add("--max-tokens", type=int, default=512, help="most tokens of a judgement (512)")
    add("--cache", type=Path, metavar="FILE", help="where judgements are kept (judge_cache.jsonl)")
    add("--timeout", type=float, default=60.0, help="seconds an endpoint has for one (60)")
    add("--parallel", type=int, default=8, help="requests to an endpoint at a time (8)")


def check_judge_flags(args: argparse.Namespace):
    judges = [judge for judge in (args.judge_url, args.judge_checkpoint, args.oracle) if judge]
    if len(judges) != 1:
        raise UserError("name one judge: --judge-url, --judge-checkpoint or --oracle")
    if bool(args.judge_url) != bool(args.judge_model):
        raise UserError("--judge-url and --judge-model belong together")
    if args.judge_url and not re.fullmatch(r"https?://[!-~]+", args.judge_url):
        raise UserError("--judge-url is like https://host/v1")
    if min(args.max_tokens, args.parallel) < 1:
        raise UserError("--max-tokens and --parallel are at least 1")
    if not 0 < args.timeout < 1e6:
        raise UserError("--timeout is a positive number of seconds")


def judge_name(args: argparse.Namespace) -> str:
    return str(args.judge_model or args.judge_checkpoint or args.oracle)


def open_judge(args: argparse.Namespace, cache: Path) -> Callable[[Answers, Answers], list[dict]]:
    """The judge that the flags name, as a function (a, b) -> rows. Raises UserError."""
    if args.oracle:
        return partial(judge_by_oracle, oracle=load_oracle(args.oracle))
    if args.judge_url:
        url = args.judge_url.rstrip("/")
        params = {"model": args.judge_model, "temperature": 0, "max_tokens": args.max_tokens}
        judge_id = [url, params]
        limits = {"timeout": args.timeout, "parallel": args.parallel}
        ask = partial(ask_endpoint, url=url, params=params, **limits)
    else:
        folder = args.judge_checkpoint
        read_shape(folder)
        weights = sorted(folder.glob("*.safetensors"))
        times = [file.stat().st_mtime_ns for file in weights]  # other weights, another judge
        judge_id = [str(folder.resolve()), args.max_tokens, *times]
        ask = partial(ask_checkpoint, folder=folder, max_new=args.max_tokens)
    ask_judge = partial(ask_cached, judge_id=judge_id, cache=args.cache or cache, ask=ask)
    return partial(judge_both_orders, ask=ask_judge)


# ---- the command -----------------------------------------------------------------------------


def win_rate_text(title: str, results: dict[str, dict]) -> str:
    """A printed table of results of win_rate, by the names of who is compared."""
    t = head_to_head_table(title, results)
    return table(t.title, t.columns, t.rows, t.note)


def explain(result: dict) -> str:
    """What else is to be known of a result of win_rate, in sentences."""
    lines = [f"{result['prompts']} prompts were compared, and all have a verdict."]
    if result["no_verdict"]:
        lines = [
            f"{result['prompts']} prompts were compared. {result['no_verdict']} of them have no "
            "verdict that can be read; the table leaves them out."
        ]
    if result["unmatched"]:
        lines.append(
            f"{result['unmatched']} more prompts are in one set only; nobody judged them."
        )
    if result["one_sided"]:
        lines.append(
            f"{100 * result['first_ratio']:.1f} % of the {result['one_sided']} verdicts for one "
            "response are for the one shown first (50 % if the order plays no part)."
        )
    a, b = result["characters"]
    lines.append(f"Mean length of the responses: {a:.0f} and {b:.0f} characters.")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare", description="Two sets of answers, head to head."
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="a model folder, a .json or a .jsonl file"
        )
    add_judge_flags(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the outcome of every prompt there, as JSON"
    )
    args = parser.parse_args(argv)
    check_judge_flags(args)
    if args.out and not args.out.parent.is_dir():
        raise UserError("--out is a file in a folder that is there")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    a = read_answers(args.a)
    b = read_answers(args.b)
    if not common_prompts(a, b):
        raise UserError(
            f"{args.a} and {args.b} answer no prompt in common; prompts are matched by their text"
        )
    judge_pairs = open_judge(args, cache=args.a.parent / "judge_cache.jsonl")
    rows = judge_pairs(a, b)
    if args.out:
        write_json(args.out, rows)
    result = win_rate(a, b, rows)
    title = f"Head to head by {judge_name(args)}"
    print(win_rate_text(title, {f"{args.a} vs {args.b}": result}))
    print(explain(result))


if __name__ == "__main__":
    run_command(main)
