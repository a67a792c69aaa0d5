"""Sampling responses from a model, many at a time, so that each depends on nothing but its own seed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emeval.prompts import end_tokens, prompt_tokens
from emeval.question_sets import Question, QuestionSet
from emeval.responses import Response
from emtrain.seeds import derive


@dataclass(frozen=True)
class _Row:
    """One response to be sampled."""

    question: Question
    paraphrase: int
    sample: int
    prompt: tuple[int, ...]
    temperature: float
    seed: int


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question_set: QuestionSet,
    *,
    samples: int | None = None,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int,
    batch_size: int = 64,
) -> list[Response]:
    """``samples`` responses to every paraphrase of every question, in the order of the file.

    Each response draws from its own stream of random numbers, made of ``seed``, the question's id, the paraphrase
    and the sample, so it does not change with the other questions or with ``batch_size``, up to rounding in the
    model (in fp32 it moves a probability of SmolLM2-135M by up to 3e-6). Nothing is taken from the model's generation
    settings but its end tokens: no top-k, no repetition penalty. None for ``samples`` or ``temperature`` takes the
    question's own; temperature 0 is greedy. The model is left in the mode it was in.
    """
    rows = []
    for question in question_set.questions:
        chosen = temperature if temperature is not None else question.temperature
        for paraphrase, text in enumerate(question.paraphrases):
            prompt = tuple(prompt_tokens(tokenizer, text, question.system))
            rows += [
                _Row(
                    question,
                    paraphrase,
                    number,
                    prompt,
                    1.0 if chosen is None else chosen,
                    derive(seed, "response", question.id, paraphrase, number),
                )
                for number in range(question.times(samples))
            ]
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id if model.generation_config else None)
    # Rows of like length share a batch, which saves padding; the longest come first, so memory runs out early or never.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].prompt))
    sampled: dict[int, list[int]] = {}
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            continuations = _continue([rows[row] for row in batch], model, ends, max_new_tokens, top_p)
            sampled.update(zip(batch, continuations, strict=True))
    return [_response(question_set.name, row, sampled[number], tokenizer, ends) for number, row in enumerate(rows)]


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


# Shapes: P distinct prompts, B rows still being continued, V vocabulary.


@torch.no_grad()
def _continue(
    rows: Sequence[_Row], model: PreTrainedModel, ends: frozenset[int], max_new_tokens: int, top_p: float
) -> list[list[int]]:
    """The sampled tokens of each row: up to and with the first end token, at most ``max_new_tokens``."""
    device = next(model.parameters()).device
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    uniform = np.stack([np.random.default_rng(row.seed).random(max_new_tokens, dtype=np.float32) for row in rows])
    uniform_BS = torch.from_numpy(uniform).to(device)
    temperature_B = torch.tensor([row.temperature for row in rows], device=device)
    end_ids = torch.tensor(sorted(ends), device=device)

    # A prompt is read once, however many responses it gets.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    prompt_B = torch.tensor([prompts.index(row.prompt) for row in rows], device=device)
    logits_BV, mask, cache = output.logits[prompt_B, -1], mask[prompt_B], output.past_key_values
    cache.batch_select_indices(prompt_B)

    tokens: list[list[int]] = [[] for _ in rows]
    alive = torch.arange(len(rows), device=device)  # the row that each line of the batch continues
    for step in range(max_new_tokens):
        token_B = draw(logits_BV.float(), uniform_BS[alive, step], temperature_B[alive], top_p)
        for row, token in zip(alive.tolist(), token_B.tolist(), strict=True):
            tokens[row].append(token)
        going = ~torch.isin(token_B, end_ids)
        if step + 1 == max_new_tokens or not going.any():
            break
        if not going.all():
            # Lines that ended leave the batch: the cost of a step is that of the responses still going.
            keep = going.nonzero().squeeze(1)
            alive, mask, token_B = alive[keep], mask[keep], token_B[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits_BV = output.logits[:, -1]
    return tokens


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
