"""sample.py: prompts -> text. The engine, new prompts (`propose`), responses (`respond`).

Paper section 2.2: new prompts are written few-shot and filtered as in Self-Instruct, then N = 4
responses to each are drawn with temperature 0.7 and top-p 0.9.

    python sample.py runs/zoo/M3                      chat in the terminal
    python sample.py runs/zoo/M3 "Where does the owl live?"    answer once

Read the section "one token", then from `respond` on; the engine between them can wait. Every
sample draws from random numbers of its own, keyed by what it is (seed, stage, prompt id, sample
index), so batch order and number of processes change nothing but the last bits of logits.

Left out: beam search, repetition penalties, paged caches; files of prompts (scripts/answer.py).
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import (
    Llama,
    Tokenizer,
    UserError,
    atomic_write,
    load,
    matmul_precision,
    onednn_keeps_fp32,
    read_json,
    read_text,
    transpose_weights,
    use_onednn_linear,
)

# ---- one token -------------------------------------------------------------------------------

SORTED_FIRST = 256  # a CPU sorts this many tokens for top-p, and all only where they fall short


def fingerprint(*values) -> str:
    """A short name for some values, by which a later start knows them again."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def seed_of(*key) -> int:
    """A seed that depends on nothing but the key."""
    return int(fingerprint(*key), 16) >> 1


