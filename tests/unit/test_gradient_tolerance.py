"""The backward pass over some columns (_core/columns.py): its bound, and what it leaves alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_kernels import linear_divergence, linear_topk_divergence, objectives, plan, weights
from opsd_kernels._core import columns
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import assert_same_bits, evaluate, relative_error
from opsd_kernels.testing.cases import Case

TOLERANCE = 1e-2
N, V, H = 48, 4000, 24


def peaked(
    dtype=torch.float32, tokens=N, vocab=V, scale=6.0, seed=0, distance=0.5, batch=2, **fields
) -> Case:
    """Return rows whose distributions are peaked, as those of a language model, with a shared head."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    head = (draw(vocab, H) + draw(H)).to(dtype)
    hidden = draw(batch, tokens // batch, H) * scale / math.sqrt(H)
    teacher = hidden + distance * draw(*hidden.shape) * scale / math.sqrt(H)
    labels = torch.randint(0, vocab, hidden.shape[:2], generator=gen)
    return Case(
        student_hidden=hidden.to(dtype),
        student_weight=head,
        teacher_hidden=teacher.to(dtype),
        teacher_weight=head,
        labels=labels,
        **fields,
    )


@pytest.fixture
def chunks(monkeypatch):
    """Record the gradient, with the row factors in it, and the choice of each chunk."""
    seen, select = [], columns.ColumnFilter.select

    def recorded(self, G, scale):
        whole = G.double() if scale is None else G.double() * scale.double()[:, None]
        kept = select(self, G, scale)
        seen.append((whole, None if kept is None else kept.columns.clone()))
        return kept

    monkeypatch.setattr(columns.ColumnFilter, "select", recorded)
    return seen


def true_share(G: torch.Tensor, kept: torch.Tensor | None) -> float:
    if kept is None:
        return 0.0
    left_out = torch.ones(G.shape[1], dtype=torch.bool)
    left_out[kept] = False
    return (G[:, left_out].norm() / G.norm()).item()


ROUTES = {
    "in forward": {},
    "recompute": {"backward": "recompute"},
    "weights": {"token_weights": weights.TrustGate(0.1)},
    "sequences": {"token_weights": weights.PrefixDiscrepancy(0.3)},
    "per token": {"reduction": "none"},
    "student's top": {"topk": 40},
    "teacher's top": {"topk": 40, "topk_support": "teacher", "topk_tail": "none"},
    "clips": {"entry_clip": 0.05, "token_clip": 2.0},
    "softcap": {"student_softcap": 30.0, "teacher_softcap": 30.0},
    "temperature": {"temperature": 0.7},
    "chunks": {"workspace_bytes": 3 << 20},
    "one chunk": {"workspace_bytes": 1 << 28},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_stays_within_the_bound(backend, route, frozen, chunks):
    case = peaked(trainable=("student_hidden",) if frozen else ("student_hidden", "student_weight"))
    options = {"divergence": "forward_kl", "return_stats": True, "backend": backend, **ROUTES[route]}
    exact = evaluate(linear_divergence, case, **options)
    ours = evaluate(linear_divergence, case, **options, gradient_tolerance=TOLERANCE)
    assert any(kept is not None for _, kept in chunks), "nothing was left out: the test shows nothing"
    assert_same_bits(ours.loss, exact.loss)
    shares = [true_share(*chunk) for chunk in chunks]
    assert 0 < max(shares) <= TOLERANCE
    assert max(shares) <= ours.stats.gradient_dropped.item() <= TOLERANCE * (1 + 1e-6)
    for ours_stat, exact_stat in zip(fields_of(ours.stats), fields_of(exact.stats), strict=True):
        assert_same_bits(ours_stat, exact_stat)
    norm = math.sqrt(sum(G.norm().item() ** 2 for G, _ in chunks)) * case.upstream
    for name, other in (("student_hidden", case.student_weight), ("student_weight", case.student_hidden)):
        if getattr(ours, name) is not None:
            off = (getattr(ours, name).double() - getattr(exact, name).double()).norm()
            # Twice: the sum of what is left out times the mean row is added to dh.
            assert off <= 2 * TOLERANCE * norm * torch.linalg.matrix_norm(other.double().flatten(0, -2), 2)


def fields_of(stats) -> tuple[torch.Tensor, ...]:
    given = {name: value for name, value in vars(stats).items() if name != "gradient_dropped"}
    return tuple(value for value in given.values() if value is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_the_head_are_exact_or_left_out(backend, dtype, chunks):
    """The kept rows of dW differ from those of the exact call by rounding alone."""
    case = peaked(dtype)
    exact = evaluate(linear_divergence, case, backend=backend)
    ours = evaluate(linear_divergence, case, backend=backend, gradient_tolerance=TOLERANCE)
    ((_, kept),) = chunks
    zeroed = (ours.student_weight == 0).all(1)
    assert 0 < kept.numel() < V / 2
    assert not zeroed[kept].any() and zeroed.sum() == V - kept.numel()
    truth = evaluate(linear_divergence, case.double(), backend="torch")
    rounding = 4 * torch.finfo(dtype).eps
    assert relative_error(ours.student_weight[kept], exact.student_weight[kept].double()) <= rounding
    for name in ("student_hidden", "student_weight"):
        errors = [relative_error(getattr(outcome, name), getattr(truth, name)) for outcome in (ours, exact)]
        assert errors[0] <= errors[1] + 3 * TOLERANCE


def test_the_mean_row_takes_the_error_down(monkeypatch):
    """Rows of a real head have much in common, and what is left out has a sum."""
    case = peaked()
    truth = evaluate(linear_divergence, case.double())
    with_mean = evaluate(linear_divergence, case, gradient_tolerance=TOLERANCE)
    of = columns.ColumnFilter.of.__func__

    def without(cls, problem, backend, dropped):
        made = of(cls, problem, backend, dropped)
        return made and replace(made, mean=torch.zeros_like(made.mean))

    monkeypatch.setattr(columns.ColumnFilter, "of", classmethod(without))
    plain = evaluate(linear_divergence, case, gradient_tolerance=TOLERANCE)
    errors = [relative_error(outcome.student_hidden, truth.student_hidden) for outcome in (with_mean, plain)]
    assert errors[0] < 0.7 * errors[1]


cases = settings(
    max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@cases
@given(data=st.data())
def test_the_certified_share_is_never_below_the_true_one(data):
    """The true one is that of the computed gradient, in float64, at the columns that were left out."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    tokens, vocab = data.draw(st.integers(1, 20)) * 2, data.draw(st.integers(2, 600))
    scale = data.draw(st.floats(1.0, 25.0))
    distance = data.draw(st.sampled_from([1e-3, 0.1, 1.0]))
    case = peaked(dtype, tokens, vocab, scale, data.draw(st.integers(0, 99)), distance)
    case = replace(case, upstream=data.draw(st.sampled_from([1e-12, 1.0, 1e3])))
    options = {
        "divergence": data.draw(st.sampled_from([name for name in KIND_NAMES if name != "tvd"])),
        "gradient_tolerance": 10 ** data.draw(st.floats(-5, -0.3)),
        "reduction": data.draw(st.sampled_from(["mean", "sum"])),
        "normalizer": None,
        "workspace_bytes": 1 << 28,
    }
    with pytest.MonkeyPatch.context() as patch:
        seen, select = [], columns.ColumnFilter.select

        def recorded(self, G, scale):
            seen.append((G.double(), select(self, G, scale)))
            return seen[-1][1]

        patch.setattr(columns.ColumnFilter, "select", recorded)
        ours = evaluate(linear_divergence, case, **options, return_stats=True)
    ((computed, kept),) = seen
    share = true_share(computed, None if kept is None else kept.columns)
    certified = ours.stats.gradient_dropped.item()
    assert share <= certified <= options["gradient_tolerance"] * (1 + 1e-6)


def test_nothing_changes_without_it(backend):
    case = peaked()
    plain = evaluate(linear_divergence, case, backend=backend, return_stats=True)
    assert plain.stats.gradient_dropped is None
    zero = evaluate(linear_divergence, case, backend=backend, return_stats=True, gradient_tolerance=0.0)
    assert_same_bits(zero, plain)
    assert zero.stats.gradient_dropped == 0 and zero.stats.gradient_dropped.dim() == 0


def test_flat_distributions_take_the_exact_products(backend):
    """Where nearly all columns would be kept, all of them are."""
    case = peaked(scale=0.1)
    options = {"backend": backend, "return_stats": True}
    ours = evaluate(linear_divergence, case, gradient_tolerance=1e-3, **options)
    assert_same_bits(ours, evaluate(linear_divergence, case, **options))
    assert ours.stats.gradient_dropped == 0


def test_the_same_bits_again(backend):
    case = peaked(torch.bfloat16)
    runs = [evaluate(linear_divergence, case, backend=backend, gradient_tolerance=1e-3) for _ in range(2)]
    assert_same_bits(*runs)


def test_threads_choose_the_same_columns(chunks):
    case, threads = peaked(tokens=64, vocab=9000), torch.get_num_threads()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        evaluate(linear_divergence, case, gradient_tolerance=1e-3)
    torch.set_num_threads(threads)
    (_, first), *others = chunks
    assert first is not None and all(torch.equal(kept, first) for _, kept in others)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(spoilt):
    """Nothing may be left out of it: a NaN would vanish."""
    case = peaked()
    hidden = case.student_hidden.clone()
    hidden[0, 0, 0] = spoilt
    ours = evaluate(linear_divergence, replace(case, student_hidden=hidden), gradient_tolerance=0.1)
    assert ours.student_weight.isnan().all(1).all()


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-42])
def test_gradients_near_nothing(factor):
    """Squares that underflow are no reason to leave a column out."""
    case = peaked()
    live = case.leaves()
    loss = linear_divergence(
        *live.inputs(), token_weights=torch.full((2, N // 2), factor), gradient_tolerance=0.1
    )
    exact = linear_divergence(*case.leaves().inputs(), token_weights=torch.full((2, N // 2), factor))
    assert loss == exact
    loss.backward()
    assert live.student_weight.grad.isfinite().all()


def test_listed_teachers_and_policy_terms(backend):
    case = peaked()
    gen = torch.Generator().manual_seed(1)
    ids = torch.rand(2, N // 2, 50, generator=gen).argsort(-1)[..., :8]
    logprobs = torch.linspace(-1, -4, 8).expand(2, N // 2, 8)
    mixed = {
        "policy": objectives.PolicyGradient(torch.ones(2, 1)),
        "policy_weight": 0.5,
        "labels": case.labels,
    }
    for op, inputs, options in (
        (linear_topk_divergence, (*case.inputs()[:2], ids, logprobs), {}),
        (objectives.linear_policy_divergence, case.inputs(), mixed),
    ):
        grads = {}
        for tolerance in (None, TOLERANCE):
            leaves = [x.clone().requires_grad_() for x in inputs[:2]]
            loss, stats = op(
                *leaves,
                *inputs[2:],
                **options,
                backend=backend,
                gradient_tolerance=tolerance,
                return_stats=True,
            )
            loss.backward()
            grads[tolerance] = [leaf.grad for leaf in leaves]
        assert 0 < stats.gradient_dropped <= TOLERANCE
        for ours, exact in zip(grads[TOLERANCE], grads[None], strict=True):
            assert relative_error(ours, exact.double()) <= 3 * TOLERANCE


def test_recompute_reports_the_bound():
    case = peaked()
    options = {"backward": "recompute", "return_stats": True}
    ours = evaluate(linear_divergence, case, gradient_tolerance=0.02, **options)
    assert ours.stats.gradient_dropped.item() == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan, math.inf])
def test_a_share_outside_its_range(bad):
    with pytest.raises(ValueError, match="gradient_tolerance: expected (None or a share|a finite number)"):
        linear_divergence(*peaked().inputs(), gradient_tolerance=bad)


@pytest.mark.parametrize("bad", ["1e-3", torch.tensor(0.1), True])
def test_no_number(bad):
    with pytest.raises(TypeError, match="gradient_tolerance: expected"):
        linear_divergence(*peaked().inputs(), gradient_tolerance=bad)


def test_the_plan_has_room_for_the_choice():
    exact = plan(4096, 151936, 2048, workspace_bytes=1 << 28)
    ours = plan(4096, 151936, 2048, workspace_bytes=1 << 28, gradient_tolerance=1e-3)
    assert ours.scratch_bytes > exact.scratch_bytes and ours.rows <= exact.rows
