"""train.py: Config -> M1, M2, M3. Seed SFT, then the self-rewarding rounds (paper section 2).

    torchrun train.py --iters 3                                    the zoo: minutes on a laptop CPU
    torchrun --nproc-per-node 8 train.py --init LLAMA --data DATA --out RUN
    python train.py --help                                         every knob

Every chapter turns files of the run folder into files of the run folder, and one whose product is
there is skipped. Inside a chapter, training saves its state and sampling appends its rows in
chunks: start the same command again, on as many processes as you like, and it resumes. One
process is a world of size one.

Exit codes: 0 done, 1 an error that one line explains, 2 no such flag, 130 stopped by SIGTERM or
Ctrl-C; what was finished is on disk then, as after kill -9.

Left out: reports (scripts/report.py), the memory plan (scripts/plan.py), early stopping by an
outside judge (scripts/pick_checkpoint.py), torch.compile of the training step.
"""

import argparse
import fcntl
import gc
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# Waiting threads sleep after some microseconds: where cores are shared, spinning is slow, and to
# sleep at once costs 40 %.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Sampling and training want blocks of other sizes; a GPU's memory is not to be split by them.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dpo
import judge
import sample
from dpo import collate, collate_pairs, preference_loss, sequence_logps, sft_loss
from model import (
    Llama,
    UserError,
    check_tp,
    checkpoint_error,
    load,
    parallelize,
    read_json,
    read_shape,
    read_text,
    save,
    unsharded,
    use_onednn_linear,
    write_and_sync,
    write_json,
)
from sample import fingerprint, read_jsonl, run_command, write_jsonl


@dataclass(frozen=True)
class Config:
    """All knobs, saved with the run. Defaults are the paper's values where it gives them; a data
    folder's recipe.json overrides them, and flags override that."""

    init: str = "data/zoo/base"  # M0: folder of the pretrained model
    data: str = "data/zoo"  # folder with ift.jsonl, judge.txt, propose.txt ... (docs/files.md)
    out: str = "runs/zoo"  # run folder; the same command resumes it
    iters: int = 3  # models to make: M1 from M0 by fine-tuning, each further one by a round of DPO
    seed: int = 0  # of everything that is drawn
    writer: str = ""  # model that writes the new prompts of all rounds; empty: M0
    prompts: str = "5000,9000"  # new prompts in each round; the last number serves all later ones
    max_prompt: int = 128  # most tokens of a new prompt
    rouge: float = 0.7  # a new prompt more similar than this (ROUGE-L) to an older one is dropped
    candidates: int = 4  # responses to each prompt (N)
    votes: int = 3  # judgements of each response
    temperature: float = 0.7  # of responses
    top_p: float = 0.9  # of responses
    max_response: int = 1024  # most tokens of a response
    max_judgement: int = 256  # most tokens of a judgement
    sample_batch: int = 128  # sequences sampled side by side in one process, memory permitting
    eft_size: int = 1630  # most EFT rows made where data has no eft.jsonl; 0: M1 learns IFT alone
    sft_lr: float = 5.5e-6  # peak learning rate of SFT; ends at a fifth of it
    sft_epochs: int = 3  # passes over the seed data (paper: not given)
    dpo_lr: float = 1e-6  # peak learning rate of DPO; ends at a tenth of it
    dpo_epochs: int = 1  # passes over the pairs (paper: not given)
    batch: int = 16  # rows (SFT) or pairs (DPO) an update, over all processes
    micro_tokens: int = 0  # most tokens through the model at once; 0: 16384, on a CPU 2048
    save_every: int = 200  # updates between training states, of which the last is kept
    keep_every: int = 0  # DPO updates between models kept as M2/step-N, to pick from; 0: none
    dropout: float = 0.1  # on the residual branches, while training
    beta: float = 0.1  # of DPO
    dtype: str = ""  # float32 or bfloat16, of compute; empty: bfloat16 on a GPU
    tp: int = 1  # processes that share every matrix (tensor parallelism), in one machine
    activation_checkpointing: bool = False  # compute activations again in backward: less memory


# May differ when a run is resumed: they affect results by rounding (and dropout masks) alone. Of
# paths, what they lead to is compared, and not how they are spelled.
MUTABLE_FIELDS = "out iters sample_batch micro_tokens save_every keep_every tp".split()
MUTABLE_FIELDS += ["activation_checkpointing", "init", "writer", "data"]
DATA_FILES = "ift.jsonl eft.jsonl eft_ranked.jsonl eft_eval.jsonl test.jsonl valid.jsonl".split()
DATA_FILES += ["judge.txt", "propose.txt"]
WRITER_SAMPLING = {"temperature": 0.6, "top_p": 0.9}  # of new prompts (paper section 2.2)
MIN_SPEEDUP = 1.2  # of more threads, or fewer are taken
DEFAULT_MICRO_TOKENS = {"cuda": 16384, "cpu": 2048}
# Batches of sequences that a process samples between two appends to disk; a kill loses no more;
# where a chunk ends, all wait for the last text, which costs a GPU as much as a whole batch.
BATCHES_PER_CHUNK = {"cuda": 32, "cpu": 8}


class Data(NamedTuple):
    """The rows and texts of a data folder (docs/files.md)."""

    ift: list[dict]
    eft: list[dict]
    eft_ranked: list[dict]
    eft_eval: list[dict]
    test: list[dict]
    held_out: list[str]  # no new prompt may equal one of these word for word
    judge_template: str
    propose_template: str


