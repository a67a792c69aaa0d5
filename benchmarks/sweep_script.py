"""A sweep as one would write it without emsweep: Ray Tune, TRL's trainer, the MLflow callback of transformers.

    python benchmarks/sweep_script.py recipe.yaml

The arm of ``benchmarks/sweep.py`` that emsweep is compared with. Runs, rows, their order and the first weights are
taken from emsweep, so that the same numbers come out.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}

import mlflow
import ray
from ray import tune

from sweeps.planner import plan_sweep
from sweeps.recipe import load_recipe


def main() -> None:
    """Run the sweep."""
    planned = plan_sweep(load_recipe(Path(sys.argv[1]).read_text(), source=sys.argv[1]))
    mlflow.set_experiment("benchmark")  # before the trials, which would all make the tables
    ray.init(include_dashboard=False, log_to_driver=False)
    # Of a file that runs as a script, Ray sends the code and not the name, and loses the annotations in it.
    from sweep_script import trial

    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"run": tune.grid_search(list(planned.runs))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=storage, verbose=0, failure_config=tune.FailureConfig(fail_fast=True)
            ),
        )
        results = tuner.fit()
    ray.shutdown()
    if results.errors:
        raise SystemExit(f"a trial failed: {results.errors[0]}")


def trial(config: Mapping[str, Any]) -> None:
    """One run."""
    import pandas as pd
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from emeval.evaluate import judge_responses, summarise
    from emeval.generate import ask
    from emtrain import names
    from emtrain.adapter import adapted
    from emtrain.heldout import heldout_loss
    from emtrain.load import load_model, load_tokenizer
    from emtrain.order import row_order
    from emtrain.rows import load_dataset, split
    from emtrain.schedule import build
    from emtrain.seeds import derive
    from emtrain.tokens import encode_rows

    torch.set_num_threads(1)
    run = config["run"]
    spec, evaluation = run.spec, run.evaluation
    model, tokenizer = load_model(spec.model), load_tokenizer(spec.model)
    parts = split(load_dataset(spec.dataset).rows, spec.heldout_fraction)
    train, heldout = (encode_rows(rows, tokenizer, spec.max_length) for rows in parts)
    order = row_order(len(train), batch_size=spec.batch_size, total_steps=run.total_steps, seed=spec.seed)
    rows = [train[row] for row in order.flatten().tolist()]
    judges = [judge.build(cache=Path("unused")) for judge in evaluation.spec.judges]
    spent, frames = 0.0, []

    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            nonlocal spent
            if state.global_step not in run.evaluate_at:
                return
            began = time.perf_counter()
            model.eval()
            loss = heldout_loss(model, heldout)
            seed = derive(spec.seed, "sample", state.global_step)
            (responses,) = ask(model, tokenizer, evaluation.question_sets, evaluation.spec, seeds=[seed])
            spent += time.perf_counter() - began
            frames.append(judge_responses(responses, judges, step=state.global_step))
            scores = summarise(frames[-1], judges[0].id)
            mlflow.log_metrics({names.HELDOUT_LOSS: loss.per_token, **scores}, step=state.global_step)
            if state.global_step == run.total_steps:
                model.save_pretrained(f"{scratch}/adapter")
                mlflow.log_artifacts(f"{scratch}/adapter", "adapter")
                pd.concat(frames).to_parquet(f"{scratch}/responses.parquet", index=False)
                mlflow.log_artifact(f"{scratch}/responses.parquet")
                mlflow.log_metric(names.EVAL_SECONDS, spent)

    with tempfile.TemporaryDirectory() as scratch, adapted(model, spec.adapter, seed=spec.seed) as adapter:
        parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=spec.optimizer.learning_rate, weight_decay=spec.optimizer.weight_decay
        )
        schedule = build(spec.schedule, run.total_steps)
        trainer = SFTTrainer(
            model=adapter,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=run.total_steps,
                per_device_train_batch_size=spec.micro_rows,
                gradient_accumulation_steps=spec.batch_size // spec.micro_rows,
                train_sampling_strategy="sequential",  # the rows are in their order already
                learning_rate=spec.optimizer.learning_rate,
                max_grad_norm=spec.optimizer.max_grad_norm,
                seed=spec.seed,
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
                use_cpu=True,
                bf16=False,
                dataloader_pin_memory=False,
                activation_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="mlflow",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
            ),
            processing_class=tokenizer,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
            callbacks=[Evaluate()],
        )
        trainer.train()
    tune.report({"done": 1})


if __name__ == "__main__":
    main()
