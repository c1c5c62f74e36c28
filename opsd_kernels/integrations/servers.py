"""Teachers behind vLLM or SGLang: their replies as the lists of `linear_topk_divergence`.

    lists = teacher_lists(replies, labels, starts=prompt_lengths)
    loss = linear_topk_divergence(hidden, head, lists.ids, lists.logprobs, labels=labels)

Ask the server to score prompt + completion as one prompt, by token ids: `prompt_logprobs=K` and
`max_tokens=1` for vLLM; `return_logprob`, `top_logprobs_num=K` and `logprob_start_len=0` for SGLang. Replies
may be objects or JSON:

* vLLM offline: a `RequestOutput`, whose `prompt_logprobs` holds per position a dict from id to `Logprob`.
* vLLM's OpenAI-compatible server: the body of /v1/completions, one sequence for each of its `choices`, or of
  /v1/chat/completions. `return_token_ids` adds `prompt_token_ids`, against which the tokens are then checked.
  A line of `vllm run-batch` is accepted as well.
* SGLang's /generate: a dict whose `meta_info` holds `input_token_logprobs` and `input_top_logprobs`, or a
  list of them.

The first position of a sequence has no distribution. The others list the K likeliest tokens, and the token
itself where it is not among them: K or K + 1 entries. Neither server is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import check_tensor, expect

# What vLLM's servers write for -inf, which JSON lacks.
NO_PROBABILITY = -9999.0
# Probabilities of a position may add up to 1 and the rounding of their log-probs.
MOST = 1.01

Entries = dict[int, float]


class TeacherLists(NamedTuple):
    """The teacher's part of `linear_topk_divergence`, in nats. Entries by falling log-prob."""

    ids: Tensor  # (B, T, K) int64, 0 for padding
    logprobs: Tensor  # (B, T, K) fp32, -inf for padding and where a label is ignored
    token_logprobs: Tensor  # (B, T) fp32: of the labels themselves, 0 where ignored


@dataclass(frozen=True)
class Reply:
    """A server's scores of one sequence of L tokens."""

    entries: Sequence[Entries | None]  # L times log-probs by id; None: no distribution
    tokens: Sequence[int | None]  # L ids; None where the reply does not say
    where: str  # for error texts: "replies[3]", "teacher.jsonl:4"


def teacher_lists(
    replies: Sequence[Any],  # B sequences
    labels: Tensor,  # (B, T) int64
    starts: int | Sequence[int] | Tensor,  # B positions
    *,
    k: int | None = None,
    ignore_index: int = -100,
) -> TeacherLists:
    """Return the lists of teachers behind servers, checked against the student's tokens.

    * `replies`: replies of vLLM or SGLang (see the module), or what `read_jsonl` returns. A reply with
      several sequences counts as several.
    * `labels`: the tokens that the student predicts. Those of `ignore_index` are neither checked nor listed.
    * `starts`: the position of `labels[b, 0]` in the sequence of reply b, that is, the number of tokens of
      the teacher's prompt. It may differ from the student's prompt.
    * `k`: keep the k likeliest entries. None keeps all, with the token itself beside the K likeliest.

    Log-probs are those that the server computed: at temperature 1, and before penalties, unless it was told
    otherwise (vLLM's `logprobs_mode`). Compare the student at the same temperature.

    Raises ValueError for a reply whose token at a position is not the label, with position, expected and
    actual token; for a position without a distribution; for a number of replies or starts that is not B; and
    for values that are not log-probs. Raises TypeError for starts or a k that are no ints.
    """
    check_tensor("labels", labels)
    expect(labels.dim() == 2, "labels", "a tensor (B, T)", f"shape {tuple(labels.shape)}")
    whole = k is None or (isinstance(k, int) and not isinstance(k, bool))
    expect(whole, "k", "an int or None", type(k).__name__, TypeError)
    expect(k is None or k >= 1, "k", "at least 1, or None", k)
    firsts = _firsts(starts, len(labels))
    sequences = [one for number, raw in enumerate(replies) for one in _sequences(raw, f"replies[{number}]")]
    expect(len(sequences) == len(labels), "replies", f"{len(labels)} sequences, as labels", len(sequences))
    rows: list[list[tuple[int, float]]] = []
    own: list[float] = []
    # -100 in the host's copy alone: one sync.
    for b, (reply, start, wanted) in enumerate(zip(sequences, firsts, labels.tolist(), strict=True)):
        for t, label in enumerate(wanted):
            if label == ignore_index:
                rows.append([])
                own.append(0.0)
                continue
            found = _entries_at(reply, start + t, label, f"labels[{b}, {t}]")
            rows.append(sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:k])
            own.append(found[label])
    return _padded(rows, own, labels)


def read_jsonl(path: str | Path) -> list[Reply]:
    """Read replies of vLLM or SGLang, one JSON value a line, for `teacher_lists`.

    Empty lines are skipped. Raises ValueError with file and line for a line that is no reply; errors of
    `teacher_lists` about these replies name them too.
    """
    found: list[Reply] = []
    # Not splitlines, which splits at U+2028 inside a string.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                raw = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected a JSON value, got {error}") from None
            found.extend(_sequences(raw, where))
    return found


def _firsts(starts: Any, count: int) -> list[int]:
    """Return the starts of `count` sequences."""
    expected, whole = f"one int, or {count} of them", False
    try:
        given = torch.as_tensor(starts)
        kind = given.dtype
        whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool) or not given.numel()
    except (TypeError, ValueError, RuntimeError):
        pass
    if not whole:
        raise TypeError(f"starts: expected {expected}, got {starts!r:.80}")
    expect(given.shape in ((), (count,)), "starts", expected, f"shape {tuple(given.shape)}")
    return given.expand(count).tolist()


