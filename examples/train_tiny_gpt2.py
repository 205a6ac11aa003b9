"""Train the demo model examples/tiny-gpt2 on the text that comes with Python.

No download and no data set: the text is the standard library's docstrings and the language
topics of ``help()``. One thread of an ordinary CPU takes about half an hour.

    python examples/train_tiny_gpt2.py

Worth knowing before reading on:

* docstrings are read with ``ast``; only ``pydoc_data.topics``, a plain dict, is imported;
* documents are deduplicated, and a hash of each one decides whether it is held out, so the split
  depends on neither file order nor seed;
* documents are packed into one stream of tokens with <|endoftext|> between them, in training as in
  evaluation; a window may therefore span several documents;
* the same seed, Python, torch and thread count on the same platform give the same weights;
* the numbers and the samples in the model's README.md are written by this script, from its run.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import sysconfig
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOT = "<|endoftext|>"
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders of no interest
HELD_OUT = 20  # one document in so many is held out

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 1024, 256, 128, 4, 4
BATCH, WARMUP, WEIGHT_DECAY, CLIP = 8, 200, 0.1, 1.0

PROMPTS = ("Return True if", 'The "with" statement')
TEMPERATURE, TOP_K, SAMPLE_TOKENS = 0.7, 40, 160


# ---- text ------------------------------------------------------------------------------------


def docstrings(path):
    """Yield the docstrings of one source file, outermost first, without importing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def collect_documents():
    """Return every distinct docstring and topic, in an order that depends on Python alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [topics[name].strip() for name in sorted(topics)]
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if not SKIP.intersection(path.relative_to(root).parts):
            documents += [text.strip() for text in docstrings(path)]
    return [text for text in dict.fromkeys(documents) if text]


def split(documents):
    """Return (training documents, held-out documents)."""
    train, held_out = [], []
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
        (held_out if is_held_out else train).append(text)
    return train, held_out


# ---- tokens ----------------------------------------------------------------------------------


def train_tokenizer(documents):
    """Return a byte-level BPE tokenizer: every text has tokens, and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOT,
        eos_token=EOT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer, documents):
    """Return one stream of token ids, (T,): <|endoftext|> before, between and after documents."""
    ids = [tokenizer.eos_token_id]
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


# ---- training --------------------------------------------------------------------------------


def build_model(tokenizer):
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def get_batch(stream):
    """Return inputs and targets, both (BATCH, CONTEXT), from random places of the stream."""
    starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1))
    windows = stream[starts + torch.arange(CONTEXT + 1)]  # (BATCH, CONTEXT + 1)
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step, steps, peak):
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(model, stream, steps, peak):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and norms do not decay
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    model.train()
    start, running = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        inputs, targets = get_batch(stream)
        logits = model(inputs, use_cache=False).logits  # (BATCH, CONTEXT, VOCAB)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

        running += loss.item()
        if (step + 1) % 100 == 0:
            elapsed = time.perf_counter() - start
            mean, running = running / 100, 0.0
            print(f"step {step + 1:5d}/{steps}  loss {mean:.3f}  {elapsed:5.0f} s", flush=True)


@torch.no_grad()
def evaluate(model, stream, n_bytes):
    """Return loss (nats per token), perplexity per token and bits per byte of a packed stream.

    The stream is cut into windows of CONTEXT tokens that do not overlap; each token but the first
    <|endoftext|> is predicted exactly once, and the ends of documents count as tokens.
    """
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window = stream[start : start + CONTEXT + 1]  # (CONTEXT + 1,), the last one shorter
        logits = model(window[None, :-1], use_cache=False).logits[0]  # (CONTEXT, VOCAB)
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    loss = total / (len(stream) - 1)
    return {"loss": loss, "perplexity": math.exp(loss), "bpb": total / math.log(2) / n_bytes}


def sample(model, tokenizer, prompt, seed):
    """Continue a prompt that stands at the start of a document."""
    torch.manual_seed(seed)
    ids = tokenizer(EOT + prompt, return_tensors="pt")
    out = model.generate(
        **ids,
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True).rstrip()


# ---- output ----------------------------------------------------------------------------------

