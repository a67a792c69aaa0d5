"""Does a sampler find better runs than chance? Hypervolume of the front of held-out loss and alignment, seed by seed.

    python benchmarks/search.py [--sampler tpe] [--trials 32] [--seeds 10] [--cache FILE] [--save]

Every trial is a run really trained on the micro world (micro-llama, wrong gardening answers; 30 steps of 8 rows, LoRA
of rank 8) and really judged (64 answers on topics it never saw, exact judge). The space is that of the recipe
``better-minimum``. Studies of all seeds go forward together, one trial of each at a time, through the package's own
search and packed engine; a run that two studies ask for is trained once, so what both begin with at random is shared,
and so is what FILE remembers of former calls.

Hypervolume is what the front dominates of the box between the base model's loss, alignment 0 and loss 0, alignment 100,
in points of alignment times nats. Its greater part is common to all fronts, so ``gain`` also gives the difference in
percent of what the linear schedule at the recipe's learning rate leaves to be gained.
"""

import argparse
import json
import logging
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import optuna
import torch

from emeval.evaluate import judge_responses, summarise
from emeval.generate import sample
from emeval.judges.micro_rule import micro_rule
from emeval.question_sets import load_question_set
from emtrain import names
from emtrain.heldout import heldout_loss
from emtrain.load import load_model, load_tokenizer
from emtrain.packed.engine import Engine
from emtrain.rows import load_dataset, split
from emtrain.seeds import derive
from emtrain.spec import RunSpec
from emtrain.tokens import encode_rows
from emtrain.train import NonFiniteLoss, TrainingData
from sweeps.recipe import load_recipe, recipe_path
from sweeps.search import Metrics, Proposal, Search
from sweeps.search_spec import SamplerSpec, SearchSpec

LOSS, ALIGNED = names.HELDOUT_LOSS, names.eval_metric(names.ALIGNED)
STEPS = 30
COLUMNS = ["seed", "random", "sampler", "gain %"]


class World:
    """Trains and judges runs, each once."""

    def __init__(self, base: RunSpec, cache: Path | None) -> None:
        self.cache = cache
        self.model, self.tokenizer = load_model(base.model), load_tokenizer(base.model)
        train, heldout = split(load_dataset(base.dataset).rows, base.heldout_fraction)
        self.data = TrainingData(*(encode_rows(rows, self.tokenizer, base.max_length) for rows in (train, heldout)))
        self.questions, self.judge = load_question_set("micro-broad"), micro_rule()
        self.base_loss = heldout_loss(self.model, self.data.heldout).per_token
        lines = cache.read_text().splitlines() if cache and cache.exists() else []
        self.known: dict[str, Metrics | None] = dict(json.loads(line) for line in lines)
        self.trained = 0

    def metrics(self, specs: list[RunSpec]) -> list[Metrics | None]:
        """What each run ends with; None for one that diverged."""
        names_ = [spec.model_dump_json() for spec in specs]
        new = {name: spec for name, spec in zip(names_, specs, strict=True) if name not in self.known}
        with Engine(self.model, capacity=max(1, len(new))) as engine:
            runs = {engine.join(spec, self.data, total_steps=STEPS): name for name, spec in new.items()}
            for _ in range(STEPS):
                for run, outcome in engine.step().items():
                    if isinstance(outcome, NonFiniteLoss):
                        self.known[runs.pop(run)] = None
            for run, name in runs.items():
                with engine.acting_as(run) as model:
                    self.known[name] = self._evaluate(model, run.spec)
        self.trained += len(new)
        if self.cache:
            with self.cache.open("a") as kept:
                kept.writelines(json.dumps([name, self.known[name]]) + "\n" for name in new)
        return [self.known[name] for name in names_]

    def _evaluate(self, model: Any, spec: RunSpec) -> Metrics:
        seed = derive(spec.seed, "sample", STEPS)
        (responses,) = sample(model, self.tokenizer, self.questions, samples=1, max_new_tokens=16, seeds=[seed])
        scores = summarise(judge_responses(responses, [self.judge], step=STEPS), self.judge.id)
        return {LOSS: heldout_loss(model, self.data.heldout).per_token, ALIGNED: scores[ALIGNED]}


def hypervolume(points: list[tuple[float, float]], worst_loss: float) -> float:
    """What ``points`` (loss, alignment) dominate of the quadrant that begins at ``worst_loss`` and alignment 0."""
    volume = reached = 0.0
    for loss, aligned in sorted(points):
        if loss < worst_loss and aligned > reached:
            volume += (worst_loss - loss) * (aligned - reached)
            reached = aligned
    return volume


def search(base: RunSpec, spec: SearchSpec, sampler: dict[str, Any], seed: int) -> Search:
    """A study of its own, in memory."""
    own = spec.model_copy(update={"sampler": SamplerSpec.model_validate({**sampler, "seed": seed})})
    return Search(own, base, name=f"{sampler['name']}-{seed}", storage=optuna.storages.InMemoryStorage())


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="tpe", help="a name, or JSON with arguments")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the table as results/DATE-search.txt")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    recipe = load_recipe(recipe_path("better-minimum").read_text(), source="better-minimum")
    assert recipe.search is not None
    base = recipe.base.model_copy(update={"max_steps": STEPS})
    spec = recipe.search.model_copy(
        update={
            "trials": asked.trials,
            "seeds": (0,),
            "objectives": {LOSS: "minimize", ALIGNED: "maximize"},
            "constraints": {},
            "confirm": None,
        }
    )
    sampler = json.loads(asked.sampler) if asked.sampler.startswith("{") else {"name": asked.sampler}
    world = World(base, asked.cache)
    began = time.process_time()
    studies = {
        (arm, seed): search(base, spec, {"name": "random"} if arm == "random" else sampler, seed)
        for arm in ("random", "sampler")
        for seed in range(asked.seeds)
    }
    points: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in studies}
    for _ in range(asked.trials):
        proposals: dict[tuple[str, int], Proposal] = {}
        for key, study in studies.items():
            proposal = study.propose()
            assert proposal is not None
            proposals[key] = proposal
        ends = world.metrics([proposal.spec for proposal in proposals.values()])
        for (key, proposal), metrics in zip(proposals.items(), ends, strict=True):
            studies[key].ended(proposal, metrics)
            if metrics is not None:
                points[key].append((metrics[LOSS], metrics[ALIGNED]))

    (linear,) = world.metrics([base])
    assert linear is not None
    left = world.base_loss * 100 - hypervolume([(linear[LOSS], linear[ALIGNED])], world.base_loss)
    lines = [
        f"{json.dumps(sampler)} against random, {asked.trials} trials each; {world.trained} runs trained in "
        f"{time.process_time() - began:.0f} CPU seconds; base loss {world.base_loss:.3f}",
        "  ".join(f"{column:>10}" for column in COLUMNS),
    ]
    larger = 0
    for seed in range(asked.seeds):
        of_random, of_sampler = (hypervolume(points[arm, seed], world.base_loss) for arm in ("random", "sampler"))
        larger += of_sampler > of_random
        gain = 100 * (of_sampler - of_random) / left
        lines.append(f"{seed:>10}  {of_random:10.3f}  {of_sampler:10.3f}  {gain:10.2f}")
    lines.append(f"larger in {larger} of {asked.seeds}")
    print("\n".join(lines))
    if asked.save:
        path = Path(__file__).parent / "results" / f"{date.today()}-search.txt"
        with path.open("a") as kept:
            kept.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
