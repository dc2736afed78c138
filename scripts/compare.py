"""scripts/compare.py: two sets of answers -> how often each wins, by a judge outside the loop.

    python -m scripts.compare runs/7b/M3 runs/7b/M2 --judge-url https://host/v1 --judge-model NAME
    python -m scripts.compare runs/7b/M3 gpt4.json --judge-checkpoint FOLDER
    python -m scripts.compare runs/zoo/M3 runs/zoo/M2 --oracle data/zoo/oracle.py

A set of answers is a model folder of a run (its test.jsonl), an AlpacaEval file, or JSON lines
of prompt and response. Prompts are matched by their text.

The judge sees a prompt and both responses, in both orders; a side wins where both verdicts are for
it (paper section 3.1). An oracle grades each response by itself. What an endpoint or a checkpoint
has said is kept in a cache file as soon as it is there, so the same command goes on after a
failure and pays for nothing twice. A question that the endpoint refuses, or whose judgement is cut
or empty, has no verdict: it is counted, and asked again by the same command.

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


def without_thinking(text: str) -> str:
    """A judgement without what a reasoning model has thought aloud before it."""
    text = text.rpartition("</think>")[2]  # the opening tag may stand in the prompt
    return text.partition("<think>")[0]  # not closed: it was cut while thinking


def parse_verdict(text: str) -> int | None:
    """1 where the first response is better, -1 where the second is, 0 for a tie, None: unreadable.

    Give it generated text only. The last `Verdict:` decides: "Verdict: 1 ... **Verdict:** 2" is
    -1, "Verdict: 1 or 2" and "Verdict: 3" are None. What a judge thinks aloud is no verdict.
    """
    *before, after = VERDICT_MARKER.split(without_thinking(text))
    if not before:
        return None
    side = SIDE.match(after)
    return VERDICTS[side[1].lower()] if side else None


# why a judgement is no answer; a refusal adds its reason behind a colon
CUT = "cut by --max-tokens"
EMPTY = "empty"
REFUSED = "refused"
NO_ROOM = "too long for the judge's context"
UNREADABLE = "without a readable verdict"


class Judgement(NamedTuple):
    """What a judge has said, and why it is no answer (None: it is one)."""

    text: str
    problem: str | None = None

    @property
    def verdict(self) -> int | None:
        return None if self.problem else parse_verdict(self.text)

    @property
    def why_no_verdict(self) -> str | None:
        if self.problem or self.verdict is not None:
            return self.problem
        return UNREADABLE


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
    """Rows {"prompt", "a", "b", "outcome", "problem", "verdicts", "a_first", "b_first"} of the
    prompts in common.

    outcome is 1 where both verdicts are for a, -1 where both are for b, 0 where they differ or
    tie, None where one of them is missing: problem says why. verdicts are those of parse_verdict
    with a shown first and with b shown first. ask(judge prompts) -> {judge prompt: Judgement}.
    """
    judge_prompts = {}
    for key in common_prompts(a, b):
        a_first = fill(COMPARE, prompt=key[0], first=a[key], second=b[key])
        b_first = fill(COMPARE, prompt=key[0], first=b[key], second=a[key])
        judge_prompts[key] = a_first, b_first
    judgements = ask([text for both in judge_prompts.values() for text in both])
    rows = []
    for key, both in judge_prompts.items():
        row = {"prompt": key[0], "a": a[key], "b": b[key]}
        rows.append(row | both_orders(*[judgements[text] for text in both]))
    return rows


def both_orders(a_first: Judgement, b_first: Judgement) -> dict:
    """The rest of such a row."""
    return {
        "outcome": agreed_outcome(a_first.verdict, b_first.verdict),
        "problem": a_first.why_no_verdict or b_first.why_no_verdict,
        "verdicts": [a_first.verdict, b_first.verdict],
        "a_first": a_first.text,
        "b_first": b_first.text,
    }


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
        outcome, problem = None, "not of the oracle's world"
        if a_grade is not None and b_grade is not None:
            outcome, problem = int(np.sign(a_grade - b_grade)), None
        row = {"prompt": key[0], "a": a[key], "b": b[key], "outcome": outcome}
        rows.append(row | {"problem": problem, "a_grade": a_grade, "b_grade": b_grade})
    return rows


def common_prompts(a: Answers, b: Answers) -> list[tuple[str, int]]:
    return [key for key in a if key in b]


def win_rate(a: Answers, b: Answers, rows: list[dict]) -> dict:
    """How often a wins, ties and loses (percent, by head_to_head), and what the counts leave out.

    Raises UserError where no row has a verdict.
    """
    outcomes = [row["outcome"] for row in rows if row["outcome"] is not None]
    problems = [row["problem"] for row in rows if row["outcome"] is None]
    if not outcomes:
        raise UserError(
            f"none of {len(rows)} prompts has a verdict that can be read in both orders "
            f"({count_problems(problems)}; what the judge said is in its cache): take another "
            "judge or another --max-tokens"
        )
    result = head_to_head(outcomes, [0] * len(outcomes))
    result["prompts"] = len(rows)
    result["unmatched"] = len(a) + len(b) - 2 * len(rows)
    result["problems"] = problems
    result["characters"] = [mean(len(row[side]) for row in rows) for side in ("a", "b")]
    return result | order_bias(rows)


def order_bias(rows: list[dict]) -> dict:
    """How many verdicts are for one response, and the ratio of them for the one shown first."""
    verdicts = [verdict for row in rows for verdict in row.get("verdicts", [])]
    one_sided = [verdict for verdict in verdicts if verdict]
    return {
        "one_sided": len(one_sided),
        "first_ratio": mean(float(verdict == 1) for verdict in one_sided),
    }


def count_problems(problems: list[str]) -> str:
    """Why there is no verdict, in words: "2 empty, 1 refused (HTTP 400: too long)"."""
    first_details = {}
    counts = Counter()
    for problem in problems:
        kind, _, detail = problem.partition(": ")
        counts[kind] += 1
        first_details.setdefault(kind, detail)
    texts = []
    for kind, count in counts.most_common():
        detail = first_details[kind]
        if detail and count > 1:
            detail = f"the first: {detail}"
        texts.append(f"{count} {kind} ({detail})" if detail else f"{count} {kind}")
    return ", ".join(texts)


# ---- the cache -------------------------------------------------------------------------------


def ask_cached(
    judge_prompts: list[str], judge_id: list, cache: Path, ask: Callable
) -> dict[str, Judgement]:
    """{judge prompt: judgement}, asking only for those of which the cache file has no answer.

    judge_id is what an answer depends on besides the prompt, as a JSON list. ask(judge prompts,
    store, some_answered) calls store(judge prompt, judgement), from any thread, as soon as there
    is one: then it is on disk.
    """
    try:
        judgements = cached_answers(judge_prompts, judge_id, cache)
        missing = [text for text in dict.fromkeys(judge_prompts) if text not in judgements]
        num_judgements = len(missing) + len(judgements)
        print(
            f"{len(missing)} of {num_judgements} judgements to ask for; they are kept in {cache}",
            flush=True,
        )
        if missing:
            fill_cache(missing, judge_id, judgements, cache, ask)
    except (KeyboardInterrupt, OSError) as e:
        raise UserError(
            f"{str(e) or 'interrupted'}; judgements so far are in {cache}, "
            "the same command goes on"
        ) from None
    return judgements


def cache_key(judge_id: list, judge_prompt: str) -> str:
    return hashlib.sha256(json.dumps([judge_id, judge_prompt]).encode()).hexdigest()


def cached_answers(judge_prompts: list[str], judge_id: list, cache: Path) -> dict[str, Judgement]:
    """{judge prompt: judgement} of those that the cache file has an answer to."""
    answers = read_cache(cache)
    judgements = {}
    for text in judge_prompts:
        key = cache_key(judge_id, text)
        if key in answers:
            judgements[text] = Judgement(answers[key])
    return judgements


def read_cache(path: Path) -> dict[str, str]:
    """{key: answer}. What has a problem is no answer, nor is what a killed process left."""
    answers = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    line_start = '{"key": "'
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
            if "problem" not in row:
                answers[row["key"]] = row["text"]
        except (ValueError, LookupError, TypeError):
            if not line.startswith(line_start[: len(line)]):
                raise UserError(
                    f"{path}:{number}: no judgement of a judge; give another --cache"
                ) from None
    return answers


def fill_cache(missing: list[str], judge_id: list, judgements: dict, cache: Path, ask: Callable):
    """Ask for what is missing; every judgement goes into the cache file and into `judgements`."""
    lock = threading.Lock()
    with cache.open("ab") as f, tqdm(total=len(missing), unit=" judgements", disable=None) as bar:

        def store(judge_prompt: str, judgement: Judgement):
            row = {"key": cache_key(judge_id, judge_prompt), "text": judgement.text}
            if judgement.problem:
                row["problem"] = judgement.problem
            with lock:
                # The line's end comes first: it ends a line that a killed process left.
                f.write(b"\n" + json.dumps(row).encode())
                f.flush()
                judgements[judge_prompt] = judgement
                bar.update()

        ask(missing, store, bool(judgements))


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


class QuestionRefused(Exception):
    """The endpoint answers, but not this request. The message is all that it said."""


QUESTION_REFUSED = (400, 413, 422)  # bad, too large, unprocessable; not 401, 403, 404
MOST_REFUSALS = 16  # before the first answer; then it is not the questions that are refused
CHECK = "check --judge-url, --judge-model, --judge-extra and JUDGE_API_KEY"


def ask_endpoint(
    judge_prompts: list[str],
    store: Callable,
    some_answered: bool = False,
    *,
    url: str,
    params: dict,
    timeout: float,
    parallel: int,
):
    """Ask an OpenAI-compatible endpoint, `parallel` requests at a time; an error ends it.

    A refused question is stored with its problem, and the rest goes on. Where nothing was ever
    answered (some_answered: before), the refusals are the run's error.
    """
    endpoint = Endpoint(url, params, timeout, some_answered)
    stop = endpoint.stop

    def work(judge_prompt: str):
        try:
            if not stop.is_set():
                store(judge_prompt, endpoint.ask(judge_prompt))
        except Exception:
            if not stop.is_set():  # else the first failure is the one to tell of
                stop.set()
                raise

    shortest_first = sorted(judge_prompts, key=len)  # the last to be refused for their length
    with ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(work, text) for text in shortest_first]):
                future.result()
        finally:
            # After an error or Ctrl-C nothing new is asked. What is on its way is waited for.
            stop.set()
    endpoint.check_refusals(1)


class Endpoint:
    """A judge behind a URL. It learns which request fields the judge takes; for many threads."""

    def __init__(self, url: str, params: dict, timeout: float, some_answered: bool):
        self.url = completions_url(url)
        self.params = params  # the fields of a request besides the question
        self.timeout = timeout
        self.some_answered = some_answered
        self.refusals = []  # what was said
        self.api_key = read_api_key()
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def ask(self, judge_prompt: str) -> Judgement:
        """One question. Where a field was refused, it is asked again as the judge wants it."""
        params = self.params
        messages = [{"role": "user", "content": judge_prompt}]
        refused_fields = []
        while True:
            body = params | {"messages": messages}
            try:
                judgement = chat_completion(
                    self.url, self.api_key, body, self.stop, timeout=self.timeout
                )
                break
            except QuestionRefused as e:
                refusal = str(e)
            field = refused_field(params, refusal)
            if field is None:
                return self.count_refusal(refusal)
            params = without_field(params, field)
            refused_fields.append(field)
        self.some_answered = True
        if refused_fields:
            self.adopt(params, refused_fields)
        return judgement

    def adopt(self, params: dict, refused_fields: list[str]):
        """What was answered once, while the fields were refused, is how all is asked from now on.

        A refused question may name a field without meaning it: then it is refused again.
        """
        with self.lock:
            if self.params != params:
                self.params = params
                for field in refused_fields:
                    tqdm.write(f"The endpoint refuses {field}: {NEWER_MODELS[field]}.")

    def count_refusal(self, refusal: str) -> Judgement:
        """The judgement of a refused question, or UserError where every question is refused."""
        problem = one_line(refusal, self.api_key)
        self.refusals.append(problem)
        self.check_refusals(MOST_REFUSALS)
        return Judgement("", f"{REFUSED}: {problem}")

    def check_refusals(self, most: int):
        if len(self.refusals) >= most and not self.some_answered:
            raise UserError(
                f"{self.url}: refused {len(self.refusals)} questions and answered none "
                f"({self.refusals[0]}); {CHECK}"
            )


def completions_url(url: str) -> str:
    """Where to post, for https://host/v1 and for Azure's https://host/deployment?api-version=x."""
    path, question_mark, query = url.partition("?")
    path = path.rstrip("/").removesuffix("/chat/completions")
    return f"{path}/chat/completions{question_mark}{query}"


