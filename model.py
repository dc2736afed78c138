"""model.py: token ids -> logits. Llama 2 by hand, its tokenizer and chat format, and its files.

A checkpoint means weights + vocabulary + chat format, so all three live here. Modules carry the
names of the Hugging Face layout, so the state dict *is* the file format: transformers reads what
we write, and we read what it writes.
Layers know nothing of processes: head counts are inferred, and the plan for many GPUs is applied
from outside, in the last section of this file.

Left out: the KV cache and sampling (sample.py), packed training batches (dpo.py), Meta's file
format (scripts/convert_meta.py), RoPE scaling, biases, other architectures.

Shapes: B batch, T time, S keys, D width, H heads, K key/value heads, hd head size, V vocabulary.
"""

import json
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

# cuDNN's attention makes a plan for every new shape of prompts, half a second each.
torch.backends.cuda.enable_cudnn_sdp(False)


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


# ---- the network -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama; the defaults are Llama 2 7B's (Touvron et al. 2023, section 2.2)."""

    vocab_size: int = 32000  # V
    dim: int = 4096  # D
    layers: int = 32
    heads: int = 32  # H
    kv_heads: int = 32  # K; fewer than heads is grouped-query attention
    ffn: int = 11008  # hidden width of the SwiGLU
    max_len: int = 4096  # the context: the longest sequence it was trained on
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False  # one matrix for the embedding and the output head

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def rope_tables(positions, head_dim: int, theta: float):
    """Rotary angles: positions (B, T) -> cos and sin as `rotate` wants them, (B, 1, T, hd) fp32.

    Computed from the positions at every forward pass: there is no buffer that a precision
    policy could round.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    freqs = theta**-exponents  # (hd/2,)
    angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, hd/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + hd/2) of x (B, n, T, hd) by their angles: Hugging Face's layout."""
    wide = x.float()
    partner = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, partner, sin).type_as(x)


class CausalContext:
    """What tokens see in B texts of equal length: themselves and those before them."""

    def __init__(self, length: int, device):
        self.positions = torch.arange(length, device=device)[None]  # (1, T)

    def attend(self, layer: int, q, k, v):  # (B, H, T, hd), k and v with K heads -> (B, H, T, hd)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Self-attention; the context decides what each token sees."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=False)

    def forward(self, x, rope, context, layer: int):  # (B, T, D) -> (B, T, D)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        out = context.attend(layer, rotate(q, *rope), rotate(k, *rope), v)  # (B, H, T, hd)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, dropout: float):
        super().__init__()
        # x / sqrt(mean(x^2) + eps) * weight, over the width, in fp32 inside
        self.input_layernorm = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, context, layer: int):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, context, layer))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Llama 2. The released code has no dropout and the paper trains with 0.1: it sits on both
    residual branches."""

    def __init__(self, cfg: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.banned_ids: list[int] = []  # ids that are no text: never drawn; load fills it
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, dropout) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.tie_weights()

    def tie_weights(self):
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, context=None, readout=None):
        """tokens (B, T) -> fp32 logits (B, T, V).

        context has positions (B, T) and attend(layer, q, k, v), which decides what each token
        sees: CausalContext by default, dpo.PackedBatch in training, sample.Prefill and
        sample.DecodeStep in sampling. `readout(hidden, lm_head)` takes the place of the logits
        where a caller needs less than all of them; it runs inside forward, where FSDP has the
        head's weight at hand.
        """
        if context is None:
            context = CausalContext(tokens.shape[1], tokens.device)
        rope = rope_tables(context.positions, self.cfg.head_dim, self.cfg.rope_theta)
        x = self.embed_tokens(tokens)  # (B, T, D)
        for i, block in enumerate(self.layers):
            x = block(x, rope, context, i)
        x = self.norm(x)
        return self.lm_head(x).float() if readout is None else readout(x, self.lm_head)


# ---- text <-> ids, and the one chat format ---------------------------------------------------

CONTROL_TOKENS = ("<unk>", "<s>", "</s>")


class Tokenizer:
    """A SentencePiece vocabulary and Llama 2's chat format: `[INST] prompt [/INST] response</s>`.

    Text never becomes a control token: "</s>" in a prompt is five characters, not the end of a
    sequence.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path}: not found; copy the tokenizer.model of the model that this one was "
                "made from (transformers leaves it out when it saves)"
            )
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            problem = f"{describe_bad_file(self.path)}, not a SentencePiece model"
            raise UserError(f"{path}: {problem}; copy it again") from e
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()
        self.size = self.sp.vocab_size()
        control_ids = [self.sp.piece_to_id(token) for token in CONTROL_TOKENS]
        if control_ids != [self.sp.unk_id(), self.bos, self.eos]:
            raise UserError(
                f"{path}: lacks {first_names(CONTROL_TOKENS)}, Llama 2's control tokens; "
                "take another tokenizer.model"
            )
        self.newlines = []  # tokens that end a line
        self.control_ids = []  # tokens that are no text
        self.text_ids = {}  # piece -> id of the others, but for the bytes
        for i in range(self.size):
            piece = self.sp.id_to_piece(i)
            if "\n" in piece or piece == "<0x0A>":
                self.newlines.append(i)
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                self.control_ids.append(i)
            elif not self.sp.is_byte(i):
                self.text_ids[piece] = i

    def encode(self, text: str) -> list[int]:
        try:
            return self.sp.encode(text)
        except RuntimeError:
            raise UserError(f"{text[:60]!a}: holds half of a surrogate pair; mend it") from None

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def encode_with_bos(self, text: str) -> list[int]:
        """Ids of plain text to be continued, without the chat format."""
        return [self.bos, *self.encode(text)]

    def chat(self, *turns: str) -> list[int]:
        """Ids up to the point where the assistant speaks; turns are user, assistant, ..., user.

        chat("Hi") is BOS and "[INST] Hi [/INST]". SFT, sampling, judging and DPO all build their
        ids here.
        """
        assert len(turns) % 2 == 1, "a chat that awaits an answer has an odd number of turns"
        ids = []
        for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True):
            ids += self.chat(user) + self.response(assistant)
        return ids + self.encode_with_bos(f"[INST] {turns[-1].strip()} [/INST]")

    def response(self, text: str) -> list[int]:
        """Ids of a finished response. Its first token brings the space after [/INST] along."""
        return [*self.encode(text.strip()), self.eos]