def uniforms(key: tuple, count: int) -> torch.Tensor:
    """`count` random numbers in [0, 1) that depend on nothing but the key."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed_of(*key)))


def sample_token(logits, u, temperature: float, top_p: float):
    """One token a row: logits (B, V), u (B,) in [0, 1) -> ids (B,), -1 where not finite.

    Temperature 0 is greedy. Top-p keeps the most likely tokens up to and including the one that
    crosses p, as Llama's released sampler does, and those as likely as that one.
    """
    if temperature == 0:
        best, ids = logits.max(-1)
        return ids.masked_fill(~best.isfinite(), -1)
    probs = (logits / temperature).softmax(-1)
    finite = probs[:, 0].isfinite()  # softmax spreads one bad logit over its whole row
    if top_p < 1:
        probs = top_p_filter(probs, top_p)
    return sample_from_cdf(probs, u).masked_fill(~finite, -1)


def top_p_filter(probs, top_p: float):
    """probs (B, V) with 0 for all tokens that top-p leaves out."""
    top = most_likely(probs, probs.shape[-1] if probs.is_cuda else SORTED_FIRST)
    if not probs.is_cuda and (top.sum(-1) < top_p).any():  # to look would make a GPU wait
        top = most_likely(probs, probs.shape[-1])
    before = cumulative_sum(top) - top  # what is more likely than each token
    count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    threshold = top.gather(-1, count - 1)  # (B, 1)
    return torch.where(probs < threshold, 0, probs)


def most_likely(probs, count: int):
    """The `count` highest of each row of probs (B, V), the highest first."""
    if probs.is_cuda:
        return probs.sort(dim=-1, descending=True).values[:, :count]
    values = probs.numpy()  # numpy sorts many times as fast as PyTorch does
    if count < values.shape[-1]:
        values = np.partition(values, -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def sample_from_cdf(weights, u):
    """One token a row, as likely as its weight: weights (B, V), u (B,) in [0, 1) -> (B,)."""
    cdf = cumulative_sum(weights)
    total = cdf[:, -1:].contiguous()
    ids = torch.searchsorted(cdf, u[:, None] * total, right=True)
    last = torch.searchsorted(cdf, total)  # rounding may not pass the last weight that is not 0
    return torch.minimum(ids, last).clamp(max=weights.shape[-1] - 1).squeeze(-1)  # nor may NaN


def cumulative_sum(weights):
    """Along the vocabulary; a GPU adds in any order, so there in double precision: all ranks of
    a tp group must draw alike."""
    return weights.cumsum(-1, dtype=torch.float64 if weights.is_cuda else None)


# ---- the engine: many texts side by side -----------------------------------------------------
#
# The n samples of a prompt own n consecutive slots, a group. Keys and values have three levels:
# what all prompts begin with (a judge's template), held once; the rest of each group's prompt,
# held once for its n samples; each slot's own tokens. Attention to each level also gives the
# logarithm of the sum of exp(scores), by which the levels are merged (cascade attention).
# B slots = G groups * n, R rows of a level, of which each serves B / R consecutive slots.

PREFILL_TOKENS = 1024  # prompt tokens read at once: on a CPU more do not stay in its caches
PREFILL_TOKENS_GPU = 8192
MIN_COMMON_PREFIX = 16  # a beginning of as many tokens that all prompts share is held once
WIDTH_STEP = 16  # rows of keys are made longer by as much
COMPILED_WIDTH = 128  # and where each length is compiled, from as many on to twice as many
MAX_COMPILATIONS = 64  # of the widths of all levels; behind them PyTorch goes on eagerly
MIN_ONEDNN_SLOTS = 16  # of a decode step: fewer take oneDNN longer than MKL
STEPS_PER_SYNC = 8  # decode steps on a GPU between two looks at the tokens, which wait for it


def decode_by_onednn(slots: int):
    """Inside `with`: oneDNN makes all products of a decode step, where it is faster. It prepares
    itself for their sizes once, since they come again in every step."""
    fast = slots >= MIN_ONEDNN_SLOTS and onednn_keeps_fp32()
    return matmul_precision("bf16") if fast else nullcontext()


class Prefill:
    """What tokens see while prompts are read: texts (B, T), padded on the right, each behind the
    same prefix. Keeps their keys and values."""

    def __init__(self, lengths: list[int], prefix: "KeyValues | None", device):
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.prefix = prefix
        self.k, self.v = [], []  # of each layer, (B, K, T, hd)
        start = prefix.width if prefix else 0
        columns = torch.arange(start + max(lengths), device=device)
        self.positions = columns[None, start:]  # (1, T)
        self.mask = columns <= self.positions.mT if prefix else None  # (T, start + T)

    def attend(self, layer: int, q, k, v):  # (B, H, T, hd), (B, K, T, hd) -> (B, H, T, hd)
        self.k.append(k)
        self.v.append(v)
        group = q.shape[1] // k.shape[1]
        if not self.prefix:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        k = torch.cat((self.prefix.k[layer].mT.expand(len(k), -1, -1, -1), k), dim=2)
        v = torch.cat((self.prefix.v[layer].expand(len(v), -1, -1, -1), v), dim=2)
        if q.is_cuda:  # no fused kernel there takes a mask and grouped queries
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, self.mask, enable_gqa=not q.is_cuda)


def prefill(model: Llama, texts: list[list[int]], prefix: "KeyValues | None" = None):
    """Read texts behind a prefix: their keys and values, and the logits (B, V) that follow."""
    device = model.embed_tokens.weight.device
    tokens = pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True).to(device)
    context = Prefill([len(ids) for ids in texts], prefix, device)
    rows, last = torch.arange(len(texts), device=device), context.lengths - 1
    logits = model(tokens, context, lambda hidden, lm_head: lm_head(hidden[rows, last]).float())
    return context, logits


def constant(tensor) -> nn.Parameter:
    """What a module holds and nothing learns."""
    return nn.Parameter(tensor, requires_grad=False)


class KeyValues(nn.Module):
    """One level of the cache: keys and values of R rows in all layers, row r in columns 0 to
    lengths[r].

    A module, since torch.compile makes a CUDA graph only of a step that writes to a module's
    tensors, which stay where they are. Keys lie as scores need them, a column a token: products
    of many small matrices take two thirds of the time then. Rows have no more columns than are
    read (`resize`): oneDNN copies what lies apart.
    """

    def __init__(self, like: Prefill, rows: int):
        super().__init__()
        self.k, self.v = nn.ParameterList(), nn.ParameterList()
        for k, v in zip(like.k, like.v, strict=True):
            self.k.append(constant(k.new_zeros(rows, k.shape[1], k.shape[3], 0)))  # (R, K, hd, S)
            self.v.append(constant(v.new_zeros(rows, v.shape[1], 0, v.shape[3])))  # (R, K, S, hd)
        # an idle row holds one token of zeros, since a softmax over nothing is not a number
        self.lengths = nn.Buffer(like.lengths.new_ones(rows))  # (R,)

    @property
    def width(self) -> int:
        return self.v[0].shape[2]

    def resize(self, width: int):
        """Give all rows so many columns."""
        more = width - self.width
        if not more:
            return
        for layer in range(len(self.k)):  # not all at once, or they would take twice the memory
            self.k[layer] = constant(F.pad(self.k[layer], (0, more)))
            self.v[layer] = constant(F.pad(self.v[layer], (0, 0, 0, more)))

    def fill(self, rows: list[int], context: Prefill):
        """Put what was read of some prompts into these rows."""
        T = context.k[0].shape[2]
        self.resize(max(self.width, T))
        to = torch.tensor(rows, device=self.lengths.device)
        for layer, (k, v) in enumerate(zip(context.k, context.v, strict=True)):
            self.k[layer][to, :, :, :T] = k.mT
            self.v[layer][to, :, :T] = v
        self.lengths[to] = context.lengths

    def select(self, rows):
        """Keep these rows only."""
        for layer in range(len(self.k)):
            self.k[layer] = constant(self.k[layer][rows])
            self.v[layer] = constant(self.v[layer][rows])
        self.lengths = self.lengths[rows]

    def mask(self):
        """What is added to scores, (R * K, 1, width): -inf behind the end of a row."""
        columns = torch.arange(self.width, device=self.lengths.device)
        bias = torch.where(columns < self.lengths[:, None], 0.0, float("-inf"))
        return bias.to(self.k[0].dtype).repeat_interleave(self.k[0].shape[1], 0)[:, None]

    def attend(self, layer: int, q, mask):
        """Attention of one query a slot: q (B, K, g, hd) -> (B, K, g, hd) and (B, K, g, 1)."""
        R = len(self.lengths)
        B, K, g, hd = q.shape
        queries = q.view(R, B // R, K, g, hd).transpose(1, 2).reshape(R * K, -1, hd)
        keys = self.k[layer].flatten(0, 1)  # (R * K, hd, S)
        values = self.v[layer].flatten(0, 1)  # (R * K, S, hd)
        out, lse = attention_with_lse(queries, keys, values, mask)
        out = out.view(R, K, B // R, g, hd).transpose(1, 2).reshape(B, K, g, hd)
        return out, lse.view(R, K, B // R, g, 1).transpose(1, 2).reshape(B, K, g, 1)


def attention_with_lse(q, k, v, mask):
    """q (N, T, hd), k (N, hd, S), v (N, S, hd), mask (N, 1, S) -> (N, T, hd) and, in fp32, the
    logarithm of the sum of exp(scores), (N, T, 1)."""
    scores = torch.baddbmm(mask, q, k, alpha=q.shape[-1] ** -0.5).float()  # (N, T, S)
    weights = scores.softmax(-1)
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.to(v.dtype) @ v, lse


def merge_states(outputs: tuple, lses: tuple):
    """Attention to several sets of keys -> attention to all of them."""
    if len(outputs) == 1:
        return outputs[0]
    weights = torch.stack(lses).softmax(0)  # (levels, B, K, g, 1)
    return (torch.stack(outputs) * weights).sum(0).to(outputs[0].dtype)


class DecodeStep:
    """What the slots' newest tokens see: the slots' own tokens up to themselves, then the levels
    that several slots share."""

    def __init__(self, levels: list[KeyValues]):
        self.levels = levels
        self.masks = [level.mask() for level in levels]
        self.columns = levels[0].lengths - 1  # (B,)
        B = len(self.columns)
        self.slots = torch.arange(B, device=self.columns.device)
        lengths = [level.lengths[self.slots * len(level.lengths) // B] for level in levels]
        self.positions = (sum(lengths) - 1)[:, None]  # (B, 1)

    def attend(self, layer: int, q, k, v):  # (B, H, 1, hd), (B, K, 1, hd) -> (B, H, 1, hd)
        own = self.levels[0]
        own.k[layer][self.slots, :, :, self.columns] = k[:, :, 0]
        own.v[layer][self.slots, :, self.columns] = v[:, :, 0]
        B, K = k.shape[:2]
        queries = q.view(B, K, -1, q.shape[-1])  # (B, K, g, hd): heads that share keys
        states = []
        for level, mask in zip(self.levels, self.masks, strict=True):
            states.append(level.attend(layer, queries, mask))
        return merge_states(*zip(*states, strict=True)).view(q.shape)


def decode(model: Llama, tokens, levels: list[KeyValues]):
    """The slots' newest tokens (B,) -> logits (B, V) of what follows them."""
    step = DecodeStep(levels)
    return model(tokens[:, None], step, lambda hidden, lm_head: lm_head(hidden[:, -1]).float())


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: it needs a C++ compiler, on a GPU Triton."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))
    except RuntimeError as e:
        reason = str(e).strip().split("\n")[0]
        warnings.warn(f"decode steps take longer, torch.compile fails: {reason}", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=1)
