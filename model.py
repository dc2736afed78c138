"""model.py: token ids -> logits. Llama 2 by hand, its tokenizer and chat format, and its files.

A checkpoint means weights + vocabulary + chat format, so all three live here. Modules carry the names of the
Hugging Face layout, so the state dict *is* the file format: transformers reads what we write. We read that layout and
Meta's own files.
Layers know nothing of processes: head counts are inferred, and the plan for many GPUs is applied from outside,
below the last rule of this file.

Left out: training tricks (train.py), sampling (sample.py), RoPE scaling, biases, other architectures.

Shapes: B batch, T time, S cached time, D width, H heads, K key/value heads, hd head size, V vocabulary.
"""

import json
import os
import pickle
import re
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape of prompts, half a second each


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


# ---- the network -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama (paper: Llama 2 70B; Touvron et al. 2023, section 2.2)."""

    vocab_size: int = 32000
    dim: int = 4096  # D
    layers: int = 32
    heads: int = 32  # H
    kv_heads: int = 32  # K; fewer than heads is grouped-query attention
    ffn: int = 11008  # hidden width of the SwiGLU
    max_len: int = 4096  # the context: the longest sequence it was trained on
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False  # one matrix for the embedding and the head

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


CONFIGS = {
    "toy": ModelConfig(vocab_size=1024, dim=160, layers=4, heads=4, kv_heads=2, ffn=432, max_len=512),
    "7b": ModelConfig(),
    "13b": ModelConfig(dim=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "70b": ModelConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn=28672),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside, rounded once
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles, (B, T) positions -> cos and sin as `rotate` wants them, each (B, 1, T, hd) in fp32.

    Computed from the positions at every forward pass: there is no buffer that a precision policy could round.
    """
    freqs = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (hd/2,)
    angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, hd/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + hd/2) of x (B, n, T, hd) by their angles: the half layout of Hugging Face files."""
    h = x.float()
    return torch.addcmul(h * cos, h.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def attend(q, k, v, bias, share: bool = False):
    """Softmax attention by plain products: q (N, T, hd), k and v (N, S, hd) -> (N, T, hd).

    N counts rows times K; the query heads of a group are queries of one product. bias (N, 1, S): 0 where the queries
    may look and -inf elsewhere. For the few queries of a step of sampling this is faster than the fused kernel.
    share: also the logarithm of the sum of exp(scores), (N, T, 1) in fp32. By it the same queries' attention to
    several sets of keys can be put together.
    """
    scores = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)  # (N, T, S)
    weights = scores.softmax(dim=-1)
    if not share:
        return weights @ v
    return weights @ v, scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).float().log()


def bias_of(unseen: torch.Tensor, K: int, dtype) -> torch.Tensor:
    """(B, S), True where a row's token may not look -> what `attend` adds to its scores, (B * K, 1, S)."""
    bias = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, float("-inf"))
    return bias.repeat_interleave(K, 0)[:, None]