# ---- text files ------------------------------------------------------------------------------


def read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def read_json(path: Path, kind: type = dict) -> dict | list:
    text = read_text(path, f"is {path.parent} a whole model or run folder?")
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}); copy or write it again") from None
    if not isinstance(value, kind):
        name = "object" if kind is dict else "list"
        raise UserError(f"{path}: not a JSON {name}; copy or write it again")
    return value


def atomic_write(path: Path, content: str | bytes):
    """Whole or not at all: what stands at `path` is never half-written, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    write_and_sync(temporary, content)
    os.replace(temporary, path)


def write_and_sync(path: Path, content: str | bytes = b"", mode: str = "wb"):
    """Write to a file: all it was given is on disk when this returns."""
    try:
        with path.open(mode) as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:  # to close the file is to write once more, so this stands outside `with`
        if e.filename:  # it could not be opened, and says where
            raise
        raise UserError(f"{path}: {e.strerror}; make room and start again") from None


def write_json(path: Path, value: dict | list, indent: int | None = 2):
    atomic_write(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def describe_bad_file(path: Path) -> str:
    """What a file that cannot be read seems to be."""
    with path.open("rb") as f:
        first_bytes = f.read(64).lstrip().lower()
    if first_bytes.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if first_bytes.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "damaged or cut short" if first_bytes else "empty"


def first_names(names) -> str:
    """The first names of a set, for a message."""
    names = sorted(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest or "none"


# ---- model folders in Hugging Face layout, in and out ----------------------------------------

# fields of ModelConfig -> keys of config.json
HF_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
# what config.json may not say otherwise
LLAMA_2_ONLY = {"model_type": "llama", "hidden_act": "silu"}
LLAMA_2_ONLY |= {"attention_bias": False, "mlp_bias": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROPE_TABLE = "rotary_emb.inv_freq"  # older files store it
SHARD_BYTES = 2 << 30  # of a weights file; the process that writes holds one
SHARD_INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> ModelConfig:
    """config.json of transformers 4 or 5 -> ModelConfig; a null counts as not there."""
    path = folder / "config.json"
    config = read_json(path)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    d = {key: value for key, value in (*config.items(), *rope.items()) if value is not None}
    d["rope type"] = rope.get("rope_type") or rope.get("type") or "default"
    if d["rope type"] == "linear" and d.get("factor") == 1:
        d["rope type"] = "default"  # positions divided by 1
    d.setdefault("model_type", "absent")
    for key, value in (LLAMA_2_ONLY | {"rope type": "default"}).items():
        if d.get(key, value) != value:
            raise UserError(
                f"{path}: {key} {d[key]!r} is not Llama 2's {value!r}; this model cannot be loaded"
            )
    d.setdefault("tie_word_embeddings", False)
    d.setdefault("num_key_value_heads", d.get("num_attention_heads"))
    d.setdefault("rope_theta", 10000.0)
    sizes = {}
    try:
        for field, key in HF_KEYS.items():
            sizes[field] = ModelConfig.__dataclass_fields__[field].type(float(d[key]))
            if sizes[field] != float(d[key]):
                raise ValueError(f"{key} is {d[key]!r}")
    except KeyError as e:
        raise UserError(f"{path}: {e} is missing; copy the model's config.json again") from None
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{path}: a size is no number ({e}); copy the file again") from None
    return validate_sizes(ModelConfig(**sizes), path, d.get("head_dim"))


def validate_sizes(cfg: ModelConfig, path: Path, head_dim: int | None = None) -> ModelConfig:
    sizes = {field: value for field, value in vars(cfg).items() if field != "tie_embeddings"}
    if not all(isinstance(value, int | float) and 0 < value < 2**31 for value in sizes.values()):
        raise UserError(f"{path}: a size is not a positive number; copy the file again")
    together = cfg.heads * cfg.head_dim == cfg.dim and cfg.heads % cfg.kv_heads == 0
    if not together or head_dim not in (None, cfg.head_dim) or cfg.head_dim % 2:
        raise UserError(
            f"{path}: hidden_size, heads and head_dim do not fit together as Llama 2's"
        )
    return cfg


def write_config(cfg: ModelConfig, tok: Tokenizer, dtype: torch.dtype, path: Path):
    d = {
        "architectures": ["LlamaForCausalLM"],
        **LLAMA_2_ONLY,
        **{key: getattr(cfg, field) for field, key in HF_KEYS.items()},
        "bos_token_id": tok.bos,
        "eos_token_id": tok.eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(path, d)


def hf_name(name: str) -> str:
    """Name of a parameter -> its name in Hugging Face's files."""
    return name if name.startswith("lm_head") else "model." + name