def _padded(rows: list[list[tuple[int, float]]], own: list[float], labels: Tensor) -> TeacherLists:
    width = max(1, *map(len, rows)) if rows else 1
    gap = (0, -math.inf)
    full = [row + [gap] * (width - len(row)) for row in rows]
    shape = (*labels.shape, width)
    ids = torch.tensor([[entry[0] for entry in row] for row in full], dtype=torch.int64).reshape(shape)
    logprobs = torch.tensor([[entry[1] for entry in row] for row in full], dtype=torch.float32).reshape(shape)
    # A listed token without probability is padding too.
    ids = torch.where(logprobs > -math.inf, ids, 0)
    values = torch.tensor(own, dtype=torch.float32).reshape(labels.shape)
    return TeacherLists(*(x.to(labels.device) for x in (ids, logprobs, values)))


def _entries_at(reply: Reply, position: int, label: int, which: str) -> Entries:
    """Return the entries at a position, after checks that it holds the token `label`."""
    length = len(reply.entries)
    place = f"position {position} ({which})"
    inside = 0 <= position < length
    expect(inside, reply.where, f"a sequence that reaches {place}", f"{length} positions")
    token, entries = reply.tokens[position], reply.entries[position]
    expect(token is None or token == label, reply.where, f"token {label} at {place}", f"token {token}")
    if entries is None:
        raise ValueError(
            f"{reply.where}: expected log-probs at {place}, got none: the first scored token of a sequence "
            "has no distribution"
        )
    listed = f"token {token}" if token is not None else f"entries of {sorted(entries)[:8]} alone"
    expect(label in entries, reply.where, f"token {label} among the log-probs at {place}", listed)
    total = sum(map(math.exp, entries.values())) if max(entries.values()) < 1 else math.inf
    # The comparison is False for NaN.
    expected = f"log-probs, with a sum of probabilities of at most 1, at {place}"
    expect(total <= MOST, reply.where, expected, list(entries.values())[:8])
    return entries


def _sequences(raw: Any, where: str) -> list[Reply]:
    """Return the sequences of one value: a reply of either server, a list of them, or a Reply."""
    if isinstance(raw, Reply):
        return [raw]
    if isinstance(raw, list):
        return [reply for part in raw for reply in _sequences(part, where)]
    response = _get(raw, "response")
    if response is not None:
        # A line of a batch file.
        expect(_get(response, "status_code") == 200, where, "a response with status 200", response)
        return _sequences(_get(response, "body"), where)
    if _get(raw, "meta_info") is not None:
        return [_of_sglang(raw, where)]
    if _get(raw, "prompt_logprobs") is not None:
        return [_of_vllm(raw, where)]
    choices = sorted(_get(raw, "choices") or (), key=lambda choice: _get(choice, "index") or 0)
    asked = bool(choices) and all(_get(choice, "prompt_logprobs") is not None for choice in choices)
    keys = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
    expected = "a reply of vLLM with prompt_logprobs, or of SGLang with meta_info"
    expect(asked, where, expected, keys)
    return [_of_vllm(choice, where) for choice in choices]


def _of_vllm(raw: Any, where: str) -> Reply:
    entries = [None if part is None else _by_id(part, where) for part in _get(raw, "prompt_logprobs")]
    tokens = _get(raw, "prompt_token_ids")
    if tokens is None:
        return Reply(entries, [None] * len(entries), where)
    expected = f"prompt_logprobs of all {len(tokens)} tokens in prompt_token_ids"
    expect(len(tokens) == len(entries), where, expected, f"{len(entries)} positions")
    return Reply(entries, list(tokens), where)


def _by_id(part: Any, where: str) -> Entries:
    try:
        return {int(token): _logprob(_get(score, "logprob")) for token, score in part.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{where}: expected prompt_logprobs with a dict from token id to logprob at each position, "
            f"got {part!r:.80}"
        ) from None


def _of_sglang(raw: Any, where: str) -> Reply:
    meta = _get(raw, "meta_info")
    scored = _get(meta, "input_token_logprobs")
    expected = "input_token_logprobs in meta_info: ask with return_logprob and logprob_start_len=0"
    expect(bool(scored), where, expected, ", ".join(map(str, meta)))
    tops = _get(meta, "input_top_logprobs") or [None] * len(scored)
    expect(len(tops) == len(scored), where, f"{len(scored)} input_top_logprobs", len(tops))
    total = _get(meta, "prompt_tokens")
    # The scores begin at logprob_start_len.
    before = 0 if total is None else total - len(scored)
    expect(before >= 0, where, f"input_token_logprobs of at most {total} prompt_tokens", len(scored))
    entries: list[Entries | None] = [None] * before
    tokens: list[int | None] = [None] * before
    for own, top in zip(scored, tops, strict=True):
        try:
            logprob, token = own[0], int(own[1])
            listed = {int(entry[1]): _logprob(entry[0]) for entry in top or ()}
        except (IndexError, TypeError, ValueError):
            raise ValueError(
                f"{where}: expected lists of (log-prob, token id, text), got {own!r:.60} and {top!r:.60}"
            ) from None
        tokens.append(token)
        entries.append(None if logprob is None else {token: _logprob(logprob), **listed})
    return Reply(entries, tokens, where)


def _logprob(value: Any) -> float:
    number = float(value)
    return -math.inf if number <= NO_PROBABILITY else number


def _get(holder: Any, name: str) -> Any:
    """Return an entry of a JSON object, or an attribute of a reply as a Python object; None if missing."""
    if isinstance(holder, Mapping):
        return holder.get(name)
    return None if isinstance(holder, (str, bytes)) else getattr(holder, name, None)