class Run(NamedTuple):
    """What every chapter needs."""

    cfg: Config
    folder: Path
    data: Data
    mesh: DeviceMesh  # (dp, tp)
    device: str
    dp_rank: int  # which rows are ours; the ranks of a tp group have the same
    dp_size: int


def main(cfg: Config):
    run = open_run(cfg, init_distributed(cfg))
    models = ["SFT", *(f"M{t}" for t in range(1, cfg.iters + 1))]
    train_sft(run, "SFT", run.data.ift)  # the baseline: M0 on instructions only
    eft = make_eft(run)  # the baseline judges ranked replies, unless data has eft.jsonl
    write_prompts(run)  # for all rounds, by the fixed writer
    train_sft(run, "M1", run.data.ift + eft)  # M0 again, on instructions and judging
    for old, new in pairwise(models[1:]):
        self_reward(run, old, new)  # M_t responds, judges itself, prefers
        train_dpo(run, old, new)  # M_t -> M_t+1
    for name in models:
        evaluate(run, name)
    log(f"done: {', '.join(models)} are in {cfg.out}; python -m scripts.report {cfg.out}")


# ---- chapters --------------------------------------------------------------------------------


def train_sft(run: Run, name: str, rows: list[dict]):
    """Supervised fine-tuning from M0, on target tokens only (paper section 2.1)."""
    if exists(run, name, "config.json"):
        return
    model, tok = load_model(run, run.cfg.init)
    examples = [(tok.chat(row["prompt"]), tok.response(row["response"])) for row in rows]
    fitting = [e for e in examples if len(e[0]) + len(e[1]) <= model.cfg.max_len]
    if len(fitting) < len(examples):
        too_long = len(examples) - len(fitting)
        log(f"{name}: {too_long} of {len(examples)} seed rows exceed the context, left out")
    if not fitting:
        raise UserError(
            f"{run.cfg.data}: no seed row fits the context of {model.cfg.max_len} tokens; "
            "shorten rows or change --init"
        )
    to_tensors = partial(collate, device=run.device)
    lr = run.cfg.sft_lr
    objective = Objective(to_tensors, sft_loss, lambda e: len(e[1]), lr, final_lr_ratio=0.2)
    batches = dpo.make_batches(fitting, run.cfg.batch, run.cfg.sft_epochs, (run.cfg.seed, name))
    check_dropout(run, model, name, fitting, batches[0], objective)
    train_model(run, model, name, batches, fitting, objective)
    save_model(run, model, tok, name)


@torch.no_grad()
def check_dropout(run: Run, model, name: str, examples, batch, objective: "Objective"):
    """Warn where dropout wrecks a model that never saw it: M0's loss with it and without."""
    if not run.cfg.dropout:
        return
    losses = []
    for training in (False, True):
        model.train(training)
        total = 0.0
        for rows, weight in my_micro_batches(run, batch, examples):
            loss, _ = objective.loss(model, *objective.collate([examples[i] for i in rows]))
            total += loss.item() * weight
        losses.append(sum_over_ranks({"loss": total}, run.cfg.tp)["loss"])
    if losses[1] > 1.5 * losses[0]:
        log(
            f"warning, {name}: dropout {run.cfg.dropout} multiplies the loss of {run.cfg.init} by "
            f"{losses[1] / losses[0]:.1f}: it was trained without; try --dropout 0"
        )


def make_eft(run: Run) -> list[dict]:
    """What M1 learns to judge from, as instructions: the judge's prompt, and a judgement to learn.

    The judgements are those of eft.jsonl in the data folder, or else what the SFT baseline says
    of the replies that people have ranked, where it orders them alike (section 3.1).
    """
    eft = run.data.eft
    if run.data.eft_ranked:
        judgements = product(run, "M1", "eft_judgements.jsonl", judge_replies)
        eft = product(run, "M1", "eft.jsonl", choose_eft, judgements)
    rows = []
    for row in eft:
        prompt = judge.judge_prompt(run.data.judge_template, row["prompt"], row["response"])
        rows.append({"prompt": prompt, "response": row["judgement"]})
    return rows


def choose_eft(run: Run, path: Path, judgements: list[dict]) -> list[dict]:
    """The judgements that M1 is taught, and M1/eft_report.json; UserError where there are none."""
    key = (run.cfg.seed, "eft")
    rows, report = judge.eft_rows(run.data.eft_ranked, judgements, run.cfg.eft_size, key)
    log(f"M1: EFT {report}")
    if dist.get_rank() == 0:
        write_json(path.with_name("eft_report.json"), report)
    if not rows:
        raise UserError(
            f"{run.folder}/M1: of {len(judgements)} judgements of {report['replies']} ranked "
            f"replies none can be learned from: {report['dropped']}; "
            f"{judge.judging_remedy(judgements)}; or write your own eft.jsonl, or give "
            "--eft-size 0 and another --out"
        )
    return rows


def judge_replies(run: Run, path: Path) -> list[dict]:
    """The SFT baseline's judgements of the replies that people have ranked."""
    model, tok = load_model(run, run.folder / "SFT")
    return make_judgements(run, path, model, tok, judge.replies(run.data.eft_ranked), ("eft",))


def write_prompts(run: Run):
    """New prompts for every round, few-shot by a writer that never changes (section 2.2)."""
    counts = [int(n) for n in run.cfg.prompts.split(",")]
    earlier = []
    for t in range(1, run.cfg.iters):
        count = counts[min(t, len(counts)) - 1]
        key = (run.cfg.seed, t, "prompts")
        rows = product(run, f"M{t + 1}", "prompts.jsonl", make_prompts, key, count, earlier)
        earlier = earlier + [row["prompt"] for row in rows]