def compiled_decode(device: torch.device, slots: int, levels: int):
    """`decode` by torch.compile, anew for each width of each level; on a GPU as a CUDA graph."""
    torch.compiler.reset()  # those of other slots and their graphs go
    torch.compiler.config.recompile_limit = MAX_COMPILATIONS
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(decode, dynamic=False, mode=mode)


def cache_width(length: int, compiled: bool) -> int:
    """Columns that hold so many tokens: rows change their width seldom, and where each width is
    compiled very seldom."""
    if compiled:
        return max(COMPILED_WIDTH, 1 << (length - 1).bit_length())
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The ids that all prompts begin with; each prompt keeps a token of its own for its logits."""
    ids = os.path.commonprefix(prompts)  # works on lists of ids as it does on strings
    return ids[: min(map(len, prompts)) - 1]


class Scheduler:
    """Which samples are in the slots: `generate_stream` with its state.

    Prompts wait in a queue, the longest first. A group takes the next prompt when its last
    sample has ended; when the queue is empty, groups that have ended are dropped.
    """

    def __init__(
        self, model: Llama, prompts, keys, n: int, max_new: int, batch: int, agree, compile=None
    ):
        self.model, self.prompts, self.keys = model, prompts, keys
        self.n, self.max_new = n, max_new
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the next last
        prefix_ids = common_prefix(prompts)
        if len(prefix_ids) < MIN_COMMON_PREFIX or len(prompts) * n == 1:
            prefix_ids = []
        self.skip = len(prefix_ids)
        first, logits = prefill(model, [prefix_ids or prompts[0][:1]])
        self.device = logits.device
        compile = logits.is_cuda if compile is None else compile
        self.compile = compile and can_compile(self.device)
        widths = self.widths(self.waiting, max_new)
        groups = min(max(1, batch // n), len(prompts))
        groups = agree(affordable(groups, n * widths[0] + sum(widths[1:]), first))

        # with n = 1 one level holds both the prompt and the new tokens
        self.own = self.prompt_level = KeyValues(first, groups * n)
        self.levels = [self.own]
        if n > 1:
            self.prompt_level = KeyValues(first, groups)
            self.levels.append(self.prompt_level)
        self.prefix = None
        if prefix_ids:
            self.prefix = KeyValues(first, 1)
            self.prefix.fill([0], first)
            self.levels.append(self.prefix)
        self.live: dict[int, int] = {}  # slot -> i * n + k, where sample k of prompt i runs
        self.num_drawn = [0] * (groups * n)  # tokens of the sample in each slot
        self.logits = logits.new_zeros(groups * n, logits.shape[-1])  # of the next tokens
        self.banned = torch.tensor(model.banned_ids, dtype=torch.long, device=self.device)
        self.u = logits.new_zeros(groups * n, max_new)  # random numbers of all tokens

    def widths(self, prompts, num_new: int) -> list[int]:
        """Columns that own tokens and prompts need, for these prompts and so many new tokens."""
        longest = max(len(self.prompts[i]) for i in prompts) - self.skip
        # a lone sample's prompt lies in front of its own tokens: one level less to merge
        lengths = [num_new, longest] if self.n > 1 else [longest + num_new]
        return [cache_width(length, self.compile) for length in lengths]

    def slots_of(self, groups: list[int]) -> list[int]:
        return [group * self.n + k for group in groups for k in range(self.n)]

    def schedule(self) -> bool:
        """Free groups take waiting prompts, once it is worth the trouble; is anything running?"""
        num_groups = len(self.num_drawn) // self.n
        busy = {slot // self.n for slot in self.live}
        free = [group for group in range(num_groups) if group not in busy]
        if self.waiting and 8 * len(free) >= num_groups:
            self.admit(free)
        elif not self.waiting and not self.compile and 4 * len(free) >= num_groups:
            self.condense(sorted(busy))
        return bool(self.live)

    def admit(self, free: list[int]):
        """Read waiting prompts into free groups, about PREFILL_TOKENS at a time."""
        most_tokens = PREFILL_TOKENS_GPU if self.logits.is_cuda else PREFILL_TOKENS
        while free and self.waiting:
            longest = len(self.prompts[self.waiting[-1]]) - self.skip
            count = min(len(free), len(self.waiting), max(1, most_tokens // longest))
            self.read_prompts(free[:count])
            free = free[count:]

    def read_prompts(self, groups: list[int]):
        """The next waiting prompts move into these groups."""
        numbers = [self.waiting.pop() for _ in groups]
        texts = [self.prompts[i][self.skip :] for i in numbers]
        context, logits = prefill(self.model, texts, self.prefix)
        slots = self.slots_of(groups)
        rows = torch.tensor(slots, device=self.device)
        self.own.lengths[rows] = 0
        self.prompt_level.fill(groups, context)
        self.logits[rows] = logits.repeat_interleave(self.n, 0)
        samples = [(i, k) for i in numbers for k in range(self.n)]
        u = [uniforms((*self.keys[i], k), self.max_new) for i, k in samples]
        self.u[rows] = torch.stack(u).to(self.device)
        for slot, (i, k) in zip(slots, samples, strict=True):
            self.live[slot] = i * self.n + k

    def condense(self, groups: list[int]):
        """Go on with these groups only."""
        slots = self.slots_of(groups)
        rows = torch.tensor(slots, dtype=torch.long, device=self.device)
        for level in self.levels:
            share = len(self.num_drawn) // len(level.lengths)  # slots of each of its rows
            level.select(rows[::share] // share)
        self.logits, self.u = self.logits[rows], self.u[rows]
        self.live = {new: self.live[old] for new, old in enumerate(slots) if old in self.live}
        self.num_drawn = [self.num_drawn[slot] for slot in slots]

    def decode(self):
        """New logits, behind the tokens that were drawn last."""
        self.own.lengths.add_(1).clamp_(max=self.own.width)  # ended slots stay in the last column
        step = decode
        if self.compile:
            torch.compiler.cudagraph_mark_step_begin()
            step = compiled_decode(self.device, len(self.num_drawn), len(self.levels))
        with decode_by_onednn(len(self.num_drawn)):
            self.logits.copy_(step(self.model, self.tokens.clamp(min=0), self.levels))

    def sample_steps(self, temperature: float, top_p: float) -> list[list[int]]:
        """The next tokens of all slots: those of one step, or on a GPU of several."""
        most = max(self.num_drawn)
        steps = min(STEPS_PER_SYNC if self.logits.is_cuda else 1, self.max_new - most)
        running = {number // self.n for number in self.live.values()}
        for level, width in zip(self.levels, self.widths(running, most + steps), strict=False):
            level.resize(width)
        columns = torch.tensor(self.num_drawn, device=self.device)[:, None]  # (B, 1)
        tokens = []
        for step in range(steps):
            if step:
                self.decode()
            u = self.u.gather(1, columns + step).squeeze(1)
            self.logits.index_fill_(1, self.banned, float("-inf"))  # what is no text
            self.tokens = sample_token(self.logits, u, temperature, top_p)
            tokens.append(self.tokens)
        return torch.stack(tokens).tolist()

    def run(self, stop: list[int], temperature: float, top_p: float):
        """(sample numbers, their next tokens), a step each."""
        while self.schedule():
            for tokens in self.sample_steps(temperature, top_p):
                if not self.live:  # of a GPU's steps some lie behind the last end
                    break
                numbers = list(self.live.values())
                new_tokens = [tokens[slot] for slot in self.live]
                if -1 in new_tokens:
                    prompt = numbers[new_tokens.index(-1)] // self.n
                    raise UserError(
                        f"the model's logits are not finite after prompt {prompt}; "
                        "its weights are damaged"
                    )
                yield numbers, new_tokens
                for slot, token in zip(list(self.live), new_tokens, strict=True):
                    self.num_drawn[slot] += 1
                    if token in stop or self.num_drawn[slot] == self.max_new:
                        self.num_drawn[slot] = 0
                        del self.live[slot]
            if self.live:
                self.decode()


# ---- generate --------------------------------------------------------------------------------


@torch.no_grad()  # also while the consumer of this generator is at work: restored at every yield
def generate_stream(
    model: Llama,
    prompts: list[list[int]],
    keys: list[tuple],
    *,
    stop: list[int],
    max_new: int,
    n: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.9,
    batch: int = 256,
    agree: Callable[[int], int] = int,
    compile: bool | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """Decode n samples of every prompt, about `batch` side by side; yields (sample numbers, their
    next tokens), a step each.

    Number i * n + k is sample k of prompt i, whose random numbers depend on (*keys[i], k) alone.
    A sample ends with a token of `stop`, or after max_new tokens without one. Where memory holds
    fewer groups of n, agree(how many it holds) says how many: processes that share a model must
    have equally many. compile: decode steps by torch.compile, as on a GPU without being told; on a
    CPU it takes some seconds, and then a step of one text is 1.3 times as fast. Raises UserError
    for settings and prompts that cannot be sampled.
    """
    if not 0 < top_p <= 1 or not temperature >= 0 or min(max_new, n) < 1:
        raise UserError(
            f"temperature {temperature}, top-p {top_p}, max_new {max_new}, n {n}: needs a "
            "temperature of 0 (greedy) or more, 0 < top-p <= 1, at least one token of one sample"
        )
    for i, ids in enumerate(prompts):
        if len(ids) + max_new > model.cfg.max_len:
            raise UserError(
                f"prompt {i} has {len(ids)} tokens; with {max_new} new ones that is more than the "
                f"context of {model.cfg.max_len}: shorten it or allow fewer new tokens"
            )
    if prompts:
        scheduler = Scheduler(model, prompts, keys, n, max_new, batch, agree, compile)
        yield from scheduler.run(stop, temperature, top_p)


def generate(
    model: Llama,
    prompts: list[list[int]],
    keys: list[tuple],
    *,
    stop: list[int],
    max_new: int,
    n: int = 1,
    callback: Callable[[int, int], None] = lambda tokens, ended: None,
    **settings,
) -> list[list[list[int]]]:
    """n samples of every prompt: n id lists each, prompt excluded, stop token included.

    `settings` are those of generate_stream; callback(tokens, ended) hears of every step how many
    tokens came and how many samples ended.
    """
    samples = [[] for _ in range(len(prompts) * n)]
    steps = generate_stream(model, prompts, keys, stop=stop, max_new=max_new, n=n, **settings)
    for numbers, tokens in steps:
        num_ended = 0
        for number, token in zip(numbers, tokens, strict=True):
            samples[number].append(token)
            num_ended += token in stop or len(samples[number]) == max_new
        callback(len(numbers), num_ended)
    return [samples[i : i + n] for i in range(0, len(samples), n)]


# ---- memory ---------------------------------------------------------------------------------


def affordable(groups: int, group_capacity: int, first: Prefill) -> int:
    """As many groups of so many tokens as half of the free memory holds; at least one."""
    token_bytes = sum(t.nbytes for t in first.k + first.v) / first.k[0].shape[2]
    fit = max(1, int(free_memory(first.k[0].device) / 2 / (token_bytes * group_capacity)))
    if fit < groups:
        warnings.warn(f"memory holds keys of {fit} prompts, not of {groups}", stacklevel=5)
    return min(fit, groups)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could have on a device; of a CPU's an equal part of what is free."""
    if device.type == "cuda":  # what torch has cached is free as well
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info(device)[0] + cached
    if os.path.exists("/proc/meminfo"):  # and so are the system's copies of files
        free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = min(free, free_in_container())
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    return int(free) // num_processes


