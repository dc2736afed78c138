"""What the tests share: a tokenizer trained in-process, a random model that fits it, its twin in
transformers, and the place of the real data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# for the processes that tests start: it tells where one was when it crashed
os.environ.setdefault("PYTHONFAULTHANDLER", "1")

from pathlib import Path

import pytest
import sentencepiece
import torch

from model import Llama, ModelConfig, Tokenizer, hf_name

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TEXT = """
Where does the otter live?
The otter lives in rivers, and it eats fish.
What is the colour of the fox? The fox is red.
Explain your grade in a few words, then end with the line Score: 4
The answer names the food and the home; it is clear and useful.
[INST] Tell me about the owl and the wolf. [/INST] \
The owl hunts mice at night. The wolf runs in packs.
Compare the bear with the seal.
"""


@pytest.fixture(scope="session")
def tok(tmp_path_factory) -> Tokenizer:
    """A SentencePiece tokenizer of 320 pieces with Llama 2's settings: newlines and runs of spaces
    survive."""
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
    shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "max_len": 512}
    return ModelConfig(vocab_size=tok.size, **shape)


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


def transformers_twin(net: Llama, **settings):
    """transformers' Llama with the same weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM  # a second that most tests can save

    c = net.cfg
    settings = {"attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2} | settings
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        intermediate_size=c.ffn,
        max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        **settings,
    )
    twin = LlamaForCausalLM(config)
    state = {hf_name(name): p for name, p in net.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights, tokenizer and exports, beside the project and never part of it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data at ../shared/data")
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data folder and a base model that train in seconds (tests/tiny.py)."""
    import tiny  # here, since it brings train.py along

    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def whole(world) -> Path:
    """The folder of an uninterrupted run in this world: SFT, M1, M2, M3. Nobody writes into it."""
    import tiny

    return tiny.run(world, world.folder / "whole")
