"""Artifacts in TRL's trainers: they train, and the auxiliary loss is in the gradient exactly once."""

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.models import load
from torch.nn.functional import cross_entropy, logsigmoid
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

AUX = 0.5
TEXTS = [" ".join(f"w{(7 * i + k) % 30 + 3}" for k in range(8 + i % 3)) for i in range(8)]
WORDS = [text.split() for text in TEXTS]
PAIRS = {
    "prompt": [" ".join(words[:3]) for words in WORDS],
    "chosen": [" " + " ".join(words[3:]) for words in WORDS],
    "rejected": [" " + " ".join(reversed(words[3:])) for words in WORDS],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def prepared(artifact, model_type: str):
    """(model without dropout whose routers prefer an expert by far, tokenizer)."""
    out = artifact(model_type, noise=0.1)[1]
    rates = {"dropout": 0.0, "attention_dropout": 0.0} if model_type == "opt" else {}  # which are no modules
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(out, trust_remote_code=True, **rates)
    generator = torch.Generator().manual_seed(0)
    for _, ffn in model.mixtures():
        ffn.router.weight.data = 3 * torch.randn(ffn.router.weight.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def arguments(folder, **more) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "router_aux_loss_coef": AUX,
        "disable_tqdm": True,
    } | more


def router_gradients(loss: torch.Tensor, model) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.stack([ffn.router.weight.grad for _, ffn in model.mixtures()]).clone()


def auxiliary(model, **inputs) -> torch.Tensor:
    """As TRL and transformers compute it, of the routers' logits in a plain pass."""
    logits = []
    routers = [ffn.router for _, ffn in model.mixtures()]
    handles = [r.register_forward_hook(lambda _, __, out: logits.append(out.logits)) for r in routers]
    model.eval()(**inputs)
    for handle in handles:
        handle.remove()
    model.train()
    return load_balancing_loss_func(tuple(logits), 3, 2, inputs.get("attention_mask"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_sft(model_type, checkpointing, artifact, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = prepared(artifact, model_type)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = SFTConfig(**arguments(tmp_path, gradient_checkpointing=checkpointing, max_length=16))
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    found = router_gradients(trainer.compute_loss(model.train(), dict(batch)), model)
    plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model.eval()(**plain, output_router_logits=False).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    alone = router_gradients(loss, model)
    balanced = router_gradients(auxiliary(model, **plain), model)
    torch.testing.assert_close(found, alone + AUX * balanced, rtol=1e-3, atol=1e-5)
    assert (AUX * balanced).norm() > 0.1 * alone.norm()
    model.zero_grad()
    trainer.train()
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert len(logged) == 3 and all(value >= 1.9 for value in logged)  # two experts per token: 2 if balanced
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.endswith("router.weight") for name in moved)


def test_dpo(artifact, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = prepared(artifact, "llama")
    reference = load(artifact("llama", noise=0.1)[1], "llama")
    config = DPOConfig(**arguments(tmp_path, max_length=32, gradient_checkpointing=False))
    data = Dataset.from_dict(PAIRS)
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = router_gradients(trainer.compute_loss(model.train(), dict(batch)), model)

    def log_probability(of) -> torch.Tensor:
        """(2 B,) of the completions: the chosen ones, then the rejected."""
        outputs = of(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=False
        )
        ids, counts = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
        scores = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return (scores * counts).sum(-1)

    ours = log_probability(model.eval())
    with torch.no_grad():
        theirs = log_probability(reference)
    chosen, rejected = (ours - theirs).chunk(2)
    alone = router_gradients(-logsigmoid(trainer.beta * (chosen - rejected)).mean(), model)
    plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    balanced = router_gradients(auxiliary(model, **plain), model)
    torch.testing.assert_close(found, alone + AUX * balanced, rtol=1e-3, atol=1e-5)
    assert (AUX * balanced).norm() > 0.1 * alone.norm()
    model.zero_grad()
    trainer.train()
    assert sum("aux_loss" in entry for entry in trainer.state.log_history) == 3