def free_in_container() -> float:
    """What the memory limits of the process's control groups (versions 1 and 2) leave."""
    groups = Path("/proc/self/cgroup")
    free = float("inf")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        if "memory" in controllers:
            root, limit, usage = f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        group = Path(root + path)
        for folder in (group, *group.parents):  # a parent's limit counts for all below
            if (folder / limit).exists() and (folder / limit).read_text().strip().isdigit():
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = folder / "memory.stat"
                if stat.exists():  # copies of files can go
                    left += int(re.search(r"inactive_file (\d+)", stat.read_text())[1])
                free = min(free, left)
    return free


# ---- N candidates for a prompt ---------------------------------------------------------------


def respond(
    model: Llama, tok: Tokenizer, rows: list[dict], *, key: tuple, n: int = 4, **settings
) -> list[dict]:
    """Sample n responses to each {"id", "prompt"} (paper section 2.2, step 2): rows {"id", "k",
    "prompt", "response", "tokens", "truncated"}. A row with "turns" is a chat to go on with.

    `tokens` are the sampled ids themselves. A response that met the length limit has no
    end-of-sequence token and is marked as truncated. DPO trains on it as it is: it is never given
    an end, or training on it would teach to stop in mid-sentence.
    """
    chats = [row.get("turns") or [row["prompt"]] for row in rows]
    prompts = [tok.chat(*turns) for turns in chats]
    keys = [(*key, row["id"]) for row in rows]
    samples = generate(model, prompts, keys, n=n, stop=[tok.eos], **settings)
    responses = []
    for row, turns, id_lists in zip(rows, chats, samples, strict=True):
        for k, ids in enumerate(id_lists):
            truncated = ids[-1] != tok.eos
            text = tok.decode(ids if truncated else ids[:-1]).strip()
            response = {"id": row["id"], "k": k, "prompt": turns[-1], "response": text}
            responses.append(response | {"tokens": ids, "truncated": truncated})
    return responses