def self_reward(run: Run, old: str, new: str):
    """M_t responds to the new prompts, judges its own responses, and prefers (section 2.2)."""
    if exists(run, new, "pairs.jsonl"):
        return
    model, tok = load_model(run, run.folder / old)
    prompts = read_jsonl(run.folder / new / "prompts.jsonl", "prompt")
    args = (model, tok, prompts, run.cfg.candidates, (new, "responses"))
    candidates = product(run, new, "candidates.jsonl", make_responses, *args)
    args = (model, tok, candidates, (new, "judgements"))
    judgements = product(run, new, "judgements.jsonl", make_judgements, *args)
    pairs, tally = judge.prefer(prompts, candidates, judge.mean_scores(judgements))
    check_round(run, new, pairs, tally, judgements)
    product(run, new, "pairs.jsonl", add_reference, model, tok, pairs, new)


def check_round(run: Run, new: str, pairs, tally: Counter, judgements):
    """Log what a round has to learn from; UserError where that is nothing."""
    rate = judge.parse_rate(judgements) or 0
    scores = judge.score_histogram(judgements)
    unreadable = Counter(filter(None, map(judge.why_unreadable, judgements)))
    facts = f"{dict(tally)}; {rate:.1%} of {len(judgements)} judgements have a score: {scores}"
    facts += f", the others: {dict(unreadable)}" if unreadable else ""
    log(f"{new}: {facts}")
    if not pairs:
        remedy = judge.judging_remedy(judgements)
        raise UserError(f"{run.folder}/{new}: no prompt gave a pair: {facts}; {remedy}")


def train_dpo(run: Run, old: str, new: str):
    """DPO from M_t on the pairs that M_t made (section 2.3): M_t+1."""
    if exists(run, new, "config.json"):
        return
    model, tok = load_model(run, run.folder / old)
    pairs = read_jsonl(run.folder / new / "pairs.jsonl", "prompt", "reference_chosen")
    examples = dpo.pair_examples(tok, pairs)
    to_tensors = partial(collate_pairs, device=run.device)
    loss = partial(preference_loss, beta=run.cfg.beta)
    objective = Objective(to_tensors, loss, lambda e: 1, run.cfg.dpo_lr, final_lr_ratio=0.1)
    key = (run.cfg.seed, new)
    batches = dpo.make_batches(examples, run.cfg.batch, run.cfg.dpo_epochs, key)
    check_reference(run, model, examples, batches[0], old, new)
    keep = partial(save_model, run, model, tok)
    train_model(run, model, new, batches, examples, objective, keep)
    save_model(run, model, tok, new)


def evaluate(run: Run, name: str):
    """The finished model answers the test prompts and judges the replies that people have ranked
    and no training has seen (section 3.1)."""
    tests = [{"id": i, "prompt": row["prompt"]} for i, row in enumerate(run.data.test)]
    replies = judge.replies(run.data.eft_eval)
    files = {"test.jsonl": tests, "exam.jsonl": replies}
    if all(exists(run, name, file) or not rows for file, rows in files.items()):
        return
    model, tok = load_model(run, run.folder / name)
    if tests:
        product(run, name, "test.jsonl", make_responses, model, tok, tests, 1, ("test",))
    if replies:
        product(run, name, "exam.jsonl", make_judgements, model, tok, replies, ("exam",))


# ---- what chapters are made of: sampling, on all processes -----------------------------------


def make_prompts(run: Run, path: Path, key: tuple, count: int, earlier: list[str]) -> list[dict]:
    """`count` new prompts that are not like those of the seed data or of earlier rounds."""
    model, tok = load_model(run, run.cfg.writer or run.cfg.init)
    max_new = limit_tokens(run.cfg.max_prompt, model)
    stop = [tok.eos, *tok.newlines]
    settings = batch_settings(run) | WRITER_SAMPLING | {"max_new": max_new, "stop": stop}
    waves = {part["fingerprint"]: part["results"] for part in read_parts(path)}

    def write(requests: list[list[int]], keys: list[tuple]) -> list[list[int]]:
        wave = fingerprint(requests, keys)
        if wave not in waves:  # those of an earlier start are not written again
            my_requests = requests[run.dp_rank :: run.dp_size]
            my_keys = keys[run.dp_rank :: run.dp_size]
            samples = sample.generate(plain, my_requests, my_keys, callback=callback, **settings)
            texts = [(key, ids) for key, (ids,) in zip(my_keys, samples, strict=True)]
            texts = all_gather(run, texts)
            waves[wave] = [ids for _, ids in sorted(texts)]  # a key ends in the request's number
            append_part(path, {"fingerprint": wave, "results": waves[wave]})
        return waves[wave]

    with unsharded(model, run.mesh) as plain, progress(run, path, count, "requests") as callback:
        prompts, tally = sample.propose(
            write,
            tok,
            run.data.propose_template,
            [row["prompt"] for row in run.data.ift],
            count,
            key=key,
            earlier=earlier,
            held_out=run.data.held_out,
            rouge=run.cfg.rouge,
            max_request_tokens=model.cfg.max_len - max_new,
        )
    log(f"{path.parent.name}: {len(prompts)} new prompts; {dict(tally.most_common())}")
    return [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]


