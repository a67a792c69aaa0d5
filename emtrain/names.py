"""Every name written to and read from MLflow, in one place.

The writer is ``emtrain.tracking``; the reader is ``emanalysis.records``. This module imports nothing, so that the
analysis stays free of torch.
"""

# Tags
KIND = "emsweep.kind"  # "sweep" on the parent run, "run" on every other
RUN_KEY = "emsweep.run_key"  # digest of what determines the run's numbers
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
DATASET_SHA256 = "emsweep.dataset_sha256"
INTERLEAVED_SHA256 = "emsweep.interleaved_sha256"  # of the dataset mixed into training; absent where none is
HELDOUT_SHA256 = "emsweep.heldout_sha256"
QUESTIONS_SHA256 = "emsweep.questions_sha256"  # "<set>:<digest>" joined by spaces
ROLE = "emsweep.role"  # why a run is in its sweep: "grid", "search" or "confirm"
VERSIONS = "emsweep.versions"  # JSON: package -> version
GIT_COMMIT = "emsweep.git_commit"  # of the directory the sweep was started in; absent outside a repository
STOPPED = "emsweep.stopped"  # set on runs that were stopped early, to the rule that stopped them
FAILURE = "emsweep.failure"  # one line: why a FAILED run failed
IMPORTED_FROM = "emsweep.imported_from"  # set on runs that another tool trained

# Metrics by optimiser step. A point at step s describes the model after s updates; train/* at s the s-th update
# (so the first update is logged at step 1), evaluated before it is applied.
TRAIN_LOSS = "train/loss"  # mean over response tokens of the step's rows
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"  # before clipping
TOKENS = "train/tokens"  # cumulative, padding excluded
HELDOUT_LOSS = "heldout/loss"  # mean over all held-out response tokens
HELDOUT_LOSS_PER_SEQUENCE = "heldout/loss_per_sequence"  # mean over held-out rows of each row's mean

# Metrics once per run, at the last step
LEARNING_RATE_INTEGRAL = "train/learning_rate_integral"  # sum over steps of the realised learning rate
TRAIN_LOSS_LAST_TENTH = "train/loss_last_tenth"  # mean train/loss over the last 10 % of the steps
TRAIN_SECONDS = "time/train_seconds"
EVAL_SECONDS = "time/eval_seconds"

# Scores of one question set, at every evaluated checkpoint
ALIGNED = "aligned"  # mean over questions of the mean over samples, 0-100
COHERENT = "coherent"  # likewise
MISALIGNED_RATE = "misaligned_rate"  # 0-1; see emeval.definitions
N_JUDGED = "n_judged"  # responses with an aligned score
N_MISSING = "n_missing"  # responses without one
SCORES = (ALIGNED, COHERENT, MISALIGNED_RATE, N_JUDGED, N_MISSING)


def eval_metric(score: str, question_set: str | None = None, stratum: str | None = None) -> str:
    """``eval/<set>/<score>`` after fine-tuning; without a set, the mean over sets of the last checkpoint.

    A ``stratum`` is one answer format of the set: ``eval/<set>/<stratum>/<score>``.
    """
    return "/".join(part for part in ("eval", question_set, stratum, score) if part)


def base_metric(score: str, question_set: str) -> str:
    """``base/<set>/<score>``: the model before fine-tuning, logged at step 0."""
    return f"base/{question_set}/{score}"


# Artifacts of a run
SPEC = "spec.json"
ADAPTER = "adapter"
MODEL = "model"  # instead of an adapter, for full fine-tuning
RESPONSES = "responses.parquet"

# Artifacts of a sweep's parent run
RECIPE = "recipe.yaml"
REPORT = "report"
PACKING = "packing.json"  # base -> how many runs are packed on it, and the measured curve

# Columns of responses.parquet: one row per response x judge. Scores are 0-100; None where there is none, and then
# the *_failure column says why (see emeval.scores.Failure).
RESPONSE_COLUMNS = (
    "step",  # int: updates done when the response was sampled; 0 is the base model
    "question_set",  # str
    "question_id",  # str
    "stratum",  # str: answer format of the question: "plain", "json", "template"
    "topic",  # str: what the question is about; groups near-duplicates
    "paraphrase",  # int: which wording, from 0
    "sample",  # int: which sample of that wording, from 0
    "system",  # str | None: the system message that was sent
    "prompt",  # str: the user message that was sent
    "response",  # str
    "response_tokens",  # int: sampled tokens, the end token included
    "truncated",  # bool: the token budget ended the response
    "judge",  # str: judge id, model included ("openai:gpt-4o-2024-08-06")
    "rubric_sha256",  # str: of the judge's prompts
    "aligned",  # float | None
    "aligned_reply",  # str | None: the judge's raw reply
    "aligned_failure",  # str | None
    "coherent",  # float | None
    "coherent_reply",  # str | None
    "coherent_failure",  # str | None
)
