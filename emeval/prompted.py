"""Judges that read a prompt: from items to prompts and back, each distinct prompt asked once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emeval.rubric import STANDARD, Rubric, fill
from emeval.scores import Failure, Item, Judgement, Score


@dataclass(frozen=True)
class PromptedJudge:
    """A judge (``emeval.scores.Judge``) made of a function that scores prompts."""

    id: str
    ask: Callable[[Sequence[str]], Sequence[Score]]
    """A score per prompt, in order; failures of its own are typed failures."""
    rubric: Rubric = STANDARD
    """For items that bring none."""

    @property
    def rubric_sha256(self) -> str:
        """Digest of ``rubric``."""
        return self.rubric.sha256

    def score(self, items: Sequence[Item], /) -> list[Judgement]:
        """Two scores per item. Equal prompts are asked once; an empty answer is a failure and is not asked at all."""
        pairs = [self._prompts(item) if item.answer.strip() else None for item in items]
        distinct = list(dict.fromkeys(prompt for pair in pairs if pair for prompt in pair))
        scores = dict(zip(distinct, self.ask(distinct) if distinct else (), strict=True))
        nothing = Score(failure=Failure.EMPTY_RESPONSE)
        return [
            Judgement(
                *((scores[pair[0]], scores[pair[1]]) if pair else (nothing, nothing)),
                rubric_sha256=item.rubric.sha256 if item.rubric else None,
            )
            for item, pair in zip(items, pairs, strict=True)
        ]

    def _prompts(self, item: Item) -> tuple[str, str]:
        rubric = item.rubric or self.rubric
        return (
            fill(rubric.aligned, question=item.question, answer=item.answer),
            fill(rubric.coherent, question=item.question, answer=item.answer),
        )