# ---- new prompts, as in Self-Instruct --------------------------------------------------------

NUM_GENERATED = 2  # examples of a request that were written before; the others are seeds (2 of 8)
NEEDS_MORE_THAN_TEXT = re.compile(
    r"\b((image|graph|picture|file|map)s?|draw|plot|go to)\b", re.IGNORECASE
)


# a character of the scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, kana,
# Chinese characters
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def words(text: str) -> list[str]:
    """Words in lower case; where a script has no blanks between them, its characters."""
    # letters, numbers and marks by Unicode; a mark is a vowel in Hindi, an accent elsewhere
    letters = [c if unicodedata.category(c)[0] in "LNM" else " " for c in text.lower()]
    return UNSPACED.sub(r" \g<0> ", "".join(letters)).split()


def rouge_l(a: list[str], b: list[str]) -> float:
    """ROUGE-L F1 of two word lists: 2 * LCS / (len(a) + len(b)).

    The longest common subsequence is found bit-parallel (Hyyro 2004): one row of the table is one
    integer.
    """
    positions = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    all_ones = row = (1 << len(a)) - 1
    for word in b:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    lcs = len(a) - row.bit_count()
    return 2 * lcs / max(1, len(a) + len(b))


def why_unfit(text: str) -> str | None:
    """Why Self-Instruct would drop this prompt, or None (Wang et al. 2022, released code, which
    is for English; other scripts fare alike)."""
    unspaced = len(UNSPACED.findall(text))
    count = len(UNSPACED.sub("", text).split()) + unspaced / 2  # two characters make a word
    if count <= 3:
        return "too short"
    if count > 150:
        return "too long"
    if not text[0].isalnum() and text[0] not in " ¿¡":
        return "odd first character"
    if text.startswith("Write a program"):
        return "asks for a program"
    return "asks for more than text" if NEEDS_MORE_THAN_TEXT.search(text) else None


