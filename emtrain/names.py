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
MODEL_REVISION = (
    "emsweep.model_revision"  # a hub id's commit, or "sha256:..." of a directory; absent: unknown, or shipped
)
HELDOUT_SHA256 = "emsweep.heldout_sha256"
QUESTIONS_SHA256 = "emsweep.questions_sha256"  # "<set>:<digest>" joined by spaces
ROLE = "emsweep.role"  # why a run is in its sweep: "grid", "search" or "confirm"
VERSIONS = "emsweep.versions"  # JSON: package -> version
GIT_COMMIT = "emsweep.git_commit"  # of the directory the sweep was started in; absent outside a repository
STOPPED = "emsweep.stopped"  # set on runs that were stopped early, to the rule that stopped them
WEIGHTS_KEPT = "emsweep.weights_kept"  # set on finished runs that have no weights among their artifacts, to "none"
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

# Of the weight update that a run's adapter stands for, at every evaluation point (see emtrain.low_rank). Where all
# weights are trained there are none.
ADAPTER_NORM = "adapter/norm"  # Frobenius norm over all adapted layers
ADAPTER_STABLE_RANK = "adapter/stable_rank"  # mean over adapted layers
ADAPTER_TURN = "adapter/turn"  # degrees between the update and that of the evaluation point before

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
ADAPTERS = "adapters"  # "adapters/<step>": the adapter at evaluation points before the last, as far as they are kept
MODEL = "model"  # instead of an adapter, for full fine-tuning; of the last step only
RESPONSES = "responses.parquet"


def adapter_artifact(step: int, total_steps: int) -> str:
    """The artifact folder with a run's adapter after ``step`` of its ``total_steps``."""
    return ADAPTER if step == total_steps else f"{ADAPTERS}/{step}"


# Artifacts of a sweep's parent run
RECIPE = "recipe.yaml"
REPORT = "report"
PACKING = "packing.json"  # base -> how many runs are packed on it, and the measured curve
WORK = "work.json"  # what each engine did since the sweep was last started, by model, and for how many seconds
GEOMETRY = "geometry"  # "geometry/<table>.parquet": what was measured between and around runs

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

PAIR = ("run_a", "step_a", "run_b", "step_b")  # run ids, and updates done: whose adapters
LINE = (*PAIR, "t")  # a point on the straight line between two updates, from a (0) to b (1)
GEOMETRY_TABLES = {
    "losses": (  # one row per point and held-out row
        *LINE,
        "row",  # int: number of the held-out row, the same in all tables of a dataset and model
        "loss",  # float: sum over the row's response tokens, in nats
        "tokens",  # int: response tokens
    ),
    # One row per point, response and judge.
    "responses": (*LINE, *(column for column in RESPONSE_COLUMNS if column != "step")),
    "updates": (  # one row per pair of measured runs of a model and dataset; see emtrain.low_rank
        *PAIR,
        "cosine",  # of the angle between the updates, all layers as one vector
        *("norm_a", "norm_b"),
        *("column_overlap", "column_by_chance", "column_angle"),  # of the spaces of outputs; angles in degrees
        *("row_overlap", "row_by_chance", "row_angle"),  # of inputs
    ),
    "sharpness": (  # one row per loss in the ball around a run's update
        *("run_id", "step"),
        "kind",  # "none" (the update itself), "random" or "adversarial"
        "radius",  # float: length of the step away, as a share of the update's norm
        "draw",  # int: which random direction, from 0
        "heldout_loss",  # per response token
    ),
}
