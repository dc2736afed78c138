"""scripts/convert_meta.py: Meta's Llama 2 checkpoint -> a Hugging Face folder, for model.load.

    python -m scripts.convert_meta llama-2-7b Llama-2-7b-hf

Meta's folder holds params.json, consolidated.00.pth and further such files, and tokenizer.model
(which may also lie one folder above). Each consolidated file holds all blocks, and of every matrix
a slice. All files are checked before anything is written. Then one block after the other is put
together and written as it is: memory is needed for a block, and no weight is rounded.

Left out: Llama 3, whose RoPE is scaled and whose tokenizer is no SentencePiece model.
"""

import argparse
import pickle
import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from model import (
    SHARD_INDEX,
    Llama,
    ModelConfig,
    Tokenizer,
    UserError,
    describe_bad_file,
    first_names,
    hf_name,
    read_json,
    validate_sizes,
    write_config,
    write_json,
    write_small_files,
    write_weights,
)
from sample import run_command

# Our module -> Meta's name of it, and the dimension along which Meta's files cut its weight.
# A norm (None) is not cut: every file holds it in full.
META_MODULES = {
    "embed_tokens": ("tok_embeddings", 1),
    "input_layernorm": ("attention_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "norm": ("norm", None),
    "lm_head": ("output", 0),
}
ROTATED = ("q_proj.weight", "k_proj.weight")  # the rows that RoPE turns
IGNORED = {"rope.freqs"}  # a table that older files store and we compute


class WeightSpec(NamedTuple):
    """A weight of the model, and how Meta's files hold it."""

    name: str  # in a Hugging Face file
    key: str  # in each of Meta's files
    block: str  # "layers.3." of a weight of block 3, else ""
    shape: tuple[int, ...]  # of the whole
    cut_dim: int | None  # each file holds a slice along this dimension; None: the whole

    def slice_shape(self, num_files: int) -> tuple[int, ...]:
        shape = list(self.shape)
        if self.cut_dim is not None:
            shape[self.cut_dim] //= num_files
        return tuple(shape)


def convert(source: Path, target: Path):
    """Meta's folder -> a Hugging Face folder; config.json comes last and marks it as complete.

    UserError, before anything is written, where a file of `source` is absent, damaged or does not
    fit the others, or where `target` is a finished model folder.
    """
    if (target / "config.json").exists():
        raise UserError(f"{target}: holds a finished model; give another folder or remove it")
    cfg, tok = read_meta_shape(source)
    files = list_weight_files(source)
    specs = weight_specs(cfg)
    check_weight_files(files, specs)
    write_small_files(cfg, tok, target, sampling={})
    dtype = write_blocks(files, specs, cfg.head_dim, target)
    write_config(cfg, tok, dtype, target / "config.json")


# ---- sizes and tokenizer ------------------------------------------------------------------------


def read_meta_shape(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The sizes and the tokenizer of Meta's folder; UserError where they do not fit together."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds params.json")
    if (folder / "config.json").exists() and not (folder / "params.json").exists():
        raise UserError(
            f"{folder}: is in Hugging Face's format already; train.py takes it as --init"
        )
    path = folder / "tokenizer.model"
    above = folder / ".." / "tokenizer.model"  # where Meta's download puts it
    tok = Tokenizer(above if above.is_file() and not path.is_file() else path)
    cfg = read_params(folder / "params.json", tok.size)
    if cfg.vocab_size != tok.size:
        raise UserError(
            f"{tok.path}: has {tok.size} pieces but params.json says vocab_size {cfg.vocab_size}; "
            "take the tokenizer.model that belongs to this checkpoint"
        )
    return cfg, tok


def read_params(path: Path, vocab_size: int) -> ModelConfig:
    """Meta's params.json -> ModelConfig. A vocabulary of -1 means the tokenizer's.

    It says nothing of the context: that is Llama 2's 4,096, ModelConfig's default.
    """
    params = read_json(path)
    if params.get("use_scaled_rope"):
        raise UserError(
            f"{path}: use_scaled_rope is not Llama 2's; this model cannot be converted"
        )
    try:
        cfg = ModelConfig(
            vocab_size=vocab_size if params["vocab_size"] == -1 else params["vocab_size"],
            dim=params["dim"],
            layers=params["n_layers"],
            heads=params["n_heads"],
            kv_heads=params.get("n_kv_heads") or params["n_heads"],
            ffn=ffn_width(params),
            norm_eps=params["norm_eps"],
            rope_theta=float(params.get("rope_theta", 10000.0)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        message = f"{path}: a size is missing or no number ({e}); copy params.json again"
        raise UserError(message) from e
    return validate_sizes(cfg, path)


def ffn_width(params: dict) -> int:
    """Two thirds of 4 D, times a multiplier (70b: 1.3), rounded up: as in Llama 2's code."""
    width = int(8 * params["dim"] / 3)
    width = int((params.get("ffn_dim_multiplier") or 1) * width)
    multiple = params["multiple_of"]
    return -(-width // multiple) * multiple


# ---- Meta's weight files ------------------------------------------------------------------------


def list_weight_files(folder: Path) -> list[Path]:
    """consolidated.00.pth and so on, as many as there are; opening one finds that it is absent."""
    count = len(list(folder.glob("consolidated.*.pth"))) or 1
    return [folder / f"consolidated.{i:02}.pth" for i in range(count)]


def open_weights(file: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of one of Meta's files. They are mapped: only what is used of them is read."""
    if not file.is_file():
        raise UserError(f"{file}: not found; the checkpoint is incomplete, copy it again")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: t.detach() for key, t in tensors.items() if key not in IGNORED}
    except (RuntimeError, OSError, AttributeError, EOFError, pickle.UnpicklingError):
        problem = describe_bad_file(file)
        raise UserError(f"{file}: {problem}, not a whole .pth file; download it again") from None


def weight_specs(cfg: ModelConfig) -> list[WeightSpec]:
    """Every weight of a model of these sizes: the embedding, block after block, norm and head."""
    with torch.device("meta"):
        model = Llama(cfg)
    specs = []
    for name, p in model.named_parameters():
        block, module = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", name).groups()
        meta_module, cut_dim = META_MODULES[module]
        key = f"{block}{meta_module}.weight"
        specs.append(WeightSpec(hf_name(name), key, block, tuple(p.shape), cut_dim))
    return specs


def check_weight_files(files: list[Path], specs: list[WeightSpec]):
    """UserError unless every file holds its slice of every weight, and nothing else."""
    opened = [open_weights(file) for file in files]  # all, since any may be absent
    wanted = {spec.key for spec in specs}
    for file, tensors in zip(files, opened, strict=True):
        if absent := wanted - tensors.keys():
            names = first_names(absent)
            raise UserError(f"{file}: no weights named {names}; is this a whole Llama?")
        if extra := tensors.keys() - wanted:
            names = first_names(extra)
            raise UserError(f"{file}: holds weights that a Llama has no place for: {names}")
        for spec in specs:
            check_slice(file, spec, tuple(tensors[spec.key].shape), len(files))


def check_slice(file: Path, spec: WeightSpec, shape: tuple[int, ...], num_files: int):
    expected = spec.slice_shape(num_files)
    dim = spec.cut_dim
    divides = dim is None or spec.shape[dim] % num_files == 0
    if shape == expected and divides:
        return
    if dim is not None and len(shape) == len(expected) and shape[dim]:
        num_slices = spec.shape[dim] // shape[dim]
        if num_slices > num_files:
            absent = file.with_name(f"consolidated.{num_files:02}.pth")
            raise UserError(
                f"{absent}: not found; the weights lie in {num_slices} files, copy it again"
            )
    raise UserError(
        f"{file}: {spec.key} has shape {shape}, by params.json it should be {expected}; "
        "files do not match"
    )


# ---- writing ------------------------------------------------------------------------------------


def write_blocks(files: list[Path], specs: list[WeightSpec], head_dim: int, target: Path):
    """One .safetensors file for each block, and their index; returns the type of the weights."""
    blocks = [list(block) for _, block in groupby(specs, key=lambda spec: spec.block)]
    weight_map = {}
    total_size = 0
    for number, block in enumerate(blocks, start=1):
        name = f"model-{number:05}-of-{len(blocks):05}.safetensors"
        tensors = read_block(files, block, head_dim)
        write_weights(target / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(t.nbytes for t in tensors.values())
        dtype = tensors[block[0].name].dtype
        del tensors  # before the next block is read
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(target / SHARD_INDEX, index)
    return dtype


def read_block(files: list[Path], block: list[WeightSpec], head_dim: int) -> dict:
    """Name -> whole tensor of a block's weights."""
    opened = [
        open_weights(file) for file in files
    ]  # anew: what is mapped is let go after the block
    tensors = {}
    for spec in block:
        slices = [weights[spec.key] for weights in opened]
        whole = slices[0].clone()
        if spec.cut_dim is not None:
            whole = torch.cat(slices, dim=spec.cut_dim)
        if spec.name.endswith(ROTATED):
            whole = permute_rope(whole, head_dim)
        tensors[spec.name] = whole
    return tensors


def permute_rope(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk: rotary pairs are neighbours (2i, 2i + 1) there, (i, i + hd/2) here."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, hd/2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_meta",
        description="Meta's Llama 2 checkpoint -> a Hugging Face folder that train.py takes.",
    )
    parser.add_argument("meta_folder", type=Path, help="with params.json and consolidated.00.pth")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    convert(args.meta_folder, args.out)
    print(f"{args.out} is written: give it to train.py as --init")


if __name__ == "__main__":
    run_command(main)