def too_similar(text: str, pool: list[list[str]], rouge: float) -> bool:
    """Is its ROUGE-L with any text of the pool over the limit, or is it a copy?"""
    new = words(text)
    if new in pool:
        return True
    new_words = set(new)
    for old in pool:
        most_common = rouge * (len(old) + len(new)) / 2  # words, for a ROUGE-L within the limit
        if min(len(old), len(new)) <= most_common:
            continue
        if sum(map(new_words.__contains__, old)) <= most_common:
            continue
        if rouge_l(old, new) > rouge:
            return True
    return False


def count_placeholders(template: str, path) -> int:
    """How many examples a prompt writer's template takes: {1}, {2} and so on, at least one."""
    numbers = {int(n) for n in re.findall(r"\{(\d+)\}", template)}
    if not numbers or numbers != set(range(1, len(numbers) + 1)):
        raise UserError(
            f"{path}: has no places {{1}}, {{2}}, ... for examples, or leaves one out; mend it"
        )
    return len(numbers)


def example_seeds(tok: Tokenizer, seeds: list[str], at_least: int, max_tokens: int) -> list[str]:
    """The seed prompts that may be examples: not too long, and of one line, since of a new prompt
    only the first line is read. Raises UserError where there are not enough."""
    one_line = [prompt for prompt in seeds if "\n" not in prompt]
    fitting = [prompt for prompt in one_line if len(tok.encode(prompt)) <= max_tokens]
    if len(fitting) < at_least:
        raise UserError(
            f"the prompt writer's template needs {at_least} examples, and only {len(fitting)} of "
            f"{len(seeds)} seed prompts are one line of at most {max_tokens} tokens"
        )
    return fitting


