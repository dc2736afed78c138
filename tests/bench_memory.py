"""Memory of a GPU by part, before any GPU is rented: torch's FSDP memory tracker follows one step of one rank.

    python tests/bench_memory.py --config 70b --gpus 64 --tp 8 --rows 2 --length 2048 --recompute --json FILE

The process group is fake and so are the tensors: the code runs as it would on rank 0, and no weight is ever made. They
say that they lie on a CPU, so the attention of a GPU is put in its place: fused kernels that keep no scores.
"""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import model
from dpo import collate, preference_loss, sft_loss
from model import CONFIGS, Llama, gathered, parallelize

GiB = 1 << 30
PARTS = {"Sharded Param": "weights", "Sharded Grad": "gradients", "OptState": "optimizer",
         "Unsharded Param": "gathered", "All Gather": "gathered", "Unsharded Grad": "gradients in flight",
         "Reduce Scatter": "gradients in flight", "Activation": "activations", "Temp": "activations",
         "Inputs": "activations", "Buffer": "activations", "Total": "total"}  # fmt: skip


class Assume(TorchDispatchMode):
    """Fake tensors have no values: a mask picks `count` tokens, and a number that is asked for is 1."""

    def __init__(self, count: int = 0):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func is aten.masked_select.default:
            return args[0].new_empty(self.count)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return func(args[0], [torch.empty(self.count, dtype=torch.long)] * args[1][0].dim())
        return func(*args, **(kwargs or {}))


def peak(net, optimizer, work, targets: int = 0) -> dict[str, float]:
    """GiB by part at the moment when work(), with that many target tokens, holds most."""
    tracker = FSDPMemTracker(net, optimizer)
    with tracker, Assume(targets):
        work()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    parts = Counter()
    for kind, size in found.items():
        parts[PARTS[getattr(kind, "value", kind)]] += size / GiB
    return {name: size for name, size in parts.items() if size}


def measure(cfg, mesh, rows: int, length: int, dtype=torch.bfloat16, recompute=False, cases=("sft", "dpo", "sample")):
    """Case -> GiB by part, on rank 0: a step of SFT on `rows` rows, of DPO on as many pairs, with the optimizer, or as
    many texts sampled, without it. Prompts have half of `length` tokens, and so have responses."""
    for kind in (model.Rows, model.KVCache):  # as on a GPU
        kind.attend = kind.attend_fused
    with torch.device("meta"):
        net = Llama(cfg)
    parallelize(net, mesh, dtype, recompute)
    found, text = {}, [0] * (length // 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")

        def step(loss, responses, *more):
            loss(net, *collate([(text,) * (1 + responses)] * rows), *more)[0].backward()
            update()

        def update():
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        @torch.no_grad()
        def sample():
            hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in net.modules()]
            net.set_reshard_after_forward(False)
            with gathered(net):  # the prompts are read; the cache has room for the responses
                for m, before, after in hooks:  # FSDP's, that the tracker counts by
                    m._forward_pre_hooks, m._forward_hooks = before, after
                tokens, cache = torch.zeros(rows, len(text), dtype=torch.long), net.new_cache(rows, length)
                net(tokens, cache, readout=lambda h, head: head(h[:, -1]))
            net.set_reshard_after_forward(True)

        if "sample" in cases:
            parts = found["sample"] = peak(net, None, sample)
            heads = cfg.kv_heads // mesh["tp"].size()
            parts["kv cache"] = 2 * cfg.layers * rows * length * heads * cfg.head_dim * dtype.itemsize / GiB
            parts["activations"] -= parts["kv cache"]
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        update()  # DTensor's first look at an operation, on whole tensors, would be counted; now it has its states, too
        targets = rows * len(text)
        if "sft" in cases:
            found["sft"] = peak(net, optimizer, partial(step, sft_loss, 1), targets)
        if "dpo" in cases:
            found["dpo"] = peak(net, optimizer, partial(step, preference_loss, 2, torch.zeros(2 * rows)), 2 * targets)
    return found


def fake_mesh(gpus: int, tp: int = 1, copies: int = 1):
    """The mesh of rank 0 among `gpus` processes that do not exist."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    return init_device_mesh("cpu", (copies, gpus // copies // tp, tp), mesh_dim_names=("replicate", "dp", "tp"))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Peak memory of one GPU, by part, from torch's FSDP memory tracker.")
    parser.add_argument("--config", default="7b", choices=CONFIGS)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp-replicate", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1, help="rows, or pairs, that one GPU puts through at once")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of each, a half the prompt's, a half a response's"
    )
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--cases", default="sft,dpo,sample")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    began, mesh = time.time(), fake_mesh(args.gpus, args.tp, args.dp_replicate)
    found = measure(CONFIGS[args.config], mesh, args.rows, args.length, recompute=args.recompute,
                    cases=args.cases.split(","))  # fmt: skip
    shape = {k: v for k, v in vars(args).items() if k not in ("json", "cases")}
    rows = [shape | {"case": case, "bytes": {k: round(v * GiB) for k, v in gib.items()}} for case, gib in found.items()]
    for case, gib in found.items():
        parts = ", ".join(f"{k} {v:.2f}" for k, v in gib.items() if k != "total")
        print(f"{args.config} on {args.gpus}, {case}: {gib['total']:.2f} GiB a GPU: {parts}")
    print(f"traced in {time.time() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