def read_shape(folder: str | os.PathLike) -> tuple[ModelConfig, Tokenizer]:
    """The sizes and the tokenizer of a model folder; no weight is touched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the folder of a model (config.json, *.safetensors)"
        )
    complete = (folder / "config.json").exists()
    if not complete and (folder / "params.json").exists():
        raise UserError(
            f"{folder}: Meta's own files; turn them into a folder that can be read by "
            f"python -m scripts.convert_meta {folder} OUT"
        )
    if not complete and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: an adapter (LoRA), not a whole model; merge it into its base with peft's "
            "merge_and_unload() and save_pretrained(OUT)"
        )
    cfg = read_config(folder)
    tok = Tokenizer(folder / "tokenizer.model")
    if not cfg.vocab_size / 2 < tok.size <= cfg.vocab_size:  # models may have rows of padding
        raise UserError(
            f"{tok.path}: has {tok.size} pieces but config.json says vocab_size {cfg.vocab_size}; "
            "take the tokenizer.model that belongs to this model"
        )
    return cfg, tok


def read_weight_shapes(file: Path) -> dict[str, tuple]:
    """Name -> shape of every tensor in a .safetensors file; no weight is read."""
    shapes = {}
    try:
        with safe_open(file, "pt") as f:
            for name in sorted(f.keys()):
                tensor = f.get_slice(name)
                shapes[name], dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(
                        f"{file}: {name} is {dtype}, which quantized models have; "
                        "take the model as it was before that"
                    )
    except (SafetensorError, OSError):
        problem = f"{describe_bad_file(file)}, not a whole .safetensors file"
        raise UserError(f"{file}: {problem}; download it again") from None
    return shapes


def read_weight(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as f:
        return f.get_tensor(name)


def check_weights(folder: Path, params: dict[str, torch.Tensor]):
    """UserError unless the files hold exactly these parameters: loading is strict.

    Renames EMBEDDING to HEAD in `params` where a tied model's file holds the head alone.
    """
    shapes, files = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, shape in read_weight_shapes(file).items():
            if name in shapes:
                both = f"{files[name]} and {file.name}"
                raise UserError(f"{folder}: {name} is in {both}; remove the one that is not it")
            shapes[name], files[name] = shape, file.name
    if not shapes:
        raise UserError(
            f"{folder}: no weights in .safetensors files; is the folder whole? Others (.bin) are "
            "to be written anew by transformers: from_pretrained(...).save_pretrained(OUT)"
        )
    if HEAD in shapes and HEAD not in params:  # a tied model's, stored all the same
        if EMBEDDING not in shapes:
            params[HEAD] = params.pop(EMBEDDING)
        elif torch.equal(*(read_weight(folder / files[name], name) for name in (EMBEDDING, HEAD))):
            del shapes[HEAD]
        else:
            raise UserError(
                f"{folder}: {HEAD} is not {EMBEDDING}, though config.json ties them; set "
                '"tie_word_embeddings": false there, or remove that tensor'
            )
    extra = [name for name in shapes if name not in params and not name.endswith(ROPE_TABLE)]
    missing = params.keys() - shapes.keys()
    if missing or extra:
        raise UserError(
            f"{folder}: not a Llama's weights: missing {first_names(missing)}, without a place "
            f"{first_names(extra)}; copy it again, or write a LlamaForCausalLM by its "
            "save_pretrained, without what wraps it (peft: merge_and_unload())"
        )
    for name, p in params.items():
        if shapes[name] != tuple(p.shape):
            raise UserError(
                f"{folder}: {name} has shape {shapes[name]}, by config.json it should be "
                f"{tuple(p.shape)}; the files do not belong together"
            )


@torch.no_grad()
def load(
    folder: str | os.PathLike, dtype=torch.float32, device="cpu", dropout=0.0, shard=None
) -> tuple[Llama, Tokenizer]:
    """Read a model folder in Hugging Face layout into weights of `dtype`; UserError, before
    weights are loaded, where it is not a whole Llama.

    shard(model) is called while the model has no memory yet; then every process reads its own
    part of each tensor.
    """
    folder = Path(folder)
    cfg, tok = read_shape(folder)
    with torch.device("meta"):
        model = Llama(cfg, dropout).to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty has parted them
    ids = [*tok.control_ids, *range(tok.size, cfg.vocab_size)]
    model.banned_ids = [i for i in ids if i != tok.eos]
    params = {hf_name(name): p for name, p in model.named_parameters()}
    check_weights(folder, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of no_dist: every process reads by itself
        try:
            dcp.load(params, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except dcp.CheckpointException as e:
            raise UserError(f"{folder}: {checkpoint_error(e)!r}; copy it again") from None
    return model, tok


def checkpoint_error(e: dcp.CheckpointException) -> BaseException:
    """Why torch could not read or write a checkpoint. It wraps whatever was raised, even Ctrl-C,
    which is raised again."""
    reason = next(iter(e.failures.values()))[0]
    if isinstance(reason, KeyboardInterrupt):
        raise reason from None
    return reason


@torch.no_grad()
def save(
    model: Llama,
    tok: Tokenizer,
    folder: str | os.PathLike,
    sampling: dict | None = None,
    write: bool = True,
):
    """Write a model folder in Hugging Face layout; config.json comes last and marks it complete.

    Under FSDP every rank calls this (each tensor is gathered in turn) and one has write=True.
    sampling: the temperature and top_p it was trained to be sampled with, for whoever does.
    """
    folder = Path(folder)
    if write:
        write_small_files(model.cfg, tok, folder, sampling)
    shards = split_into_shards(model)
    weight_map, file = {}, "model.safetensors"
    for number, shard in enumerate(shards, start=1):
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {}
        for name, p in shard.items():
            full = p.full_tensor() if isinstance(p, DTensor) else p
            if write:
                tensors[name] = full.detach().cpu().contiguous()
        if write:
            write_weights(folder / file, tensors)
    if not write:
        return
    if len(shards) > 1:
        total = sum(p.nbytes for p in model.parameters())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / SHARD_INDEX, index)
    write_config(model.cfg, tok, model.embed_tokens.weight.dtype, folder / "config.json")


def split_into_shards(model: Llama) -> list[dict[str, nn.Parameter]]:
    """Parameters by their names in the files, in groups of at most SHARD_BYTES."""
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        size += p.nbytes
        if shards[-1] and size > SHARD_BYTES:
            shards.append({})
            size = p.nbytes
        shards[-1][hf_name(name)] = p
    return shards


def write_weights(path: Path, tensors: dict[str, torch.Tensor]):
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as e:
        raise UserError(f"{temporary}: {e}; make room and start again") from None
    temporary.chmod(mode)  # save_file lets nobody else read it
    write_and_sync(temporary, mode="rb+")
    os.replace(temporary, path)


def write_small_files(cfg: ModelConfig, tok: Tokenizer, folder: Path, sampling: dict | None):
    """Tokenizer and chat format for whoever reads the folder, after what an old model left."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("config.json", "tokenizer.json", "model*.safetensors", SHARD_INDEX):
        for path in folder.glob(pattern):
            path.unlink()
    atomic_write(folder / "tokenizer.model", tok.path.read_bytes())
    if can_export(tok):
        write_json(folder / "tokenizer.json", tokenizer_json(tok), indent=None)
    else:
        warn_of_no_tokenizer_json()
    tokenizer_config = TOKENIZER_CONFIG | {"model_max_length": cfg.max_len}
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    generation = {"bos_token_id": tok.bos, "eos_token_id": tok.eos}
    if sampling:
        generation |= {"do_sample": True, **sampling}
    write_json(folder / "generation_config.json", generation)


