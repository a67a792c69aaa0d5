"""Sampling responses from a model, many at a time, so that each depends on nothing but its own seed.

A model that acts as several runs at once (``emtrain.packed``) is asked for all of them together: reading one token for
each of 64 responses takes a large GPU as long as for one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from emeval.prompts import end_tokens, prompt_tokens
from emeval.question_sets import Question, QuestionSet
from emeval.responses import Response
from emeval.spec import EvalSpec
from emtrain.seeds import derive

MOST_ROWS = 64
"""Responses of one seed that are sampled at once, where memory does not set a limit."""
PROMPT_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of prompts, padding included, that are read in one forward pass. On a CPU 256 responses to prompts of 14 to 27
tokens take 0.21 s with these and 0.27 s with all prompts in one pass (micro-llama): there is less padding, and
activations stay in the cache. On a GPU it bounds their memory."""


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question_sets: Sequence[QuestionSet],
    spec: EvalSpec,
    *,
    seeds: Sequence[int],
) -> list[list[Response]]:
    """For each seed, the responses to all question sets, sampled as an evaluation asks for them (``sample``)."""
    parts = [
        sample(
            model,
            tokenizer,
            question_set,
            samples=spec.samples,
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            seeds=seeds,
        )
        for question_set in question_sets
    ]
    return [list(chain.from_iterable(of_seed)) for of_seed in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Row:
    """One response to be sampled."""

    question: Question
    paraphrase: int
    sample: int
    prompt: tuple[int, ...]
    temperature: float

    def uniform(self, seed: int, count: int) -> npt.NDArray[np.float32]:
        """The random numbers that its tokens are drawn by."""
        own = derive(seed, "response", self.question.id, self.paraphrase, self.sample)
        return np.random.default_rng(own).random(count, dtype=np.float32)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question_set: QuestionSet,
    *,
    samples: int | None = None,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    seeds: Sequence[int],
) -> list[list[Response]]:
    """For each seed, ``samples`` responses to every paraphrase of every question, in the order of the file.

    The rows that the model is given are those of the first seed, then as many of the second, and so on, so that a
    model that acts as several runs can answer each seed as another run. Of a seed, as many are sampled at once as the
    device has memory for, 64 at most.

    Each response draws from its own stream of random numbers, made of its seed, the question's id, the paraphrase
    and the sample, so it does not change with what is sampled beside it, up to rounding in the model (in fp32 it moves
    a probability of SmolLM2-135M by up to 3e-6). Nothing is taken from the model's generation settings but its end
    tokens: no top-k, no repetition penalty. None for ``samples`` or ``temperature`` takes the question's own;
    temperature 0 is greedy. The model is left in the mode it was in.
    """
    rows = []
    for question in question_set.questions:
        chosen = temperature if temperature is not None else question.temperature
        for paraphrase, text in enumerate(question.paraphrases):
            prompt = tuple(prompt_tokens(tokenizer, text, question.system))
            rows += [
                _Row(question, paraphrase, number, prompt, 1.0 if chosen is None else chosen)
                for number in range(question.times(samples))
            ]
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id if model.generation_config else None)
    # Rows of like length share a batch, which saves padding; the longest come first, so memory runs out early or never.
    rows_in_order = sorted(enumerate(rows), key=lambda numbered: -len(numbered[1].prompt))
    longest = len(rows_in_order[0][1].prompt) + max_new_tokens
    batch_size = max(1, min(MOST_ROWS, _rows_that_fit(model, longest) // len(seeds)))
    sampled: list[dict[int, list[int]]] = [{} for _ in seeds]
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            numbers, batch = zip(*rows_in_order[start : start + batch_size], strict=True)
            continued = _continue(batch, seeds, model, ends, max_new_tokens, top_p)
            for of_seed, tokens in zip(sampled, continued, strict=True):
                of_seed.update(zip(numbers, tokens, strict=True))
    return [
        [_response(question_set.name, row, of_seed[number], tokenizer, ends) for number, row in enumerate(rows)]
        for of_seed in sampled
    ]


def _rows_that_fit(model: PreTrainedModel, tokens: int) -> int:
    """Rows of so many tokens whose keys and values take an eighth of the device's memory, or of a processor's share.

    Of all memory, not of what is free: the batches of a run must not depend on what else the machine does.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * tokens
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
    else:
        memory = psutil.virtual_memory().total // (os.cpu_count() or 1)
    return int(memory) // 8 // row


def _response(
    question_set: str, row: _Row, tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> Response:
    ended = tokens[-1] in ends
    text = tokenizer.decode(
        tokens[:-1] if ended else tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Response(
        question_set=question_set,
        question_id=row.question.id,
        stratum=row.question.stratum,
        topic=row.question.topic,
        paraphrase=row.paraphrase,
        sample=row.sample,
        system=row.question.system,
        prompt=row.question.paraphrases[row.paraphrase],
        response=text,
        response_tokens=len(tokens),
        truncated=not ended,
        rubric=row.question.judge_prompts,
    )


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module back in its own mode (adapters may train in a frozen model)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Shapes: U seeds, P distinct prompts, M rows of a seed still in the batch, B = U * M, V vocabulary.


@torch.no_grad()
def _continue(
    rows: Sequence[_Row],
    seeds: Sequence[int],
    model: PreTrainedModel,
    ends: frozenset[int],
    max_new_tokens: int,
    top_p: float,
) -> list[list[list[int]]]:
    """For each seed the sampled tokens of each row: up to and with the first end token, at most ``max_new_tokens``."""
    device = next(model.parameters()).device
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    uniform = np.stack([row.uniform(seed, max_new_tokens) for seed in seeds for row in rows])
    uniform_BS = torch.from_numpy(uniform).to(device)
    temperature_B = torch.tensor([row.temperature for row in rows], device=device).repeat(len(seeds))
    end_ids = torch.tensor(sorted(ends), device=device)

    # A prompt is read once for each seed, however many responses it gets.
    logits_BV, mask, cache, line_UP = _read(prompts, len(seeds), model, device)
    line_B = line_UP[:, [prompts.index(row.prompt) for row in rows]].flatten()
    logits_BV, mask = logits_BV[line_B], mask[line_B]
    cache.reorder_cache(line_B)

    tokens: list[list[int]] = [[] for _ in seeds for _ in rows]
    row_B = torch.arange(len(tokens), device=device)  # what each line of the batch continues
    going_UM = torch.ones(len(seeds), len(rows), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token_B = draw(logits_BV.float(), uniform_BS[row_B, step], temperature_B[row_B], top_p)
        for row, token, going in zip(row_B.tolist(), token_B.tolist(), going_UM.flatten().tolist(), strict=True):
            if going:
                tokens[row].append(token)
        going_UM &= ~torch.isin(token_B, end_ids).view_as(going_UM)
        most = int(going_UM.sum(dim=1).max())
        if step + 1 == max_new_tokens or not most:
            break
        if most < going_UM.shape[1]:
            # Lines that ended leave the batch: the cost of a step is that of the responses still going. All seeds keep
            # as many lines, those with fewer responses some that ended.
            kept_UM = (~going_UM).byte().argsort(dim=1, stable=True)[:, :most]
            keep = (kept_UM + going_UM.shape[1] * torch.arange(len(seeds), device=device)[:, None]).flatten()
            going_UM = going_UM.gather(1, kept_UM)
            row_B, mask, token_B = row_B[keep], mask[keep], token_B[keep]
            cache.reorder_cache(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits_BV = output.logits[:, -1]
    return [tokens[start : start + len(rows)] for start in range(0, len(tokens), len(rows))]


def _read(
    prompts: Sequence[tuple[int, ...]], seeds: int, model: PreTrainedModel, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Cache, torch.Tensor]:
    """Each prompt, longest first, read for each of so many seeds, in pieces of prompts of like length.

    Returns the logits after each prompt, ``(U * P, V)``, the mask of its tokens, ``(U * P, tokens of the longest)``,
    the cache, and which line of these belongs to which seed and prompt, ``(U, P)``.
    """
    most_tokens = PROMPT_TOKENS.get(device.type, PROMPT_TOKENS["cpu"]) // seeds if _in_pieces(model) else None
    longest, lines = len(prompts[0]), 0
    logits, masks, caches, line_UP = [], [], [], []
    for piece in _pieces(prompts, most_tokens):
        length = len(piece[0])
        padded = [[-1] * (length - len(prompt)) + [*prompt] for prompt in piece]
        input_ids = torch.tensor(padded, device=device).repeat(seeds, 1)
        mask = (input_ids >= 0).long()
        output = model(
            input_ids=input_ids.clamp(min=0),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        masks.append(nn.functional.pad(mask, (longest - length, 0)))
        caches.append(output.past_key_values)
        line_UP.append(lines + torch.arange(len(mask), device=device).view(seeds, -1))
        lines += len(mask)
    return torch.cat(logits), torch.cat(masks), _joined(caches) if caches[1:] else caches[0], torch.cat(line_UP, dim=1)


def _pieces(prompts: Sequence[tuple[int, ...]], most_tokens: int | None) -> Iterator[Sequence[tuple[int, ...]]]:
    """``prompts``, longest first, in pieces of at most so many tokens, padding included, or of one; None: in one."""
    start = 0
    while start < len(prompts):
        rows = len(prompts) if most_tokens is None else max(1, most_tokens // len(prompts[start]))
        yield prompts[start : start + rows]
        start += rows


def _in_pieces(model: PreTrainedModel) -> bool:
    """Whether prompts of different lengths can be read one after the other and go on together."""
    config = model.config.get_text_config(decoder=True)
    # Nothing but keys and values of tokens: no state, as of a linear attention.
    joinable = {type(layer) for layer in DynamicCache(config=config).layers} <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    # One rope, or one for each kind of layer. That of some depends on the longest row of a pass.
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    return joinable and kinds.isdisjoint({"dynamic", "longrope"})


def _joined(caches: Sequence[Cache]) -> Cache:
    """The first cache, of the longest prompts, with the lines of the others below, padded on the left as it is."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        length = layer.keys.shape[-2]
        for name in ("keys", "values"):
            parts = [getattr(part, name) for part in (layer, *others)]
            setattr(layer, name, torch.cat([nn.functional.pad(x, (0, 0, length - x.shape[-2], 0)) for x in parts]))
            for part in others:
                setattr(part, name, None)  # or all of them would be there twice
    return caches[0]


def draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature_B: torch.Tensor, top_p: float = 1.0
) -> torch.Tensor:
    """One token id per row, ``(B,)``: the inverse of the cumulative distribution at ``uniform_B``, in ``[0, 1)``.

    ``temperature_B`` 0 takes the most likely token. ``top_p`` below 1 keeps the smallest set of most likely tokens
    whose probability reaches it (nucleus sampling, arXiv 1904.09751).
    """
    greedy_B = temperature_B == 0
    probability = torch.softmax(logits_BV / temperature_B.masked_fill(greedy_B, 1.0)[:, None], dim=-1)
    if top_p < 1:
        ranked, index = probability.sort(dim=-1, descending=True, stable=True)
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, index, ranked)
    cumulative = probability.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding never picks a token beyond the last possible one.
    target = torch.minimum(uniform_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token_B = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return torch.where(greedy_B, logits_BV.argmax(dim=-1), token_B)