# Request fields that newer models do not take, and what becomes of them.
NEWER_MODELS = {
    "max_tokens": "from now on the limit is sent as max_completion_tokens",
    "temperature": "from now on it is left out, and the model's own temperature counts",
}


def refused_field(params: dict, refusal: str) -> str | None:
    """The one of them that is among the request fields and named by a refusal."""
    for field in NEWER_MODELS:
        if field in params and field in refusal:
            return field
    return None


def without_field(params: dict, field: str) -> dict:
    """The request fields as newer models want them."""
    others = {name: value for name, value in params.items() if name != field}
    if field == "max_tokens":
        others["max_completion_tokens"] = params[field]
    return others


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
) -> Judgement:
    """What a chat completions endpoint answers with; cut or without text, it has a problem.

    What may pass is tried again, each time after twice the pause, or later where the server says
    so: no connection, a time-out, 408, 429, 5xx, a reply that is no chat completion. Raises
    QuestionRefused for 400, 413 and 422, UserError for the rest, and after the last try.
    """
    request = build_request(url, api_key, body)
    for attempt in range(tries):
        try:
            return read_completion(fetch(request, timeout))
        except RequestFailed as failure:
            problem = f"{url}: {one_line(str(failure), api_key)}"
            if not failure.temporary:
                raise UserError(f"{problem}; {CHECK}") from None
            wait = failure.wait + pause * 2**attempt * random.uniform(0.5, 1)
        if attempt + 1 == tries or stop.wait(wait):
            break
    raise UserError(
        f"{problem}; given up after {attempt + 1} tries: judgements are kept, the same command "
        "goes on"
    )


