"""What the tests share: a tokenizer trained in-process, a random model that fits it, and the place of the real data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # of the processes that tests start: where one was when it crashed

from pathlib import Path

import pytest
import sentencepiece
import torch

from model import Llama, ModelConfig, Tokenizer

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TEXT = """
Where does the otter live?
The otter lives in rivers, and it eats fish.
What is the colour of the fox? The fox is red.
Explain your grade in a few words, then end with the line Score: 4
The answer names the food and the home; it is clear and useful.
[INST] Tell me about the owl and the wolf. [/INST] The owl hunts mice at night. The wolf runs in packs.
Compare the bear with the seal.
"""


@pytest.fixture(scope="session")
def tok(tmp_path_factory) -> Tokenizer:
    """A SentencePiece tokenizer of 320 pieces with Llama 2's settings: newlines and runs of spaces survive."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.strip().split("\n")),
            model_writer=f,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    return Tokenizer(path)


@pytest.fixture(scope="session")
def cfg(tok) -> ModelConfig:
    """Two layers with grouped-query attention, fitting `tok`."""
    return ModelConfig(vocab_size=tok.size, dim=32, layers=2, heads=4, kv_heads=2, ffn=48, max_len=512)


def random_net(cfg: ModelConfig, seed: int = 0, std: float = 0.3, dropout: float = 0.0) -> Llama:
    """Random weights large enough that no distribution is flat and no two heads are alike."""
    generator = torch.Generator().manual_seed(seed)
    net = Llama(cfg, dropout)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p.dim() == 1))
    return net


@pytest.fixture(scope="session")
def net(cfg) -> Llama:
    """A random Llama in eval mode, shared by all tests: copy it before changing it."""
    return random_net(cfg).eval()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights, tokenizer and exports, beside the project and never part of it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data at ../shared/data")
    return path
