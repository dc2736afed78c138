"""train.py: Config -> M1, M2, M3. Seed SFT, then the self-rewarding iterations (paper section 2).

    torchrun train.py --iters 3                                    the zoo: minutes on a laptop CPU
    torchrun --nproc-per-node 8 train.py --init LLAMA --data DATA --out RUN
    python train.py --preset 70b --data DATA --gpus 64 --plan      what that needs, before anything starts
    python train.py --help                                         every knob

Every chapter turns files of the run folder into files of the run folder, and one whose product is there is skipped.
Inside a chapter, training leaves checkpoints and sampling commits its rows in chunks: start the same command again,
on as many processes as you like, and it goes on where it was stopped. One process is a world of size one.

Exit codes: 0 done, 1 an error that one line explains, 75 stopped by SIGTERM and saved, 130 the same by Ctrl-C.

Left out: torch.compile of the training step (a tenth faster on a CPU, after minutes of compiling).
"""

import argparse
import gc
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

# Waiting threads sleep after some microseconds: where cores are shared, spinning is slow; to sleep at once costs 40 %.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"} | os.environ

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dpo
import judge
import sample
from dpo import collate, preference_loss, sequence_logps, sft_loss
from model import (
    CONFIGS,
    BadInput,
    Llama,
    ModelConfig,
    check_tp,
    gathered,
    load,
    parallelize,
    read_json,
    read_shape,
    read_text,
    save,
    settle,
    write_json,
    write_text,
)
from sample import digest, optional, read_rows


@dataclass(frozen=True)
class Config:
    """All knobs, saved with the run. Defaults are the paper's values where it gives them; a data folder's
    recipe.json overrides them, and flags override that."""

    init: str = "data/zoo/base"  # M0: folder of the pretrained checkpoint
    data: str = "data/zoo"  # folder with ift.jsonl, eft.jsonl, test.jsonl, judge.txt, propose.txt
    out: str = "runs/zoo"  # run folder; the same command continues it
    iters: int = 3  # models to make: M1 by SFT, each further one by a round of DPO
    seed: int = 0  # of everything that is drawn
    writer: str = ""  # checkpoint that writes the new prompts of all rounds; empty: M0
    judge_template: str = ""  # file with {prompt} and {response}; empty: judge.txt of the data folder
    prompts: str = "5000,9000"  # new prompts a round, the last number for all further rounds (paper: not given)
    max_prompt: int = 128  # most tokens of a new prompt
    writer_temperature: float = 0.6  # of the prompt writer
    rouge: float = 0.7  # a new prompt more similar than this (ROUGE-L) to an older one is dropped
    candidates: int = 4  # responses to each prompt (N)
    votes: int = 3  # judgements of each response
    length_guard: float = 0.0  # choose the shortest of those within this share of the score range below the best
    temperature: float = 0.7  # of responses and judgements
    top_p: float = 0.9  # of all sampling
    max_response: int = 1024  # most tokens of a response
    max_judgement: int = 256  # most tokens of a judgement
    sample_batch: int = 32  # sequences sampled side by side in one process (memory: their keys and values)
    eft_size: int = 1630  # most EFT rows that are made where data has no eft.jsonl; 0: M1 learns from IFT alone
    sft_lr: float = 5.5e-6  # peak learning rate of SFT; ends at a fifth of it
    sft_epochs: int = 3  # passes over the seed data (paper: not given)
    dpo_lr: float = 1e-6  # peak learning rate of DPO; ends at a tenth of it
    dpo_epochs: int = 1  # passes over the pairs (paper: not given)
    batch: int = 16  # rows (SFT) or pairs (DPO) an update, over all processes
    micro_tokens: int = 0  # most tokens that one process puts through the model at once; 0: 16384, on a CPU 2048
    save_every: int = 200  # updates between checkpoints, of which the last is kept until the model is finished
    dropout: float = 0.1  # on the residual branches, while training
    beta: float = 0.1  # of DPO
    nll: float = 0.0  # weight of the chosen response's NLL beside DPO (not in the paper; Pang et al. 2024)
    reference: str = ""  # model that DPO is anchored to in all rounds, such as M1; empty: the round's own start
    judge: str = ""  # model that judges in all rounds, such as M1; empty: the round's own start
    valid_every: int = 0  # DPO updates between answers to valid.jsonl; stop when they no longer improve; 0: never
    evaluator: str = ""  # who compares them: an oracle.py, a checkpoint's folder, or an endpoint as URL#MODEL
    control: str = ""  # shuffle: scores dealt anew, learning should fail; positive: SFT on responses of score 5 (A.4)
    dtype: str = ""  # float32 or bfloat16, of compute; master weights are float32; empty: bfloat16 on a GPU
    save_dtype: str = "float32"  # of saved weights; bfloat16 halves them but rounds away part of a small step
    tp: int = 1  # processes that share every matrix (tensor parallelism): neighbours, best in one machine
    dp_replicate: int = 1  # copies of the sharded model (HSDP): one in each machine spares the network between them
    recompute: bool = False  # a block's activations are computed again in the backward pass: less memory, more time
    offload: bool = False  # master weights, their gradients and the optimizer's state lie in the CPU's memory


# These may change between two starts: who ran out of memory starts again with less at once.
FREE = ("out", "iters", "sample_batch", "micro_tokens", "save_every", "evaluator", "tp", "dp_replicate", "recompute",
        "offload")  # fmt: skip
ROWS = ("ift", "eft", "eft_ranked", "eft_eval", "test", "valid")  # of a data folder; a run goes on with these very rows
CHUNK = 8  # batches of sequences that each process samples between two commits
ASKED = []  # signals that have asked this process to stop; work in hand is brought to a safe end first


# What the machine needs to hold a size of Llama 2: 7b and 13b on 8 GPUs of 80 GiB, 70b on 64. The method's knobs are
# the paper's already, as Config's defaults. Weights are saved in float32: M_t+1 goes on from the files of M_t.
PRESETS = {
    "7b": {"tp": 1, "recompute": False, "micro_tokens": 8192, "sample_batch": 16},
    "13b": {"tp": 1, "recompute": True, "micro_tokens": 8192, "sample_batch": 8},
    "70b": {"tp": 8, "recompute": True, "micro_tokens": 8192, "sample_batch": 64},
}


class Stopped(Exception):
    """Some process was asked to stop, and all have agreed to; what is finished is on disk."""


def main(cfg: Config):
    mesh = start_processes(cfg)
    data = open_run(cfg)
    models = ["SFT", *(f"M{t}" for t in range(1, cfg.iters + 1))]
    seed_sft(cfg, mesh, data, "SFT", data["ift"])  # the baseline: instructions only
    eft = write_eft(cfg, mesh, data)  # by the baseline, where people's rankings are all there is
    write_prompts(cfg, mesh, data)  # for all rounds, by the fixed writer
    seed = data["ift"] + eft
    seed_sft(cfg, mesh, data, "M1", seed)  # M0 -> M1: instructions and judging
    for start, end in pairwise(models[1:]):
        self_reward(cfg, mesh, data, start, end)  # M_t writes, judges itself, prefers
        if cfg.control == "positive":
            seed_sft(cfg, mesh, data, end, seed + read_rows(Path(cfg.out) / end / "positives.jsonl"))  # M0 -> M_t+1
        else:
            train_dpo(cfg, mesh, data, start, end)  # M_t -> M_t+1
    for name in models:
        examine(cfg, mesh, data, name)
    if dist.get_rank() == 0:
        log(judge.show(judge.report(Path(cfg.out))))


# ---- chapters ----------------------------------------------------------------------------------------------


