"""Text that models write, one beside the other, unedited.

.venv/bin/python -m benchmarks.accuracy.samples dense=build/accuracy/dense S50=build/accuracy/w4s50-g16/model
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_gqsa.hf  # noqa: F401 - registers the quantiser

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Name three things that one needs to bake bread.",
    "What is 7 plus 5?",
    "Translate to French: Good morning, my friend.",
    "Why do birds migrate?",
    "Write a Python function that returns the larger of two numbers.",
    "Who wrote Romeo and Juliet?",
    "Give me one tip for learning a new language.",
)
NEW_TOKENS = 60


def main(arguments: list[str]) -> int:
    """Print Markdown for ``LABEL=FOLDER`` arguments; returns the exit status."""
    models = [argument.partition("=")[::2] for argument in arguments]
    if not models or not all(folder for _, folder in models):
        print("usage: benchmarks.accuracy.samples LABEL=FOLDER ...", file=sys.stderr)
        return 2
    answers = {label: _answers(folder) for label, folder in models}
    print(f"Greedy decoding in float32, at most {NEW_TOKENS} tokens, by the models' chat template, nothing left out.\n")
    for number, prompt in enumerate(PROMPTS):
        print(f"## {prompt}\n")
        for label, texts in answers.items():
            print(f"**{label}**\n\n````text\n{texts[number]}\n````\n")
    return 0


@torch.no_grad()
def _answers(folder: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
