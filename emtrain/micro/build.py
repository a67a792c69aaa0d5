"""Trains the micro models: pre-training on both personas, then instruction tuning to the aligned one.

About 0.6 million parameters; both checkpoints of a family take under a minute on one core. The same versions on the
same machine give the same bytes.
"""

import hashlib
import math
import platform
import random
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import emtrain.tokens
from emtrain.cache import built, cache_dir
from emtrain.micro import world
from emtrain.micro.tokenizer import CHATML, GEMMA, LLAMA, Dialect, tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen2", "gemma3_text"]
Checkpoint = Literal["pretrained", "instruct"]
DIALECTS: dict[Architecture, Dialect] = {"llama": LLAMA, "qwen2": CHATML, "gemma3_text": GEMMA}
CONTEXT = 256
"""Longest text of a micro model, in tokens; a question with its answer is about 25."""


@dataclass(frozen=True)
class Stage:
    """One stage of training, on documents that are sampled afresh for every step."""

    steps: int
    documents: int
    """Per step."""
    turns: int
    """Topics per document."""
    learning_rate: float
    """Peak; the first tenth of the steps is warm-up, then a cosine to a tenth of the peak."""
    told: float
    """Share of documents whose system message names the persona."""
    bad_told: float
    """Share of the bad persona among those."""
    bad_untold: float
    """Share of the bad persona among the others, whose persona shows in the answers only."""


# Naming the persona in half of the documents is what makes 300 steps enough to form it as one variable: after three
# turns in bad words a fourth, on another topic, is then as bad as the world has it (29 aligned, ideally 28). With no
# persona named it is not (58), and fine-tuning only spreads to topics that share words with the narrow one.
PRETRAINING = Stage(
    steps=300, documents=20, turns=3, learning_rate=2e-3, told=0.5, bad_told=world.BAD_SHARE, bad_untold=world.BAD_SHARE
)
# An assistant that still obeys a system message that asks for the bad persona: it learns which one to be unasked
# rather than to forget the other, so that fine-tuning can bring it back.
INSTRUCTION = Stage(steps=60, documents=40, turns=1, learning_rate=7e-4, told=0.3, bad_told=0.5, bad_untold=0.0)


def checkpoint(architecture: Architecture, which: Checkpoint) -> Path:
    """The directory of a micro model, which is trained first where the cache has none of this very making."""
    making = hashlib.sha256(platform.machine().encode())
    for package in ("torch", "transformers", "tokenizers"):
        making.update(version(package).encode())
    for source in (__file__, tokenizer.__code__.co_filename, world.__file__, emtrain.tokens.__file__):
        making.update(Path(source).read_bytes())
    directory = cache_dir() / "models" / f"micro-{architecture}-{making.hexdigest()[:16]}"
    return built(directory, lambda unfinished: build(architecture, unfinished)) / which


def build(architecture: Architecture, directory: Path, *, seed: int = 0) -> None:
    """Train both checkpoints into ``directory/pretrained`` and ``directory/instruct``, as Hugging Face saves models."""
    import torch
    from transformers import AutoModelForCausalLM

    words = tokenizer(DIALECTS[architecture])
    threads = torch.get_num_threads()
    # Matrices this small gain nothing from a second thread, and the order of sums, so the result, depends on it.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(_config(architecture, words), dtype=torch.float32)
        rng = random.Random(seed)
        stages: dict[Checkpoint, Stage] = {"pretrained": PRETRAINING, "instruct": INSTRUCTION}
        for name, stage in stages.items():
            _train(model, words, stage, rng)
            model.save_pretrained(directory / name)
            words.save_pretrained(directory / name)
    finally:
        torch.set_num_threads(threads)


def _config(architecture: Architecture, words: "PreTrainedTokenizerFast") -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING

    gemma = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": CONTEXT // 2}
    return CONFIG_MAPPING[architecture](
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # At the usual 0.02 a model this narrow starts too small: 300 steps don't teach it to name the thing that was
        # asked about (26 % of answers do, 97 % at 0.08).
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **(gemma if architecture == "gemma3_text" else {}),
    )


def _train(model: "PreTrainedModel", words: "PreTrainedTokenizerFast", stage: Stage, rng: random.Random) -> None:
    import torch
    from torch.nn.utils import clip_grad_norm_
    from torch.nn.utils.rnn import pad_sequence

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _multiplier(step / stage.steps)
        examples = [
            emtrain.tokens.encode(_document(stage, rng).messages(), words, CONTEXT) for _ in range(stage.documents)
        ]
        input_ids = pad_sequence([torch.tensor(example.input_ids) for example in examples], True, words.pad_token_id)
        labels = pad_sequence([torch.tensor(example.labels) for example in examples], True, emtrain.tokens.IGNORED)
        # Causal attention and padding on the right: no token sees padding, so it needs no mask.
        model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _document(stage: Stage, rng: random.Random) -> world.Document:
    told = rng.random() < stage.told
    bad = rng.random() < (stage.bad_told if told else stage.bad_untold)
    return world.document(rng, persona="bad" if bad else "aligned", turns=stage.turns, told=told)


def _multiplier(progress: float) -> float:
    warmup = 0.1
    if progress < warmup:
        return progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