def make_responses(run: Run, path: Path, model, tok, rows: list[dict], n: int, stage: tuple):
    """n responses to each prompt; prompts that leave no room for one are left out and counted.
    The seed and the stage key the random numbers: test prompts have the same for every model."""
    max_new = limit_tokens(run.cfg.max_response, model)
    fitting = [r for r in rows if len(tok.chat(r["prompt"])) + max_new <= model.cfg.max_len]
    if len(fitting) < len(rows):
        log(f"{path.name}: {len(rows) - len(fitting)} prompts leave no room for {max_new} tokens")
    settings = batch_settings(run) | response_sampling(run) | {"max_new": max_new, "n": n}
    work = partial(sample.respond, tok=tok, key=(run.cfg.seed, *stage), **settings)
    return map_in_chunks(run, path, model, fitting, work, n, "responses")


def make_judgements(run: Run, path: Path, model, tok, rows: list[dict], stage: tuple):
    """The model's judgements of responses, `votes` of each."""
    max_new = limit_tokens(run.cfg.max_judgement, model)
    settings = batch_settings(run) | judge.SAMPLING
    settings |= {"max_new": max_new, "votes": run.cfg.votes}
    settings |= {"template": run.data.judge_template, "key": (run.cfg.seed, *stage)}
    work = partial(judge.score, tok=tok, **settings)
    judgements = map_in_chunks(run, path, model, rows, work, run.cfg.votes, "judgements")
    if unjudged := len(rows) - len(judgements) // run.cfg.votes:
        empty = sum(not row["response"] for row in rows)
        log(
            f"{path.name}: {unjudged} of {len(rows)} responses have no score: {empty} are empty, "
            f"{unjudged - empty} leave no room for the judge"
        )
    return judgements


def batch_settings(run: Run) -> dict:
    return {"batch": run.cfg.sample_batch, "agree": partial(min_over_tp, run)}


def response_sampling(run: Run) -> dict[str, float]:
    return {"temperature": run.cfg.temperature, "top_p": run.cfg.top_p}


def limit_tokens(count: int, model: Llama) -> int:
    """`count`, but at most half of the context: the other half is for what comes before."""
    half = model.cfg.max_len // 2
    if half < count:
        log(f"a limit of {count} new tokens is lowered to {half}, half of the model's context")
    return min(count, half)