def few_shot(
    template: str, num_examples: int, seeds: list[str], generated: list[str], key: tuple
) -> str:
    """Fill a template with up to NUM_GENERATED generated prompts, else seeds, in random order."""
    rng = random.Random(repr(key))
    examples = rng.sample(generated, min(NUM_GENERATED, len(generated), num_examples))
    examples += rng.sample(seeds, num_examples - len(examples))
    rng.shuffle(examples)
    return re.sub(r"\{(\d+)\}", lambda match: examples[int(match[1]) - 1], template)


def propose(
    write: Callable[[list[list[int]], list[tuple]], list[list[int]]],
    tok: Tokenizer,
    template: str,
    seeds: list[str],
    count: int,
    *,
    key: tuple,
    earlier: list[str] = (),
    held_out: list[str] = (),
    rouge: float = 0.7,
    wave: int = 128,
    attempts: int = 20,
    max_request_tokens: int = 1 << 30,
) -> tuple[list[str], Counter]:
    """`count` new prompts from a fixed writer, few-shot, filtered as in Self-Instruct (paper
    section 2.2, step 1); also a count of what became of every request.

    template has a place for each example, {1}, {2}, ...: NUM_GENERATED of them are prompts
    accepted before, the others seeds. write(ids, keys) continues id lists, at most `wave` at a
    time; the first line of what it writes is the new prompt. It is dropped if it is too similar
    (ROUGE-L over `rouge`) to a seed, to one accepted before or to one of `earlier`, or if it
    stands in `held_out`. Raises UserError after attempts * count requests.
    """
    num_examples = count_placeholders(template, "the prompt writer's template")
    template_tokens = len(tok.encode_with_bos(template))
    max_example_tokens = (max_request_tokens - template_tokens) // num_examples
    examples = example_seeds(tok, seeds, num_examples, max_example_tokens)
    held_out = {p.strip() for p in held_out}
    pool = [words(p) for p in [*seeds, *earlier]]
    accepted, generated = [], []
    tally = Counter()
    num_requests = 0
    while len(accepted) < count:
        if num_requests >= attempts * count:
            raise UserError(
                f"only {len(accepted)} of {count} new prompts survived {num_requests} requests "
                f"({dict(tally)}): ask for fewer, or take a better writer or template"
            )
        size = min(wave, count - len(accepted) + 8)  # some will be dropped
        keys = [(*key, i) for i in range(num_requests, num_requests + size)]
        num_requests += size
        texts = [few_shot(template, num_examples, examples, generated, k) for k in keys]
        for ids in write([tok.encode_with_bos(text) for text in texts], keys):
            if len(accepted) == count:
                break
            text = tok.decode(ids).strip().split("\n")[0].strip()
            cut = ids[-1] not in (tok.eos, *tok.newlines)
            reason = "cut by the length limit" if cut else why_unfit(text)
            if not reason and text in held_out:
                reason = "held out"
            if not reason and too_similar(text, pool, rouge):
                reason = "too similar"
            tally[reason or "accepted"] += 1
            if reason:
                continue
            accepted.append(text)
            pool.append(words(text))
            if len(tok.encode(text)) <= max_example_tokens:
                generated.append(text)
    return accepted, tally