class Rows:
    """Rows of text that lie end to end in one sequence (1, T), none of them padded.

    layout: (length, row that lends its beginning as a prefix, length of the prefix) of each row. A row sees its
    prefix, such as a prompt that it shares, and then itself, causally.
    """

    def __init__(self, layout: list[tuple[int, int, int]], device):
        self.layout, self.lengths = layout, [n for n, *_ in layout]
        self.positions = torch.cat([torch.arange(p, p + n) for n, _, p in layout])[None].to(device)  # (1, T)
        self.fused: tuple | None = None
        self.masks: list[torch.Tensor | None] | None = None

    def attend(self, layer, q, k, v):
        """Attention of every row: q (1, H, T, hd), k and v (1, K, T, hd) -> (1, H, T, hd)."""
        flash = q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0  # SDPA pads heads, varlen_attn does not
        if flash and torch.cuda.get_device_capability(q.device)[0] >= 8:
            return self.attend_fused(layer, q, k, v)
        if self.masks is None:  # what a row sees that has a prefix; the others need none, which is faster
            self.masks = [torch.ones(n, p + n, dtype=torch.bool, device=q.device).tril(p) if p else None
                          for n, _, p in self.layout]  # fmt: skip
        q, k, v = (t.split(self.lengths, dim=2) for t in (q, k, v))  # views of the rows
        out = []
        for row, ((_, of, p), mask) in enumerate(zip(self.layout, self.masks, strict=True)):
            ks, vs = (torch.cat((t[of][:, :, :p], t[row]), dim=2) if p else t[row] for t in (k, v))  # (1, K, p + n, hd)
            found = F.scaled_dot_product_attention(q[row], ks, vs, mask, is_causal=mask is None, enable_gqa=True)
            out.append(found.transpose(1, 2))
        return torch.cat(out, dim=1).transpose(1, 2)

    def attend_fused(self, layer, q, k, v):
        """The same by flash attention, for half precision on a GPU."""
        from torch.nn.attention.varlen import varlen_attn  # here, since it brings torch's compiler along: a second

        if self.fused is None:  # which keys the rows see, and where rows end among queries and keys
            at, sizes = [0, *accumulate(self.lengths)], (self.lengths, [n + p for n, _, p in self.layout])
            spans = [span for row, (n, of, p) in enumerate(self.layout) for span in ((at[of], p), (at[row], n))]
            keys = torch.cat([torch.arange(start, start + n) for start, n in spans]).to(q.device)  # (S,)
            keys = keys if len(keys) > q.shape[2] else None  # no row has a prefix: all keys as they are
            ends = [torch.tensor([0, *accumulate(s)], dtype=torch.int32, device=q.device) for s in sizes]
            self.fused = keys, *ends, *map(max, sizes)
        keys, *where = self.fused
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H or K, hd)
        k, v = (t if keys is None else t.index_select(0, keys) for t in (k, v))  # (S, K, hd)
        if (group := q.shape[1] // k.shape[1]) > 1:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))  # (S, H, hd)
        causal = (-1, 0)  # no limit to the left, none to the right of a query; a row's last one sees all of its keys
        return varlen_attn(q, k, v, *where, window_size=causal).transpose(0, 1)[None]


class Kin(NamedTuple):
    """A cache whose rows are continued by those of another, of which there are B."""

    cache: "KVCache"
    rows: torch.Tensor  # (B,), the row of it that each goes on from
    grid: torch.Tensor  # (R, g), those that go on from each of its first R rows; places that are left over hold 0
    nth: torch.Tensor  # (B,), the place of each in its row of the grid

    def held(self, t):
        """Its keys or values, (R * K, S, hd)."""
        return t[: len(self.grid), :, : self.cache.end].flatten(0, 1)

    def deal(self, x):
        """What each of our rows has, by the row that it goes on from: (B, K, G, n) -> (R * K, g * G, n)."""
        K, (R, g) = x.shape[1], self.grid.shape
        x = x[None] if R == 1 else x[self.grid]  # (R, g, K, G, n)
        return x.transpose(1, 2).reshape(R * K, g * x.shape[3], -1)

    def collect(self, x, K: int):
        """The way back: (R * K, g * G, n) -> (B, K, G, n)."""
        (R, g), n = self.grid.shape, x.shape[2]
        x = x.view(R, K, g, -1, n)
        return x[0].transpose(0, 1) if R == 1 else x[self.rows, :, self.nth]


class KVCache:
    """Keys and values of some rows, all layers. Row b lies in the columns from start[b] to `end`: all end together.

    So a step writes one column and not one place a row. Before its start a row holds rubbish: finite, weighed with 0.
    With a parent, row b goes on from row of[b] of that cache, which may have a parent itself. What many rows have in
    common (a prompt that several samples answer, a template that all prompts begin with) is held and read once.
    """

    def __init__(self, layers: int, rows: int, columns: int, device=None, parent: "KVCache | None" = None):
        self.columns, self.parent, self.end = columns, parent, 0
        self.start, self.of = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.k: list[torch.Tensor | None] = [None] * layers  # (B, K, columns, hd)
        self.v: list[torch.Tensor | None] = [None] * layers
        self.kin: list[Kin] | None = None  # parent, its parent and so on; None where they must be looked for

    def adopt(self, rows: torch.Tensor, of: torch.Tensor):
        """Our `rows` become empty and go on from the rows `of` of the parent. Kin are looked for anew: call it after
        the parent has changed."""
        self.start[rows], self.of[rows], self.kin = self.end, of, None

    def find_kin(self):
        self.kin, rows, cache = [], self.of, self.parent
        self.before = 0  # or (B, 1): tokens that a row goes on from
        while cache:
            nth = (rows == rows[:, None]).tril(-1).sum(1)  # (B,), how many before it go on from the same row
            grid = rows.new_zeros(int(rows.max()) + 1, int(nth.max()) + 1)
            grid[rows, nth] = torch.arange(len(rows), device=rows.device)
            self.kin.append(Kin(cache, rows, grid, nth))
            self.before = self.before + (cache.end - cache.start[rows])[:, None]
            rows, cache = cache.of[rows], cache.parent

    def look(self, T: int) -> torch.Tensor:
        """The positions (B, T) of the next T tokens of all rows, which `attend` is now about to be given."""
        if self.kin is None:
            self.find_kin()
        columns = torch.arange(self.end + T, device=self.start.device)
        own = columns[self.end :]
        first = torch.minimum(self.start[:, None], own)  # padding sees itself: to see nothing is to be NaN
        self.unseen, self.masks = (columns < first[..., None]) | (columns > own[:, None]), None  # (B, T, S)
        return own - self.start[:, None] + self.before

    def attend(self, layer: int, q, k, v):
        """Attention of new tokens, whose k and v are kept: q (B, H, T, hd), k and v (B, K, T, hd) -> (B, H, T, hd)."""
        if q.shape[2] > 1:
            return self.attend_fused(layer, q, k, v)
        (B, H, _, hd), K = q.shape, k.shape[1]
        k, v = self.put(layer, k, v)  # (B, K, S, hd)
        if self.masks is None:  # the same in all layers
            self.masks = [bias_of(self.unseen[:, 0], K, q.dtype)]
            self.masks += [bias_of(kin.cache.padding()[: len(kin.grid)], K, q.dtype) for kin in self.kin]
        q = q.view(B, K, H // K, hd)  # the query heads of a group are queries of one product
        own = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.masks[0]
        if not self.kin:
            return attend(*own).view(B, H, 1, hd)
        parts = [[t.view(B, K, H // K, -1) for t in attend(*own, share=True)]]
        for kin, bias in zip(self.kin, self.masks[1:], strict=True):
            found = attend(kin.deal(q), kin.held(kin.cache.k[layer]), kin.held(kin.cache.v[layer]), bias, share=True)
            parts.append([kin.collect(t, K) for t in found])
        found, shares = map(torch.stack, zip(*parts, strict=True))  # (parts, B, K, H / K, hd or 1)
        return (found * shares.softmax(0)).sum(0).type_as(q).view(B, H, 1, hd)

    def attend_fused(self, layer: int, q, k, v):
        """The same by PyTorch's fused kernel, which never holds the (T, S) weights but wants all keys in one piece."""
        k, v = self.put(layer, k, v)
        for kin in self.kin:
            theirs = (t[layer][:, :, : kin.cache.end] for t in (kin.cache.k, kin.cache.v))
            theirs = (t.expand(len(q), -1, -1, -1) if len(t) == 1 else t.index_select(0, kin.rows) for t in theirs)
            k, v = (torch.cat(both, 2) for both in zip(theirs, (k, v), strict=True))
        if self.masks is None:
            seen = [~kin.cache.padding()[kin.rows][:, None].expand(-1, q.shape[2], -1) for kin in self.kin[::-1]]
            self.masks = torch.cat((*seen, ~self.unseen), dim=-1)[:, None]  # (B, 1, T, S)
        return F.scaled_dot_product_attention(q, k, v, self.masks, enable_gqa=q.shape[1] != k.shape[1])

    def padding(self) -> torch.Tensor:
        """(B, S), True before the start of a row."""
        return torch.arange(self.end, device=self.start.device) < self.start[:, None]

    def put(self, layer: int, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, K, T, hd) in the next columns; all so far, (B, K, S, hd)."""
        S = self.end + k.shape[2]
        for ours, new in ((self.k, k), (self.v, v)):
            if ours[layer] is None:
                ours[layer] = new.new_empty(*new.shape[:2], self.columns, new.shape[3])
            ours[layer][:, :, self.end : S] = new
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def resize(self, rows, width: int, columns: int):
        """Keep `rows` (an index or a slice) and the last `width` columns, and have room for `columns`."""
        kept = slice(self.end - width, self.end)
        for ours in (self.k, self.v):
            for i, t in enumerate(ours):
                if t is not None:  # else nothing has been put there
                    ours[i] = t.new_empty(len(self.start[rows]), t.shape[1], columns, t.shape[3])
                    ours[i][:, :, :width] = t[:, :, kept][rows]
        self.start, self.of, self.kin = (self.start[rows] - kept.start).clamp(min=0), self.of[rows], None
        self.columns, self.end = columns, width

    def replace(self, rows: torch.Tensor, index: torch.Tensor, other: "KVCache"):
        """Our `rows` become copies of another cache's rows `index`, none longer than the longest of ours."""
        width = min(self.end, other.end)
        places, theirs = slice(self.end - width, self.end), slice(other.end - width, other.end)
        for ours, source in ((self.k, other.k), (self.v, other.v)):
            for i, t in enumerate(source):
                if ours[i] is None:
                    ours[i] = t.new_zeros(len(self.start), t.shape[1], self.columns, t.shape[3])
                ours[i][rows, :, places] = t[index][:, :, theirs]
        self.start[rows] = other.start[index] + self.end - other.end
        self.of[rows], self.kin = other.of[index], None


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=False)

    def project(self, x):
        """x (B, T, D) -> queries (B, T, H * hd), keys and values (B, T, K * hd)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, rope, context, layer: int):
        """x (B, T, D) -> (B, T, D). context, Rows or a KVCache, is what the tokens see."""
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.project(x))  # (B, H or K, T, hd)
        out = context.attend(layer, rotate(q, *rope), rotate(k, *rope), v)  # (B, H, T, hd)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.dim, bias=False)

    def widen(self, x):
        """x (B, T, D) -> gate and up, each (B, T, ffn)."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.widen(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, context, layer: int):
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope, context, layer), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Llama(nn.Module):
    """Llama 2. Released Llama code has no dropout, the paper trains with 0.1: it sits on both residual branches."""

    def __init__(self, cfg: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, dropout) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if cfg.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, cache: KVCache | None = None, readout=None, layout=None):
        """tokens (B, T) -> fp32 logits (B, T, V).

        With a cache the tokens continue its rows. With a layout (see Rows) the tokens (1, T) are many rows end to end;
        without either, B texts of equal length.
        `readout(hidden, head)` replaces the logits by what the caller needs of them; it runs inside forward, where
        FSDP has the head at hand.
        """
        shape = tokens.shape
        if cache is not None:
            context, positions = cache, cache.look(shape[1])  # (B, T)
        else:
            tokens = tokens.reshape(1, -1)
            context = Rows(layout or [(shape[1], b, 0) for b in range(shape[0])], tokens.device)
            positions = context.positions  # (1, B * T)
        rope = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)
        x = self.embed_tokens(tokens)  # (B, T, D), or (1, B * T, D)
        for i, block in enumerate(self.layers):
            x = block(x, rope, context, i)
        if cache is not None:
            cache.end += shape[1]
        x = self.norm(x).view(*shape, -1)
        return self.lm_head(x).float() if readout is None else readout(x, self.lm_head)

    def new_cache(self, rows: int, columns: int, parent: KVCache | None = None) -> KVCache:
        return KVCache(self.cfg.layers, rows, columns, self.embed_tokens.weight.device, parent)


# ---- text <-> ids, and the one chat format -----------------------------------------------------------------


class Tokenizer:
    """A SentencePiece vocabulary and Llama 2's chat format: `[INST] prompt [/INST] response</s>`, one BOS.

    Text never becomes a control token: "</s>" in a prompt is five characters, not the end of a sequence.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput(f"{self.path}: not found; give the folder of a whole checkpoint, such as runs/zoo/M3")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as e:
            raise BadInput(f"{self.path}: {looks(self.path)}, not a SentencePiece model; copy it again") from e
        self.bos, self.eos, self.size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()
        if [self.sp.piece_to_id(c) for c in CONTROL] != [self.sp.unk_id(), self.bos, self.eos]:
            raise BadInput(
                f"{self.path}: lacks {some(CONTROL)}, Llama 2's control tokens; take another tokenizer.model"
            )
        pieces = map(self.sp.id_to_piece, range(self.size))
        self.newlines = [i for i, piece in enumerate(pieces) if "\n" in piece or piece == "<0x0A>"]  # they end a line

    def encode(self, text: str) -> list[int]:
        try:
            return self.sp.encode(text)
        except RuntimeError:
            raise BadInput(f"{text[:60]!a}: holds half of a surrogate pair, no whole character; mend it") from None

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def raw(self, text: str) -> list[int]:
        """Ids of plain text to be continued: BOS and the text, no chat format."""
        return [self.bos, *self.encode(text)]

    def chat(self, *turns: str) -> list[int]:
        """Ids up to the point where the assistant speaks; turns are user, assistant, ..., user.

        chat("Hi") = BOS + "[INST] Hi [/INST]". SFT, sampling, judging and DPO all build their ids here.
        """
        assert len(turns) % 2 == 1, "a chat that awaits an answer has an odd number of turns"
        ids = []
        for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True):
            ids += self.chat(user) + self.response(assistant)
        return ids + self.raw(f"[INST] {turns[-1].strip()} [/INST]")

    def response(self, text: str) -> list[int]:
        """Ids of a finished answer. Its first token brings the space after [/INST] along."""
        return [*self.encode(text.strip()), self.eos]


# ---- files: Hugging Face's and Meta's folders in, Hugging Face's out ---------------------------------------

HF_KEYS = {"vocab_size": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers",
           "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "ffn": "intermediate_size",
           "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
           "tied": "tie_word_embeddings"}  # fields of ModelConfig -> keys of config.json  # fmt: skip
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what config.json may not say otherwise
IGNORED = ("rotary_emb.inv_freq", "rope.freqs")  # tables that older files store and we compute
META = {"tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}  # Meta's modules -> ours  # fmt: skip
CUT_BY_COLUMNS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")  # by Meta's files; all others by rows
SHARD_BYTES = 4 << 30
SHARD_INDEX = "model.safetensors.index.json"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them


def read_json(path: Path, kind: type = dict) -> dict | list:
    try:
        d = json.loads(read_text(path, f"is {path.parent} a finished checkpoint or run folder?"))
    except ValueError as e:
        raise BadInput(f"{path}: not valid JSON ({e}); copy or write it again") from None
    if not isinstance(d, kind):
        raise BadInput(f"{path}: not a JSON {'object' if kind is dict else 'list'}; copy or write it again")
    return d


def read_config(folder: Path) -> ModelConfig:
    """config.json of transformers 4 or 5 -> ModelConfig."""
    path = folder / "config.json"
    d = read_json(path)
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if d.get("model_type") != "llama":
        raise BadInput(f"{path}: model_type is {d.get('model_type')!r}; only 'llama' checkpoints can be loaded")
    d["rope type"] = rope.get("rope_type", rope.get("type", "default"))
    for key, want in (FIXED | {"rope type": "default"}).items():
        if d.get(key, want) != want:
            raise BadInput(f"{path}: {key} {d[key]!r} is not Llama 2's {want!r}; this model cannot be loaded")
    d.setdefault("tie_word_embeddings", False)
    d["num_key_value_heads"] = d.get("num_key_value_heads") or d.get("num_attention_heads")
    d["rope_theta"] = float(rope.get("rope_theta", d.get("rope_theta", 10000.0)))
    try:
        cfg = ModelConfig(**{field: d[key] for field, key in HF_KEYS.items()})
    except KeyError as e:
        raise BadInput(f"{path}: {e} is missing; copy the checkpoint's config.json again") from None
    return checked(cfg, path, d.get("head_dim"))


def read_params(folder: Path, vocab_size: int) -> ModelConfig:
    """Meta's params.json -> ModelConfig. It says nothing of the context, and of the vocabulary mostly -1."""
    path = folder / "params.json"
    d = read_json(path)
    if d.get("use_scaled_rope"):
        raise BadInput(f"{path}: use_scaled_rope is not Llama 2's; this model cannot be loaded")
    try:
        ffn = int((d.get("ffn_dim_multiplier") or 1) * int(8 * d["dim"] / 3))
        cfg = ModelConfig(
            vocab_size=vocab_size if d["vocab_size"] == -1 else d["vocab_size"],
            dim=d["dim"],
            layers=d["n_layers"],
            heads=d["n_heads"],
            kv_heads=d.get("n_kv_heads") or d["n_heads"],
            ffn=-(-ffn // d["multiple_of"]) * d["multiple_of"],
            norm_eps=d["norm_eps"],
            rope_theta=float(d.get("rope_theta", 10000.0)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise BadInput(f"{path}: a size is missing or no number ({e}); copy the checkpoint's params.json again") from e
    return checked(cfg, path)


def checked(cfg: ModelConfig, path: Path, head_dim: int | None = None) -> ModelConfig:
    if not all(isinstance(v, int | float) and v > 0 for k, v in vars(cfg).items() if k != "tied"):
        raise BadInput(f"{path}: a size that is not a positive number; copy the checkpoint's {path.name} again")
    if (head_dim or cfg.head_dim) * cfg.heads != cfg.dim or cfg.heads % cfg.kv_heads:
        raise BadInput(f"{path}: hidden_size, heads and head_dim do not fit together as in Llama 2")
    return cfg


def write_config(cfg: ModelConfig, tok: Tokenizer, dtype: torch.dtype, path: Path):
    d = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(cfg, field) for field, key in HF_KEYS.items()},
        **FIXED,
        "bos_token_id": tok.bos,
        "eos_token_id": tok.eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(path, d)


def read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: not found; {remedy}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def write_text(path: Path, text: str):
    """Whole or not at all: what stands at `path` is never half-written, not even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        settle(f)
    os.replace(temporary, path)


def settle(f):
    """What has been written to an open file is on disk when this returns."""
    f.flush()
    os.fsync(f.fileno())


def write_json(path: Path, d: dict | list, indent: int | None = 2):
    write_text(path, json.dumps(d, indent=indent, ensure_ascii=False) + "\n")


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else "model." + name


def looks(file: Path) -> str:
    """What a file that cannot be read seems to be."""
    with file.open("rb") as f:
        head = f.read(64).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "damaged or cut short" if head else "empty"


def open_weights(file: Path) -> dict[str, tuple]:
    """Name -> (shape, tensor) of a .pth or .safetensors file; nothing is read but what is sliced of a tensor."""
    if not file.is_file():
        raise BadInput(f"{file}: not found; the checkpoint is incomplete, copy it again")
    try:
        if file.suffix == ".pth":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found = {name: (tuple(t.shape), t) for name, t in tensors.items()}
        else:
            f = safe_open(file, "pt", backend="pread")  # the pages of a mapped file would count as our memory
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            found = {name: (tuple(t.get_shape()), t) for name, t in slices.items()}
    except (SafetensorError, RuntimeError, OSError, AttributeError, EOFError, pickle.UnpicklingError):
        raise BadInput(f"{file}: {looks(file)}, not a whole {file.suffix} file of weights; download it again") from None
    return {name: t for name, t in found.items() if not name.endswith(IGNORED)}


def find_weights(folder: Path, meta: bool, want: dict[str, torch.Size]) -> dict[str, list[tuple]]:
    """Name -> (file, key) of every piece of the tensor, in order. All must be there and fit, or BadInput says which
    does not; nothing is read but names and shapes."""
    if meta:
        files = [folder / f"consolidated.{i:02}.pth" for i in range(len([*folder.glob("consolidated.*.pth")]) or 1)]
    elif (index := folder / SHARD_INDEX).exists():
        files = sorted({folder / f for f in read_json(index).get("weight_map", {}).values()})
        if not files:
            raise BadInput(f"{index}: names no weight files; copy it again")
    else:
        files = [folder / "model.safetensors"]
    where, shapes = {}, {}
    for file in files:
        for key, (shape, _) in open_weights(file).items():
            name = re.sub(r"^(layers\.\d+\.)?(.+)(?=\.weight$)", lambda m: (m[1] or "") + META.get(m[2], m[2]), key)
            name = hf_name(name) if meta else key
            if len(shape) > 1 or name not in where:  # each of Meta's files holds the norms in full
                where.setdefault(name, []).append((file, key))
                shapes.setdefault(name, []).append(shape)
    if want.keys() - where.keys():
        raise BadInput(f"{folder}: no weights named {some(want.keys() - where.keys())}; is this a whole Llama?")
    if extra := where.keys() - want.keys() - {"lm_head.weight"}:
        raise BadInput(f"{folder}: holds weights that a Llama has no place for: {some(extra)}")
    for name, full in want.items():
        cut = int(name.endswith(CUT_BY_COLUMNS))
        part = tuple(n // len(where[name]) if i == cut else n for i, n in enumerate(full))
        for (file, key), shape in zip(where[name], shapes[name], strict=True):
            total = full[cut] // shape[cut] if meta and len(shape) == len(full) and shape[cut] else 0
            if shape != part and total > len(files):
                absent = folder / f"consolidated.{len(files):02}.pth"
                raise BadInput(f"{absent}: not found; the weights lie in {total} files, copy it again")
            if shape != part or part[cut] * len(where[name]) != full[cut]:
                raise BadInput(f"{file}: {key} has shape {shape}, by the checkpoint's sizes it should be {part}; "
                               "files do not match")  # fmt: skip
    return where


def copy_piece(p: nn.Parameter, shape: tuple, piece, number: int, by_columns: bool):
    """Copy piece `number` of a tensor that is cut into equal pieces to where it lies in p.

    Of a sharded p each process holds a rectangle; of the piece it reads what lies in that, and nothing else.
    """
    mine, start = p, [0] * p.dim()
    if isinstance(p, DTensor):
        mine, start = p.to_local(), p.__create_chunk_list__()[0].offsets
    there = [number * n if i == by_columns else 0 for i, n in enumerate(shape)]
    lo = [max(a, b) for a, b in zip(start, there, strict=True)]
    hi = [min(a + n, b + m) for a, n, b, m in zip(start, mine.shape, there, shape, strict=True)]
    if all(a < b for a, b in zip(lo, hi, strict=True)):
        to, of = (tuple(slice(a - o, b - o) for a, b, o in zip(lo, hi, at, strict=True)) for at in (start, there))
        mine[to].copy_(piece[of])


def halves(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of Meta's wq or wk, whose rotary pairs are neighbours (2i, 2i + 1), in our order (i, i + hd/2)."""
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_shape(folder: str | os.PathLike) -> tuple[ModelConfig, Tokenizer, bool]:
    """The sizes and the tokenizer of a checkpoint folder, and whether it is one of Meta's; no weight is touched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the folder of a checkpoint (config.json, *.safetensors)")
    meta = not (folder / "config.json").exists() and bool([*folder.glob("params.json"), *folder.glob("consolidated*")])
    places = [folder / "tokenizer.model", folder / ".." / "tokenizer.model"]  # Meta's lies beside the folders
    tok = Tokenizer(next((path for path in places if path.is_file()), places[0]))
    cfg = read_params(folder, tok.size) if meta else read_config(folder)
    if tok.size != cfg.vocab_size:
        raise BadInput(
            f"{tok.path}: has {tok.size} pieces but the checkpoint says vocab_size {cfg.vocab_size}; "
            "take the tokenizer.model that belongs to this checkpoint"
        )
    return cfg, tok, meta


@torch.no_grad()
def load(
    folder: str | os.PathLike, dtype=torch.float32, device="cpu", dropout=0.0, shard=None
) -> tuple[Llama, Tokenizer]:
    """Read a checkpoint folder, Hugging Face's or Meta's, into weights of `dtype`.

    shard(model) is called while the model has no memory yet; then every process reads its own part of each tensor.
    A process holds no more than its part of the model and the tensor at hand (of Meta's files: the block at hand).
    """
    cfg, tok, meta = read_shape(folder)
    folder = Path(folder)
    with torch.device("meta"):
        model = Llama(cfg, dropout).to(dtype)
    where = find_weights(folder, meta, {hf_name(name): p.shape for name, p in model.named_parameters()})
    if shard:
        shard(model)
    model.to_empty(device=device)
    if cfg.tied:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty has parted them
    params = {hf_name(name): p for name, p in model.named_parameters()}
    pieces = [(name.split(".")[:3], file, i, key, name) for name in params for i, (file, key) in enumerate(where[name])]
    for (_, file), group in groupby(sorted(pieces), key=lambda piece: piece[:2]):
        tensors = open_weights(file)
        for *_, number, key, name in group:
            shape, piece = tensors[key]
            if meta and name.endswith(("q_proj.weight", "k_proj.weight")):
                piece = halves(piece, cfg.head_dim)
            copy_piece(params[name], shape, piece, number, name.endswith(CUT_BY_COLUMNS))
        del tensors, piece  # opened anew for each block: what is mapped of a file is let go here
    return model, tok


def save(model: Llama, tok: Tokenizer, folder: str | os.PathLike, dtype=torch.float32, write: bool = True):
    """Write a checkpoint folder in Hugging Face layout; config.json comes last and marks it as complete.

    Under FSDP every rank calls this (each tensor is gathered in turn) and one has write=True.
    """
    folder = Path(folder)
    shards, filled = [{}], 0
    for name, p in model.named_parameters():
        size = p.numel() * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][hf_name(name)] = p
        filled += size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [folder / "config.json", folder / SHARD_INDEX, *folder.glob("model*.safetensors")]:
            old.unlink(missing_ok=True)
        if tok.path.resolve() != (folder / "tokenizer.model").resolve():
            (folder / "tokenizer.model").write_bytes(tok.path.read_bytes())
        write_json(folder / "tokenizer.json", tokenizer_json(tok), indent=None)
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": model.cfg.max_len})
        write_json(folder / "generation_config.json", {"bos_token_id": tok.bos, "eos_token_id": tok.eos})
    for file, shard in zip(names, shards, strict=True):
        write_weights(folder / file, shard, dtype, write)
    if write:
        if len(shards) > 1:
            total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
            where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            write_json(folder / SHARD_INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        write_config(model.cfg, tok, dtype, folder / "config.json")


@torch.no_grad()
def write_weights(path: Path, params: dict[str, nn.Parameter], dtype: torch.dtype, write: bool):
    """A safetensors file: the header's length, the header, the bytes. One tensor at a time is gathered or converted."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, p in params.items():
        start, end = end, end + p.numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(p.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary if write else os.devnull, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for p in params.values():
            full = p.to(dtype).full_tensor() if isinstance(p, DTensor) else p
            if write:
                f.write(full.to("cpu", dtype).contiguous().view(torch.uint8).numpy())
        if write:
            settle(f)
    if write:
        os.replace(temporary, path)


# The chat format for those who read our folders: transformers' AutoTokenizer, vLLM. Where user text holds the name of
# a control token, the template puts a sign between its first two letters that the tokenizer takes out again, so that
# it stays text as in Tokenizer.chat.
CONTROL, SIGN = ("<unk>", "<s>", "</s>"), "\ufdd0"
CHAT_TEMPLATE = """{%- set ns = namespace(system='', user=true) -%}
{%- for message in messages -%}
{%- set text = message['content']REPLACE -%}
{%- if loop.first and message['role'] == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + text + '\\n<</SYS>>\\n\\n' if text else '' -%}
{%- elif message['role'] != ('user' if ns.user else 'assistant') -%}
{{- raise_exception('a chat is user, assistant, user and so on') -}}
{%- else -%}
{%- set text = (ns.system + text) | trim -%}
{{- '<s>[INST] ' + text + ' [/INST]' if ns.user else (' ' + text if text else '') + '</s>' -}}
{%- set ns.system, ns.user = '', not ns.user -%}
{%- endif -%}
{%- endfor -%}""".replace("REPLACE", "".join(f" | replace('{c}', '<{SIGN}{c[1:]}')" for c in CONTROL))
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                    "chat_template": CHAT_TEMPLATE}  # fmt: skip


def tokenizer_json(tok: Tokenizer) -> dict:
    """The vocabulary as Hugging Face's tokenizers wants it: all merges of two pieces, best piece first."""
    sp, pieces = tok.sp, [tok.sp.id_to_piece(i) for i in range(tok.size)]
    plain = [i for i in range(tok.size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    known, merges = {pieces[i] for i in plain}, []
    for piece in (pieces[i] for i in sorted(plain, key=sp.get_score, reverse=True)):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [f"{a} {b}" for a, b in cuts if a in known and b in known]
    changes = [({"Regex": f"(?<=<){SIGN}(?={'|'.join(c[1:] for c in CONTROL)})"}, ""), ({"String": " "}, "▁")]
    if tok.encode("a  b ") == tok.encode("a b"):  # a vocabulary that was trained to drop spaces
        changes.append(({"Regex": r"\A▁+|▁+\z|▁+(?=▁)"}, ""))
    steps = [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in changes]
    steps.append({"type": "Prepend", "prepend": "▁"})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [{"id": pieces.index(c), "content": c} | flags for c in CONTROL],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [tok.bos], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip


# ---- many processes: applied from outside, in place --------------------------------------------------------

# Tensor parallelism (Megatron-LM, Shoeybi et al. 2019). What enters and leaves attention and MLP is whole and equal on
# all ranks of a tp group, to the last bit; between `columns` and `rows` each has heads and hidden units of its own.
# The forwards below run on plain tensors: DTensor's own take several times as long to start, which decoding would feel.


class SumForward(torch.autograd.Function):
    """Partial results of a tp group -> their sum. All ranks use it alike, so each has the whole gradient of it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class SumBackward(torch.autograd.Function):
    """One value on all ranks of a tp group -> the same. Each feeds it to other columns: gradients are summed."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def whole(norm: RMSNorm, mesh, x):
    """On every rank in full; as a part of the mesh, or its gradient could not be clipped with the others."""
    weight = norm.weight.to_local()
    return SumBackward.apply(F.rms_norm(x, weight.shape, weight, norm.eps), mesh.get_group())


def columns(linear: nn.Linear, mesh, x):
    return F.linear(x, linear.weight.to_local())


def rows(linear: nn.Linear, mesh, x):
    return SumForward.apply(F.linear(x, linear.weight.to_local()), mesh.get_group())


def look_up(embedding: nn.Embedding, mesh, tokens):
    weight = embedding.weight.to_local()
    at = tokens - mesh.get_local_rank() * len(weight)
    here = (at >= 0) & (at < len(weight))  # (B, T)
    return SumForward.apply(F.embedding(at * here, weight) * here[..., None], mesh.get_group())


def read_out(head: nn.Linear, mesh, x):
    """All logits on every rank, the same copy of each: so all draw the same token."""
    return DTensor.from_local(columns(head, mesh, x), mesh, [Shard(-1)]).full_tensor()


# Name of a module -> what each rank of a tp group holds of its weight, and its forward with that.
TP_PLAN = {
    "embed_tokens": (Shard(0), look_up),  # of the vocabulary, as the head: they may be one matrix
    "*norm": (Replicate(), whole),
    "*.[qkv]_proj": (Shard(0), columns),
    "*.o_proj": (Shard(1), rows),
    "*.gate_proj": (Shard(0), columns),
    "*.up_proj": (Shard(0), columns),
    "*.down_proj": (Shard(1), rows),
    "lm_head": (Shard(0), read_out),
}


def check_tp(cfg: ModelConfig, tp: int, where):
    """BadInput where the model of the checkpoint `where` cannot be dealt evenly to the ranks of a tp group."""
    for what, count in (("heads", cfg.heads), ("key/value heads", cfg.kv_heads), ("hidden units (ffn)", cfg.ffn),
                        ("tokens of vocabulary", cfg.vocab_size)):  # fmt: skip
        if count % tp:
            raise BadInput(f"{where}: {count} {what} cannot be dealt to {tp} processes; give a --tp that divides them")


def parallelize(model: Llama, mesh, dtype: torch.dtype, recompute: bool = False, offload: bool = False):
    """Deal the model to the mesh (replicate, dp, tp), in place; master weights keep their type.

    tp splits every matrix, dp shards what is left block by block (FSDP2), replicate repeats all that. dtype is the
    type of compute; gradients are reduced in fp32. A block's parameters are gathered just before it runs, so no rank
    ever holds the whole model while training. recompute: activations inside a block are computed again in backward.
    offload: shards and the optimizer's state live in the CPU's memory.
    """
    if mesh["tp"].size() > 1:
        for pattern, (held, forward) in TP_PLAN.items():
            for module in (m for name, m in model.named_modules() if fnmatch(name, pattern)):
                module.weight = nn.Parameter(distribute_tensor(module.weight, mesh["tp"], [held]))
                module.forward = partial(forward, module, mesh["tp"])
        if model.cfg.tied:
            model.lm_head.weight = model.embed_tokens.weight
    # inputs are not cast, or every block would round the rotary angles it is handed
    knobs = {
        "mesh": mesh["replicate", "dp"] if mesh["replicate"].size() > 1 else mesh["dp"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for block in model.layers:
        if recompute:
            block.forward = partial(recomputed, block.forward)
        fully_shard(block, **knobs)
    # by default the root stays gathered after a forward pass, and an optimizer made then would update copies
    fully_shard(model, reshard_after_forward=True, **knobs)


def recomputed(forward, *args):
    """forward(*args), keeping no more than its inputs for backward."""
    return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)


@contextmanager
def gathered(model: nn.Module):
    """Every rank holds all parameters inside, with tp its part of each, so replicas may sample texts of any length.

    Without it each forward pass is a collective, and a rank that makes one more than the others waits for ever. So
    the ranks of a tp group must be given the same rows.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in sharded]
    for m in sharded:
        m.unshard()
        m._forward_pre_hooks, m._forward_hooks = {}, {}  # FSDP's: they gather and note each block in every step
    try:
        yield model
    finally:
        for m, (before, after) in zip(sharded, hooks, strict=True):
            m._forward_pre_hooks, m._forward_hooks = before, after
            m.reshard()
