"""Adapters come on and go off without a trace, and what is saved loads with plain PEFT."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from emtrain.adapter import adapted, lora_config
from emtrain.spec import AdapterSpec
from emtrain.tokens import Example

SPEC = AdapterSpec(rank=4, alpha=8, rslora=True)
INPUT = torch.tensor([[1, 5, 9, 13, 2, 7]])


def bits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def randomise(adapter: PeftModel) -> None:
    """A fresh adapter does nothing, its B being zero; this one does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def test_the_base_is_bitwise_itself_again(make_model: Callable[[], PreTrainedModel]) -> None:
    model, untouched = make_model(), make_model()
    with adapted(model, SPEC, seed=0) as adapter:
        randomise(adapter)
        assert not torch.equal(adapter(INPUT).logits, untouched(INPUT).logits)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert bits(model).keys() == bits(untouched).keys()
    assert all(torch.equal(tensor, bits(untouched)[name]) for name, tensor in bits(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(INPUT).logits, untouched(INPUT).logits)


def test_the_base_is_itself_again_after_an_error(make_model: Callable[[], PreTrainedModel]) -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="on the way"), adapted(model, SPEC, seed=0):
        raise RuntimeError("on the way")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_only_the_adapter_learns(model: PreTrainedModel) -> None:
    with adapted(model, SPEC, seed=0) as adapter:
        learning = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    # Two layers x seven linear modules x A and B; the output head is not adapted.
    assert len(learning) == 2 * 7 * 2
    assert all("lora_" in name for name in learning)


def test_the_first_weights_depend_on_the_seed_alone(make_model: Callable[[], PreTrainedModel]) -> None:
    def first_weights(seed: int) -> torch.Tensor:
        torch.rand(3)  # whatever else draws from torch's generator
        with adapted(make_model(), SPEC, seed=seed) as adapter:
            return torch.cat([p.detach().flatten() for n, p in adapter.named_parameters() if "lora_A" in n])

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_torchs_own_generator_is_left_alone(model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    with adapted(model, SPEC, seed=3):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_one_adapter_after_another_warns_of_nothing(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(3):
            with adapted(model, SPEC, seed=seed):
                pass


def test_modules_that_are_not_there_are_named_and_leave_the_base_usable(
    make_model: Callable[[], PreTrainedModel],
) -> None:
    model, untouched = make_model(), make_model()
    with (
        pytest.raises(ValueError, match="q_prj"),
        adapted(model, SPEC.model_copy(update={"target_modules": ("q_prj",)}), seed=0),
    ):
        pytest.fail("an adapter on nothing")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with adapted(model, SPEC, seed=0) as adapter:
            assert torch.equal(adapter(INPUT).logits, untouched(INPUT).logits)


@pytest.mark.parametrize(("rslora", "scale"), [(True, 8 / 4**0.5), (False, 8 / 4)])
def test_the_scale_is_that_of_the_paper(model: PreTrainedModel, rslora: bool, scale: float) -> None:
    """``W x + scale * B A x`` on one module, by hand."""
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    plain = linear(x)
    with adapted(model, AdapterSpec(rank=4, alpha=8, rslora=rslora), seed=0) as adapter:
        randomise(adapter)
        module = adapter.base_model.model.model.layers[0].mlp.up_proj
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        torch.testing.assert_close(module(x), plain + scale * (x @ a.T @ b.T))


def test_a_saved_adapter_loads_with_plain_peft_and_gives_the_same_logits(
    make_model: Callable[[], PreTrainedModel], examples: list[Example], tmp_path: Path
) -> None:
    inputs = [torch.tensor([example.input_ids]) for example in examples[:4]]
    with adapted(make_model(), SPEC, seed=0) as adapter:
        randomise(adapter)
        expected = [adapter.eval()(ids).logits for ids in inputs]
        adapter.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter")).eval()
    for ids, logits in zip(inputs, expected, strict=True):
        assert torch.equal(loaded(ids).logits, logits)


def test_a_list_of_modules_reaches_peft() -> None:
    config = lora_config(AdapterSpec(target_modules=("q_proj", "v_proj"), dropout=0.1))
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (32, 64, 0.1, True)
