"""sample.py: prompts -> text. The sampler, new prompts (`propose`) and candidate responses (`respond`).

Paper section 2.2: new prompts are written few-shot and filtered as in Self-Instruct, then N = 4
responses to each are drawn with temperature 0.7 and top-p 0.9.

    python sample.py runs/zoo/M3                      chat in the terminal
    python sample.py runs/zoo/M3 "What is an owl?"    answer once
    python sample.py runs/zoo/M3 --prompts FILE --out alpaca_eval.json

What is common to prompts is computed once, and in each step its keys are read once: the ids that all prompts begin with
(a judge's template) for all rows, a long prompt for its n samples. Every sample draws from random numbers of its own,
keyed by what it is (seed, stage, prompt id, sample index), so batch order and number of processes change nothing.

A finished sample's place goes to the next in the queue at once, so no step is spent on texts that have ended.

Left out: beam search, repetition penalties; on a GPU paged caches and CUDA graphs, which nobody could try here yet.
"""

import argparse
import hashlib
import json
import os
import random
import re
import string
import sys
import time
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, groupby, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import BadInput, KVCache, Llama, Tokenizer, load, read_json, read_text, write_text

# ---- one token ---------------------------------------------------------------------------------------------


def digest(*what) -> str:
    """A short name for what was asked or read, by which a later start knows it again."""
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()


def uniforms(key: tuple, count: int) -> torch.Tensor:
    """`count` random numbers in [0, 1) that depend on nothing but the key."""
    return torch.rand(count, generator=torch.Generator().manual_seed(int(digest(*key), 16) >> 1))


TRIES = 4  # random numbers that a token may take


def running_sum(weights):
    """Along the vocabulary; on a GPU, which adds in any order, in double precision: all of a tp group draw alike."""
    return weights.cumsum(-1, dtype=torch.float64 if weights.is_cuda else None)


def draw(weights, u):
    """One place a row, as likely as its weight: weights (B, V) and u (B,) in [0, 1) -> (B,)."""
    cumulative = running_sum(weights)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, u[:, None] * total, right=True)
    place = torch.minimum(place, torch.searchsorted(cumulative, total))  # rounding may not pass the last one
    return place.clamp(max=weights.shape[-1] - 1).squeeze(-1)  # nor may NaN


def nucleus(probs, top_p: float):
    """probs (B, V) with 0 for all but the most likely tokens, up to and including the one that crosses p."""
    top = probs.sort(dim=-1, descending=True).values
    kept = (running_sum(top) - top < top_p).sum(-1, keepdim=True).clamp(min=1)
    return probs.masked_fill(probs < top.gather(-1, kept - 1), 0)


def pick(logits, u, temperature: float, top_p: float):
    """One token a row: logits (B, V) and u (B, TRIES) in [0, 1) -> ids (B,), -1 where logits are not finite.

    Top-p keeps the most likely tokens up to and including the one that crosses p, as Llama's released sampler does,
    and those as likely as that one. To find them is to sort the vocabulary, so a row draws from all tokens first: if
    those more likely than its token hold p already, it was not in the nucleus and the row draws again. Only rows that
    fail in all tries but the last are sorted. Temperature 0 is greedy.
    """
    if temperature == 0:
        most, ids = logits.max(-1)
        return ids.masked_fill(~most.isfinite(), -1)
    probs = (logits / temperature).softmax(-1)
    finite = probs[:, 0].isfinite()  # softmax spreads one bad logit over its whole row
    if top_p == 1 or probs.is_cuda:  # where sorting is cheap, and asking who must be sorted is not
        ids = draw(probs if top_p == 1 else nucleus(probs, top_p), u[:, 0])
    else:
        ids, rest = torch.empty(len(u), dtype=torch.long), torch.arange(len(u))
        for i in range(TRIES):
            probs = probs if i + 1 < TRIES else nucleus(probs, top_p)
            ids[rest] = draw(probs, u[rest, i])
            above = torch.where(probs > probs.gather(-1, ids[rest, None]), probs, 0).sum(-1)
            rest, probs = rest[above >= top_p], probs[above >= top_p]
            if not len(rest):
                break
    return ids.masked_fill(~finite, -1)


# ---- many texts --------------------------------------------------------------------------------------------