def seed_sft(cfg: Config, mesh, data: dict, name: str, rows: list[dict]):
    """Supervised fine-tuning from M0 on the seed rows (section 2.1)."""
    if done(cfg, name, "config.json"):
        return
    model, tok = open_model(cfg, mesh, cfg.init)
    examples = []
    for row in rows:
        prompt, response = row["prompt"], row["response"]
        if "judgement" in row:
            prompt, response = judge.judge_prompt(data["judge_template"], prompt, response), row["judgement"]
        examples.append((tok.chat(prompt), tok.response(response)))
    room = model.cfg.max_len
    fit = [e for e in examples if len(e[0]) + len(e[1]) <= room]
    if len(fit) < len(examples):
        log(f"{name}: {len(examples) - len(fit)} of {len(examples)} seed rows exceed the context of {room} tokens")
    if not fit:
        raise BadInput(f"{cfg.data}: no seed row fits the context of {room} tokens; shorten rows or change --init")
    plan = batches([len(p) + len(r) for p, r in fit], cfg.batch, cfg.sft_epochs, (cfg.seed, name))
    optimize(
        cfg, model, name, plan, fit,
        pack=lambda rows: collate(rows, mesh.device_type), loss=sft_loss, units=lambda row: len(row[1]),
        lr=cfg.sft_lr, end=0.2,
    )  # fmt: skip
    save_model(cfg, model, tok, name)


def write_eft(cfg: Config, mesh, data: dict) -> list[dict]:
    """What M1 learns to judge from: eft.jsonl of the data folder, or else what the SFT baseline says of the replies
    that people have ranked, where it orders them as people do (section 3.1)."""
    if not data["ranked"] or done(cfg, "M1", "config.json") and cfg.control != "positive":  # which learns it again
        return data["eft"]
    folder, asked = Path(cfg.out) / "M1", {(r["id"], r["k"]): r for r in replies(data["ranked"])}
    if not done(cfg, "M1", "eft_judgements.jsonl"):
        model, tok = open_model(cfg, mesh, Path(cfg.out) / "SFT")
        what, file = "SFT writes EFT judgements", "M1/eft_judgements.jsonl"
        found = score(cfg, mesh, model, tok, data, list(asked.values()), what, ("eft",), file)
        put(cfg, "M1", "eft_judgements.jsonl", [asked[j["id"], j["k"]] | j for j in found])
    if not done(cfg, "M1", "eft.jsonl"):
        judgements = read_rows(folder / "eft_judgements.jsonl", empty=True)
        rows, report = judge.eft_rows(data["ranked"], judgements, cfg.eft_size, (cfg.seed, "eft"))
        if dist.get_rank() == 0:
            write_json(folder / "eft_report.json", report)
        log(f"M1: EFT {report}")
        if not rows:
            remedy = "give a better --init" if judgements else "shorten the judge template"
            raise BadInput(
                f"{folder}: of {len(judgements)} judgements of {report['replies']} ranked replies none can be learned "
                f"from: {report['dropped'] or 'no reply leaves room for the judge'}; {remedy}, write "
                f"{cfg.data}/eft.jsonl yourself, or take another --out with --eft-size 0"
            )
        put(cfg, "M1", "eft.jsonl", rows)
    return read_rows(folder / "eft.jsonl")


def write_prompts(cfg: Config, mesh, data: dict):
    """New prompts for every round, few-shot by a writer that never changes (section 2.2, step 1)."""
    counts = [int(n) for n in cfg.prompts.split(",")]
    todo = [t for t in range(1, cfg.iters) if not done(cfg, f"M{t + 1}", "prompts.jsonl")]
    if not todo:
        return
    model, tok = open_model(cfg, mesh, cfg.writer or cfg.init)
    knobs = sampling(cfg, mesh) | {"temperature": cfg.writer_temperature, "stop": [tok.eos, *tok.newlines]}
    knobs["max_new"] = limit(cfg.max_prompt, model)

    def write(ids, keys):
        def work(mine):
            texts = sample.generate(model, [i for _, i in mine], [k for k, _ in mine], tick=bar, **knobs)
            return [(key, drawn[0]) for (key, _), drawn in zip(mine, texts, strict=True)]

        of = digest(ids, keys)
        if of not in waves:  # the waves of an earlier start are not written again
            drawn = spread(cfg, list(zip(keys, ids, strict=True)), work)
            waves[of] = [ids for _, ids in sorted(drawn)]  # a key ends in the request's number
            commit(cfg, f"M{t + 1}/prompts.jsonl", {"of": of, "made": waves[of]})
        return waves[of]

    for t in todo:
        waves = {line["of"]: line["made"] for line in committed(cfg, f"M{t + 1}/prompts.jsonl")}
        taken = [r["prompt"] for s in range(1, t) for r in read_rows(Path(cfg.out) / f"M{s + 1}" / "prompts.jsonl")]
        count = counts[min(t, len(counts)) - 1]
        with gathered(model), progress(cfg, mesh, f"prompts for M{t + 1}", count, "requests") as bar:
            prompts, tally = sample.propose(
                write, tok, data["propose"], [r["prompt"] for r in data["ift"]], count,
                key=(cfg.seed, t, "prompts"), taken=taken, held_out=data["held_out"], rouge=cfg.rouge,
                room=model.cfg.max_len - knobs["max_new"],
            )  # fmt: skip
        log(f"M{t + 1}: {len(prompts)} new prompts; {dict(tally.most_common())}")
        put(cfg, f"M{t + 1}", "prompts.jsonl", [{"id": i, "prompt": p} for i, p in enumerate(prompts)])


def self_reward(cfg: Config, mesh, data: dict, start: str, end: str):
    """M_t responds to the new prompts, judges its own responses, and prefers (section 2.2, steps 2 and 3)."""
    if done(cfg, end, "positives.jsonl" if cfg.control == "positive" else "pairs.jsonl"):
        return
    model, tok = open_model(cfg, mesh, Path(cfg.out) / start)
    prompts = read_rows(Path(cfg.out) / end / "prompts.jsonl", "prompt")
    if not done(cfg, end, "candidates.jsonl"):
        stage, file = (end, "responses"), f"{end}/candidates.jsonl"
        drawn = respond(cfg, mesh, model, tok, prompts, f"{start} responds", stage, cfg.candidates, file)
        put(cfg, end, "candidates.jsonl", drawn)
    candidates = read_rows(Path(cfg.out) / end / "candidates.jsonl", empty=True)
    if not done(cfg, end, "judgements.jsonl"):
        texts = {p["id"]: p["prompt"] for p in prompts}
        asked = [c | {"prompt": texts[c["id"]]} for c in candidates]
        if cfg.judge:
            del model  # one at a time is in memory
            model, _ = open_model(cfg, mesh, Path(cfg.out) / cfg.judge)
        what, stage, file = f"{cfg.judge or start} judges", (end, "judgements"), f"{end}/judgements.jsonl"
        put(cfg, end, "judgements.jsonl", score(cfg, mesh, model, tok, data, asked, what, stage, file))
    judgements = read_rows(Path(cfg.out) / end / "judgements.jsonl", empty=True)
    scores = judge.mean_scores(judgements)
    if cfg.control == "positive":
        return put(cfg, end, "positives.jsonl", positives(cfg, end, prompts, candidates, scores))
    if cfg.control == "shuffle":
        scores = shuffled(scores, (cfg.seed, end, "control"))
    pairs, tally = judge.prefer(prompts, candidates, scores, cfg.length_guard)
    rate, histogram = judge.parse_rate(judgements) or 0, Counter(j["score"] for j in judgements)
    log(f"{end}: {dict(tally)}; {rate:.1%} of {len(judgements)} judgements readable")
    if not pairs:
        remedy = f"{start} cannot judge yet: give it EFT rows or more SFT"
        remedy = remedy if judgements else "shorten judge.txt or texts"
        raise BadInput(
            f"{cfg.out}/{end}: none of {len(prompts)} prompts gave a pair: {dict(tally)}, {rate:.1%} of judgements "
            f"readable, scores {dict(histogram.most_common())}; {remedy}"
        )
    if cfg.reference or cfg.judge:
        del model
        model, _ = open_model(cfg, mesh, Path(cfg.out) / (cfg.reference or start))
    put(cfg, end, "pairs.jsonl", add_reference(cfg, mesh, model, tok, pairs, end))