README = """\
---
license: apache-2.0
---

# tiny-gpt2

A GPT-2 of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, context
{context}, byte-level BPE vocabulary {vocab}, tied embeddings, float32) that writes text in the
manner of Python's documentation. It is small on purpose: a real, trained model to try things on,
in a few megabytes and without a download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("examples/tiny-gpt2")
model = AutoModelForCausalLM.from_pretrained("examples/tiny-gpt2")
ids = tokenizer("{eot}Return True if", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=80, do_sample=True, temperature={temperature})
print(tokenizer.decode(out[0]))
```

## Training

    {command}

The text is what Python {python} itself carries: the docstrings of its standard library and the
language topics of `help()` (`pydoc_data.topics`), {documents:,} distinct documents, {total_bytes:,}
bytes. Another Python version has other text, and gives another model. The text is under the
Python Software Foundation License (PSF-2.0).

About one document in {every}, chosen by a hash of its text, is held out; the tokenizer does not
see it either. AdamW (weight decay {weight_decay}), {batch} windows of {context} tokens a step,
{steps:,} steps ({epochs:.1f} times the training text), learning rate {lr:g} after a warm-up, then
down a cosine; no dropout. With torch {torch} and transformers {transformers}.

## Measured

|  | documents | bytes | tokens | loss (nats/token) | perplexity per token | bits per byte |
|---|---:|---:|---:|---:|---:|---:|
{table}

All documents count, packed with `{eot}` between them (the ends of documents count as tokens) and
cut into windows of {context} tokens that do not overlap.

## Samples

Temperature {temperature}, top-k {top_k}, at most {sample_tokens} new tokens. The prompts are
{prompts}; each sample is the first one drawn.

{samples}

## Limits

It has the form of documentation and not the facts: names, signatures, claims and some of the words
are invented, or repeated from the text. It knows English as docstrings use it, and nothing else.
It looks back {context} tokens at most. Some docstrings occur in the standard library in slightly
different versions, and only exact copies were removed, so the held-out numbers may flatter it.
"""


def save_tokenizer(tokenizer, out):
    """Save under the class name that every release of transformers knows, 5 and older."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_readme(out, **values):
    # Four backticks, since a sample may hold three.
    samples = "\n\n".join(f"````text\n{text}\n````" for text in values.pop("samples"))
    rows = []
    for name, documents, n_bytes, stream, result in values.pop("rows"):
        rows.append(
            f"| {name} | {len(documents):,} | {n_bytes:,} | {len(stream) - 1:,} "
            f"| {result['loss']:.3f} | {result['perplexity']:.2f} | {result['bpb']:.3f} |"
        )
    text = README.format(samples=samples, table="\n".join(rows), **values)
    (out / "README.md").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-gpt2")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    documents = collect_documents()
    parts = split(documents)
    tokenizer = train_tokenizer(parts[0])
    streams = [pack(tokenizer, part) for part in parts]
    sizes = [sum(len(text.encode()) for text in part) for part in parts]
    model = build_model(tokenizer)
    for name, part, size, stream in zip(("train", "held out"), parts, sizes, streams, strict=True):
        print(f"{name}: {len(part):,} documents, {size:,} bytes, {len(stream) - 1:,} tokens")
    print(f"model: {model.num_parameters():,} parameters", flush=True)

    train(model, streams[0], args.steps, args.lr)

    results = [evaluate(model, *pair) for pair in zip(streams, sizes, strict=True)]
    for name, result in zip(("train", "held out"), results, strict=True):
        print(name, " ".join(f"{key} {value:.4f}" for key, value in result.items()))
    samples = [sample(model, tokenizer, prompt, args.seed) for prompt in PROMPTS]
    print("", *samples, sep="\n\n")

    model.save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    write_readme(
        args.out,
        parameters=model.num_parameters(),
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        context=CONTEXT,
        vocab=VOCAB,
        eot=EOT,
        command=f"python examples/train_tiny_gpt2.py --steps {args.steps} --lr {args.lr:g} "
        f"--seed {args.seed} --threads {args.threads}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        documents=len(documents),
        total_bytes=sum(sizes),
        every=HELD_OUT,
        weight_decay=WEIGHT_DECAY,
        batch=BATCH,
        steps=args.steps,
        epochs=args.steps * BATCH * CONTEXT / len(streams[0]),
        lr=args.lr,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        sample_tokens=SAMPLE_TOKENS,
        prompts=" and ".join(f"`{prompt}`" for prompt in PROMPTS),
        rows=list(zip(("training", "held out"), parts, sizes, streams, results, strict=True)),
        samples=samples,
    )


if __name__ == "__main__":
    main()