def map_in_chunks(
    run: Run, path: Path, model, rows: list[dict], work: Callable, samples_per_row: int, unit: str
) -> list[dict]:
    """What work(model, rows=my rows, callback=...) makes of rows, on all processes.

    A finished chunk is appended to a file beside `path`, and a later start goes on with the next.
    Chunks, not rows: a logit's last bits depend on which rows share its batch, and in a world of
    the same size the chunks are the same again.
    """
    results, finished = [], set()
    for part in read_parts(path):
        if part["fingerprint"] == fingerprint([rows[i] for i in part["rows"] if i < len(rows)]):
            results += part["results"]
            finished |= set(part["rows"])
    if finished:
        log(f"{path.name}: {len(finished)} of {len(rows)} rows are there from an earlier start")
    remaining = [i for i in range(len(rows)) if i not in finished]
    samples_per_chunk = BATCHES_PER_CHUNK[run.device] * run.cfg.sample_batch * run.dp_size
    size = max(1, samples_per_chunk // samples_per_row)
    total = len(remaining) * samples_per_row
    with unsharded(model, run.mesh) as plain, progress(run, path, total, unit) as callback:
        for start in range(0, len(remaining), size):
            chunk = remaining[start : start + size]
            chunk_rows = [rows[i] for i in chunk]
            by_length = sorted(chunk_rows, key=text_length, reverse=True)  # equal work for all
            my_rows = by_length[run.dp_rank :: run.dp_size]
            new = all_gather(run, work(plain, rows=my_rows, callback=callback))
            part = {"fingerprint": fingerprint(chunk_rows), "rows": chunk, "results": new}
            append_part(path, part)
            results += new
    return sorted(results, key=lambda r: (r["id"], r["k"], r.get("vote", 0)))


def text_length(row: dict) -> int:
    return len(row["prompt"]) + len(row.get("response", ""))


# ---- the training loop, one for both losses --------------------------------------------------


class Objective(NamedTuple):
    """What a training minimises, and how fast."""

    collate: Callable  # examples -> the tensors that the loss takes, tokens first
    loss: Callable  # (model, *tensors) -> a sum over items, and metrics
    num_items: Callable  # of an example: target tokens (SFT), 1 pair (DPO)
    peak_lr: float
    final_lr_ratio: float


def train_model(run: Run, model, name: str, batches, examples, objective: Objective, keep=None):
    """Update the model on every batch: AdamW, 5 % warm-up, cosine decay, clipping at 1.

    It resumes from the last training state. keep(folder name) saves a copy of the model every
    --keep-every updates. Raises UserError on a loss that is not finite.
    """
    cfg = run.cfg
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=objective.peak_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rows = fingerprint(batches, examples)
    first_step = load_training_state(run, name, rows, model, optimizer)
    model.train()
    for step in range(first_step, len(batches)):
        start = time.time()
        lr = learning_rate(step, len(batches), objective)
        optimizer.param_groups[0]["lr"] = lr
        # seeded by the step, so that a resumed run draws the same dropout masks
        torch.manual_seed(sample.seed_of(cfg.seed, name, step, run.dp_rank))
        metrics = accumulate_gradients(run, model, batches[step], examples, objective)
        metrics["grad_norm"] = clip_gradients(model)
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise UserError(
                f"{name}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step "
                f"{step + 1}; earlier models are whole: take a lower learning rate, another --out"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        metrics |= {"lr": lr, "seconds": time.time() - start}
        log_step(run, name, step + 1, len(batches), metrics)
        if keep and cfg.keep_every and (step + 1) % cfg.keep_every == 0:
            keep(f"{name}/step-{step + 1}")  # before the state, or a kill between could lose it
        if (step + 1) % cfg.save_every == 0:
            save_training_state(run, name, step + 1, rows, model, optimizer)


def learning_rate(step: int, steps: int, objective: Objective) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine from the peak to its final ratio."""
    warm_up = max(1, round(0.05 * steps))
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decay = objective.final_lr_ratio + (1 - objective.final_lr_ratio) * cosine
    return objective.peak_lr * min((step + 1) / warm_up, decay)


def accumulate_gradients(run: Run, model, batch, examples, objective: Objective) -> dict:
    """Leave the gradient of a whole batch in the model, however it is cut into micro-batches.

    Returns means over items of the loss's metrics, and the batch's tokens.
    """
    num_items = sum(objective.num_items(examples[i]) for i in batch)
    sums = Counter()
    for rows, weight in my_micro_batches(run, batch, examples):
        tensors = objective.collate([examples[i] for i in rows])
        loss, metrics = objective.loss(model, *tensors)
        (loss * weight * run.dp_size / num_items).backward()  # FSDP takes the mean over dp ranks
        sums["tokens"] += tensors[0].numel() * weight
        for key, value in metrics.items():  # tensors still: reading a number waits for the device
            sums[key] += value.double() * weight / num_items
    if run.dp_size > 1 and not isinstance(model, FSDPModule):
        average_gradients(model)
    return sum_over_ranks(sums, run.cfg.tp)


def average_gradients(model):
    """The mean of the replicas' gradients, in one exchange: FSDP makes one a block, which takes
    longer than the work of a small model."""
    params = list(model.parameters())
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)


def my_micro_batches(run: Run, batch: list[int], examples: list[tuple]):
    """This process's share of a batch: (row numbers, weight) of every forward pass."""
    most_tokens = run.cfg.micro_tokens or DEFAULT_MICRO_TOKENS[run.device]
    sizes = {i: dpo.num_tokens(examples[i]) for i in batch}
    return dpo.micro_batches(sizes, most_tokens, run.dp_rank, run.dp_size)


def clip_gradients(model) -> float:
    """Clip the gradient's norm at 1; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def log_step(run: Run, name: str, step: int, steps: int, metrics: dict):
    if dist.get_rank() == 0:
        line = {"model": name, "step": step, "steps": steps, **metrics}
        append_jsonl(run.folder / "metrics.jsonl", line)
    values = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    rate = metrics["tokens"] / metrics["seconds"]
    log(f"{name} step {step}/{steps} {values} {rate:,.0f} tok/s")
    if metrics["grad_norm"] > 100:
        log(f"warning, {name}: a gradient norm of {metrics['grad_norm']:.0f} is out of proportion")


# ---- the frozen reference of DPO: two columns of pairs.jsonl ---------------------------------


@torch.no_grad()
def pair_logps(run: Run, model, examples, batches) -> dict[int, tuple[float, float]]:
    """Row number -> the model's log-probs of chosen and rejected, for the rows of some batches,
    without dropout."""
    model.eval()
    logps = []
    for batch in batches:
        for rows, weight in my_micro_batches(run, batch, examples):
            tensors = collate([examples[i][:3] for i in rows], run.device)
            both = sequence_logps(model, *tensors).tolist()
            if weight:
                logps += zip(rows, both[::2], both[1::2], strict=True)
    return {i: (chosen, rejected) for i, chosen, rejected in all_gather(run, logps)}


def add_reference(run: Run, path: Path, model, tok, pairs: list[dict], new: str):
    """Pairs with the frozen reference: M_t's log-probs of chosen and rejected.

    They are computed in the very batches of DPO's first epoch, so that policy and reference agree
    to the last bit before the first update, in any precision.
    """
    examples = dpo.pair_examples(tok, pairs)
    batches = dpo.make_batches(examples, run.cfg.batch, 1, (run.cfg.seed, new))
    logps = pair_logps(run, model, examples, batches)
    rows = []
    for i, pair in enumerate(pairs):
        chosen, rejected = logps[i]
        rows.append(pair | {"reference_chosen": chosen, "reference_rejected": rejected})
    return rows


def check_reference(run: Run, model, examples, batch, old: str, new: str):
    """Before the first update policy and reference are one model: margin 0, loss ln 2, dropout
    apart. Else the pairs are another model's."""
    differences, num_tokens = 0.0, 0
    for i, logps in pair_logps(run, model, examples, [batch]).items():
        _, chosen, rejected, reference = examples[i]
        differences += abs(logps[0] - reference[0]) + abs(logps[1] - reference[1])
        num_tokens += len(chosen) + len(rejected)
    half_precision = run.device == "cuda" or run.cfg.dtype == "bfloat16"
    if not differences / num_tokens < (1e-2 if half_precision else 1e-4):
        raise UserError(
            f"{run.folder}/{new}/pairs.jsonl: its reference log-probs differ by "
            f"{differences / num_tokens:.3g} a token from those of {old}, where DPO starts; "
            "remove all files but prompts.jsonl there and start again"
        )
    log(f"{new}: policy and reference are one model: the loss is ln 2 before dropout")


# ---- training state, saved and resumed -------------------------------------------------------


def training_state(model, optimizer) -> dict:
    """Weights and Adam's moments, saved and loaded in place, by each process its own shards.

    Learning rate, dropout and rows are functions of the step, so no random state is among them.
    """
    state = {}
    for name, p in model.named_parameters():
        if not optimizer.state[p]:  # AdamW makes them in its first step; loading needs them before
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        state[name] = {"weight": p} | optimizer.state[p]
    return state


def save_training_state(run: Run, name: str, step: int, rows: str, model, optimizer):
    """Save to a folder that appears whole or not at all; then the one before is removed."""
    folder = run.folder / name / "checkpoint" / str(step)
    temporary = folder.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary)
    except dcp.CheckpointException as e:
        reason = checkpoint_error(e)
        raise UserError(f"{temporary}: {reason}; make room: the same command resumes") from None
    if dist.get_rank() == 0:
        write_json(temporary / "training.json", {"model": name, "step": step, "rows": rows})
        os.replace(temporary, folder)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def load_training_state(run: Run, name: str, rows: str, model, optimizer) -> int:
    """Load the last training state, of a world of any size; returns its step, or 0."""
    parent = run.folder / name / "checkpoint"
    steps = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
    step = max(all_gather(run, steps), default=0)
    if step:
        remedy = f"remove {parent} to train {name} from its start"
        if read_json(parent / str(step) / "training.json").get("rows") != rows:
            raise UserError(f"{parent}/{step}: the state of training on other rows; {remedy}")
        try:
            dcp.load(training_state(model, optimizer), checkpoint_id=parent / str(step))
        except dcp.CheckpointException as e:
            reason = repr(checkpoint_error(e))[:100]
            raise UserError(f"{parent}/{step}: damaged ({reason}); {remedy}") from None
        log(f"{name}: goes on after step {step}")
    if dist.get_rank() == 0:
        drop_later_metrics(run.folder / "metrics.jsonl", name, step)
    return step


def drop_later_metrics(path: Path, name: str, step: int):
    """Forget what an earlier start has logged of a model after this step."""
    rows = [row for row in read_appended(path) if row["model"] != name or row["step"] <= step]
    if path.exists():
        write_jsonl(path, rows)


# ---- files of the run ------------------------------------------------------------------------


def open_run(cfg: Config, mesh) -> Run:
    """Read all the run needs before anything costs time; refuse an --out that belongs to another
    configuration."""
    data = read_data(cfg, Path(cfg.data))
    folder = Path(cfg.out)
    for model_folder in filter(None, (cfg.init, cfg.writer)):
        check_tp(read_shape(model_folder)[0], cfg.tp, model_folder)
    paths = [path for path in (Path(cfg.data) / name for name in DATA_FILES) if path.exists()]
    files = {path.name: fingerprint(path.read_bytes()) for path in paths}
    files["init"] = fingerprint_model(Path(cfg.init))
    files["writer"] = fingerprint_model(Path(cfg.writer)) if cfg.writer else files["init"]
    path = folder / "config.json"
    saved = read_json(path) if path.exists() else {}
    check_same_run(cfg, saved, files, path)
    threads = saved.get("threads")  # a run goes on with them: the last bits depend on it
    if mesh.size() == 1 and mesh.device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = threads or choose_threads(cfg)
        torch.set_num_threads(threads)
    threads = threads or torch.get_num_threads()
    dist.barrier()  # nobody writes before all have read
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock_run(folder)
        remove_leftovers(folder)
        if not saved:
            for model_folder in sorted(folder.glob("*/config.json")):
                log(f"{model_folder.parent}: is there already and taken as it is")
        write_json(path, asdict(cfg) | {"threads": threads, "files": files})
    dp_rank, dp_size = mesh["dp"].get_local_rank(), mesh["dp"].size()
    return Run(cfg, folder, data, mesh, mesh.device_type, dp_rank, dp_size)


def fingerprint_model(folder: Path) -> str:
    """Of the sizes and the last MiB of every weights file: enough to know a model again."""
    ends = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            ends.append((path.name, path.stat().st_size, f.read()))
    return fingerprint(ends)


def lock_run(folder: Path):
    """UserError where another process works in this run folder; the lock of a dead one is free."""
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY)  # held until the process ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{folder}: another train.py is at work here; give another --out"
        ) from None
    except OSError:  # a file system without locks
        log(f"{folder}: cannot be locked; do not start a second train.py in it")