def limit(tokens: int, model) -> int:
    """`tokens`, but no more than half of the context: the other half is for what comes before."""
    most = min(tokens, model.cfg.max_len // 2)
    if most < tokens:
        log(f"a limit of {tokens} new tokens is lowered to {most}, half of the model's context")
    return most


def sampling(cfg: Config, mesh) -> dict:
    """Knobs of all sampling; the writer has a temperature of its own."""
    agree = partial(least, mesh)
    return {"temperature": cfg.temperature, "top_p": cfg.top_p, "batch": cfg.sample_batch, "agree": agree}


def in_chunks(cfg: Config, mesh, model, rows: list[dict], what: str, unit: str, file: str, each: int, work):
    """What work(rows, tick=tick) makes of rows, `each` sequences of a row, on all processes.

    A finished chunk is committed beside `file`, and a later start goes on with the next. Chunks, not rows: a logit's
    last bits hang on which rows share its batch, and in a world of the same size the chunks are the same again.
    """
    kept = [c for c in committed(cfg, file) if c["of"] == digest([rows[i] for i in c["rows"] if i < len(rows)])]
    found, there = [row for c in kept for row in c["made"]], {i for c in kept for i in c["rows"]}
    left, size = [i for i in range(len(rows)) if i not in there], CHUNK * cfg.sample_batch * replica(cfg)[1]
    chunks = [left[at : at + max(1, size // each)] for at in range(0, len(left), max(1, size // each))]
    if there:
        log(f"{what}: {len(there)} of {len(rows)} rows are there from an earlier start")
    with gathered(model), progress(cfg, mesh, what, len(left) * each, unit) as bar:
        for chunk in chunks:
            asked = [rows[i] for i in chunk]
            dealt = sorted(asked, key=lambda r: -len(r["prompt"] + r.get("response", "")))  # that all end together
            made = spread(cfg, dealt, partial(work, tick=bar))
            commit(cfg, file, {"of": digest(asked), "rows": chunk, "made": made})
            found += made
    return sorted(found, key=lambda r: (r["id"], r["k"], r.get("vote", 0)))


def respond(cfg: Config, mesh, model, tok, rows: list[dict], what: str, stage: tuple, n: int, file: str) -> list[dict]:
    """n responses to each prompt, on all processes; prompts that leave no room for one are left out and counted.
    The seed and the stage key their random numbers: the test prompts have the same ones for every model."""
    most = limit(cfg.max_response, model)
    fit = [r for r in rows if len(tok.chat(r["prompt"])) + most <= model.cfg.max_len]
    if len(fit) < len(rows):
        log(f"{what}: {len(rows) - len(fit)} prompts leave no room for a response of {most} tokens")

    work = partial(sample.respond, model, tok, key=(cfg.seed, *stage), n=n, max_new=most, **sampling(cfg, mesh))
    return in_chunks(cfg, mesh, model, fit, what, "responses", file, n, work)


def answer(cfg: Config, mesh, model, tok, held_out: list[dict], what: str, stage: tuple, file: str) -> list[dict]:
    """One response to each prompt of a held-out file, beside it in the row."""
    rows = [{"id": i, "prompt": r["prompt"]} for i, r in enumerate(held_out)]
    return [rows[a["id"]] | a for a in respond(cfg, mesh, model, tok, rows, what, stage, 1, file)]


def score(cfg: Config, mesh, model, tok, data: dict, rows: list[dict], what: str, stage: tuple, file: str):
    """The model's judgements of responses, on all processes."""
    knobs = sampling(cfg, mesh) | {"votes": cfg.votes, "max_new": limit(cfg.max_judgement, model)}
    work = partial(judge.score, model, tok, data["judge_template"], key=(cfg.seed, *stage), **knobs)
    found = in_chunks(cfg, mesh, model, rows, what, "judgements", file, cfg.votes, work)
    missing = len(rows) - len(found) // cfg.votes
    if missing:
        log(f"{what}: {missing} of {len(rows)} responses are empty or leave no room for the judge; they have no score")
    return found


def replies(ranked: list[dict]) -> list[dict]:
    """Rows of human rankings -> one row for each of their replies, as `score` takes them."""
    return [{"id": i, "k": k, "prompt": row["prompt"], "response": text}
            for i, row in enumerate(ranked) for k, text in enumerate(row["responses"])]  # fmt: skip


def add_reference(cfg: Config, mesh, model, tok, pairs: list[dict], end: str) -> list[dict]:
    """Store the frozen reference with every pair: its log-probs of chosen and rejected, as two more columns.

    They are computed in the very batches of DPO's first epoch, so that policy and reference agree to the last bit
    before the first update, in any precision.
    """
    examples = pair_examples(tok, pairs)
    found = pair_logps(cfg, mesh, model, examples, batches([size(e) for e in examples], cfg.batch, 1, (cfg.seed, end)))
    return [pair | {"reference_chosen": found[i][0], "reference_rejected": found[i][1]} for i, pair in enumerate(pairs)]


def train_dpo(cfg: Config, mesh, data: dict, start: str, end: str):
    """DPO from M_t on the pairs that M_t made (section 2.3): M_t+1."""
    if done(cfg, end, "config.json"):
        return
    model, tok = open_model(cfg, mesh, Path(cfg.out) / start)
    examples = pair_examples(tok, read_rows(Path(cfg.out) / end / "pairs.jsonl", "prompt", "reference_chosen"))
    plan = batches([size(e) for e in examples], cfg.batch, cfg.dpo_epochs, (cfg.seed, end))
    if cfg.reference in ("", start):
        check_start(cfg, mesh, model, examples, plan[0], start, end)
    optimize(
        cfg, model, end, plan, examples,
        pack=partial(pack_pairs, device=mesh.device_type), loss=partial(preference_loss, beta=cfg.beta, nll=cfg.nll),
        units=lambda row: 1, lr=cfg.dpo_lr, end=0.1, better=partial(better, cfg, mesh, data, model, tok, end),
    )  # fmt: skip
    if not cfg.valid_every:
        save_model(cfg, model, tok, end)
    elif dist.get_rank() == 0:  # the last that was better than the one before
        for file in sorted((Path(cfg.out) / end / "selected").iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, Path(cfg.out) / end / file.name)
        (Path(cfg.out) / end / "selected").rmdir()
    dist.barrier()
    if dist.get_rank() == 0:
        for line in judge.round_warnings(Path(cfg.out), end):
            log(f"warning, {end}: {line}")


def better(cfg: Config, mesh, data: dict, model, tok, name: str, step: int) -> bool:
    """Does an outside evaluator prefer the model's answers to the validation prompts to those of `valid_every` updates
    before? Then it is saved as M_t+1/selected. (The paper: every 200 updates, 253 prompts, Claude 2.)"""
    folder, file = Path(cfg.out) / name, f"valid-{step}.jsonl"
    model.eval()
    if not done(cfg, name, file):
        what = f"{name} after {step} updates answers"
        put(cfg, name, file, answer(cfg, mesh, model, tok, data["valid"], what, ("valid",), f"{name}/{file}"))
    model.train()
    earlier = max((int(p.stem[6:]) for p in folder.glob("valid-*.jsonl") if int(p.stem[6:]) < step), default=0)
    verdict = []
    if earlier and dist.get_rank() == 0:
        new, old = (judge.read_answers(folder / f"valid-{n}.jsonl") for n in (step, earlier))
        rows = judge.outcomes(new, old, cache=folder / "judge_cache.jsonl", **evaluator(cfg))
        verdict = [judge.duel(new, old, rows)]
        log(f"{name} after {step} updates against {earlier}: {verdict[0]['win']:.1f} / {verdict[0]['tie']:.1f} / "
            f"{verdict[0]['lose']:.1f} % win / tie / lose")  # fmt: skip
    if any(h["win"] <= h["lose"] for h in share(verdict)):
        log(f"{name}: no longer better, so the model after {earlier} updates is taken")
        return False
    save_model(cfg, model, tok, f"{name}/saving")
    if dist.get_rank() == 0:
        write_json(folder / "saving" / "selected.json", {"step": step})
        shutil.rmtree(folder / "selected", ignore_errors=True)
        os.replace(folder / "saving", folder / "selected")
    return True


def check_evaluator(cfg: Config, prompts: list[dict]):
    """BadInput where a selection of checkpoints is asked for that cannot be made."""
    if bool(cfg.valid_every) != bool(cfg.evaluator):
        raise BadInput("--valid-every and --evaluator belong together: how often, and by whom")
    if cfg.valid_every and not prompts:
        raise BadInput(f"{Path(cfg.data) / 'valid.jsonl'}: not found; --valid-every needs prompts to answer")
    asked = evaluator(cfg) if cfg.valid_every else {}
    if "oracle" in asked:
        judge.load_oracle(asked["oracle"])
    if "judge_checkpoint" in asked:
        read_shape(asked["judge_checkpoint"])


def evaluator(cfg: Config) -> dict:
    """--evaluator as judge.outcomes takes it."""
    if "://" in cfg.evaluator:
        url, _, name = cfg.evaluator.partition("#")
        return {"judge_url": url, "judge_model": name}
    return {"oracle" if cfg.evaluator.endswith(".py") else "judge_checkpoint": Path(cfg.evaluator)}


def examine(cfg: Config, mesh, data: dict, name: str):
    """The finished model answers the test prompts and judges the held-out human rankings (section 3.1)."""
    todo = [f for f, rows in (("test.jsonl", data["test"]), ("exam.jsonl", data["exam"]))
            if not done(cfg, name, f) and rows]  # fmt: skip
    if not todo:
        return
    model, tok = open_model(cfg, mesh, Path(cfg.out) / name)
    if "test.jsonl" in todo:
        what, file = f"{name} answers the test prompts", f"{name}/test.jsonl"
        answers = answer(cfg, mesh, model, tok, data["test"], what, ("test",), file)
        if dist.get_rank() == 0:
            texts = [{"turns": [a["prompt"]], "responses": [a["response"]]} for a in answers]
            for_alpaca_eval = sample.as_file(texts, name, Path(cfg.data).name, ".json")
            write_text(Path(cfg.out) / name / "alpaca_eval.json", for_alpaca_eval)
        put(cfg, name, "test.jsonl", answers)
    if "exam.jsonl" in todo:
        what, file = f"{name} judges ranked answers", f"{name}/exam.jsonl"
        asked = replies(data["exam"])
        put(cfg, name, "exam.jsonl", score(cfg, mesh, model, tok, data, asked, what, ("exam",), file))


# ---- the optimisation loop, one for both losses ------------------------------------------------------------


def optimize(
    cfg: Config, model, name, plan, examples, *, pack, loss, units, lr: float, end: float, better=lambda step: True
):
    """Update the model on every batch of the plan: AdamW, 5 % warm-up, cosine from lr to end * lr, clipping at 1.

    pack(rows) makes the tensors that loss(model, *tensors) takes; it returns a sum over units, of which units(row)
    says how many a row has. It goes on from the last checkpoint. With --valid-every it ends where better(step) is not
    so. BadInput on a loss that is not finite; the models finished so far are on disk.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = max(1, round(0.05 * len(plan)))
    model.train()
    peak = matmul_rate() * dist.get_world_size() if torch.cuda.is_available() else 0
    identity = {k: v for k, v in asdict(cfg).items() if k not in FREE} | asdict(model.cfg)
    identity |= {"model": name, "steps": len(plan), "rows": digest(plan, examples)}
    begin = resume(cfg, model, optimizer, identity)
    looks = range(cfg.valid_every, len(plan) + 1, cfg.valid_every) if cfg.valid_every else ()  # after so many updates
    bar = tqdm(total=len(plan), initial=begin, desc=name, unit="step", disable=quiet())
    for step, batch in enumerate(plan[begin:], begin):
        if step in looks and not better(step):  # after a restart once more: what was answered and said is kept
            break
        began = time.time()
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, len(plan) - warm)))
        rate = lr * min((step + 1) / warm, end + (1 - end) * cosine)
        optimizer.param_groups[0]["lr"] = rate
        torch.manual_seed(random.Random(repr((cfg.seed, name, step, replica(cfg)[0]))).getrandbits(62))  # dropout
        sums, norm = gradient(cfg, model, batch, examples, pack=pack, loss=loss, units=units)
        if not math.isfinite(sums["loss"] + norm):
            raise BadInput(f"{name}: loss {sums['loss']}, gradient norm {norm} at step {step + 1}; earlier models "
                           "and checkpoints are whole: take a lower learning rate and another --out")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - began
        line = {"model": name, "step": step + 1, "steps": len(plan), **sums, "grad_norm": norm, "lr": rate}
        if peak:
            line["mfu"] = sum(flops(model, examples[i]) for i in batch) / seconds / peak
        write_metrics(cfg, line | {"seconds": seconds})
        bar.update()
        bar.set_postfix({k: f"{v:.3g}" for k, v in sums.items() if k in ("loss", "margin", "accuracy")})
        if bar.disable:
            shown = " ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
            log(f"{name} step {step + 1}/{len(plan)} {shown} {sums['tokens'] / seconds:,.0f} tok/s")
        stop = stopping()
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 in looks:
            checkpoint(cfg, model, optimizer, identity | {"step": step + 1})
        if stop:
            raise Stopped
    else:
        if cfg.valid_every:
            better(len(plan))
    bar.close()


def gradient(cfg: Config, model, batch, examples, *, pack, loss, units) -> tuple[dict[str, float], float]:
    """Leave the gradient of a whole batch in the model, clipped at 1, however the batch is cut.

    Returns means over units of what the loss shows, the batch's tokens, the share of what was put through the model
    and is thrown away (rows that some process repeats, see `micro_batches`), and the norm.
    """
    total, found, sums = sum(units(examples[i]) for i in batch), [], Counter()
    for rows, weight in micro_batches(cfg, batch, examples):
        tensors = pack([examples[i] for i in rows])
        value, shown = loss(model, *tensors)
        (value * weight * replica(cfg)[1] / total).backward()  # FSDP takes the mean over replicas
        found.append((weight, tensors[0].numel(), shown))
    for weight, count, shown in found:  # only now, since reading a number waits for the device
        sums.update({k: v.item() * weight / total for k, v in shown.items()})
        sums.update(tokens=count * weight, padding=count * (1 - weight))
    sums = reduced(sums, cfg.tp)
    sums["padding"] /= sums["padding"] + sums["tokens"]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return sums, (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def flops(model, example: tuple) -> int:
    """Operations of a training step on one example: 6 for each weight and token that it meets, two forward and four
    backward, and 12 * D a layer for each token that a token sees. What is computed twice to save memory counts once.
    """
    before, *sizes = len(example[0]) - 1, *map(len, example[1:3])  # a prompt is read once, and only answers are scored
    seen = before * (before + 1) // 2 + sum(n * before + n * (n + 1) // 2 for n in sizes)
    weights, cfg = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2), model.cfg
    total = weights * (before + sum(sizes)) + cfg.vocab_size * cfg.dim * sum(sizes)
    return 6 * total + 12 * cfg.layers * cfg.dim * seen


def matmul_rate(size: int = 8192, count: int = 20) -> float:
    """Operations per second of large bf16 matrix products on this GPU: the whole that utilisation is a share of."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for n in (3, count):  # the first are warm-up
        torch.cuda.synchronize()
        began = time.time()
        for _ in range(n):
            a @ a
        torch.cuda.synchronize()
    return count * 2 * size**3 / (time.time() - began)


def state(model, optimizer) -> dict:
    """All that a step changes, as tensors that are saved from and loaded into where they lie, by each process its part.

    Learning rate, dropout and rows are functions of the step, so no random state is among them.
    """
    for p in model.parameters():
        if not optimizer.state[p]:  # AdamW makes them in its first step; loading needs them before
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros
    return {name: {"weight": p} | optimizer.state[p] for name, p in model.named_parameters()}


def checkpoint(cfg: Config, model, optimizer, identity: dict):
    """Save the training's state in a folder that appears whole or not at all; then the one before is removed.

    All wait until it is written: saving meanwhile (dcp.async_save) needs room for a copy of the state in main memory.
    """
    folder = Path(cfg.out) / identity["model"] / "checkpoint" / str(identity["step"])
    temporary = folder.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(state(model, optimizer), checkpoint_id=temporary)
    except dcp.CheckpointException as e:
        why, free = next(iter(e.failures.values()))[0], shutil.disk_usage(temporary).free / 1e9
        raise BadInput(f"{temporary}: cannot be written ({why}; {free:.1f} GB free there); the checkpoint before it "
                       "and finished files are whole: make room, start the same command again") from None  # fmt: skip
    if dist.get_rank() == 0:
        write_json(temporary / "training.json", identity)
        os.replace(temporary, folder)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def resume(cfg: Config, model, optimizer, identity: dict) -> int:
    """Load the last checkpoint, of a world of any size, if it is of this very training; returns its step, or 0."""
    name, home = identity["model"], Path(cfg.out) / identity["model"] / "checkpoint"
    step = max(share([int(p.name) for p in home.glob("*") if p.name.isdigit()]), default=0)
    if step:
        folder, remedy = home / str(step), f"remove {home} (and valid-*.jsonl beside it) to train {name} from its start"
        saved = read_json(folder / "training.json")
        if k := next((k for k in identity if identity[k] != saved.get(k)), None):
            raise BadInput(f"{folder}: a checkpoint of another training, whose {k} is {saved.get(k)!r} and not "
                           f"{identity[k]!r}; {remedy}")  # fmt: skip
        try:
            dcp.load(state(model, optimizer), checkpoint_id=folder)
        except dcp.CheckpointException:
            raise BadInput(f"{folder}: damaged or incomplete; {remedy}") from None
        log(f"{name}: goes on after step {step} of {identity['steps']}")
    path = Path(cfg.out) / "metrics.jsonl"
    if dist.get_rank() == 0 and path.exists():  # what an earlier attempt has logged after this step is dropped
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        write_text(path, "".join(line for line, row in whole if row["model"] != name or row["step"] <= step))
    return step


def batches(sizes: list[int], batch: int, epochs: int, key: tuple) -> list[list[int]]:
    """Row numbers of every update: shuffled anew each epoch, rows of like length in one batch, so that its cuts and
    processes have equal work.

    Every row is seen once an epoch; the last batch may be smaller.
    """
    plan = []
    for epoch in range(epochs):
        rng, order = random.Random(repr((*key, epoch))), list(range(len(sizes)))
        rng.shuffle(order)
        window = 32 * batch
        order = [
            i for at in range(0, len(order), window) for i in sorted(order[at : at + window], key=sizes.__getitem__)
        ]
        cut = [order[at : at + batch] for at in range(0, len(order), batch)]
        rng.shuffle(cut)
        plan += cut
    return plan


def micro_batches(cfg: Config, batch: list[int], examples: list[tuple]) -> list[tuple[list[int], float]]:
    """This process's rows of a batch, cut so that no cut exceeds `micro_tokens` (if no row does), with their weight.

    All replicas get equally many cuts of like size, or they would wait for each other in collectives, some for
    ever: who has no rows left repeats one with weight 0.
    """
    size = {i: sum(map(len, examples[i][:3])) for i in batch}
    place, replicas = replica(cfg)
    room = max(cfg.micro_tokens or (16384 if torch.cuda.is_available() else 2048), *size.values())
    for count in range(1, len(batch) + 1):
        cuts = [[] for _ in range(count * replicas)]
        for i in sorted(batch, key=size.get, reverse=True):  # the longest first, each to the emptiest cut
            min(cuts, key=lambda cut: sum(size[j] for j in cut)).append(i)
        if max(sum(size[i] for i in cut) for cut in cuts) <= room:
            break
    return [(cut, 1.0) if cut else (batch[:1], 0.0) for cut in cuts[place::replicas]]


def pair_examples(tok, pairs: list[dict]) -> list[tuple]:
    """(prompt ids, chosen ids, rejected ids, reference log-probs) of every pair. Ids are the sampled ones."""
    return [(tok.chat(p["prompt"]), p["chosen_tokens"], p["rejected_tokens"],
             (p.get("reference_chosen", 0.0), p.get("reference_rejected", 0.0))) for p in pairs]  # fmt: skip


def size(example: tuple) -> int:
    prompt, chosen, rejected, _ = example
    return len(prompt) + max(len(chosen), len(rejected))


def pack_pairs(rows: list[tuple], device):
    """B pairs -> tokens, targets and layout of 2B rows, chosen and rejected in turn, and their reference (2B,)."""
    reference = torch.tensor([logp for *_, both in rows for logp in both], dtype=torch.float32)
    return *collate([row[:3] for row in rows], device), reference.to(device)


@torch.no_grad()
def pair_logps(cfg: Config, mesh, model, examples, plan) -> dict[int, tuple[float, float]]:
    """Row number -> the model's log-probs of chosen and rejected, for the rows of the plan, dropout off."""
    model.eval()
    found = []
    for batch in plan:
        stop_if_asked()
        for rows, weight in micro_batches(cfg, batch, examples):
            logps = sequence_logps(model, *collate([examples[i][:3] for i in rows], mesh.device_type)).tolist()
            if weight:
                found += zip(rows, logps[::2], logps[1::2], strict=True)
    return {i: (chosen, rejected) for i, chosen, rejected in share(found)}


def check_start(cfg: Config, mesh, model, examples, batch: list[int], start: str, end: str):
    """Before the first update policy and reference are one model: margin 0, loss ln 2. Else the pairs are another's."""
    found = pair_logps(cfg, mesh, model, examples, [batch])
    rows = [(abs(now - then), len(ids)) for i, logps in found.items()
            for now, then, ids in zip(logps, examples[i][3], examples[i][1:3], strict=True)]  # fmt: skip
    off = sum(d for d, _ in rows) / sum(n for _, n in rows)  # of one short row alone bf16 may be off by 0.01 a token
    if not off < (1e-2 if mesh.device_type == "cuda" or cfg.dtype == "bfloat16" else 1e-4):
        raise BadInput(
            f"{cfg.out}/{end}/pairs.jsonl: its reference log-probs differ by {off:.3g} a token from those of "
            f"{start}, where DPO starts; remove all rows but prompts.jsonl there and start again"
        )


# ---- files of the run --------------------------------------------------------------------------------------


def data_folder(cfg: Config) -> Path:
    data = Path(cfg.data)
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; --data names a folder with ift.jsonl, judge.txt and propose.txt")
    return data


def open_run(cfg: Config) -> dict:
    """Read all the run needs before anything costs time; refuse an --out that belongs to another configuration."""
    folder, data = Path(cfg.out), data_folder(cfg)
    template, propose = Path(cfg.judge_template or data / "judge.txt"), data / "propose.txt"
    texts = {path: read_text(path, "copy it from data/zoo or data/oasst and edit it") for path in (template, propose)}
    sample.places_of(texts[propose], propose)
    found = {
        "judge_template": judge.check_template(texts[template], template),
        "propose": texts[propose],
        "ift": [{k: r[k] for k in ("prompt", "response")} for r in read_rows(data / "ift.jsonl", "prompt", "response")],
        "eft": optional(data / "eft.jsonl", "prompt", "response", "judgement") if cfg.eft_size else [],
        "exam": optional(data / "eft_eval.jsonl", read=judge.read_ranked),
        "test": optional(data / "test.jsonl", "prompt"),
        "valid": optional(data / "valid.jsonl", "prompt"),
    }
    to_make = cfg.eft_size and not found["eft"]
    found["ranked"] = optional(data / "eft_ranked.jsonl", read=judge.read_ranked) if to_make else []
    found["held_out"] = [r["prompt"] for r in found["exam"] + found["test"] + found["valid"]]
    paths = [template, propose, *(data / f"{name}.jsonl" for name in ROWS)]
    files = {path.name: digest(path.read_bytes()) for path in paths if path.exists()}
    for number, row in enumerate(found["eft"], 1):
        if judge.parse_score(row["judgement"]) is None:
            raise BadInput(f"{data}/eft.jsonl: judgement {number} has no readable `Score: n` at its end; mend it")
    mine, saved = asdict(cfg), folder / "config.json"
    check_evaluator(cfg, found["valid"])
    for checkpoint in filter(None, (cfg.init, cfg.writer) if cfg.tp > 1 or not saved.exists() else ()):
        check_tp(read_shape(checkpoint)[0], cfg.tp, checkpoint)
    if not found["eft"]:
        what = "the SFT baseline makes it of eft_ranked.jsonl" if found["ranked"] else "M1 learns from ift.jsonl alone"
        log(f"no {data / 'eft.jsonl'}: {what}" if cfg.eft_size else f"--eft-size 0: {what}")
    for file, what in (("test.jsonl", "models are not compared"), ("eft_eval.jsonl", "judges are not examined")):
        if not (data / file).exists():
            log(f"no {data / file}: {what}")
    if saved.exists():
        other = read_json(saved)
        if k := next((k for k in mine if k not in FREE and mine[k] != other.get(k, getattr(Config, k))), None):
            raise BadInput(f"{saved}: this run was made with {k} = {other.get(k)!r}, now it is {mine[k]!r}; give "
                           "another --out, or the old value")  # fmt: skip
        known = other.get("files", {})
        if changed := [name for name in known if known[name] != files.get(name)]:
            raise BadInput(f"{data}: {changed[0]} is not what it was when the run in {folder} began; give another "
                           "--out, or bring the old file back")  # fmt: skip
    dist.barrier()  # nobody writes before all have read
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(saved, mine | {"files": files})
    return found


def done(cfg: Config, name: str, file: str) -> bool:
    """Is this product there? Files appear whole or not at all, so being there is being finished."""
    stop_if_asked()  # and nobody looks before all are here
    tidy(cfg)
    return share([(Path(cfg.out) / name / file).exists()])[0]  # as the first one sees it: file systems may lag


def put(cfg: Config, name: str, file: str, rows: list[dict]):
    """Write rows as JSON lines into a model's folder, once, by the first process."""
    if dist.get_rank() == 0:
        (Path(cfg.out) / name).mkdir(parents=True, exist_ok=True)
        write_text(Path(cfg.out) / name / file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    tidy(cfg)
    dist.barrier()


def commit(cfg: Config, file: str, line: dict):
    """Append finished work to FILE.part, which `put` replaces by the whole file."""
    if dist.get_rank() == 0:
        (Path(cfg.out) / file).parent.mkdir(parents=True, exist_ok=True)
        append(Path(cfg.out) / (file + ".part"), line)


def committed(cfg: Config, file: str) -> list[dict]:
    """What an earlier start has committed of a file, as the first process reads it; a torn last line is cut off."""
    path, lines = Path(cfg.out) / (file + ".part"), []
    if dist.get_rank() == 0 and path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        os.truncate(path, sum(map(len, lines)))
    return share([json.loads(line) for line in lines])


def tidy(cfg: Config):
    """Remove what was kept only to finish a product that is there by now."""
    if dist.get_rank() == 0:
        for part in Path(cfg.out).glob("*/*.part"):
            if part.with_suffix("").exists():
                part.unlink()
        for folder in Path(cfg.out).glob("*/checkpoint"):
            if (folder.parent / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)


def write_metrics(cfg: Config, line: dict):
    if dist.get_rank() == 0:
        append(Path(cfg.out) / "metrics.jsonl", line)


def append(path: Path, line: dict):
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
        settle(f)


def shuffled(scores: dict[tuple, float], key: tuple) -> dict[tuple, float]:
    """The control: every prompt keeps its scores, but they are dealt anew among its candidates."""
    out = {}
    for i, group in groupby(sorted(scores), key=lambda at: at[0]):
        places = list(group)
        values = [scores[at] for at in places]
        random.Random(repr((*key, i))).shuffle(values)
        out |= zip(places, values, strict=True)
    return out


def positives(cfg: Config, end: str, prompts: list[dict], candidates: list[dict], scores: dict) -> list[dict]:
    """Responses of mean score 5 as seed rows (appendix A.4), without cut ones: these have no end to learn."""
    texts = {p["id"]: p["prompt"] for p in prompts}
    best = [c for c in candidates if scores.get((c["id"], c["k"])) == 5 and not c["truncated"]]
    log(f"{end}: {len(best)} of {len(candidates)} responses have a score of 5")
    if not best:
        raise BadInput(f"{cfg.out}/{end}: no whole response of {len(candidates)} has a mean score of 5, so --control "
                       "positive has nothing to add to the seed data; give more --prompts")  # fmt: skip
    return [{"id": c["id"], "k": c["k"], "prompt": texts[c["id"]], "response": c["response"]} for c in best]


# ---- processes ---------------------------------------------------------------------------------------------


def start_processes(cfg: Config):
    """Join the processes that torchrun started, or be a world of one; returns the mesh (replicate, dp, tp)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= count:
            raise BadInput(f"more processes than the {count} GPUs here; start one for each, or set "
                           "CUDA_VISIBLE_DEVICES= to work without them")  # fmt: skip
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    patience = timedelta(days=1)  # ranks may finish their texts hours apart
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=patience, **alone)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it warns of what tp cannot do in one go
    shape = (cfg.dp_replicate, check_world(cfg, dist.get_world_size()), cfg.tp)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "dp", "tp"))
    for name in mesh.mesh_dim_names:  # their groups have patience for 30 minutes, too little to save a large model
        dist.distributed_c10d._set_pg_timeout(patience, mesh[name].get_group())
    return mesh


def check_world(cfg: Config, world: int) -> int:
    """How many ways FSDP shards among this many processes; BadInput where they do not make whole groups."""
    whole = cfg.dp_replicate * cfg.tp
    if world % whole:
        raise BadInput(f"{world} processes are not a multiple of {whole}, --dp-replicate {cfg.dp_replicate} times "
                       f"--tp {cfg.tp}; start another number of them or change these")  # fmt: skip
    return world // whole


def replica(cfg: Config) -> tuple[int, int]:
    """Which rows are ours: our place among the tp groups, and their number. The ranks of a group do the same rows."""
    return dist.get_rank() // cfg.tp, dist.get_world_size() // cfg.tp


def open_model(cfg: Config, mesh, folder):
    """Load a checkpoint into fp32 master weights, on the device, dealt to the processes."""
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if mesh.device_type == "cuda" else "float32"))
    plain = mesh.size() == 1 and mesh.device_type == "cpu" and dtype == torch.float32  # nothing to shard or to cast
    shard = partial(parallelize, mesh=mesh, dtype=dtype, recompute=cfg.recompute, offload=cfg.offload)
    device = "cpu" if cfg.offload else mesh.device_type
    shard = None if plain and not (cfg.recompute or cfg.offload) else shard
    if shard:
        gc.collect()  # the model before, of which nobody has hold any more: FSDP has tied it into cycles
    model, tok = load(folder, torch.float32, device, cfg.dropout, shard)
    dist.barrier()  # who reads slowly is waited for here, for a day if need be, and not in the first forward pass
    return model.eval(), tok


def save_model(cfg: Config, model, tok, name: str):
    """Write a checkpoint into the run folder; all ranks call this, the first writes."""
    save(model, tok, Path(cfg.out) / name, getattr(torch, cfg.save_dtype), write=dist.get_rank() == 0)


def share(rows: list) -> list:
    """Everybody's rows to everybody."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def spread(cfg: Config, rows: list, work) -> list:
    """Deal rows to the replicas, work on them apart, and bring the results together, in no particular order."""
    place, count = replica(cfg)
    try:
        made = work(rows[place::count])
    except Stopped:  # here, so far: the others hear of it when they are done
        made = []
    made = share(made if dist.get_rank() % cfg.tp == 0 else [])
    stop_if_asked()
    return made


def least(mesh, count: int) -> int:
    """The least of the tp group's numbers, which all go on with: they decode the same rows side by side."""
    value = torch.tensor(count)
    dist.all_reduce(value, dist.ReduceOp.MIN, group=mesh["tp"].get_group())
    return value.item()


def stopping() -> bool:
    """Was any process asked to stop? All come by here, so all know."""
    return reduced({"asked": len(ASKED)})["asked"] > 0


def stop_if_asked():
    if stopping():
        raise Stopped


def reduced(sums: dict[str, float], tp: int = 1) -> dict[str, float]:
    """Sums over all processes; those of a tp group have the same numbers, which count once."""
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(sums, (values / tp).tolist(), strict=True))


def log(text: str):
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def quiet() -> bool:
    return dist.get_rank() != 0 or not sys.stderr.isatty()


@contextmanager
def progress(cfg: Config, mesh, what: str, total: int, unit: str):
    """A bar with rate and time left in a terminal (of the first process), and one line at the end (of all)."""
    began, counts = time.time(), {"tokens": 0, "finished": 0}
    mine = -(-total // replica(cfg)[1])
    with tqdm(total=mine, desc=what, unit=f" {unit}", disable=quiet()) as bar:

        def tick(tokens: int, finished: int):
            asked = torch.tensor(len(ASKED))
            if cfg.tp > 1:  # a group stops as one, or some of it would wait for the others' part of the next token
                dist.all_reduce(asked, group=mesh["tp"].get_group())
            if asked:
                raise Stopped
            counts["tokens"] += tokens
            counts["finished"] += finished
            bar.set_postfix_str(f"{tokens} slots, {counts['tokens'] / (time.time() - began):,.0f} tok/s", refresh=False)
            bar.update(finished)

        yield tick
    counts, seconds = reduced(counts, cfg.tp), time.time() - began
    log(f"{what}: {counts['finished']:,.0f} {unit}, {counts['tokens']:,.0f} tokens in {seconds:.1f} s "
        f"({counts['tokens'] / seconds:,.0f} tok/s)")  # fmt: skip


# ---- the plan: what a run needs, before anything starts ----------------------------------------------------

GiB = 1 << 30
MACHINE = {"gpus": (int, 8, "of the machine"), "gpu_memory": (float, 80.0, "GiB of a GPU"),
           "rate": (float, 200.0, "TFLOP/s that a GPU sustains where it trains or reads")}  # fmt: skip
BANDWIDTH = 2e12  # bytes a second that a GPU reads while it samples: 60 % of an H100's
RESERVE = 3 * GiB  # of a GPU, for the driver, buffers of collectives, attention masks and gaps between tensors
SEEDS = [315] * 3200  # without ift.jsonl: the paper's rows, of 148 + 1,072 characters (Li et al. 2023)


def parameters(shape: ModelConfig) -> tuple[int, int]:
    """How many the model has, and how many of them one block."""
    with torch.device("meta"):
        net = Llama(shape)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (net, net.layers[0]))


def passing(cfg: Config, shape: ModelConfig) -> tuple[int, int, int]:
    """Bytes of a number in compute; bytes a token that a block keeps for backward, and that pass through at work.

    Kept are: of both norms their fp32 input, the scaled and the weighted output; the masks of dropout; q, k and v with
    as many heads, the attention's output twice; four vectors of the MLP. tp cuts what lies between columns and rows.
    """
    b = getattr(torch, cfg.dtype or "bfloat16").itemsize
    kept = 2 * (4 + 2 * b + (cfg.dropout > 0)) * shape.dim + b * (5 * shape.dim + 4 * shape.ffn) // cfg.tp
    return b, kept, b * (4 * shape.dim + 3 * shape.ffn // cfg.tp)


def at_once(cfg: Config, shape: ModelConfig, gpus: int) -> tuple[int, bool]:
    """Most tokens that a GPU puts through the model at once in training, and whether an update takes several goes."""
    pair = min(shape.max_len, cfg.max_prompt + 10 + cfg.max_response) + cfg.max_response  # the prompt stands there once
    longest = max(shape.max_len, pair)
    mine = -(-cfg.batch * cfg.tp // gpus) * longest
    room = max(cfg.micro_tokens or 16384, longest)
    return min(mine, room), mine > room


def training_memory(cfg: Config, shape: ModelConfig, gpus: int, tokens: int, more: bool, targets: int = 0) -> dict:
    """Bytes a GPU by part in the worst moment of a step: backward is at the vocabulary projection, at the last block,
    or at the first, where all gradients are there (if there are `more` micro-batches than one, they always are)."""
    (n, block), (b, kept, work) = parameters(shape), passing(cfg, shape)
    held, again = 0 if cfg.offload else n * cfg.dp_replicate / gpus, kept if cfg.recompute else 0
    inputs = shape.layers * (b * shape.dim if cfg.recompute else kept)  # what is kept of all blocks, a token
    logits = min(dpo.CHUNK, (targets or tokens) * shape.vocab_size) * (8 + 2 * b) + tokens * (4 + 3 * b) * shape.dim
    fixed = {"weights": 4 * held, "optimizer": 8 * held,
             "gathered": b * (n - (shape.layers - 2) * block) / cfg.tp,  # two blocks, embedding and head
             "gradients in flight": 4 * block / cfg.tp}  # of a block, in fp32 for the reduction  # fmt: skip
    moments = ((more, inputs, logits), (more, inputs + again + work, 0), (True, kept + work, 0))
    return max((fixed | {"gradients": 4 * held * grown, "activations": tokens * size, "logits": chunk}
                for grown, size, chunk in moments), key=lambda parts: sum(parts.values()))  # fmt: skip


def sampling_memory(cfg: Config, shape: ModelConfig, gpus: int, rows: int, length: int) -> dict[str, float]:
    """Bytes a GPU by part while `rows` texts of `length` tokens are written side by side, all read in one go."""
    (n, _), (b, _, work) = parameters(shape), passing(cfg, shape)
    tokens = rows * length
    return {"weights": 0 if cfg.offload else 4 * n * cfg.dp_replicate / gpus, "gathered": b * n / cfg.tp,
            "KV cache": 2 * b * shape.layers * shape.kv_heads * shape.head_dim * tokens / cfg.tp,
            "activations": tokens * work}  # fmt: skip


def seed_sizes(cfg: Config, tok=None) -> dict[str, list[int]]:
    """Tokens of each row of the data folder: by the tokenizer, or without one 4 characters a token and the format's 10.

    Rows that the run itself makes of eft_ranked.jsonl count as empty ones here: `workload` knows how long they may be.
    """
    data = data_folder(cfg)
    path = Path(cfg.judge_template or data / "judge.txt")
    template = read_text(path, "give --judge-template a file") if path.exists() else ""

    def size(prompt, response):
        return len(tok.chat(prompt) + tok.response(response)) if tok else len(prompt + response) // 4 + 10

    eft = [size(judge.judge_prompt(template, r["prompt"], r["response"]), r["judgement"])
           for r in optional(data / "eft.jsonl", "prompt", "response", "judgement")]  # fmt: skip
    return {
        "ift": [size(r["prompt"], r["response"]) for r in optional(data / "ift.jsonl", "prompt", "response")] or SEEDS,
        "eft": (eft or [0] * cfg.eft_size * (data / "eft_ranked.jsonl").exists()) if cfg.eft_size else [],
        "template": [size(template, "")],
    }


def workload(cfg: Config, shape: ModelConfig, sizes: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Model -> tokens to train on, to sample and to read (no backward pass) for it, if every text is as long as it may
    be, every prompt gives a pair and no request for one fails. Left out: what requests read, EFT's making, exams."""
    written, answer, grade = (min(n, shape.max_len // 2) for n in (cfg.max_prompt, cfg.max_response, cfg.max_judgement))
    asked = written + 10  # with the chat format
    judged = min(shape.max_len - grade, sum(sizes["template"]) + written + answer)
    ift, eft = sum(sizes["ift"]), sum(n or judged + grade for n in sizes["eft"])
    todo = {name: {"trained": cfg.sft_epochs * rows, "sampled": 0, "read": 0}
            for name, rows in (("SFT", ift), ("M1", ift + eft))}  # fmt: skip
    counts = [int(n) for n in cfg.prompts.split(",")]
    for t in range(1, cfg.iters):
        prompts = counts[min(t, len(counts)) - 1]
        pairs = prompts * (asked + 2 * answer)
        todo[f"M{t + 1}"] = {
            "trained": cfg.dpo_epochs * pairs,
            "sampled": prompts * (written + cfg.candidates * (answer + cfg.votes * grade)),
            "read": prompts * (asked + cfg.candidates * judged) + pairs,  # the pairs for the reference's column
        }
    return todo


def plan(cfg: Config, shape: ModelConfig, machine: dict, sizes: dict[str, list[int]]) -> dict:
    """Bytes a GPU by phase and part, tokens and hours by model, bytes on disk by kind. Starts and reads nothing.

    Training takes 6 operations a parameter and token (8 with recomputation), reading 2 (Kaplan et al. 2020, section
    2.1). To sample a token of each sequence takes the time to read the weights and half of a full cache.
    """
    if min(machine.values()) <= 0:
        raise BadInput("--gpus, --gpu-memory and --rate are more than 0")
    gpus, (n, _) = machine["gpus"], parameters(shape)
    check_world(cfg, gpus)
    check_tp(shape, cfg.tp, cfg.init or "--preset")
    training = training_memory(cfg, shape, gpus, *at_once(cfg, shape, gpus))
    sampling = sampling_memory(cfg, shape, gpus, cfg.sample_batch, shape.max_len)
    token = (sampling["gathered"] + sampling["KV cache"] / 2) / BANDWIDTH / (cfg.sample_batch * gpus // cfg.tp)
    todo = workload(cfg, shape, sizes)
    for work in todo.values():
        products = ((8 if cfg.recompute else 6) * work["trained"] + 2 * work["read"]) * n
        work["hours"] = (products / (gpus * machine["rate"] * 1e12) + work["sampled"] * token) / 3600
    return {
        "memory": {"training": training | {"reserve": RESERVE}, "sampling": sampling | {"reserve": RESERVE}},
        "rows": {name: (len(rows), sum(rows) // max(1, len(rows))) for name, rows in sizes.items()},
        "models": todo,
        "disk": {f"{cfg.iters + 1} models": (cfg.iters + 1) * n * getattr(torch, cfg.save_dtype).itemsize,
                 "2 checkpoints": 2 * 12 * n},  # weights, two moments in fp32; one there, one being saved
    }  # fmt: skip


def show_plan(cfg: Config, machine: dict, found: dict):
    """Print the plan; BadInput, with the remedy, if it does not fit."""
    room = machine["gpu_memory"]
    for phase, parts in found["memory"].items():
        shown = ", ".join(f"{part} {size / GiB:.1f}" for part, size in parts.items())
        log(f"{phase}: {sum(parts.values()) / GiB:.1f} of {room:g} GiB a GPU: {shown}")
    log("rows: " + ", ".join(f"{name} {n:,} of {mean:,} tokens" for name, (n, mean) in found["rows"].items()))
    rows = [(name, *(f"{work[k]:,}" for k in ("trained", "sampled", "read")), work["hours"])
            for name, work in found["models"].items()]  # fmt: skip
    title = (f"tokens at most, and hours at {machine['gpus']} GPUs of {machine['rate']:g} TFLOP/s sustained, "
             f"{BANDWIDTH / 1e12:g} TB/s while they sample: {sum(row[-1] for row in rows):.1f} in all")  # fmt: skip
    log(judge.table(title, ["", "trained", "sampled", "read", "hours"], rows))
    log("disk: " + ", ".join(f"{what} {size / GiB:,.1f} GiB" for what, size in found["disk"].items()))
    remedies = {"training": "--recompute, --offload, a smaller --micro-tokens", "sampling": "a smaller --sample-batch"}
    for phase, parts in found["memory"].items():
        if (needs := sum(parts.values()) / GiB) > room:
            raise BadInput(f"{phase} needs {needs:.1f} GiB of {room:g} a GPU: try a larger --tp, more --gpus, "
                           f"{remedies[phase]}")  # fmt: skip


# ---- flags -------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[Config, dict]:
    """Config, overridden by the data folder's recipe.json, that by a preset, and that by flags; and the flags given.

    Config's fields are flags, and the comment behind a field is its help.
    """
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description="Self-Rewarding Language Models: M0 -> M1 -> M2 -> M3.",
        usage="train.py [--FLAG VALUE ...], where --help lists the flags",
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f"{helps[f.name]} ({f.default!r})", **kind)
    parser.add_argument("--preset", choices=PRESETS, help="knobs of the machine for this size of Llama 2; flags "
                        "override them")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print memory, tokens, hours and disk, and start nothing")
    for name, (kind, value, what) in MACHINE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"of --plan: {what} ({value!r})")
    given, knobs = vars(parser.parse_args(argv)), Config.__dataclass_fields__
    path = Path(given.get("data", Config.data)) / "recipe.json"
    recipe = read_json(path) if path.exists() else {}
    for key, value in recipe.items():
        kind = knobs[key].type if key in knobs else None
        fits = isinstance(value, (int, float) if kind is float else kind or ())
        if not fits or isinstance(value, bool) != (kind is bool):
            raise BadInput(f"{path}: {key!r}: {value!r} is no knob or has the wrong type; see train.py --help")
    preset = {"init": ""} | PRESETS[given["preset"]] if "preset" in given else {}  # the zoo's base is no Llama 2
    cfg = checked(replace(Config(), **recipe | preset | {k: v for k, v in given.items() if k in knobs}))
    if not (cfg.init or "plan" in given and "preset" in given):
        raise BadInput(
            "--init names the folder of the pretrained checkpoint, M0; only --preset SIZE --plan goes without"
        )
    return cfg, given


def checked(cfg: Config) -> Config:
    """Refuse values that no run can have."""
    for ok, what in (
        (cfg.iters >= 1, "--iters counts models from M1 on and is at least 1"),
        (re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.prompts), "--prompts is a number of prompts, or several: 300,700"),
        (cfg.candidates >= 2, "--candidates must be at least 2, or there is nothing to prefer"),
        (min(cfg.votes, cfg.batch, cfg.sample_batch) >= 1, "votes and batches are at least 1"),
        (cfg.micro_tokens >= 0, "--micro-tokens is at least 1, or 0 for the default"),
        (cfg.valid_every >= 0, "--valid-every counts updates and is at least 1, or 0 to train to the end"),
        (cfg.control != "positive" or not cfg.valid_every, "--valid-every is for DPO; --control positive has none"),
        (
            "://" not in cfg.evaluator or re.fullmatch(r"https?://[^#]+#.+", cfg.evaluator),
            "--evaluator names an endpoint and its model: https://host/v1#MODEL",
        ),
        (cfg.save_every >= 1, "--save-every counts updates and is at least 1"),
        (cfg.eft_size >= 0, "--eft-size is a number of rows, or 0"),
        (min(cfg.sft_epochs, cfg.dpo_epochs) >= 1, "epochs are at least 1"),
        (min(cfg.sft_lr, cfg.dpo_lr) > 0 and math.isfinite(cfg.sft_lr + cfg.dpo_lr), "learning rates are positive"),
        (min(cfg.tp, cfg.dp_replicate) >= 1, "--tp and --dp-replicate are at least 1"),
        (min(cfg.max_prompt, cfg.max_response, cfg.max_judgement) >= 1, "lengths are at least 1 token"),
        (min(cfg.temperature, cfg.writer_temperature) >= 0, "temperatures are 0 (greedy) or more"),
        (0 <= cfg.length_guard < 1, "--length-guard lies in [0, 1)"),
        (0 < cfg.top_p <= 1, "--top-p lies in (0, 1]"),
        (0 <= cfg.dropout < 1, "--dropout lies in [0, 1)"),
        (cfg.beta > 0 and cfg.nll >= 0, "--beta is positive and --nll not negative"),
        (cfg.control in ("", "shuffle", "positive"), "--control is shuffle, positive or nothing"),
        (cfg.dtype in ("", "float32", "bfloat16"), "--dtype is float32 or bfloat16"),
        (cfg.save_dtype in ("float32", "bfloat16"), "--save-dtype is float32 or bfloat16"),
        ({cfg.reference, cfg.judge} <= {"", "M1"}, "--reference and --judge are M1 or nothing"),
    ):
        if not ok:
            raise BadInput(what)
    return cfg


def command(argv: list[str] | None = None):
    """The command: whatever becomes of it, one line says what, and the exit code is that of the file's head."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ASKED.append(number))
    rank, code = int(os.environ.get("RANK", 0)), 0
    error = f"error on process {rank}:" if rank else "error:"
    try:
        cfg, given = parse_args(argv)
        if "plan" in given:
            machine = {name: given.get(name, value) for name, (_, value, _) in MACHINE.items()}
            shape, tok, _ = read_shape(cfg.init) if cfg.init else (CONFIGS[given["preset"]], None, None)
            return show_plan(cfg, machine, plan(cfg, shape, machine, seed_sizes(cfg, tok)))
        main(cfg)
    except Stopped:
        log(f"stopped; all that was finished is in {cfg.out}: the same command goes on")
        code = 130 if signal.SIGINT in ASKED else 75
    except BadInput as e:
        sys.exit(f"{error} {e}")
    except BrokenPipeError:  # as in `| head`; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{error} nobody reads what this prints; finished files are whole, the same command goes on")
    except OSError as e:
        sys.exit(f"{error} {e.filename or cfg.out}: {e.strerror}; finished files are whole: make room or mend it, then "
                 "start the same command again")  # fmt: skip
    except RuntimeError as e:
        if "by peer" not in str(e):  # closed or reset: the process that was at fault tells why
            raise
        sys.exit(f"process {rank} ends because another one has: {e}"[:120])
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    command()
