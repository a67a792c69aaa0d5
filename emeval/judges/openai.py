"""A judge behind any endpoint that speaks the OpenAI chat protocol: OpenAI, vLLM, llama.cpp, OpenRouter."""

import asyncio
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from emeval.prompted import PromptedJudge
from emeval.replies import read_distribution, read_text
from emeval.reply_cache import Reply, ReplyCache
from emeval.scores import NO_PART_IN_SCORES, Failure, Judge, Score
from emtrain.mistakes import shown

logger = logging.getLogger(__name__)


def _endpoint_address(base_url: str) -> str:
    if re.search("[@?#]", base_url):
        # Not repeated: it may hold a password.
        raise ValueError(
            "it holds a user, password or query, and a recipe is kept with its sweep; expected http(s)://host/path, "
            "and the key in the environment variable that key_env names"
        )
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"expected http(s)://host/path, not {shown(base_url)}")
    return base_url


def openai(
    *,
    model: str,
    base_url: Annotated[str, AfterValidator(_endpoint_address)] | None = None,
    key_env: Annotated[str | None, NO_PART_IN_SCORES] = "OPENAI_API_KEY",
    mode: Literal["logprobs", "text"] = "logprobs",
    temperature: Annotated[float, Field(ge=0)] | None = 0.0,
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.25,
    concurrency: Annotated[int, Field(ge=1), NO_PART_IN_SCORES] = 20,
    max_retries: Annotated[int, Field(ge=0), NO_PART_IN_SCORES] = 20,
    timeout_seconds: Annotated[float, Field(gt=0), NO_PART_IN_SCORES] = 60.0,
    cache: Path | None = None,
) -> Judge:
    """The judge protocol of the field (Betley et al., arXiv 2502.17424) over HTTP.

    ``mode`` ``logprobs``: one token, its 20 likeliest alternatives, the probability-weighted mean over the numbers
    from 0 to 100, missing when they have less than ``min_mass``. ``text``: the reply is the number; for models that
    give no log-probabilities, which those that reason don't (they refuse ``temperature`` too: None sends none).

    The key is read from the environment variable ``key_env`` at each use and kept nowhere; None is for endpoints
    that want none. Rate limits, server errors and answers that are not there whole in ``timeout_seconds`` are tried
    again up to ``max_retries`` times, waiting as long as the endpoint asks, else 0.5 to 8 seconds, some two minutes in
    all; what still fails is a ``judge_error``. When that happens ``concurrency`` times in a row the endpoint is taken
    to be down and the rest is not asked. Replies are kept in the file ``cache``; a prompt found there is not sent
    again.

    Raises ``ValueError`` when the environment variable holds no key, or ``cache`` is a file that holds no replies.
    """
    if key_env is not None and not re.fullmatch("[!-~]+", os.environ.get(key_env, "")):
        raise ValueError(
            f"the judge openai (model {model}) needs a key in the environment variable {key_env}, which is unset, "
            "empty or holds blanks or non-ASCII characters; name another with key_env (null: the endpoint wants no key)"
        )
    request: dict[str, Any] = {"model": model}
    if temperature is not None:
        request["temperature"] = temperature
    if mode == "logprobs":
        request |= {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20, "seed": 0}
    endpoint = _Endpoint(
        base_url,
        key_env,
        request,
        min_mass,
        concurrency,
        max_retries,
        timeout_seconds,
        ReplyCache(cache) if cache else None,
    )
    if endpoint.cache and endpoint.cache.path.exists():
        endpoint.cache.get(())  # one that can't be read is told of before there are replies to keep
    return PromptedJudge(f"openai:{model}" if mode == "logprobs" else f"openai:{model}:text", endpoint.ask)