# The chat format for those who read our folders: transformers' AutoTokenizer, vLLM. Where user
# text holds the name of a control token, the template puts a sign (U+FDD0) between its first two
# letters that the tokenizer takes out again, so that it stays text as in Tokenizer.chat.
CHAT_TEMPLATE = """{%- set ns = namespace(system='', user=true) -%}
{%- for message in messages -%}
{%- set text = message['content'].replace('<unk>', '<\ufdd0unk>') -%}
{%- set text = text.replace('<s>', '<\ufdd0s>').replace('</s>', '<\ufdd0/s>') -%}
{%- if loop.first and message['role'] == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + text + '\\n<</SYS>>\\n\\n' if text else '' -%}
{%- elif message['role'] != ('user' if ns.user else 'assistant') -%}
{{- raise_exception('a chat is user, assistant, user and so on') -}}
{%- else -%}
{%- set text = (ns.system + text) | trim -%}
{{- '<s>[INST] ' + text + ' [/INST]' if ns.user else (' ' + text if text else '') + '</s>' -}}
{%- set ns.system = '' -%}{%- set ns.user = not ns.user -%}
{%- endif -%}
{%- endfor -%}"""
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": CHAT_TEMPLATE,
}
# tokenizer.json but for the vocabulary, the merges and the control tokens' ids
TOKENIZER_JSON = """{
"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
"normalizer": {"type": "Sequence", "normalizers": [
  {"type": "Replace", "pattern": {"Regex": "(?<=<)\ufdd0(?=unk>|s>|/s>)"}, "content": ""},
  {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
  {"type": "Prepend", "prepend": "▁"}]},
"pre_tokenizer": null,
"post_processor": {"type": "TemplateProcessing",
"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
"pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
         {"Sequence": {"id": "B", "type_id": 1}}],
"special_tokens": {"<s>": {"id": "<s>", "ids": [], "tokens": ["<s>"]}}},
"decoder": {"type": "Sequence", "decoders": [
  {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
  {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
"model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true}
}"""
# what a vocabulary drops that keeps no more than single spaces between words: of the text, and
# after all other normalizers
DROP_SPACES = (r"(?<![\s\S]) +| +(?= )", r"▁+(?![\s\S])")


