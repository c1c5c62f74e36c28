"""Replies of vLLM and SGLang as their documentation describes them, made from a teacher's distributions.

A teacher scores sequences of token ids with its log-probs (L - 1, V), of the tokens 1 to L - 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Logprob:
    """vllm.logprobs.Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class FlatLogprobs(Sequence):
    """vllm.logprobs.FlatLogprobs (`flat_logprobs=True`): a sequence that makes its dicts on demand."""

    def __init__(self, positions: list[dict[int, Logprob] | None]) -> None:
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, at: int) -> dict[int, Logprob]:  # type: ignore[override]
        return self.positions[at] or {}


@dataclass
class RequestOutput:
    """vllm.RequestOutput, with the attributes that a scoring request fills."""

    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: Any
    outputs: list[Any]


def positions(sequence: list[int], logprobs: Tensor, k: int) -> list[dict[int, Logprob] | None]:
    """The token itself first, then the k likeliest; the first position is None."""
    made: list[dict[int, Logprob] | None] = [None]
    for token, row in zip(sequence[1:], logprobs, strict=True):
        order = row.argsort(descending=True).tolist()
        listed = [token, *(each for each in order[:k] if each != token)]
        made.append({each: Logprob(row[each].item(), order.index(each) + 1, f" {each}") for each in listed})
    return made


def vllm_offline(sequence: list[int], logprobs: Tensor, k: int) -> RequestOutput:
    return RequestOutput("0", sequence, positions(sequence, logprobs, k), [])


def _json(sequence: list[int], logprobs: Tensor, k: int) -> list[dict[str, Any] | None]:
    return [
        None
        if part is None
        else {
            str(token): {
                "logprob": max(one.logprob, -9999.0), "rank": one.rank, "decoded_token": one.decoded_token
            }
            for token, one in part.items()
        }
        for part in positions(sequence, logprobs, k)
    ]  # fmt: skip


def vllm_completion(
    sequences: list[list[int]], logprobs: list[Tensor], k: int, token_ids: bool = True
) -> dict[str, Any]:
    """The body of /v1/completions for a list of prompts, one choice each."""
    choices = [
        {
            "index": index, "text": " x", "logprobs": None, "finish_reason": "length", "stop_reason": None,
            "prompt_logprobs": _json(sequence, rows, k),
        }
        for index, (sequence, rows) in enumerate(zip(sequences, logprobs, strict=True))
    ]  # fmt: skip
    for choice, sequence in zip(choices, sequences, strict=True):
        if token_ids:
            choice |= {"prompt_token_ids": sequence, "token_ids": [7]}
    # Servers answer in any order.
    return {"id": "cmpl-1", "object": "text_completion", "model": "teacher", "choices": choices[::-1]}


def vllm_chat(sequence: list[int], logprobs: Tensor, k: int) -> dict[str, Any]:
    """The body of /v1/chat/completions, which has both fields beside the choices."""
    message = {"role": "assistant", "content": "x"}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "choices": [{"index": 0, "message": message}],
        "prompt_logprobs": _json(sequence, logprobs, k), "prompt_token_ids": sequence,
    }  # fmt: skip


def vllm_batch_line(sequence: list[int], logprobs: Tensor, k: int, status: int = 200) -> dict[str, Any]:
    """A line of the output of `vllm run-batch`."""
    body = vllm_completion([sequence], [logprobs], k) if status == 200 else {"message": "too long"}
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "vllm-1", "custom_id": "row-1", "response": response, "error": None}


def sglang(
    sequence: list[int], logprobs: Tensor, k: int, start: int = 0, text: bool = False
) -> dict[str, Any]:
    """A reply of /generate; the scores begin at `logprob_start_len`, whose token has none."""
    own: list[list[Any]] = [[None, sequence[start], None]]
    top: list[list[list[Any]] | None] = [None]
    for token, row in zip(sequence[start + 1 :], logprobs[start:], strict=True):
        best = row.topk(k)
        own.append([row[token].item(), token, f" {token}" if text else None])
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        top.append([[value, at, f" {at}" if text else None] for value, at in pairs])
    meta = {
        "id": "1", "prompt_tokens": len(sequence), "completion_tokens": 1, "cached_tokens": 0,
        "input_token_logprobs": own, "input_top_logprobs": top if k else [],
        "output_token_logprobs": [[-0.5, 7, None]], "output_top_logprobs": [[[-0.5, 7, None]]],
    }  # fmt: skip
    return {"text": " x", "output_ids": [7], "meta_info": meta}


def through_json(value: Any) -> Any:
    """Sort the keys, as many tools do: no order of entries may be relied on."""
    return json.loads(json.dumps(value, sort_keys=True))
