"""`distillation_loss` between two models: alignment, padding, offloaded and quantised heads, routers."""

import pytest
import torch

from opsd_kernels import DistillationHead, QuantizedHead
from opsd_kernels.integrations.transformers import Head, check_head, checks, distillation_loss, hidden_states
from opsd_kernels.testing import assert_no_worse, assert_same_bits, relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

V, RIGHT = 64, 1e-4
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
         "initializer_range": 0.3}  # fmt: skip


def made(config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama(seed=0, **options):
    return made(transformers.LlamaConfig(**{**SHAPE, **options}), seed)


def tokens(rows, length, seed=0):
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(token_ids):
    return {"input_ids": token_ids}, {"input_ids": token_ids}, token_ids


def kl(student, teacher):
    """Return KL(student || teacher) per row of logits."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def left_padded(prompts, completions):
    """Join prompts and completions of one length; shorter prompts are padded on the left."""
    longest = max(len(prompt) for prompt in prompts) + completions.shape[1]
    rows = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, completions, strict=True)]
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("config", [
    transformers.LlamaConfig(**SHAPE),
    # Counts positions from the first column, padding or not.
    transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
], ids=["llama", "gpt2"])  # fmt: skip
def test_prompts_of_different_lengths(config):
    student, teacher, answers = made(config), made(config, 1), tokens(3, 4)
    plain = [tokens(1, n, n)[0] for n in (2, 5, 3)]
    hinted = [tokens(1, n, n)[0] for n in (9, 6, 7)]
    labels = answers.clone()
    labels[1, 2:] = -100
    loss, stats = distillation_loss(
        student, teacher, left_padded(plain, answers), left_padded(hinted, answers), labels, return_stats=True
    )
    expected = torch.zeros(3, 4)
    for row, answer in enumerate(answers):
        one, other = (
            model(torch.cat([prompts[row], answer])[None]).logits[0, -5:-1]
            for model, prompts in ((student, plain), (teacher, hinted))
        )
        expected[row] = kl(one, other) * (labels[row] != -100)
    assert relative_error(stats.divergence, expected) < RIGHT
    assert relative_error(loss, expected.sum() / 10) < RIGHT


def test_whole_rows_as_labels():
    """With labels as long as the inputs the first has no row before it."""
    student, teacher, ids = llama(), llama(1), tokens(2, 6)
    loss = distillation_loss(student, teacher, *same(ids))
    expected = kl(student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]).mean()
    assert relative_error(loss, expected) < RIGHT


def test_labels_that_are_not_at_the_end_are_refused():
    student, ids = llama(), tokens(2, 6)
    for labels in (ids.roll(1, 1), ids[:, :3], ids[:1]):
        with pytest.raises(ValueError, match="^labels: expected "):
            distillation_loss(student, student, {"input_ids": ids}, {"input_ids": ids}, labels)


def test_rounding_of_autocast_is_not_taken_for_padding_that_is_read(monkeypatch):
    """Products of another shape round otherwise on some processors, here by 1 %."""
    hidden_states = checks.hidden_states

    def rounded(model, input_ids, **options):
        states = hidden_states(model, input_ids=input_ids, **options)
        return states if input_ids.shape[1] % 2 else states * 1.01

    monkeypatch.setattr(checks, "hidden_states", rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert checks.check_padding(llama()) == checks.IGNORED
    with pytest.raises(ValueError, match="^model: expected a model that leaves out masked tokens"):
        checks.check_padding(llama())


def test_a_recurrent_model_that_reads_padding_is_refused():
    config = transformers.RwkvConfig(
        vocab_size=V, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=32
    )
    student, answers = made(config), tokens(2, 4)
    of_one_length = left_padded([tokens(1, 3, n)[0] for n in (0, 1)], answers)
    assert distillation_loss(student, student, of_one_length, of_one_length, answers) == 0
    inputs = left_padded([tokens(1, n)[0] for n in (2, 5)], answers)
    with pytest.raises(ValueError, match="^teacher: expected a model that leaves out masked tokens.*Rwkv"):
        distillation_loss(student, student, inputs, inputs, answers)


def test_the_teacher_does_not_drop_out():
    """The teacher may be the student in training mode, whose own mode stays."""
    student, ids = llama(attention_dropout=0.5), tokens(2, 6)
    student.train().model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    seen = []
    hook = student.model.norm.register_forward_hook(lambda _, __, states: seen.append(states.detach()))
    for _ in range(2):
        distillation_loss(student, student, *same(ids))
    hook.remove()
    assert_same_bits(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3]) and [module.training for module in student.modules()] == modes


OFFLOADED = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "map": lambda model, folder: accelerate.dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
         "lm_head": "disk"},
        main_device="cpu", offload_dir=folder, force_hooks=True,
    ),
    "whole": lambda model, folder: accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0],
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", OFFLOADED)
def test_weights_that_accelerate_offloaded(how, tied, tmp_path):
    student, (ids, _, _) = llama(), same(tokens(2, 6))
    loss = distillation_loss(student, llama(1, tie_word_embeddings=tied), *same(ids["input_ids"]))
    teacher = llama(1, tie_word_embeddings=tied)
    teacher = OFFLOADED[how](teacher, tmp_path) or teacher
    for _ in range(2):
        check_head(teacher, "teacher")
        assert_same_bits(distillation_loss(student, teacher, *same(ids["input_ids"])), loss)
    assert how == "whole" or teacher.lm_head.weight.is_meta
    if how != "whole":
        with pytest.raises(ValueError, match="^student: expected trainable weights on a device"):
            distillation_loss(teacher, student, *same(ids["input_ids"]))


def test_a_meta_model_without_values_is_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="^model: expected a head with values.*LlamaForCausalLM.*meta"):
        check_head(model)


class Packed(torch.Tensor):
    """Stands for the tensor subclasses of quantisation libraries."""


def quantised(how):
    model = llama().bfloat16().requires_grad_(False)
    head = model.lm_head
    if how == "torchao":
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "lm_head")
    elif how == "subclass":
        head.weight = torch.nn.Parameter(head.weight.as_subclass(Packed), requires_grad=False)
    elif how == "float8":
        head.weight = torch.nn.Parameter(head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    else:
        head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize("how, told", [("subclass", "Packed"), ("float8", "float8"), ("int8", "int8")])
def test_a_quantised_head_is_refused(how, told):
    model = quantised(how)
    with pytest.raises(ValueError, match=f"^teacher: expected a head that is not quantised.*Llama.*({told})"):
        check_head(model, "teacher")


def scaled_float8(model, name, blocks):
    """Quantise the head as the FP8 layers of transformers hold it."""
    head, (rows, columns) = model.lm_head, (16, 8) if blocks else (1, model.lm_head.in_features)
    V, H = head.weight.shape
    largest = head.weight.abs().float().view(V // rows, rows, H // columns, columns).amax((1, 3))
    scales = largest / 448
    entries = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    head.weight = torch.nn.Parameter((head.weight / entries).to(torch.float8_e4m3fn), requires_grad=False)
    setattr(head, name, torch.nn.Parameter(scales, requires_grad=False))
    head.block_size = (rows, columns) if blocks else None
    return model


@pytest.mark.parametrize("name, blocks", [("weight_scale_inv", True), ("weight_scale", False)])
def test_a_float8_head_with_scales_is_read(name, blocks):
    teacher, dense = (llama(1).requires_grad_(False) for _ in range(2))
    head = Head.of(scaled_float8(teacher, name, blocks))
    assert isinstance(head.weight, QuantizedHead)
    dense.lm_head.weight = torch.nn.Parameter(head.weight.dequantize(), requires_grad=False)
    student, ids = llama(2), tokens(2, 6)
    losses = [distillation_loss(student, model, *same(ids)) for model in (teacher, dense)]
    assert relative_error(losses[0], losses[1]) < RIGHT
    own = DistillationHead(teacher.lm_head)
    h, t = torch.randn(5, head.weight.shape[1], requires_grad=True), torch.randn(5, head.weight.shape[1])
    loss, other = own(h, t), DistillationHead(dense.lm_head)(h, t)
    assert relative_error(loss, other) < RIGHT


def test_a_head_of_torchao_is_read():
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = quantised("torchao")
    check_head(model)
    assert isinstance(Head.of(model).weight, QuantizedHead)


def mixtral(seed=0, **options):
    return made(
        transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, **options), seed
    )


def test_the_routers_loss_is_the_models_own():
    ids = tokens(2, 6)
    student, teacher = mixtral(output_router_logits=True, router_aux_loss_coef=10.0), mixtral(1)
    loss, _ = distillation_loss(student, teacher, *same(ids), return_stats=True)
    own = student(ids, labels=ids)
    kept = own.loss - transformers.loss.loss_utils.ForCausalLMLoss(own.logits, ids, V)
    without = distillation_loss(mixtral(), teacher, *same(ids))
    assert kept > 1 and relative_error(loss - without, kept) < RIGHT
    with pytest.raises(ValueError, match="^reduction: expected one that gives a single loss.*'none'"):
        distillation_loss(student, teacher, *same(ids), reduction="none")


def test_no_logits_are_made():
    model, sizes = llama(vocab_size=4096), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(o))
            return out

    with Watch():
        hidden = hidden_states(model, input_ids=tokens(2, 6))
    head = Head.of(model)
    assert hidden.shape == (2, 6, 32) and max(sizes) < 12 * 4096 and head.weight is model.lm_head.weight
    assert model(tokens(2, 6)).logits.shape == (2, 6, 4096)


def test_the_head_is_put_back_after_an_error():
    model = llama()
    head = model.lm_head
    with pytest.raises(ValueError, match="specify exactly one"):
        hidden_states(model)
    assert model.lm_head is head


def test_an_encoder_or_a_bare_trunk_is_refused():
    for model in (llama().model, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match="^model: expected a causal language model with one output embedding"
        ):
            hidden_states(model, input_ids=tokens(1, 3))


def test_a_head_in_fp32_over_a_bf16_trunk():
    """Frameworks keep the head in fp32 and cast what enters it, with a hook of the head."""
    models = [llama(seed, tie_word_embeddings=False).bfloat16() for seed in (0, 1)]
    for model in models:
        model.lm_head.float()
        model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        check_head(model)
    ids = tokens(2, 6)
    loss = distillation_loss(*models, *same(ids), reduction="none")
    student, teacher = (model(ids).logits[:, :-1] for model in models)
    assert student.dtype == torch.float32
    assert_no_worse(
        loss.detach(), kl(student, teacher).detach(), kl(student.double(), teacher.double()).detach()
    )
    loss.sum().backward()
    assert models[0].model.layers[0].mlp.up_proj.weight.grad.dtype == torch.bfloat16