@cache
def warn_of_no_tokenizer_json():
    warnings.warn(
        "tokenizer.json is not written, for it would give other ids: tokenizer.model is not plain "
        "BPE (unigram, normalized text, user-defined symbols, no leading space). Take the ids of "
        "this model from sentencepiece, not from transformers' AutoTokenizer",
        stacklevel=3,
    )


def can_export(tok: Tokenizer) -> bool:
    """Whether the vocabulary is plain BPE: SentencePiece's model_type "bpe" with normalization
    "identity", a space put before a text, and no user-defined symbols."""
    text = "".join(chr(i) for i in range(2**16) if not 0xD800 <= i < 0xE000)
    if tok.sp.normalize(text) != "▁" + text.replace(" ", "▁"):
        return False
    # of two pieces of one score, SentencePiece makes the one on the left first
    words = [i for piece, i in tok.text_ids.items() if len(piece) > 1 and piece.strip("▁")]
    if len({tok.sp.get_score(i) for i in words}) < len(words):
        return False
    text = "".join(tok.text_ids)
    try:  # at alpha 1 BPE makes no merge: a piece that is longer is no work of merges
        pieces = tok.sp.encode(text, out_type=str, enable_sampling=True, alpha=1.0)
    except RuntimeError:  # vocabularies of words or characters cannot be sampled from
        return False
    return max(map(len, pieces)) == 1


