"""An activated LoRA trains as by PEFT's own code, without a backward pass before its invocation tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.activated import invocation_starts
from sparselora.contextual.handle import sparsify
from sparselora.errors import InputError
from tests.helpers.contextual_models import PACKED, bytes_kept, every_linear, exact_loss, masked, ragged, tiny

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]

INVOCATION = [7, 8]
SPARSE = {"layer_sparsity": {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5}, "svd_rank": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "none": {"mode": "dense", "context_backward": "none"},
    "svd": {"mode": "svd"} | SPARSE,
    "static": {"mode": "static", "context_backward": "none"} | SPARSE,
    "oracle": {"mode": "oracle"} | SPARSE,
    "surrogate": {"mode": "surrogate", "surrogate_rank": 4, "layer_sparsity": {"layer.0": 0.6, "layer.1": 0.75}},
}


def adapted(name: str, tokens: list[int] | None = INVOCATION, **settings: Any) -> Any:
    """A float64 model with an activated LoRA of random factors on every linear layer; a plain one for None."""
    base: Any = tiny(name, lora=False)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=every_linear(base), task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2",
        alora_invocation_tokens=tokens, **settings,
    )  # fmt: skip
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(5)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.train()


def invoked(left: bool = False) -> Batch:
    """Three ragged rows with the invocation at the end of the prompt; in the first at its beginning, too."""
    batch = ragged("llama", left=left)
    ids = batch["input_ids"]
    ids[ids == INVOCATION[0]] = 9
    for row in range(3):
        first = int((batch["labels"][row] != -100).nonzero()[0])
        ids[row, first - 2 : first] = torch.tensor(INVOCATION)
        batch["labels"][row, first] = -100  # an unlabelled token on which the adapter is active
    ids[0, :2] = torch.tensor(INVOCATION)
    return batch


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> Gradients:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    computed = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), computed)}


def largest_difference(ours: Gradients, reference: Gradients) -> float:
    return max(float((ours[name] - reference[name]).abs().max()) for name in reference)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2"])
def test_loss_and_gradients_are_those_of_peft(name, setting, tmp_path):
    model, batch = adapted(name), invoked(left=setting == "static")
    handle = sparsify(model, SparsityConfig(**SETTINGS[setting]), calibration=[batch], cache_dir=tmp_path)
    assert handle.packed == (name in PACKED)
    loss = model(**batch).loss
    choices = handle.choices()
    ours = gradients(loss, model)
    handle.remove()
    with masked(model.get_base_model(), batch, choices):
        reference_loss = exact_loss(model, batch)
        reference = gradients(reference_loss, model)
        plain = adapted(name, tokens=None)
    torch.testing.assert_close(loss.double(), reference_loss.double(), rtol=0, atol=1e-10)
    assert largest_difference(ours, reference) < 1e-10
    # The control: a LoRA that is active on the whole context is another function, with other gradients.
    assert largest_difference(gradients(exact_loss(plain, batch), plain), reference) > 1e-4


def test_nothing_before_the_invocation_is_kept_for_the_backward_pass():
    ids = torch.randint(10, 64, (3, 30), generator=torch.Generator().manual_seed(2))
    ids[:, 26:28] = torch.tensor(INVOCATION)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]

    def kept(tokens: list[int] | None) -> int:
        model = adapted("llama", tokens)
        sparsify(model, SparsityConfig(mode="dense"))
        return bytes_kept(model, ids, labels)

    assert kept(INVOCATION) < 0.6 * kept(None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plain_peft_loads_the_trained_adapter_and_computes_the_same(name, tmp_path):
    model, batch = adapted(name), invoked(left=True)
    handle = sparsify(model, SparsityConfig(mode="dense"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    handle.remove()
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(tiny(name, lora=False), tmp_path, autocast_adapter_dtype=False).eval()
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    sparsify(model, SparsityConfig(mode="dense"))
    trained = model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(trained(**inputs).logits, loaded(**inputs).logits)
        assert float(loaded(**batch).loss) < float(before) - 1e-3
        prompt = {name: x[:, :7] for name, x in inputs.items()}
        prompt["input_ids"][:, 5:] = torch.tensor(INVOCATION)
        generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(trained.generate(**prompt, **generate), loaded.generate(**prompt, **generate))


def test_starts_are_those_of_peft():
    ids = torch.randint(7, 10, (40, 9), generator=torch.Generator().manual_seed(3))
    for tokens in ([7, 8], [9], [7, 7, 8], list(range(10))):
        config = {"default": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens)}
        offsets = calculate_alora_offsets(config, "default", ids)
        expected = [9 - (offset or 0) for offset in offsets]
        assert invocation_starts(ids, tokens).tolist() == expected


# --- refusals ---------------------------------------------------------------------------------------------------


def label_before(batch: Batch) -> None:
    batch["labels"][1, 1] = 5


def no_invocation(batch: Batch) -> None:
    batch["input_ids"][1] = 9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [label_before, no_invocation])
def test_labels_where_the_adapter_is_inactive_are_refused(name, change):
    model, batch = adapted(name), invoked()
    sparsify(model, SparsityConfig(mode="dense"))
    change(batch)
    with pytest.raises(InputError, match="row 1 of a batch has labels before the last invocation tokens"):
        model(**batch)


@pytest.mark.parametrize("cut", ["upper", "sampled"])
def test_context_that_has_no_gradient_cannot_be_cut_in_part(cut):
    with pytest.raises(InputError, match=f"context_backward {cut} is not for an activated LoRA"):
        sparsify(adapted("llama"), SparsityConfig(mode="dense", context_backward=cut))


def without_tokens() -> Any:
    model = adapted("llama")
    model.peft_config["default"].alora_invocation_tokens = []
    return model


def adapted_head() -> Any:
    base: Any = tiny("llama", lora=False)
    targets = ["q_proj", "lm_head"]
    config = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def trained_norm() -> Any:
    model = adapted("llama")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (without_tokens, "without invocation tokens"),
        (adapted_head, "lm_head has an activated LoRA"),
        (trained_norm, r"model\.norm\.weight is trained too"),
        (partial(adapted, "llama", None, use_dora=True), "has a LoRA variant"),
    ],
    ids=["no tokens", "head", "norm", "dora"],
)
def test_models_that_do_not_fit_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        sparsify(build(), SparsityConfig(mode="dense"))


def test_checkpointing_is_refused():
    model, batch = adapted("llama"), invoked()
    sparsify(model, SparsityConfig(mode="dense"))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(InputError, match="gradient checkpointing of a model with an activated LoRA"):
        model(**batch)


def test_embeddings_in_place_of_tokens_are_refused():
    model, batch = adapted("llama"), invoked()
    sparsify(model, SparsityConfig(mode="dense"))
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(InputError, match="invocation tokens in input_ids"):
        model.get_base_model()(inputs_embeds=embedded, **batch)
