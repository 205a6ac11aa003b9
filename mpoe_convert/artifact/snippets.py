"""Code for the model card: load, use and train a converted model with torch and transformers alone."""

from __future__ import annotations

import re

PLACEHOLDER = "path/to/this"  # in place of the model, until its address is known
# The Hub's name of the task, by Auto class.
PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}
_GENERATE = """\
inputs = tokenizer("{prompt}", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
_TEXT = """\
batch = tokenizer("A text to learn from.", return_tensors="pt")
batch["labels"] = batch["input_ids"]"""
_USE = {
    "AutoModelForCausalLM": _GENERATE.format(prompt="Once upon a time"),
    "AutoModelForImageTextToText": (
        "# Here from text alone. With images: AutoProcessor, as for the base model.\n"
        + _GENERATE.format(prompt="Once upon a time")
    ),
    "AutoModelForSeq2SeqLM": _GENERATE.format(prompt="A text in the format that the base model expects"),
    "AutoModelForMaskedLM": """\
inputs = tokenizer(f"Paris is the {tokenizer.mask_token} of France.", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode([logits[0, place].argmax()]))""",
    "AutoModelForSequenceClassification": """\
with torch.no_grad():
    logits = model(**tokenizer("A text to classify.", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])""",
}
_BATCH = {
    "AutoModelForCausalLM": _TEXT,
    "AutoModelForImageTextToText": _TEXT,
    "AutoModelForSeq2SeqLM": """\
batch = tokenizer("A source text.", text_target="Its target text.", return_tensors="pt")""",
    "AutoModelForMaskedLM": """\
batch = tokenizer("A text to learn from.", return_tensors="pt")
batch["labels"] = batch["input_ids"].clone()
batch["input_ids"][0, 1] = tokenizer.mask_token_id""",
    "AutoModelForSequenceClassification": """\
batch = tokenizer("A text of the first class.", return_tensors="pt")
batch["labels"] = torch.tensor([0])""",
}
_TRAIN = """\
{batch}
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
model.train()
for step in range(3):
    model(**batch).loss.backward()  # includes the router losses
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("tuned")
tokenizer.save_pretrained("tuned")"""


def loading(auto: str, has_tokenizer: bool) -> str:
    """Python that loads `model` and the tokenizer, if any, and uses them if the head is one of `_USE`."""
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    if has_tokenizer and auto in _USE:
        lines.insert(0, "import torch")
    lines.append(f'model_id = "{PLACEHOLDER}"')
    lines.append(f"model = {auto}.from_pretrained(model_id, trust_remote_code=True)")
    if has_tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)")
        if auto in _USE:
            lines += ["", _USE[auto]]
    return "\n".join(lines)


def encoding(kind: str) -> str:
    """Python that loads and uses the whole of a sentence encoder, of a class of sentence-transformers."""
    use = 'predict([("A query.", "A text.")])' if kind == "CrossEncoder" else 'encode(["A text.", "Another"])'
    return (
        f'from sentence_transformers import {kind}\n\nmodel_id = "{PLACEHOLDER}"\n'
        f"encoder = {kind}(model_id, trust_remote_code=True)\nprint(encoder.{use})"
    )


def training(auto: str) -> str | None:
    """Python that trains the `model` of `loading`; None for heads other than those of `_BATCH`."""
    return _TRAIN.format(batch=_BATCH[auto]) if auto in _BATCH else None


def command(auto: str, *, has_own_code: bool) -> str:
    """A command line that trains it, with consent to custom code if there is any."""
    data = "pairs.jsonl" if auto == "AutoModelForSeq2SeqLM" else "texts.jsonl"
    trust = " --trust-remote-code" if has_own_code else ""
    return f"mpoe-convert finetune {PLACEHOLDER} --data {data} -o tuned/{trust}"


def with_model_id(text: str, model_id: str) -> str:
    """The text with snippets that load `model_id`, whatever they loaded before."""
    text = re.sub(r'^model_id = ".*"$', f'model_id = "{model_id}"', text, flags=re.MULTILINE)
    return re.sub(r"^(mpoe-convert finetune) \S+", rf"\1 {model_id}", text, flags=re.MULTILINE)
