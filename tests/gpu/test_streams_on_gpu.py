"""Streams, host synchronisation, CUDA graphs and the current device."""

import contextlib
from dataclasses import replace

import placing
import pytest
import torch
from placing import placed, unmasked

from opsd_kernels import linear_divergence, weights
from opsd_kernels.testing import assert_same_bits, evaluate, hard_case

pytestmark = pytest.mark.usefixtures("as_users_run")

SIZES = (29, 211, 24) if placing.DRY_RUN else (301, 4099, 64)
HALF_A_SECOND = 1_000_000_000  # about, in cycles


def masked(case):
    """As `unmasked`, with every third token left out."""
    return replace(
        case, mask=torch.arange(case.student_hidden.shape[0], device=case.student_hidden.device) % 3 != 0
    )


def labelled(case):
    """As `masked`, by labels."""
    labels = torch.arange(case.student_hidden.shape[0], device=case.student_hidden.device)
    return replace(case, labels=torch.where(labels % 3 == 0, -100, labels % case.student_weight.shape[0]))


def plain_case(dtype=torch.bfloat16, shared_head=True, frozen_head=False):
    return placed(
        unmasked(
            hard_case(
                *SIZES,
                dtype,
                shared_head=shared_head,
                frozen_head=frozen_head,
                largest_logit=8.0,
                masked_entry=None,
            )
        )
    )


# ---------------------------------------------------------------- the host never waits

UNMASKED = {
    "mean": {},
    "per token": {"reduction": "none"},
    "recompute": {"backward": "recompute"},
    "statistics": {"return_stats": True, "divergence": "jsd"},
    "options": {
        "entry_clip": 0.1,
        "token_clip": 2.0,
        "teacher_mix": 0.2,
        "student_softcap": 30.0,
        "teacher_softcap": 30.0,
        "temperature": 0.8,
    },
    "schedule": {"token_weights": weights.LinearDecay(0.5)},
    "gate": {"token_weights": weights.TrustGate(0.2)},
    "top-k": {"topk": 7},
}


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", UNMASKED.values(), ids=UNMASKED)
def test_no_host_synchronisation_without_a_mask(backend, options, dtype, shared_head, frozen_head):
    waits_for_nothing(plain_case(dtype, shared_head, frozen_head), backend=backend, **options)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("ignore", [masked, labelled])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_no_host_synchronisation_where_nothing_is_packed(backend, options, ignore, frozen_head, monkeypatch):
    monkeypatch.setenv("OPSD_PACK", "0")
    waits_for_nothing(ignore(plain_case(frozen_head=frozen_head)), backend=backend, **options)


def waits_for_nothing(case, **options):
    """Run once with syncs allowed (kernels compile, handles are made), then without, to the same bits.

    tests/unit/test_no_sync.py checks this without a GPU.
    """
    first = evaluate(linear_divergence, case, **options)
    with waiting_is_an_error():
        second = evaluate(linear_divergence, case, **options)
    assert_same_bits(second, first)


@contextlib.contextmanager
def waiting_is_an_error():
    if placing.DRY_RUN:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_found(cuda):
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device="cuda").sum().item()


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mask", [unmasked, masked], ids=["unmasked", "masked"])
def test_another_current_stream(backend, cuda, divergence, reduction, mask):
    """The op finishes on a side stream, with the same bits, while the default stream is busy."""
    case, options = mask(plain_case()), {"divergence": divergence, "reduction": reduction, "backend": backend}
    expected = evaluate(linear_divergence, case, **options)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # makes the allocator's blocks and the library's workspace of this stream
        evaluate(linear_divergence, case, **options)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(HALF_A_SECOND)
    busy.record()
    with torch.cuda.stream(side):
        got = evaluate(linear_divergence, case, **options)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    waited = busy.query()
    torch.cuda.synchronize()
    assert_same_bits(got, expected)
    assert not waited, "the op took as long as the work on the default stream"


def test_inputs_that_another_stream_still_writes(backend, cuda):
    """After wait_stream the op reads the values that the other stream wrote last."""
    case = plain_case()
    expected = evaluate(linear_divergence, case, backend=backend)
    late = replace(
        case, student_hidden=torch.full_like(case.student_hidden, torch.nan), trainable=case.trainable
    )
    side = torch.cuda.Stream()
    torch.cuda._sleep(HALF_A_SECOND // 5)
    late.student_hidden.copy_(case.student_hidden)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = evaluate(linear_divergence, late, backend=backend)
    torch.cuda.synchronize()
    assert_same_bits(got, expected)


def test_another_current_device(backend, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    case = plain_case()
    expected = evaluate(linear_divergence, case, backend=backend)
    with torch.cuda.device(0):
        got = evaluate(linear_divergence, case.to("cuda:1"), backend=backend)
    assert_same_bits(got, expected)
    assert {value.device.index for _, value in got.named()} == {1}


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("ignore", [unmasked, masked, labelled])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_graph_capture_and_replay(backend, cuda, monkeypatch, divergence, shared_head, ignore, options):
    """Forward and backward, captured and replayed on two inputs, give the bits of eager unpacked runs."""
    options = {"divergence": divergence, "backend": backend, **options}
    first = ignore(plain_case(shared_head=shared_head))._map(torch.clone)
    other = replace(
        first, student_hidden=first.student_hidden.flip(0), teacher_hidden=first.teacher_hidden.flip(0)
    )
    static = first._map(torch.clone)
    monkeypatch.setenv("OPSD_PACK", "0")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            evaluate(linear_divergence, static, **options)
    torch.cuda.current_stream().wait_stream(side)
    monkeypatch.delenv("OPSD_PACK")  # the op does not pack during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(linear_divergence, static, **options)
    monkeypatch.setenv("OPSD_PACK", "0")
    for case in (other, first):
        static.student_hidden.copy_(case.student_hidden)
        static.teacher_hidden.copy_(case.teacher_hidden)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, evaluate(linear_divergence, case, **options))