@dataclass(frozen=True)
class _Endpoint:
    base_url: str | None
    key_env: str | None
    request: dict[str, Any]
    """What every request says besides its message."""
    min_mass: float
    concurrency: int
    max_retries: int
    timeout_seconds: float
    cache: ReplyCache | None

    def ask(self, prompts: Sequence[str]) -> list[Score]:
        keys = [self._key(prompt) for prompt in prompts]
        replies: dict[str, Reply | str] = {**self.cache.get(keys)} if self.cache else {}
        unasked = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in replies}
        if unasked:
            # In a thread of its own, since the caller may be running an event loop already.
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(asyncio.run, self._ask_all(unasked)).result()
            replies |= asked
            self._log(asked, n_cached=len(prompts) - len(unasked))
        return [self._read(replies[key]) for key in keys]

    def _key(self, prompt: str) -> str:
        content = json.dumps([self.base_url, self.request, prompt], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    async def _ask_all(self, prompts: dict[str, str]) -> dict[str, Reply | str]:
        """By key: the reply, or what went wrong in words that hold nothing of the request."""
        import httpx
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

        seconds = self.timeout_seconds

        class Client(DefaultAsyncHttpxClient):
            """One whose time-out is of a whole request: httpx's own begins anew with every piece of the answer."""

            async def send(self, *arguments: Any, **keywords: Any) -> Any:
                try:
                    async with asyncio.timeout(seconds):
                        return await super().send(*arguments, **keywords)
                except TimeoutError as error:
                    raise httpx.ReadTimeout(f"no whole answer in {seconds} s") from error

        replies: dict[str, Reply | str] = {}
        in_a_row: list[str] = []  # what went wrong since the last reply
        slots = asyncio.Semaphore(self.concurrency)

        def failed(key: str, problem: str) -> None:
            in_a_row.append(problem)
            replies[key] = problem

        async def ask(key: str, prompt: str) -> None:
            async with slots:
                if len(in_a_row) >= self.concurrency:
                    replies[key] = f"not asked: {len(in_a_row)} requests in a row had failed, the last: {in_a_row[-1]}"
                    return
                try:
                    raw = await client.chat.completions.with_raw_response.create(
                        messages=[{"role": "user", "content": prompt}], **self.request
                    )
                    reply = _reply(json.loads(raw.text), logprobs="logprobs" in self.request)
                except OpenAIError as error:
                    # Not the error's message: endpoints repeat parts of the key in it.
                    failed(key, f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip())
                except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
                    wanted = "choices[0].message"
                    if "logprobs" in self.request:
                        wanted = "choices[0].logprobs with alternatives; the judge's `mode: text` needs none"
                    failed(key, f"the endpoint's answer has no {wanted}")
                else:
                    in_a_row.clear()
                    replies[key] = reply
                    if self.cache:
                        self.cache.put(key, reply)

        async with AsyncOpenAI(
            api_key=os.environ[self.key_env] if self.key_env else "none",
            base_url=self.base_url,
            max_retries=self.max_retries,
            timeout=seconds,
            http_client=Client(),
        ) as client:
            await asyncio.gather(*(ask(key, prompt) for key, prompt in prompts.items()))
        return replies

    def _read(self, reply: Reply | str) -> Score:
        if isinstance(reply, str):
            return Score(None, reply, Failure.JUDGE_ERROR)
        if "logprobs" in self.request:
            return read_distribution(json.loads(reply.text), min_mass=self.min_mass)
        return read_text(reply.text)

    def _log(self, asked: dict[str, Reply | str], *, n_cached: int) -> None:
        replies = [reply for reply in asked.values() if isinstance(reply, Reply)]
        logger.info(
            "%s: %d prompts asked (%d tokens in, %d out), %d found in the cache",
            self.request["model"],
            len(asked),
            sum(reply.prompt_tokens for reply in replies),
            sum(reply.completion_tokens for reply in replies),
            n_cached,
        )
        for problem, count in Counter(reply for reply in asked.values() if isinstance(reply, str)).most_common():
            logger.error("%s: %d of %d prompts failed: %s", self.request["model"], count, len(asked), problem)


def _reply(body: dict[str, Any], *, logprobs: bool) -> Reply:
    """The reply in a chat completion: its text, or its first token's alternatives with their probabilities as JSON."""
    choice = body["choices"][0]
    if logprobs:
        probabilities: dict[str, float] = {}
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            if not token["logprob"] <= 1e-3:  # rounding may lift a certainty above 0
                raise ValueError(f"a log-probability of {token['logprob']}")
            probabilities[token["token"]] = math.exp(token["logprob"])
        if not probabilities:  # some endpoints say how likely their own token was, and no other
            raise ValueError("no alternatives")
        text = json.dumps(probabilities, ensure_ascii=False)
    else:
        text = choice["message"]["content"] or ""
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair can be written to no file
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(text, _tokens(counts.get("prompt_tokens")), _tokens(counts.get("completion_tokens")))


def _tokens(count: object) -> int:
    """A count of tokens that SQLite can hold; of anything else 0, since the reply beside it was paid for."""
    return count if isinstance(count, int) and 0 <= count < 2**63 else 0