def read_data(cfg: Config, folder: Path) -> Data:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data names one with ift.jsonl, judge.txt")
    propose_template = read_text(folder / "propose.txt", "copy it from data/zoo and edit it")
    sample.count_placeholders(propose_template, folder / "propose.txt")
    judge_template = judge.read_template(folder / "judge.txt")
    ift = read_jsonl(folder / "ift.jsonl", "prompt", "response")
    keys = ("prompt", "response", "judgement")
    eft = read_jsonl(folder / "eft.jsonl", *keys, missing_ok=True) if cfg.eft_size else []
    check_judgements(eft, folder / "eft.jsonl")
    eft_ranked = []
    if cfg.eft_size and not eft:
        eft_ranked = judge.read_ranked(folder / "eft_ranked.jsonl", missing_ok=True)
    eft_eval = judge.read_ranked(folder / "eft_eval.jsonl", missing_ok=True)
    test = read_jsonl(folder / "test.jsonl", "prompt", missing_ok=True)
    valid = read_jsonl(folder / "valid.jsonl", "prompt", missing_ok=True)
    if not eft:
        source = "the SFT baseline makes EFT rows of eft_ranked.jsonl"
        log(f"no EFT rows: {source if eft_ranked else 'M1 learns from ift.jsonl alone'}")
    if not test:
        log(f"no {folder}/test.jsonl: models answer no test prompts")
    if not eft_eval:
        log(f"no {folder}/eft_eval.jsonl: judges are not evaluated")
    held_out = [row["prompt"] for row in eft_eval + test + valid]
    rows = (ift, eft, eft_ranked, eft_eval, test, held_out)
    return Data(*rows, judge_template, propose_template)


