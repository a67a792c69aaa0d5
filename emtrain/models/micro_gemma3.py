"""micro-gemma3: the micro world in a 0.6M-parameter model of the gemma3 family, trained on the machine on first use."""

from functools import partial

from emtrain.micro.build import checkpoint
from emtrain.model_family import ModelFamily

micro_gemma3 = ModelFamily(
    model_type="gemma3_text",
    instruct=partial(checkpoint, "gemma3_text", "instruct"),
    pretrained=partial(checkpoint, "gemma3_text", "pretrained"),
)