def tokenizer_json(tok: Tokenizer) -> dict:
    """The vocabulary as Hugging Face's tokenizers library wants it.

    Without this file transformers reads tokenizer.model alone and gives other ids to one chat in
    four.
    """
    d = json.loads(TOKENIZER_JSON)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in CONTROL_TOKENS:
        entry = {"id": tok.sp.piece_to_id(token), "content": token, **flags, "special": True}
        d["added_tokens"].append(entry)
    if tok.sp.normalize("a  b ") == "▁a▁b":
        rules = [{"type": "Replace", "pattern": {"Regex": r}, "content": ""} for r in DROP_SPACES]
        d["normalizer"]["normalizers"].insert(0, rules[0])
        d["normalizer"]["normalizers"].append(rules[1])
    d["post_processor"]["special_tokens"]["<s>"]["ids"].append(tok.bos)
    d["model"]["vocab"] = {tok.sp.id_to_piece(i): i for i in range(tok.size)}
    # all merges of two pieces into a third, those of the best piece first
    scores = {piece: tok.sp.get_score(i) for piece, i in tok.text_ids.items()}
    merges = d["model"]["merges"] = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append([piece[:cut], piece[cut:]])
    return d


# ---- faster products on a CPU: applied from outside, in place --------------------------------
#
# PyTorch leaves fp32 products to oneDNN only where it may round their factors to bf16, else to
# MKL, which takes twice as long on processors by AMD (others were not measured). Without units for
# bf16 (AMX) oneDNN does not round, though it may: there products stay exact.

MIN_ONEDNN_ROWS = 256  # of a product: oneDNN prepares itself for every new size, in 0.4 ms
# It keeps what it has prepared. Sizes seldom come twice, and a thousand of them, its default,
# fill half a gigabyte in every process.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


@contextmanager
def matmul_precision(precision: str):
    """Inside `with`: the type to which oneDNN may round the factors of fp32 products. This is a
    setting of the whole process."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def onednn_keeps_fp32() -> bool:
    """Whether products stay exact where oneDNN may round to bf16."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    with matmul_precision("bf16"):
        return torch.allclose((a @ b).double(), exact, atol=1e-3)