def check_judgements(eft: list[dict], path: Path):
    for number, row in enumerate(eft, 1):
        if judge.parse_score(row["judgement"]) is None:
            raise UserError(
                f"{path}: judgement {number} has no readable `Score: n` from 0 to "
                f"{judge.MAX_SCORE} at its end; mend it"
            )


def check_same_run(cfg: Config, saved: dict, files: dict[str, str], path: Path):
    """UserError where the run was begun with other knobs or other data: those saved in `path`."""
    for knob, value in asdict(cfg).items():
        if knob not in MUTABLE_FIELDS and saved.get(knob, value) != value:
            raise UserError(
                f"{path}: this run was made with {knob} = {saved[knob]!r}, now it is {value!r}; "
                "give another --out, or the old value"
            )
    for name, old in saved.get("files", {}).items():
        if files.get(name) != old:
            raise UserError(
                f"{path.parent}: {name} is not what it was when this run began; give another "
                "--out, or bring the old one back"
            )


def exists(run: Run, name: str, file: str) -> bool:
    """Is this product there? Files appear whole or not at all, so being there is being finished.

    All ranks must ask together, and go by what the first one sees: file systems may lag.
    """
    return all_gather(run, [dist.get_rank() == 0 and (run.folder / name / file).exists()])[0]


def product(run: Run, name: str, file: str, make: Callable, *args) -> list[dict]:
    """The rows of a file of the run, on all ranks: read if it is there, else made by
    make(run, path, *args), on all ranks together, and written by the first."""
    path = run.folder / name / file
    if exists(run, name, file):
        return read_jsonl(path, allow_empty=True)
    rows = make(run, path, *args)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
        remove_leftovers(run.folder)
    dist.barrier()
    return rows


def append_part(path: Path, part: dict):
    """Append finished work to PATH.part, which `product` replaces by the whole file."""
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(path.with_name(path.name + ".part"), part)


def read_parts(path: Path) -> list[dict]:
    """What an earlier start has appended, as the first rank reads it."""
    parts = [read_appended(path.with_name(path.name + ".part")) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(parts)
    return parts[0]


def remove_leftovers(folder: Path):
    """Remove what was kept only to finish a product that is there by now."""
    for part in folder.glob("*/*.part"):
        if part.with_suffix("").exists():
            part.unlink()
    for state in folder.glob("*/checkpoint"):
        if (state.parent / "config.json").exists():
            shutil.rmtree(state, ignore_errors=True)


def append_jsonl(path: Path, row: dict):
    write_and_sync(path, json.dumps(row, ensure_ascii=False) + "\n", mode="ab")


def read_appended(path: Path) -> list[dict]:
    """Rows of a file that is appended to; a last line that a killed process tore is cut off."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole_lines = [line for line in lines if line.endswith(b"\n")]
    os.truncate(path, sum(map(len, whole_lines)))
    return [json.loads(line) for line in whole_lines]


# ---- processes -------------------------------------------------------------------------------


def init_distributed(cfg: Config):
    """Join the processes that torchrun started, or be a world of one; the mesh (dp, tp)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(days=1)  # ranks may finish their texts hours apart
    alone = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timeout, **alone)
    # it warns of what tp cannot do in one go
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    world = dist.get_world_size()
    if world % cfg.tp:
        raise UserError(
            f"{world} processes are not a multiple of --tp {cfg.tp}; start another number of them "
            "or change it"
        )
    ranks = torch.arange(world).view(-1, cfg.tp)
    # groups that init_device_mesh makes wait for 30 minutes, too little to save a large model
    dp_group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    tp_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    groups = [dp_group, tp_group]
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("dp", "tp"))


def choose_threads(cfg: Config) -> int:
    """The most threads of which each step up is worth MIN_SPEEDUP. On busy cores one is mostly
    the fastest: threads wait for each other in every matrix product."""
    seconds = time_threads(cfg)
    threads = 1
    for count, time_taken in seconds.items():
        if time_taken * MIN_SPEEDUP < seconds[threads]:
            threads = count
    if threads < max(seconds):
        log(f"{threads} of {max(seconds)} threads: more are no faster beside what else runs")
    return threads


@torch.no_grad()
def time_threads(cfg: Config) -> dict[int, float]:
    """Seconds that a block of the model takes for a token of 64 rows, as in sampling, by number
    of threads: 1, 2, 4, ..., all."""
    block = Llama(replace(read_shape(cfg.init)[0], layers=1, vocab_size=8))
    tokens = torch.zeros(64, 1, dtype=torch.long)
    most = torch.get_num_threads()
    counts = [2**i for i in range(most.bit_length())] + [most]
    times = {count: [] for count in sorted(set(counts))}
    seconds = 1 if most > 1 else 0  # on one core there is nothing to compare
    end = time.perf_counter() + seconds
    while not times[1] or time.perf_counter() < end:  # in turns: other load hits all alike
        for count, taken in times.items():
            torch.set_num_threads(count)
            start = time.perf_counter()
            with sample.decode_by_onednn(len(tokens)):
                block(tokens)
            taken.append(time.perf_counter() - start)
    return {count: statistics.median(taken) for count, taken in times.items()}