PIECE = 1024  # most prompt tokens that are put through the model at once: on a CPU more do not stay in its caches
SHARED = 16  # a beginning of as many tokens that all prompts have in common is computed and kept once
LONG = 32  # if the longest prompt has as many tokens of its own, each is kept once for its samples; else it is copied
GROW = 32  # columns that are added to a full cache
LOOK = 8  # steps between two looks at the tokens on a GPU, where a look waits for the device


def free_memory(device: torch.device) -> int:
    """Bytes that this process could have on a device; of a CPU's an equal part of what is there for all."""
    if device.type == "cuda":  # what torch has cached is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if os.path.exists("/proc/meminfo"):  # and so are the system's copies of files
        with open("/proc/meminfo") as f:
            free = int(re.search(r"MemAvailable:\s*(\d+)", f.read())[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's number of processes here


def multiply(linears: list[torch.nn.Linear], rows: int) -> Callable:
    """A function x -> what each of the layers makes of x, by one product with a copy of their weights.

    A CPU reads the copy from end to end: for one row it is the transpose, for more what oneDNN makes of it. PyTorch
    reaches that by operators that torch.compile puts into its code; else every product lays out its weights anew.
    """
    weight, sizes = torch.cat([linear.weight for linear in linears]), [linear.out_features for linear in linears]
    if rows == 1 and weight.dtype == torch.float32:
        product = partial(torch.matmul, other=weight.T.contiguous())
    else:
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        product = partial(torch.ops.mkldnn._linear_pointwise, W=blocks, B=None, attr="none", scalars=[], algorithm="")
    return product if len(linears) == 1 else lambda x: product(x).split(sizes, dim=-1)


class Decoder:
    """A model that writes `rows` texts side by side. On a CPU it multiplies by copies of its weights, if they fit.

    The model itself stays as it is: the copies take the place of its layers during a call only.
    """

    def __init__(self, model: Llama, rows: int):
        self.model, self.device, self.products = model, model.embed_tokens.weight.device, []
        usable = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        usable &= "forward" not in vars(model.lm_head)  # tensor parallel layers have their own
        half = model.lm_head.weight.dtype != torch.float32
        usable = usable and (not half or torch.ops.mkldnn._is_mkldnn_bf16_supported())  # by the processor
        if not usable or sum(p.nbytes for p in model.parameters()) > free_memory(self.device) / 2:
            return
        places = [(model.lm_head, "forward", [model.lm_head])]
        for attention, mlp in ((block.self_attn, block.mlp) for block in model.layers):
            places.append((attention, "project", [attention.q_proj, attention.k_proj, attention.v_proj]))
            places.append((attention.o_proj, "forward", [attention.o_proj]))
            places.append((mlp, "widen", [mlp.gate_proj, mlp.up_proj]))
            places.append((mlp.down_proj, "forward", [mlp.down_proj]))
        self.products = [(vars(module), name, multiply(linears, rows)) for module, name, linears in places]

    def __call__(self, tokens, cache: KVCache):
        """tokens (B, T), the next ones of the cache's rows -> logits (B, V) of what follows them."""
        for place, name, function in self.products:
            place[name] = function
        try:
            return self.model(tokens, cache, readout=lambda h, head: head(h[:, -1]).float())
        finally:
            for place, name, _ in self.products:
                del place[name]


def read(decoder: Decoder, texts: list[list[int]], head: KVCache | None = None):
    """Put texts through the model, behind what they have in common: the cache they leave, and logits (B, V)."""
    width, device = max(map(len, texts)), decoder.device
    tokens = pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True, padding_side="left")  # (B, width)
    cache = decoder.model.new_cache(len(texts), width, head)
    cache.start += torch.tensor([width - len(ids) for ids in texts], device=device)
    step = max(1, PIECE // len(texts))
    for at in range(0, width, step):
        logits = decoder(tokens[:, at : at + step].to(device), cache)
    return cache, logits


class Arrival(NamedTuple):
    """A sample whose prompt has been read."""

    row: int  # i * n + k: sample k of prompt i
    cache: KVCache
    index: int  # its row there
    logits: torch.Tensor  # (V,), of its first token
    u: torch.Tensor  # (max_new, TRIES), the random numbers of all its tokens


def arrivals(decoder: Decoder, prompts, keys, n: int, max_new: int) -> Iterator[Arrival]:
    """All samples. Prompts are read when their turn comes, longest first: whoever comes later needs fewer columns."""
    common = os.path.commonprefix(prompts)  # works on lists of ids as it does on strings
    common = common[: min(map(len, prompts), default=0) - 1]  # each prompt keeps a token of its own to read logits from
    head = read(decoder, [common])[0] if len(common) >= SHARED and len(prompts) * n > 1 else None
    skip, at, order = len(common) if head else 0, 0, sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while at < len(order):
        group = order[at : at + max(1, PIECE // (len(prompts[order[at]]) - skip))]
        cache, logits = read(decoder, [prompts[i][skip:] for i in group], head)
        for b, i in enumerate(group):
            for k in range(n):
                yield Arrival(i * n + k, cache, b, logits[b], uniforms((*keys[i], k), TRIES * max_new).view(-1, TRIES))
        at += len(group)


class Slots:
    """Samples in the making, side by side: slot s is row s of the cache, of the logits and of the random numbers.

    Where prompts are long, those of the samples lie in a cache of their own, each of them once: `prompts`.
    """

    def __init__(self, decoder: Decoder, queue: Iterator[Arrival], n: int, max_new: int):
        self.decoder, self.queue, self.n, self.max_new = decoder, queue, n, max_new
        self.waiting = next(queue)  # the next sample to have a slot
        self.width, self.shared = self.waiting.cache.end, n > 1 and self.waiting.cache.end >= LONG
        self.prompts: KVCache | None = None
        self.places: dict[int, int] = {}  # prompt -> its row there

    def columns(self, count: int) -> int:
        """How many columns all caches of `count` slots have at most."""
        own = count * (self.max_new + GROW)
        return own + self.width * (self.places_for(count) if self.shared else count)

    def places_for(self, count: int) -> int:
        return -(-2 * count // self.n)  # twice what is needed at once: the last sample of a prompt may go on for long

    def affordable(self, count: int) -> int:
        """As many of `count` slots as half of the free memory holds; at least one."""
        read = self.waiting.cache
        column = sum(t.nbytes for t in (*read.k, *read.v)) / (len(read.start) * read.columns)
        room = free_memory(self.decoder.device) / 2 / column  # so many columns
        fit = max(1, bisect(range(1, count + 1), room, key=self.columns))
        if fit < count:
            warnings.warn(f"memory holds keys and values of {fit} samples side by side, not {count}", stacklevel=3)
        return fit

    def open(self, count: int):
        device, new_cache = self.decoder.device, self.decoder.model.new_cache
        self.rows, self.said = [None] * count, [0] * count  # whose slot it is (None: free), how many tokens it has
        self.logits = torch.zeros(count, self.decoder.model.cfg.vocab_size, device=device)  # of the next token
        self.u = torch.zeros(count, self.max_new, TRIES, device=device)
        if self.shared:
            self.prompts = new_cache(self.places_for(count), self.width, self.waiting.cache.parent)
            self.prompts.end = self.width

    def taken(self) -> list[int]:
        return [s for s, row in enumerate(self.rows) if row is not None]

    def fill(self) -> bool:
        """Free slots take samples from the queue, or are dropped when it is empty, once they are worth the trouble."""
        free = [s for s, row in enumerate(self.rows) if row is None]
        if 16 * len(free) > len(self.rows):
            if len(free) == len(self.rows) and self.waiting:  # nobody's columns are in use
                width = 0 if self.shared else self.waiting.cache.end
                parent = self.prompts if self.shared else self.waiting.cache.parent
                self.cache = self.decoder.model.new_cache(len(free), width + GROW, parent)
                self.cache.end = width
            if new := self.take(len(free)):
                self.admit(free[: len(new)], new)
            left = self.taken()
            if left and not self.waiting and 8 * (len(self.rows) - len(left)) > len(self.rows):
                self.keep(left)
        return bool(self.taken())

    def take(self, count: int) -> list[Arrival]:
        """At most `count` samples from the queue, if there is a place for their prompts."""
        new, places = [], count
        if self.shared:  # a place is free again when neither a slot nor the queue has a sample of its prompt
            live = {row // self.n for row in (*self.rows, self.waiting and self.waiting.row) if row is not None}
            self.places = {prompt: place for prompt, place in self.places.items() if prompt in live}
            places = len(self.prompts.start) - len(self.places)
        while self.waiting and len(new) < count and (places or self.waiting.row % self.n):
            places -= self.waiting.row % self.n == 0
            new.append(self.waiting)
            self.waiting = next(self.queue, None)
        return new

    def admit(self, slots: list[int], new: list[Arrival]):
        to, firsts = torch.tensor(slots, device=self.u.device), [a for a in new if a.row % self.n == 0]
        if self.shared:
            places = [r for r in range(len(self.prompts.start)) if r not in self.places.values()][: len(firsts)]
            self.places |= {a.row // self.n: r for a, r in zip(firsts, places, strict=True)}
            self.copy(self.prompts, places, firsts)
            self.cache.adopt(to, torch.tensor([self.places[a.row // self.n] for a in new], device=to.device))
        else:
            self.copy(self.cache, slots, new)
        self.logits[to] = torch.stack([a.logits for a in new])
        self.u[to] = torch.stack([a.u for a in new]).to(to.device)
        for s, a in zip(slots, new, strict=True):
            self.rows[s], self.said[s] = a.row, 0

    def copy(self, cache: KVCache, rows: list[int], new: list[Arrival]):
        """What was read of their prompts becomes these rows of the cache."""
        for source, group in groupby(zip(rows, new, strict=True), key=lambda both: both[1].cache):
            to, index = zip(*((row, a.index) for row, a in group), strict=True)
            cache.replace(*(torch.tensor(t, device=self.u.device) for t in (to, index)), source)

    def keep(self, slots: list[int]):
        """Go on with these slots only, when none is waiting."""
        index = torch.tensor(slots, device=self.u.device)
        self.rows, self.said = [self.rows[s] for s in slots], [self.said[s] for s in slots]
        self.logits, self.u = self.logits[index], self.u[index]
        width = self.cache.end - int(self.cache.start[index].min())
        self.cache.resize(index, width, width + GROW)
        if self.shared:
            used, self.cache.of = self.cache.of.unique(return_inverse=True)
            width = self.prompts.end - int(self.prompts.start[used].min())
            self.prompts.resize(used, width, width)

    def step(self):
        """One token more behind what was drawn last: new logits."""
        if self.cache.end == self.cache.columns:
            width = self.cache.end - int(self.cache.start[self.taken()].min())  # of those in use
            self.cache.resize(slice(None), width, width + GROW)
        self.logits = self.decoder(self.drawn.clamp(min=0)[:, None], self.cache)

    def draw(self, temperature: float, top_p: float) -> list[list[int]]:
        """The next tokens of all slots: those of one step, or on a GPU of several."""
        steps = min(LOOK, self.max_new - max(self.said[s] for s in self.taken())) if self.u.is_cuda else 1
        said, tokens = torch.tensor(self.said, device=self.u.device), []
        for i in range(steps):
            if i:
                self.step()
            u = self.u[torch.arange(len(self.u), device=self.u.device), (said + i).clamp(max=self.max_new - 1)]
            self.drawn = pick(self.logits, u, temperature, top_p)
            tokens.append(self.drawn)
        return torch.stack(tokens).tolist()


@torch.no_grad()  # also while the consumer of this generator is at work: it is restored at every yield
def stream(
    model: Llama,
    prompts: list[list[int]],
    keys: list[tuple],
    *,
    max_new: int,
    stop: list[int],
    n: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.9,
    batch: int = 256,
    agree: Callable[[int], int] = int,
) -> Iterator[tuple[list[int], list[int]]]:
    """Decode n samples of every prompt, `batch` side by side; yields (rows, their next tokens), a step each.

    Row i * n + k is sample k of prompt i. A row ends with a token of `stop`, or after max_new tokens without one; its
    slot then goes to the next in the queue. Where memory holds fewer than `batch`, agree(how many it holds) says how
    many: processes that share a model must have equally many.
    """
    if not 0 < top_p <= 1 or temperature < 0 or max_new < 1 or n < 1:
        raise BadInput(
            f"temperature {temperature}, top-p {top_p}, max_new {max_new}, n {n}: needs a temperature of 0 "
            "(greedy) or more, 0 < top-p <= 1, and at least one token of one sample"
        )
    for i, ids in enumerate(prompts):
        if len(ids) + max_new > model.cfg.max_len:
            raise BadInput(
                f"prompt {i} has {len(ids)} tokens; with {max_new} new ones that is more than the context of "
                f"{model.cfg.max_len}: shorten it or allow fewer new tokens"
            )
    if not prompts:
        return
    count = min(batch, len(prompts) * n)
    decoder = Decoder(model, count)
    slots = Slots(decoder, arrivals(decoder, prompts, keys, n, max_new), n, max_new)
    slots.open(agree(slots.affordable(count)))
    while slots.fill():
        for tokens in slots.draw(temperature, top_p):
            taken = slots.taken()
            rows, drawn = [slots.rows[s] for s in taken], [tokens[s] for s in taken]
            if drawn and min(drawn) < 0:
                bad = rows[drawn.index(-1)] // n
                raise BadInput(f"the model's logits are not finite after prompt {bad}; its weights are damaged")
            yield rows, drawn
            for s, token in zip(taken, drawn, strict=True):
                slots.said[s] += 1
                if token in stop or slots.said[s] == max_new:
                    slots.rows[s] = None
        if slots.taken():
            slots.step()


def generate(model: Llama, prompts, keys, *, stop, max_new, n: int = 1, tick: Callable = lambda *_: None, **knobs):
    """n samples of every prompt: a list of n id lists for each, prompt excluded, stop token included.

    `knobs` are those of `stream`; `tick(tokens, finished)` hears how many tokens came and how many samples ended.
    """
    out = [[] for _ in range(len(prompts) * n)]
    for rows, tokens in stream(model, prompts, keys, n=n, stop=stop, max_new=max_new, **knobs):
        for row, token in zip(rows, tokens, strict=True):
            out[row].append(token)
        tick(len(rows), sum(t in stop or len(out[r]) == max_new for r, t in zip(rows, tokens, strict=True)))
    return [out[i : i + n] for i in range(0, len(out), n)]


# ---- N candidates for a prompt -----------------------------------------------------------------------------


def respond(model: Llama, tok: Tokenizer, rows: list[dict], *, key: tuple, n: int = 4, **knobs) -> list[dict]:
    """Sample n responses to each {"id", "prompt"}; rows {"id", "k", "response", "tokens", "truncated"} (section 2.2).
    A row with "turns", user, assistant and so on to user, is a chat to go on with.

    `tokens` are the sampled ids themselves. A response that met the length limit has no end-of-sequence token and
    is marked as truncated; it is never given one, or training on it would teach to stop in mid-sentence.
    """
    prompts = [tok.chat(*(r["turns"] if "turns" in r else [r["prompt"]])) for r in rows]
    keys = [(*key, r["id"]) for r in rows]
    samples = generate(model, prompts, keys, n=n, stop=[tok.eos], **knobs)
    out = []
    for row, drawn in zip(rows, samples, strict=True):
        for k, ids in enumerate(drawn):
            text = tok.decode(ids[:-1] if ids[-1] == tok.eos else ids).strip()
            out.append({"id": row["id"], "k": k, "response": text, "tokens": ids, "truncated": ids[-1] != tok.eos})
    return out


# ---- new prompts, as in Self-Instruct ----------------------------------------------------------------------

UNFIT = re.compile(r"\b((image|graph|picture|file|map)s?|draw|plot|go to)\b", re.IGNORECASE)  # a text model cannot


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(a: list[str], b: list[str]) -> float:
    """ROUGE-L F1 of two word lists: 2 * LCS / (len(a) + len(b)).

    The longest common subsequence is found bit-parallel (Hyyro 2004): one row of the table is one integer.
    """
    where, row = {}, 0
    for i, w in enumerate(a):
        where[w] = where.get(w, 0) | 1 << i
    ones = row = (1 << len(a)) - 1
    for w in b:
        hit = row & where.get(w, 0)
        row = (row + hit | row - hit) & ones
    return 2 * (len(a) - row.bit_count()) / max(1, len(a) + len(b))


def unfit(text: str) -> str | None:
    """Why Self-Instruct would drop this prompt, or None (Wang et al. 2022, released code)."""
    count = len(text.split())
    if count <= 3 or count > 150:
        return "too short" if count <= 3 else "too long"
    if text[0] in string.punctuation or not text[0].isascii():
        return "odd first character"
    if text.startswith("Write a program"):
        return "asks for a program"
    return "asks for more than text" if UNFIT.search(text) else None


def too_similar(text: str, pool: list[list[str]], rouge: float) -> bool:
    """Is its ROUGE-L with any text of the pool over the limit, or is it a copy?"""
    new = words(text)
    near = (old for old in pool if 2 * min(len(old), len(new)) > rouge * (len(old) + len(new)))  # others are too short
    return new in pool or any(rouge_l(old, new) > rouge for old in near)


GENERATED = 2  # examples of a request that were accepted before; the others are seeds (Wang et al. 2022: 2 of 8)


def places_of(template: str, where) -> int:
    """How many examples a prompt writer's template takes: its places are {1}, {2} and so on, at least one."""
    places = {int(n) for n in re.findall(r"\{(\d+)\}", template)}
    if not places or places != set(range(1, len(places) + 1)):
        raise BadInput(f"{where}: has no places {{1}}, {{2}} and so on for examples, or leaves one out; mend it")
    return len(places)


def few_shot(template: str, places: int, seeds: list[str], generated: list[str], key: tuple) -> str:
    """Fill the places {1}, {2}, ... with up to GENERATED generated prompts, else seeds, in random order."""
    rng = random.Random(repr(key))
    examples = rng.sample(generated, min(GENERATED, len(generated), places))
    examples += rng.sample(seeds, places - len(examples))
    rng.shuffle(examples)
    return re.sub(r"\{(\d+)\}", lambda m: examples[int(m[1]) - 1], template)


def propose(
    write: Callable[[list[list[int]], list[tuple]], list[list[int]]],
    tok: Tokenizer,
    template: str,
    seeds: list[str],
    count: int,
    *,
    key: tuple,
    taken: list[str] = (),
    held_out: list[str] = (),
    rouge: float = 0.7,
    wave: int = 128,
    attempts: int = 20,
    room: int = 1 << 30,
) -> tuple[list[str], Counter]:
    """`count` new prompts from a fixed writer, few-shot, filtered as in Self-Instruct (paper section 2.2).

    template holds the places {1}, {2}, ... of its examples: GENERATED of them are prompts accepted earlier (while
    there are none, seeds), the others seed prompts. write(ids, keys) continues id lists; the first
    line of what it writes is the new prompt. A prompt too similar (ROUGE-L over `rouge`) to a seed, to one accepted
    or to one of `taken` is dropped, as is one that stands in `held_out`. Examples share `room` tokens: a longer
    prompt than an equal part of it is never shown.

    Returns the prompts and a count of every rejection by reason. Raises BadInput after attempts * count requests.
    """
    places = places_of(template, "the prompt writer's template")
    share = (room - len(tok.raw(template))) // places
    shown = [p for p in seeds if len(tok.encode(p)) <= share]
    if len(shown) < places:
        raise BadInput(f"the prompt writer's template has {places} places, and {len(shown)} of {len(seeds)} seed "
                       f"prompts fit one (of {share} tokens); it needs as many prompts as places")  # fmt: skip
    held_out, accepted, generated, tally, asked = {p.strip() for p in held_out}, [], [], Counter(), 0
    pool = [words(p) for p in [*seeds, *taken]]
    while len(accepted) < count:
        if asked >= attempts * count:
            raise BadInput(f"only {len(accepted)} of {count} new prompts survived {asked} requests ({dict(tally)}): "
                           "ask for fewer, or take a better writer or template")  # fmt: skip
        keys = [(*key, r) for r in range(asked, asked + min(wave, count - len(accepted) + 8))]
        asked += len(keys)
        requests = [tok.raw(few_shot(template, places, shown, generated, k)) for k in keys]
        for ids in write(requests, keys):
            if len(accepted) == count:
                break
            text = tok.decode(ids).strip().split("\n")[0].strip()
            cut = "cut by the length limit" if ids[-1] not in (tok.eos, *tok.newlines) else None
            reason = cut or unfit(text) or ("held out" if text in held_out else None)
            reason = reason or ("too similar" if too_similar(text, pool, rouge) else None)
            tally[reason or "accepted"] += 1
            if reason is None:
                accepted.append(text)
                pool.append(words(text))
                generated += [text] if len(tok.encode(text)) <= share else []
    return accepted, tally


# ---- rows of text, in and out ------------------------------------------------------------------------------


def usable(row, key: str) -> bool:
    """Texts are not blank, lists not empty, log-probabilities are numbers."""
    value = row.get(key) if isinstance(row, dict) else None
    if key in ("prompt", "response", "judgement"):
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, float) if key == "reference_chosen" else isinstance(value, list) and bool(value)


def read_rows(path: Path, *keys: str, empty: bool = False) -> list[dict]:
    """JSON lines with at least `keys`; a bad row is named by file and line."""
    rows, text = [], read_text(path, "see the README for the files a data folder holds")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if "\\u" in line:  # only an escape can stand for half of a surrogate pair, which no tokenizer reads
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as e:
                half = ascii(e.object[e.start])
                raise BadInput(f"{path}:{number}: {half} alone is no character; mend or remove the line") from None
            except ValueError as e:
                raise BadInput(f"{path}:{number}: not valid JSON ({e}); mend or remove the line") from None
            missing = [k for k in keys if not usable(row, k)]
            if missing:
                raise BadInput(f"{path}:{number}: no usable {' and '.join(missing)}; mend or remove the line")
            rows.append(row)
    if not rows and not empty:
        raise BadInput(f"{path}: holds no rows; make it again or remove it")
    return rows


def optional(path: Path, *keys: str, read=read_rows, **knobs) -> list[dict]:
    """The rows of a file that need not be there."""
    return read(path, *keys, **knobs) if path.exists() else []


def read_questions(path: Path) -> list[dict]:
    """The rows of a .json list or of JSON lines, with "turns": what the user says, by the name of "prompt",
    "instruction" (AlpacaEval) or "turns" (MT-Bench). Raises BadInput where a row has none."""
    questions = []
    if not path.is_file():
        raise BadInput(f"{path}: not found; give a .json or .jsonl file of prompts")
    rows = read_json(path, list) if path.suffix == ".json" else read_rows(path)
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {}
        turns = row.get("turns") or [row.get("instruction", row.get("prompt"))]
        if not isinstance(turns, list) or not all(isinstance(t, str) and t.strip() for t in turns):
            raise BadInput(f"{path}: row {number} has no text as prompt or instruction, nor a list of turns; mend it")
        if len(turns) > 1 and "question_id" not in row:
            raise BadInput(f"{path}: row {number} has {len(turns)} turns and no question_id; mend it")
        questions.append(row | {"turns": turns})
    if not questions:
        raise BadInput(f"{path}: holds no prompts; give rows with a prompt")
    return questions


# FastChat's temperatures for MT-Bench; in its other categories, writing and roleplay, it is 0.7
MT_BENCH = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


def answer(
    model: Llama,
    tok: Tokenizer,
    questions: list[dict],
    *,
    key: tuple,
    temperature: float | None,
    batch: int,
    max_new: int,
    top_p: float,
) -> Iterator[list[dict]]:
    """The questions with "responses" and "truncated", one of each for every turn (a later turn sees the earlier ones).

    They come in groups of some batches, to be kept at once. temperature None: 0.7, or that of MT-Bench's category.
    Raises BadInput, before anything is answered, where a question leaves no room for max_new tokens a turn.
    """  # fmt: skip
    for number, q in enumerate(questions, 1):
        need = sum(len(tok.chat(text)) + max_new for text in q["turns"])
        if need > model.cfg.max_len:
            raise BadInput(f"prompt {number} may need {need} tokens with its answers, more than the context of "
                           f"{model.cfg.max_len}: shorten it or lower --max-new")  # fmt: skip
    own = [MT_BENCH.get(q.get("category"), 0.7) if "question_id" in q else 0.7 for q in questions]
    todo = [q | {"id": i, "responses": [], "truncated": [], "temperature": t if temperature is None else temperature}
            for i, (q, t) in enumerate(zip(questions, own, strict=True))]  # fmt: skip
    with tqdm(total=len(todo), unit=" prompts", disable=None) as bar:
        for group in (todo[at : at + 4 * batch] for at in range(0, len(todo), 4 * batch)):
            for turn, t in product(range(max(len(q["turns"]) for q in group)), {q["temperature"] for q in group}):
                mine = [q for q in group if q["temperature"] == t and len(q["turns"]) > turn]
                said = [[*chain(*zip(q["turns"], q["responses"], strict=False)), q["turns"][turn]] for q in mine]
                rows = [{"id": q["id"], "turns": texts} for q, texts in zip(mine, said, strict=True)]
                knobs = {"max_new": max_new, "temperature": t, "top_p": top_p, "batch": batch}
                for q, r in zip(mine, respond(model, tok, rows, key=(*key, turn), n=1, **knobs), strict=True):
                    q["responses"].append(r["response"])
                    q["truncated"].append(r["truncated"])
            yield group
            bar.update(len(group))


def as_file(answered: list[dict], name: str, dataset: str, suffix: str) -> str:
    """Answered questions as the text of a file: AlpacaEval's JSON, FastChat's MT-Bench answers, or plain JSON lines."""
    if suffix == ".json":
        rows = [{"instruction": q["turns"][0], "output": q["responses"][0], "generator": name,
                 "dataset": q.get("dataset", dataset)} for q in answered]  # fmt: skip
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    rows = [
        {"question_id": q["question_id"], "answer_id": f"{name}-{q['question_id']}", "model_id": name,
         "choices": [{"index": 0, "turns": q["responses"]}], "tstamp": time.time()}
        if "question_id" in q else
        {"prompt": q["turns"][0], "response": q["responses"][0], "truncated": q["truncated"][0]}
        for q in answered
    ]  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- in the terminal ---------------------------------------------------------------------------------------


def load_here(folder: str | os.PathLike) -> tuple[Llama, Tokenizer]:
    """A checkpoint to be asked: on a GPU in bf16, else in fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tok = load(folder, torch.bfloat16 if device == "cuda" else torch.float32, device)
    return model.eval(), tok


def say(model: Llama, tok: Tokenizer, turns: list[str], key: tuple, **knobs) -> str:
    """Stream the answer to a chat to the terminal, token by token, and return it."""
    ids, shown = [], ""
    for _, (token,) in stream(model, [tok.chat(*turns)], [key], stop=[tok.eos], **knobs):
        ids += [token] if token != tok.eos else []
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):  # half of a character that is spelt in bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return shown


def chat(model: Llama, tok: Tokenizer, seed: int, **knobs):
    print("Write a prompt; an empty line starts a new chat, Ctrl-D ends.")
    turns = []
    while True:
        try:
            line = input("> ").strip()
            turns = [*turns, line] if line else []
            if len(turns) > 1 and len(tok.chat(*turns)) + knobs["max_new"] > model.cfg.max_len:
                print(f"(the chat has outgrown the context of {model.cfg.max_len} tokens: a new one begins with this)")
                turns = [line]
            if line:
                turns.append(say(model, tok, turns, (seed, len(turns)), **knobs))
        except BadInput as e:
            print(f"({e}: a new chat begins)")
            turns = []
        except (EOFError, KeyboardInterrupt):
            print()
            return


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a checkpoint, answer one prompt, or answer a file of them.")
    parser.add_argument("checkpoint", help="folder with config.json, model*.safetensors, tokenizer.model")
    parser.add_argument("prompt", nargs="?", help="answer this and exit; without it, chat")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="answer the prompts of a .json or .jsonl file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where: .json for AlpacaEval; .jsonl for rows, or, to "
                        "questions with turns, FastChat's MT-Bench answers")  # fmt: skip
    parser.add_argument("--name", help="what to call the model in the file; the name of its folder")
    parser.add_argument("--batch", type=int, default=64, help="prompts answered side by side")
    parser.add_argument("--temperature", type=float, help="0 is greedy; 0.7, for MT-Bench that of each category")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--max-new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.prompts is None) != (args.out is None) or args.prompts and args.prompt is not None:
        parser.error("--prompts FILE and --out FILE belong together, and leave no place for a prompt")
    if args.out and args.out.suffix not in (".json", ".jsonl"):
        parser.error(f"--out {args.out}: name it .json (AlpacaEval) or .jsonl (rows, MT-Bench)")
    if args.out and not os.access(args.out.parent, os.W_OK):
        parser.error(f"--out {args.out}: its folder is not there or may not be written; make it first")
    if args.batch < 1:
        parser.error("--batch is at least 1")
    return args


def main():
    args = parse_args()
    questions = read_questions(args.prompts) if args.prompts else []
    if args.out and args.out.suffix == ".json" and any(len(q["turns"]) > 1 for q in questions):
        raise BadInput(f"{args.prompts}: has questions of several turns, AlpacaEval has no place for them; "
                       "name --out .jsonl")  # fmt: skip
    model, tok = load_here(args.checkpoint)
    knobs = {"top_p": args.top_p, "max_new": args.max_new}
    if args.prompts:
        answered, name = [], args.name or Path(args.checkpoint).resolve().name
        knobs |= {"key": (args.seed,), "temperature": args.temperature, "batch": args.batch}
        with suppress(KeyboardInterrupt):
            for group in answer(model, tok, questions, **knobs):
                answered += group
                write_text(args.out, as_file(answered, name, args.prompts.stem, args.out.suffix))
        if len(answered) < len(questions):
            sys.exit(f"interrupted: {args.out} has the first {len(answered)} of {len(questions)} answers")
        return
    knobs["temperature"] = 0.7 if args.temperature is None else args.temperature
    if args.prompt is not None:
        say(model, tok, [args.prompt], (args.seed, 0), **knobs)
    else:
        chat(model, tok, args.seed, **knobs)


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        sys.exit(f"error: {e.filename or 'output'}: {e.strerror}")