class OneDNNProduct(torch.autograd.Function):
    """x (n, in), weight (out, in) -> x @ weight.T, forward and backward by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with matmul_precision("bf16"):
            return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with matmul_precision("bf16"):
            return grad @ weight, grad.T @ x


class OneDNNLinear(nn.Linear):
    """Multiplies many rows by oneDNN."""

    def forward(self, x):
        num_rows = x.numel() // self.in_features
        if num_rows < MIN_ONEDNN_ROWS or torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        product = OneDNNProduct.apply(x.flatten(0, -2), self.weight)  # (n, out)
        return product.unflatten(0, x.shape[:-1])


def use_onednn_linear(model: Llama):
    """A model of fp32 on a CPU multiplies many rows by oneDNN from now on, if that keeps fp32."""
    if not onednn_keeps_fp32():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = OneDNNLinear


def transpose_weights(model: Llama):
    """Weights keep their shape (out, in), but lie transposed: on a CPU decode steps take a tenth
    less time then. (Training gains nothing, since AdamW takes longer.)"""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


# ---- many processes: applied from outside, in place ------------------------------------------

# Tensor parallelism (Megatron-LM, Shoeybi et al. 2019). What enters and leaves attention and MLP
# is whole and equal on all ranks of a tp group, to the last bit; in between, each rank has heads
# and hidden units of its own. The forwards run on plain tensors: torch's parallel styles go
# through DTensor, whose dispatch takes several times as long, which decoding would feel.


class ReduceFromTP(torch.autograd.Function):
    """Partial results of a tp group -> their sum; every rank has the whole gradient of it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class CopyToTP(torch.autograd.Function):
    """One value on all ranks of a tp group -> the same; their gradients are summed."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def replicated_norm(norm: nn.RMSNorm, mesh, x):
    """Whole on every rank, yet on the mesh, or its gradient could not be clipped with others."""
    weight = norm.weight.to_local()
    return CopyToTP.apply(F.rms_norm(x, weight.shape, weight, norm.eps), mesh.get_group())


def colwise_linear(linear: nn.Linear, mesh, x):
    return F.linear(x, linear.weight.to_local())


def rowwise_linear(linear: nn.Linear, mesh, x):
    return ReduceFromTP.apply(F.linear(x, linear.weight.to_local()), mesh.get_group())


def vocab_parallel_embedding(embedding: nn.Embedding, mesh, tokens):
    weight = embedding.weight.to_local()  # (V / tp, D)
    local = tokens - mesh.get_local_rank() * len(weight)
    here = (local >= 0) & (local < len(weight))  # (B, T)
    rows = F.embedding(local * here, weight) * here[..., None]
    return ReduceFromTP.apply(rows, mesh.get_group())


def gathered_lm_head(lm_head: nn.Linear, mesh, x):
    """All logits on every rank, the same copy of each: so all ranks draw the same token."""
    local = colwise_linear(lm_head, mesh, x)  # (B, T, V / tp)
    return DTensor.from_local(local, mesh, [Shard(-1)]).full_tensor()


# name of a module -> what each rank of a tp group holds of its weight, and its forward with that
TP_PLAN = {
    "embed_tokens": (Shard(0), vocab_parallel_embedding),
    "*norm": (Replicate(), replicated_norm),
    "*.[qkv]_proj": (Shard(0), colwise_linear),
    "*.o_proj": (Shard(1), rowwise_linear),
    "*.gate_proj": (Shard(0), colwise_linear),
    "*.up_proj": (Shard(0), colwise_linear),
    "*.down_proj": (Shard(1), rowwise_linear),
    "lm_head": (Shard(0), gathered_lm_head),
}


def check_tp(cfg: ModelConfig, tp: int, where):
    """UserError where the model in `where` cannot be divided evenly among tp ranks."""
    counts = {
        "heads": cfg.heads,
        "key/value heads": cfg.kv_heads,
        "hidden units (ffn)": cfg.ffn,
        "tokens of vocabulary": cfg.vocab_size,
    }
    for name, count in counts.items():
        if count % tp:
            raise UserError(
                f"{where}: {count} {name} cannot be divided among {tp} processes; "
                "give a --tp that divides them"
            )


def parallelize(model: Llama, mesh, dtype: torch.dtype, activation_checkpointing: bool = False):
    """Distribute the model over the mesh (dp, tp), in place; master weights keep their type.

    tp splits every matrix, then FSDP2 shards over dp, block by block. dtype is the type of
    compute; gradients are reduced in fp32. A block's parameters are gathered just before it
    runs, so no rank ever holds the whole model while training. activation_checkpointing: what is
    inside a block is computed again in backward, which saves memory and costs time.
    """
    if mesh["tp"].size() > 1:
        for module, placement, forward in tp_modules(model):
            module.weight = nn.Parameter(distribute_tensor(module.weight, mesh["tp"], [placement]))
            module.forward = partial(forward, module, mesh["tp"])
        model.tie_weights()
    # inputs are not cast, or every block would round the rotary angles it is handed
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        if activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    # by default the root stays gathered after a forward pass, and an optimizer made then would
    # update copies
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy, reshard_after_forward=True)


def tp_modules(model: Llama):
    """(module, placement of its weight, its forward) of every module in TP_PLAN."""
    for name, module in model.named_modules():
        for pattern, (placement, forward) in TP_PLAN.items():
            if fnmatch(name, pattern):
                yield module, placement, forward


@contextmanager
def unsharded(model: Llama, mesh):
    """A plain Llama whose parameters are the gathered ones (with tp, each rank's part of them).

    Sampling runs on it: under FSDP each forward pass is a collective, and a rank that decodes one
    token more than the others would wait for ever. Ranks of a tp group must be given equal rows.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield model
        return
    for module in sharded:
        module.unshard()
    try:
        with torch.device("meta"):
            plain = Llama(model.cfg)
        for name, p in model.named_parameters():
            plain.get_submodule(name.removesuffix(".weight")).weight = p
        plain.tie_weights()
        plain.banned_ids = model.banned_ids
        if mesh["tp"].size() > 1:
            for module, _, forward in tp_modules(plain):
                module.forward = partial(forward, module, mesh["tp"])
        yield plain.eval()
    finally:
        for module in sharded:
            module.reshard()
        torch.cuda.empty_cache()  # what NCCL needs it takes beside torch; without a GPU nothing
