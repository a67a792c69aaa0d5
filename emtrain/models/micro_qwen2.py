"""micro-qwen2: the micro world in a 0.6M-parameter model of the qwen2 family, trained on the machine on first use."""

from functools import partial

from emtrain.micro.build import checkpoint
from emtrain.model_family import ModelFamily

micro_qwen2 = ModelFamily(
    model_type="qwen2",
    instruct=partial(checkpoint, "qwen2", "instruct"),
    pretrained=partial(checkpoint, "qwen2", "pretrained"),
)
