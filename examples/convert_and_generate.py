"""Convert a checkpoint and let dense and converted model continue the same text.

    python examples/convert_and_generate.py [MODEL] [PROMPT]

Right after conversion both write the same text: identical experts compute what the dense FFN computed.
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe_convert import Recipe, convert


def continuation(folder: str, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-gpt2"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Return the"
    with tempfile.TemporaryDirectory() as folder:
        convert(Recipe(source, experts=8, bond_dim=64, noise=0.0), f"{folder}/out")
        print("dense:    ", continuation(source, prompt))
        print("converted:", continuation(f"{folder}/out", prompt))


if __name__ == "__main__":
    main()
