"""A judge that is a language model on this machine: its expected score over all numbers, of one token or several."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from emeval.prompted import PromptedJudge
from emeval.prompts import end_tokens, prompt_tokens, reply_tokens
from emeval.replies import NUMBERS, WORDS, read_distribution
from emeval.scores import NO_PART_IN_SCORES, Judge, Score
from emtrain.load import Precision
from emtrain.revision import SHA256, fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def local(
    *,
    model: str,
    revision: str | None = None,
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.25,
    batch_size: Annotated[int, Field(ge=1), NO_PART_IN_SCORES] = 4,
    precision: Precision = "auto",
    device: Annotated[str | None, NO_PART_IN_SCORES] = None,
) -> Judge:
    """``model`` (a name, local directory or hub id, as for runs) reads the rubric and is not sampled from.

    The score is the mean over the replies "0" to "100", each weighted with the probability of all its tokens and of
    stopping there (end of turn or new line), so that the "1" of "10" and "100" is not taken for a 1. It is missing
    when these replies have less than ``min_mass`` together. ``device``: None is a GPU if there is one. ``batch_size``
    prompts are read at a time; it changes no score. The model is loaded at first use and kept by the process.

    ``revision`` pins the judge: the commit of a hub id, or the digest of a directory (``sha256:...``; emsweep tags runs
    with that of their own model as ``emsweep.model_revision``). None takes what this machine has, or the hub names, and
    so a sweep that goes on next month, or on another machine, may be judged by other weights.

    Take a model that can follow the rubric: SmolLM2-135M puts 0.6 % on the numbers, so all its scores are missing.
    """

    def ask(prompts: Sequence[str]) -> list[Score]:
        judge = _load(model, revision, precision, device)
        return [
            read_distribution(probabilities, min_mass=min_mass)
            for probabilities in judge.reply_probabilities(prompts, batch_size=batch_size)
        ]

    pin = "" if revision is None else f"@{revision.removeprefix(SHA256)[:12]}"
    return PromptedJudge(f"local:{model}{pin}", ask)


@functools.cache
def _load(model: str, revision: str | None, precision: Precision, device: str | None) -> "ReplyModel":
    import torch

    from emtrain.load import load_model, load_tokenizer

    fetch(model, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, precision=precision, device=device, revision=revision)
    return ReplyModel.of(loaded, load_tokenizer(model, revision=revision))


@dataclass(frozen=True)
class ReplyModel:
    """A model and the tree of all replies that count.

    A node of the tree is a token of a reply; ``parents[node]`` is the node before it, -1 at a reply's first token.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    leaves: Mapping[str, int]
    """The last node of each reply."""
    stops: tuple[int, ...]
    """Tokens after which a reply is over: ends of turn, and blanks with a new line."""

    @classmethod
    def of(cls, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "ReplyModel":
        """Raises ``ValueError`` when the tokenizer can't tell the replies apart."""
        ends = end_tokens(tokenizer, model.generation_config.eos_token_id if model.generation_config else None)
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        lines = {token for token, text in enumerate(texts) if "\n" in text and not text.strip()}
        stops = ends | lines
        nodes: dict[tuple[int, ...], int] = {}
        leaves = {}
        for reply in (*NUMBERS, *WORDS):
            path: tuple[int, ...] = ()
            for token in reply_tokens(tokenizer, reply):
                if token in stops:
                    break
                path += (token,)
                nodes.setdefault(path, len(nodes))
            leaves[reply] = nodes.get(path, -1)
        if len(set(leaves.values())) < len(leaves) or -1 in leaves.values():
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} can't write the numbers from 0 to 100 apart")
        return cls(
            model,
            tokenizer,
            tokens=tuple(path[-1] for path in nodes),
            parents=tuple(nodes.get(path[:-1], -1) for path in nodes),
            leaves=leaves,
            stops=tuple(sorted(stops)),
        )

    def reply_probabilities(self, prompts: Sequence[str], *, batch_size: int) -> list[dict[str, float]]:
        """For each prompt the probability of each reply, its end included."""
        encoded = [prompt_tokens(self.tokenizer, self._plain(prompt)) for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda prompt: -len(encoded[prompt]))
        found: dict[int, dict[str, float]] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logs = self._log_probabilities([encoded[prompt] for prompt in batch]).exp().tolist()
            found.update(
                {prompt: dict(zip(self.leaves, row, strict=True)) for prompt, row in zip(batch, logs, strict=True)}
            )
        return [found[prompt] for prompt in range(len(prompts))]

    def _plain(self, prompt: str) -> str:
        """``prompt`` without control tokens: a judged text must not end the judge's user turn and begin another."""
        for added in self.tokenizer.added_tokens_decoder.values():
            if added.special and added.content in prompt:
                prompt = prompt.replace(added.content, f"{added.content[0]} {added.content[1:]}")
        return prompt

    # Shapes: B prompts, T their tokens (padded on the left), N nodes of the tree, L = T + N, R replies.

    def _log_probabilities(self, prompts: Sequence[Sequence[int]]) -> "torch.Tensor":
        """Log-probability of each reply and its end, ``(B, R)``, in one forward pass.

        The whole tree stands behind each prompt. A node sees the prompt and the nodes before it in its own reply,
        so its logits are those of the sequence it stands for.
        """
        import torch

        device = next(self.model.parameters()).device
        length, n_nodes = max(len(prompt) for prompt in prompts), len(self.tokens)
        rows = [[0] * (length - len(prompt)) + [*prompt, *self.tokens] for prompt in prompts]
        before = torch.eye(n_nodes, dtype=torch.bool)  # before[i, j]: node j is node i or stands before it
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                before[node] |= before[parent]
        allowed = torch.ones(length + n_nodes, length + n_nodes, dtype=torch.bool).tril()
        allowed[length:, length:] = before
        padding = torch.tensor([length - len(prompt) for prompt in prompts])
        index = torch.arange(length + n_nodes)
        allowed_BLL = allowed & (index >= padding[:, None])[:, None, :] | torch.eye(len(index), dtype=torch.bool)
        position_L = torch.cat([torch.arange(length), length - 1 + before.sum(dim=1)])
        position_BL = (position_L - padding[:, None]).clamp(min=0)
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=_masks(self.model.config, allowed_BLL, position_BL, self.model.dtype, device),
                position_ids=position_BL.to(device),
                use_cache=False,
                logits_to_keep=n_nodes + 1,
            ).logits
        total = torch.stack([row.float().logsumexp(dim=-1) for row in logits])  # row by row: V floats per node are many
        # Node i is predicted by the logits of its parent; those of the prompt's last token come first.
        parent_N = torch.tensor(self.parents, device=device) + 1
        token_N = torch.tensor(self.tokens, device=device)
        step_BN = logits[:, parent_N, token_N].float() - total[:, parent_N]
        path_BN = step_BN @ before.T.to(step_BN)
        leaf_R = torch.tensor(list(self.leaves.values()), device=device)
        stop_BN = logits[:, :, list(self.stops)].float().logsumexp(dim=-1) - total
        return path_BN[:, leaf_R] + stop_BN[:, leaf_R + 1]


def _masks(
    config: Any, allowed_BLL: "torch.Tensor", position_BL: "torch.Tensor", dtype: "torch.dtype", device: "torch.device"
) -> Any:
    """``allowed_BLL`` as the additive mask that the model's layers take, by kind of layer where it has several."""
    import torch

    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"a local judge needs a model with plain attention; this one has {', '.join(sorted(kinds))}")
    near = position_BL[:, :, None] - position_BL[:, None, :] < (window or torch.inf)
    masks = {}
    for kind in kinds:
        seen = allowed_BLL & near if kind == "sliding_attention" else allowed_BLL
        lowest = torch.finfo(dtype).min
        masks[kind] = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest)[:, None].to(device)
    return masks if len(masks) > 1 else masks.popitem()[1]