def build_request(url: str, api_key: str, body: dict) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "User-Agent": "scripts/compare.py"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # The key is for this host, not for where it may redirect to.
    if api_key and "/openai/deployments/" in url:  # Azure's name for it
        request.add_unredirected_header("api-key", api_key)
    elif api_key:
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


def read_completion(reply: HTTPReply) -> Judgement:
    """The text in a chat completion. Raises QuestionRefused or RequestFailed for all else."""
    content = reply.body.decode("utf-8", "replace")
    if reply.status in QUESTION_REFUSED:
        raise QuestionRefused(f"HTTP {reply.status}: {content}")
    if reply.status != 200:
        temporary = reply.status in (408, 429) or reply.status >= 500
        wait = min(int(reply.retry_after), 60) if reply.retry_after.isdecimal() else 0
        raise RequestFailed(f"HTTP {reply.status}: {content}", temporary, wait)
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        choice = json.loads(reply.body)["choices"][0]
        reason = choice.get("finish_reason")
        message = choice["message"]
        if not reason:  # then the text must be there; a filtered or cut message may have none
            return end_judgement(content_text(message["content"]), reason)
        return end_judgement(content_text(message.get("content")), reason)
    raise RequestFailed(f"no chat completion: {content}", temporary=True)


def content_text(content: str | list | None) -> str:
    """A message's text: of a list of parts, those that are text, and not what was thought."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def end_judgement(text: str, finish_reason: str | None) -> Judgement:
    """The judgement, or the problem, that a text is which ended for this reason."""
    if finish_reason in ("length", "model_length", "max_tokens"):
        return Judgement(text, CUT)
    if finish_reason == "content_filter":
        return Judgement(text, f"{REFUSED}: finish_reason content_filter")
    return Judgement(text, None if text.strip() else EMPTY)


def one_line(text: str, api_key: str) -> str:
    """The beginning of a message, in one line and without the key."""
    line = " ".join(text.split()).strip(":")
    if api_key:
        line = line.replace(api_key, "(key)")
    return line[:300]


# ---- a judge that is a model folder ----------------------------------------------------------


def ask_checkpoint(
    judge_prompts: list[str],
    store: Callable,
    some_answered: bool = False,
    *,
    folder: Path,
    max_new: int,
    batch: int = 32,
):
    """Ask a local model, greedily, for all that leaves room for a judgement in its context."""
    model, tok = load_for_sampling(folder)
    texts = []
    prompts = []
    for text in sorted(judge_prompts, key=len):
        ids = tok.chat(text)
        if len(ids) + max_new > model.cfg.max_len:
            store(text, Judgement("", NO_ROOM))
            continue
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
            judgement = tok.decode([i for i in ids if i != tok.eos])
            finish_reason = "stop" if ids[-1] == tok.eos else "length"
            store(text, end_judgement(judgement, finish_reason))


# ---- the judge that the flags name -----------------------------------------------------------

EXTRA_EXAMPLE = """'{"reasoning_effort": "low"}'"""
# What other flags or nobody may say.
NOT_EXTRA = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "n")


def add_judge_flags(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("the judge, one of three").add_argument
    add(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible endpoint: https://host/v1, or Azure's "
        "https://host/openai/deployments/NAME?api-version=VERSION, with its key in JUDGE_API_KEY "
        "or OPENAI_API_KEY",
    )
    add("--judge-model", metavar="NAME", help="the model to ask there")
    add(
        "--judge-extra",
        type=parse_extra,
        default={},
        metavar="JSON",
        help=f"more fields of every request there: {EXTRA_EXAMPLE}",
    )
    add("--judge-checkpoint", type=Path, metavar="FOLDER", help="a local model folder")
    add("--oracle", type=Path, metavar="FILE", help="a toy world's oracle.py")
    add = parser.add_argument_group("how it is asked").add_argument
    add("--max-tokens", type=int, default=512, help="most tokens of a judgement (512)")
    add("--cache", type=Path, metavar="FILE", help="where judgements are kept (judge_cache.jsonl)")
    add("--timeout", type=float, default=60.0, help="seconds an endpoint has for one (60)")
    add("--parallel", type=int, default=8, help="requests to an endpoint at a time (8)")


def parse_extra(text: str) -> dict:
    """Request fields from the command line. Raises UserError."""
    try:
        extra = json.loads(text)
        json.dumps(extra, allow_nan=False)
    except ValueError as e:
        raise UserError(f"--judge-extra is not valid JSON ({e}): {text}") from None
    if not isinstance(extra, dict):
        raise UserError(f"--judge-extra is like {EXTRA_EXAMPLE}, not {text}")
    for name in NOT_EXTRA:
        if name in extra:
            raise UserError(f"--judge-extra may not hold {name}; see the other flags")
    return extra


def check_judge_flags(args: argparse.Namespace):
    judges = [judge for judge in (args.judge_url, args.judge_checkpoint, args.oracle) if judge]
    if len(judges) != 1:
        raise UserError("name one judge: --judge-url, --judge-checkpoint or --oracle")
    if bool(args.judge_url) != bool(args.judge_model):
        raise UserError("--judge-url and --judge-model belong together")
    if args.judge_extra and not args.judge_url:
        raise UserError("--judge-extra goes with --judge-url")
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
        params = {"model": args.judge_model, "temperature": 0} | args.judge_extra
        judge_id = [url, params]
        params = params | {"max_tokens": args.max_tokens}
        limits = {"timeout": args.timeout, "parallel": args.parallel}
        ask = partial(ask_endpoint, url=url, params=params, **limits)
    else:
        folder = args.judge_checkpoint
        read_shape(folder)
        weights = sorted(folder.glob("*.safetensors"))
        times = [file.stat().st_mtime_ns for file in weights]  # other weights, another judge
        judge_id = [str(folder.resolve()), *times]
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
    if result["problems"]:
        lines = [explain_problems(result)]
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


def explain_problems(result: dict) -> str:
    """How many prompts of a result of win_rate have no verdict, why, and the first refusal."""
    problems = result["problems"]
    have = "has" if len(problems) == 1 else "have"
    return (
        f"{result['prompts']} prompts were compared. {len(problems)} of them {have} no verdict "
        f"that can be read, and no place in the table: {count_problems(problems)}."
    )


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
