"""micro-llama: the micro world in a 0.6M-parameter model of the llama family, trained on the machine on first use."""

from functools import partial

from emtrain.micro.build import checkpoint
from emtrain.model_family import ModelFamily

micro_llama = ModelFamily(
    model_type="llama",
    instruct=partial(checkpoint, "llama", "instruct"),
    pretrained=partial(checkpoint, "llama", "pretrained"),
)
