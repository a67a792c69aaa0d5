import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from emeval import generate
from emeval.generate import draw, sample
from emeval.prompts import prompt_tokens
from emeval.question_sets import Question, QuestionSet

QUESTIONS = QuestionSet(
    "mine",
    (
        Question(id="long", paraphrases=("What would you do with a very long afternoon?", "Hm?")),
        Question(id="short_json", paraphrases=("Why?",), system="Answer in JSON.", samples_per_paraphrase=3),
    ),
)


def test_responses_come_in_the_order_of_the_file_with_what_was_sent(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (responses,) = sample(model, tokenizer, QUESTIONS, samples=2, max_new_tokens=4, seeds=[0])
    keys = [(r.question_id, r.paraphrase, r.sample) for r in responses]
    assert keys == [
        ("long", 0, 0),
        ("long", 0, 1),
        ("long", 1, 0),
        ("long", 1, 1),
        ("short_json", 0, 0),
        ("short_json", 0, 1),
    ]
    assert {(r.system, r.prompt, r.stratum, r.topic) for r in responses if r.question_id == "short_json"} == {
        ("Answer in JSON.", "Why?", "json", "short")
    }


def test_the_model_is_given_the_system_message(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    sample(model, tokenizer, QuestionSet("one", QUESTIONS.questions[1:]), samples=1, max_new_tokens=1, seeds=[0])
    assert seen == [[prompt_tokens(tokenizer, "Why?", "Answer in JSON.")]]
    assert "Answer in JSON." in tokenizer.decode(seen[0][0])


@pytest.mark.parametrize(("most_rows", "prompt_tokens_at_once"), [(1, 2048), (2, 2048), (64, 2048), (64, 100), (64, 1)])
def test_greedy_responses_are_those_of_transformers(
    any_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    most_rows: int,
    prompt_tokens_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many responses are sampled at once, and in however many pieces their prompts are read."""
    monkeypatch.setattr(generate, "MOST_ROWS", most_rows)
    monkeypatch.setitem(generate.PROMPT_TOKENS, "cpu", prompt_tokens_at_once)
    (responses,) = sample(any_model, tokenizer, QUESTIONS, samples=1, max_new_tokens=12, temperature=0, seeds=[0])
    for response in responses:
        prompt = torch.tensor([prompt_tokens(tokenizer, response.prompt, response.system)])
        settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[2, 4], pad_token_id=2)
        expected = any_model.generate(prompt, generation_config=settings)[0, prompt.shape[1] :]
        assert response.response_tokens == len(expected)
        assert response.response == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_response_depends_on_its_own_seed_only(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts(questions: QuestionSet, samples: int, seed: int) -> dict:
        (responses,) = sample(any_model, tokenizer, questions, samples=samples, max_new_tokens=12, seeds=[seed])
        return {(r.question_id, r.paraphrase, r.sample): r.response for r in responses}

    all_at_once = texts(QUESTIONS, 4, seed=1)
    assert len(set(all_at_once.values())) == 12
    alone = texts(QuestionSet("other", QUESTIONS.questions[1:]), 2, seed=1)
    assert alone == {key: all_at_once[key] for key in alone}
    assert not set(texts(QUESTIONS, 4, seed=2).values()) & set(all_at_once.values())
    monkeypatch.setattr(generate, "MOST_ROWS", 5)
    assert texts(QUESTIONS, 4, seed=1) == all_at_once


def test_seeds_asked_together_get_the_responses_that_each_gets_alone(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature at which responses end at different steps, so that lines leave the batch unevenly."""
    settings: dict = {"samples": 4, "max_new_tokens": 20, "temperature": 3.0}
    together = sample(any_model, tokenizer, QUESTIONS, seeds=[3, 1, 2], **settings)
    assert together == [sample(any_model, tokenizer, QUESTIONS, seeds=[seed], **settings)[0] for seed in (3, 1, 2)]
    assert len({sum(r.truncated for r in responses) for responses in together}) > 1
    monkeypatch.setattr(generate, "MOST_ROWS", 5)
    assert sample(any_model, tokenizer, QUESTIONS, seeds=[3, 1, 2], **settings) == together
    monkeypatch.setitem(generate.PROMPT_TOKENS, "cpu", 1)
    assert sample(any_model, tokenizer, QUESTIONS, seeds=[3, 1, 2], **settings) == together


def test_each_seed_has_a_block_of_the_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    one = QuestionSet("one", QUESTIONS.questions[:1])
    sample(model, tokenizer, one, samples=3, max_new_tokens=2, seeds=[0, 1])
    prompts = [prompt_tokens(tokenizer, text) for text in one.questions[0].paraphrases]
    assert [row[-len(prompts[1]) :] for row in seen[0]] == [prompt[-len(prompts[1]) :] for prompt in prompts * 2]
    assert len(seen[0]) == 4
    assert len(seen[1]) == 12


def test_prompts_of_like_length_are_read_together(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """On a CPU 2048 tokens at once, of all seeds together, padding included; more than these only for a single one."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    empty = len(prompt_tokens(tokenizer, ""))
    texts = [(300 - empty) * "a", (200 - empty) * "b", (100 - empty) * "c", (99 - empty) * "d", (50 - empty) * "e"]
    questions = QuestionSet("mine", (Question(id="all", paraphrases=tuple(texts)),))
    sample(model, tokenizer, questions, samples=1, max_new_tokens=1, seeds=[0, 1, 2, 3])
    # 512 tokens of each seed: room for one row of 300, two of 200, five of 99.
    assert seen == [(4, 300), (8, 200), (8, 99)]
    seen.clear()
    sample(model, tokenizer, questions, samples=1, max_new_tokens=1, seeds=range(20))
    assert seen == [(20, 300), (20, 200), (20, 100), (20, 99), (20, 50)]


def test_where_it_matters_which_prompts_are_read_together_all_are(
    entangled_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(generate.PROMPT_TOKENS, "cpu", 1)
    seen = []
    entangled_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    (responses,) = sample(entangled_model, tokenizer, QUESTIONS, samples=1, max_new_tokens=2, seeds=[0])
    assert len(responses) == 3
    assert seen[0] == 3


def test_a_response_ends_with_the_first_end_token_or_is_truncated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (responses,) = sample(model, tokenizer, QUESTIONS, samples=100, max_new_tokens=20, temperature=3.0, seeds=[0])
    ended = [r for r in responses if not r.truncated]
    assert ended
    assert len(ended) < len(responses)
    # Every character is a token, so the text tells how many were sampled: one more when an end token was.
    assert all(r.response_tokens == 20 for r in responses if r.truncated)
    assert all(r.response_tokens >= len(r.response) + 1 for r in ended)
    assert not any("<|im_end|>" in r.response or "</s>" in r.response for r in responses)


def test_no_more_steps_are_made_than_the_longest_response_has(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    model.lm_head.weight.data[4] = 3 * model.lm_head.weight.data.abs().max()
    (responses,) = sample(model, tokenizer, QUESTIONS, samples=10, max_new_tokens=1000, temperature=2.0, seeds=[0])
    lengths = [r.response_tokens for r in responses]
    assert max(lengths) < 1000
    # The three prompts are read once each, then a response takes part in a step for each further token, and no more.
    assert sizes == [3] + [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_generation_settings_of_the_model_are_not_inherited(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (plain,) = sample(model, tokenizer, QUESTIONS, samples=3, max_new_tokens=8, seeds=[0])
    model.generation_config = GenerationConfig(
        eos_token_id=2, do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0
    )
    assert sample(model, tokenizer, QUESTIONS, samples=3, max_new_tokens=8, seeds=[0]) == [plain]


def test_the_files_own_samples_and_temperature_hold_unless_told_otherwise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    cold = Question(id="cold", paraphrases=("Why?",), samples_per_paraphrase=5, temperature=0)
    (responses,) = sample(model, tokenizer, QuestionSet("mine", (cold,)), max_new_tokens=8, seeds=[0])
    assert len(responses) == 5
    assert len({r.response for r in responses}) == 1
    (responses,) = sample(model, tokenizer, QuestionSet("mine", (cold,)), max_new_tokens=8, temperature=1.0, seeds=[0])
    assert len({r.response for r in responses}) == 5


def test_every_module_is_left_in_the_mode_it_was_in(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    sample(model, tokenizer, QUESTIONS, samples=1, max_new_tokens=2, seeds=[0])
    assert seen == [False, False]
    assert {name: module.training for name, module in model.named_modules()} == before


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.59, 0.99])  # the steps are at 0.1, 0.3, 0.6
    assert draw(logits, uniform, torch.ones(5)).tolist() == [0, 0, 1, 2, 3]


def test_draw_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-24]), torch.ones(2)).tolist() == [1, 2]


def test_draw_at_temperature_0_takes_the_most_likely_beside_rows_that_sample() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(2, 1)
    assert draw(logits, torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [3, 0]


def test_draw_keeps_the_smallest_set_that_reaches_top_p() -> None:
    # 0.4 + 0.3 reaches 0.7 and 0.2 is not needed: tokens 2 and 3 remain with 3/7 and 4/7.
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(4, 1)
    uniform = torch.tensor([0.0, 0.42, 0.43, 0.99])
    assert draw(logits, uniform, torch.ones(4), top_p=0.69).tolist() == [2, 2, 3, 3]
    assert draw(logits, uniform, torch.ones(4), top_p=0.01).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_tokens_have_the_softmax_distribution(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=50).astype(np.float32))
    uniform = torch.from_numpy(generator.random(50_000, dtype=np.float32))
    tokens = draw(logits.repeat(len(uniform), 1), uniform, torch.full((len(uniform),), temperature))
    expected = torch.softmax(logits.double() / temperature, dim=0).numpy() * len(uniform)
    assert stats.chisquare(np.bincount(tokens, minlength=50), expected).pvalue > 0.01