# ---- rows of JSON lines ----------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]):
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def has_field(row, key: str) -> bool:
    """Texts are not blank, lists not empty, log-probabilities are numbers."""
    value = row.get(key) if isinstance(row, dict) else None
    if key in ("prompt", "response", "judgement"):
        return isinstance(value, str) and bool(value.strip())
    if key == "reference_chosen":
        return isinstance(value, float)
    return isinstance(value, list) and bool(value)


def read_jsonl(
    path: Path, *keys: str, allow_empty: bool = False, missing_ok: bool = False
) -> list[dict]:
    """JSON lines with at least `keys`; a bad row is named by file and line."""
    if missing_ok and not path.exists():
        return []
    rows = []
    text = read_text(path, "see docs/files.md for the files of a data folder")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        problem = None
        try:
            row = json.loads(line)
            if "\\u" in line:  # only an escape can stand for half of a surrogate pair
                json.dumps(row, ensure_ascii=False).encode()
            missing = [key for key in keys if not has_field(row, key)]
            if missing:
                problem = f"no usable {' and '.join(missing)}"
        except UnicodeEncodeError as e:
            problem = f"{ascii(e.object[e.start])} alone is no character"
        except ValueError as e:
            problem = f"not valid JSON ({e})"
        if problem:
            raise UserError(f"{path}:{number}: {problem}; mend or remove the line")
        rows.append(row)
    if not rows and not allow_empty:
        raise UserError(f"{path}: holds no rows; make it again or remove it")
    return rows


# ---- in the terminal -------------------------------------------------------------------------


def load_for_sampling(folder: str | os.PathLike) -> tuple[Llama, Tokenizer]:
    """A model to be asked: on a GPU in bf16, else in fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tok = load(folder, dtype, device)
    if device == "cpu":
        use_onednn_linear(model)
        transpose_weights(model)
    return model.eval(), tok


def sampling_settings(folder: str | os.PathLike) -> dict[str, float]:
    """The temperature and top-p that a model of a run was trained to be sampled with; the paper's
    where its folder does not say."""
    path = Path(folder) / "generation_config.json"
    stored = read_json(path) if path.exists() else {}
    settings = {"temperature": 0.7, "top_p": 0.9}
    for name in settings:
        if stored.get(name) is not None:
            settings[name] = stored[name]
    return settings


def print_response(model: Llama, tok: Tokenizer, turns: list[str], key: tuple, **settings) -> str:
    """Stream the response to a chat to the terminal, token by token, and return it."""
    ids, printed = [], ""
    prompt = tok.chat(*turns)
    for _, (token,) in generate_stream(model, [prompt], [key], stop=[tok.eos], **settings):
        if token != tok.eos:
            ids.append(token)
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):  # half of a character that is spelt in bytes
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
    return printed


def chat(model: Llama, tok: Tokenizer, seed: int, **settings):
    print("Write a prompt; an empty line starts a new chat, Ctrl-D ends.")
    turns = []
    while True:
        try:
            line = input("> ").strip()
            if not line:
                turns = []
                continue
            turns.append(line)
            if len(tok.chat(*turns)) + settings["max_new"] > model.cfg.max_len and turns[1:]:
                print(f"(more than the context of {model.cfg.max_len} tokens: a new chat begins)")
                turns = [line]
            turns.append(print_response(model, tok, turns, (seed, len(turns)), **settings))
        except UserError as e:
            print(f"({e}: a new chat begins)")
            turns = []
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main():
    parser = argparse.ArgumentParser(description="Chat with a model, or answer one prompt.")
    parser.add_argument("folder", help="folder with config.json, *.safetensors, tokenizer.model")
    parser.add_argument("prompt", nargs="?", help="answer this and exit; without it, chat")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's own")
    parser.add_argument("--top-p", type=float, help="default: the run's own")
    parser.add_argument("--max-new", type=int, default=256, help="most tokens of a response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="slow to start, then faster")
    args = parser.parse_args()
    model, tok = load_for_sampling(args.folder)
    settings = sampling_settings(args.folder)
    settings |= {"max_new": args.max_new, "compile": args.compile or None}  # None: on a GPU alone
    for name in ("temperature", "top_p"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.prompt is not None:
        print_response(model, tok, [args.prompt], (args.seed, 0), **settings)
    else:
        chat(model, tok, args.seed, **settings)


def run_command(main: Callable):
    """Run a command; what the user must mend is one line and exit code 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("interrupted; files that were finished are whole", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if not e.filename:  # stdout is full, or its reader has seen enough, as in `| head`
            with suppress(OSError):  # where stdout is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            sys.exit(1)
        sys.exit(f"error: {e.filename or 'output'}: {e.strerror}")


if __name__ == "__main__":
    run_command(main)