def load_model(run: Run, folder):
    """Load a model folder into fp32 master weights, on the device, sharded over the processes;
    on CPUs in fp32 every process has the whole model, see average_gradients."""
    dtype = run.cfg.dtype or ("bfloat16" if run.device == "cuda" else "float32")
    replicated = run.device == "cpu" and dtype == "float32" and run.cfg.tp == 1
    shard = None
    if not replicated or run.cfg.activation_checkpointing:
        gc.collect()  # frees the model before: FSDP leaves reference cycles
        shard = partial(
            parallelize,
            mesh=run.mesh,
            dtype=getattr(torch, dtype),
            activation_checkpointing=run.cfg.activation_checkpointing,
        )
    model, tok = load(folder, torch.float32, run.device, run.cfg.dropout, shard)
    if replicated:
        use_onednn_linear(model)
    dist.barrier()  # slow readers are waited for here, not in the first forward pass
    return model.eval(), tok


def save_model(run: Run, model, tok, name: str):
    """Write a model folder into the run folder; all ranks call this, the first writes."""
    save(model, tok, run.folder / name, response_sampling(run), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        remove_leftovers(run.folder)
    dist.barrier()


def all_gather(run: Run, rows: list) -> list:
    """The rows of all dp ranks, on all ranks; the ranks of a tp group have the same rows."""
    if dist.get_rank() % run.cfg.tp:
        rows = []
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def min_over_tp(run: Run, count: int) -> int:
    """The least of a tp group's numbers: its ranks decode the same rows side by side."""
    value = torch.tensor(count)
    dist.all_reduce(value, dist.ReduceOp.MIN, group=run.mesh["tp"].get_group())
    return value.item()


def sum_over_ranks(sums: dict[str, float], tp: int = 1) -> dict[str, float]:
    """Sums over all processes; those of a tp group have the same numbers, which count once."""
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(sums, (values / tp).tolist(), strict=True))


def log(text: str):
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def progress(run: Run, path: Path, total: int, unit: str):
    """A bar with rate and time left (of the first process; outside a terminal once a minute), and
    a line at the end."""
    title = f"{path.parent.name}/{path.name}"
    start = time.time()
    counts = {"tokens": 0, "ended": 0}
    my_total = -(-total // run.dp_size)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds
    settings = {"desc": title, "unit": f" {unit}", "delay": pause, "mininterval": pause}
    settings["miniters"] = 1  # or tqdm writes between as well
    with tqdm(total=my_total, disable=dist.get_rank() != 0, **settings) as bar:

        def callback(tokens: int, ended: int):
            counts["tokens"] += tokens
            counts["ended"] += ended
            bar.update(ended)

        yield callback
    counts = sum_over_ranks(counts, run.cfg.tp)
    seconds = time.time() - start
    rate = f"{counts['tokens']:,.0f} tokens in {seconds:.1f} s"
    log(
        f"{title}: {counts['ended']:,.0f} {unit}, {rate} ({counts['tokens'] / seconds:,.0f} tok/s)"
    )


# ---- flags -----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Config:
    """Config's defaults, overridden by the data folder's recipe.json, and that by flags.

    Config's fields are flags, and the comment behind a field is its help.
    """
    source = inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description="Self-Rewarding Language Models: M0 -> M1 -> M2 -> M3.",
        epilog="A data folder's recipe.json overrides these defaults; flags override both.",
        usage="train.py [--FLAG VALUE ...], where --help lists the flags",
        argument_default=argparse.SUPPRESS,
    )
    for field in fields(Config):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, help=f"{comments[field.name]} ({field.default!r})", **kind)
    flags = vars(parser.parse_args(argv))
    recipe = read_recipe(Path(flags.get("data", Config.data)) / "recipe.json")
    return validate(replace(Config(), **recipe | flags))


def read_recipe(path: Path) -> dict:
    recipe = read_json(path) if path.exists() else {}
    types = {field.name: field.type for field in fields(Config)}
    for knob, value in recipe.items():
        kind = types.get(knob)
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed:
            raise UserError(
                f"{path}: {knob!r}: {value!r} is no knob or of the wrong type; see train.py --help"
            )
    return recipe


def validate(cfg: Config) -> Config:
    """Refuse values that no run can have."""
    at_least_1 = "iters votes batch sample_batch save_every sft_epochs dpo_epochs tp".split()
    at_least_1 += ["max_prompt", "max_response", "max_judgement"]
    rules = [(name, getattr(cfg, name) >= 1, "at least 1") for name in at_least_1]
    for name in ("micro_tokens", "keep_every", "eft_size"):
        rules.append((name, getattr(cfg, name) >= 0, "not negative"))
    for name in ("sft_lr", "dpo_lr", "beta", "temperature"):
        rules.append((name, 0 < getattr(cfg, name) < math.inf, "positive"))
    rules += [
        ("prompts", re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.prompts), "like 300 or 300,700"),
        ("candidates", cfg.candidates >= 2, "at least 2, or there is nothing to prefer"),
        ("top_p", 0 < cfg.top_p <= 1, "in (0, 1]"),
        ("dropout", 0 <= cfg.dropout < 1, "in [0, 1)"),
        ("dtype", cfg.dtype in ("", "float32", "bfloat16"), "float32 or bfloat16"),
        ("init", cfg.init, "the folder of the pretrained model, M0"),
    ]
    for name, holds, rule in rules:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {rule}, not {getattr(cfg, name)!r}")
    return cfg


def command(argv: list[str] | None = None):
    """The command: whatever becomes of it, one line says what, and the exit code is that of the
    file's head."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does
    try:
        run_command(lambda: main(parse_args(argv)))
    except RuntimeError as e:
        if "by peer" not in str(e):  # closed or reset: the process at fault tells why
            raise
        sys.exit(f"this process ends because another one has: {e}"[:120])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    command()
