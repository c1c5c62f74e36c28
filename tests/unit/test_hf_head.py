"""Trunk and head of transformers models give the model's logits, or are refused."""

import pytest
import torch

from opsd_kernels import DistillationHead
from opsd_kernels.integrations.transformers import Head, check_head, on_heads
from opsd_kernels.testing import assert_no_worse

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

V = 64
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None,
         "eos_token_id": 1, "initializer_range": 0.5}  # fmt: skip
HEADS = {
    "Llama": {},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},
    "Phi": {},
    "RecurrentGemma": {"logits_soft_cap": 0.7, "lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},
}


def tiny(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**{**SHAPE, **HEADS[kind]})
        )


@pytest.mark.parametrize("kind", HEADS)
def test_head_and_hidden_states_give_the_logits(kind):
    model = tiny(kind).train()
    if kind == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    check_head(model)
    assert model.training


PLAIN = {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}


def adapted(kind="Llama", **options):
    """Return a peft model with LoRA on its head, and the inner model. Its B is not zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(tiny(kind), peft.LoraConfig(**{**PLAIN, **options}))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "Cohere"])
def test_a_head_with_lora_gives_the_logits(kind):
    """Alone, and beside embeddings that share its weight (Qwen3)."""
    model = adapted(kind)
    check_head(model)
    head, layer = Head.of(model), model.get_base_model().get_output_embeddings()
    assert head.lora[0] is layer.lora_A["default"].weight and head.weight is layer.base_layer.weight
    assert "student_lora" in head.options("student")
    with model.disable_adapter():
        assert Head.of(model).lora is None
        check_head(model)


def test_several_adapters_of_a_head_add_up():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(**{**PLAIN, "r": 3, "lora_alpha": 1}))
    assert Head.of(model).lora[0].shape[0] == 2
    model.base_model.set_adapter(["default", "other"])
    assert Head.of(model).lora[0].shape[0] == 5
    check_head(model)
    model.merge_adapter()
    assert Head.of(model).lora is None
    check_head(model)


@pytest.mark.parametrize(
    "options, scaling",
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True, "r": 4}, 3.0),
        ({"alpha_pattern": {"lm_head": 7}, "rank_pattern": {"lm_head": 3}}, 7 / 3),
    ],
    ids=["alpha", "rank-stabilised", "patterns"],
)
def test_the_scaling_is_peft_s(options, scaling):
    model = adapted(**options)
    assert Head.of(model).lora[2] == pytest.approx(scaling)
    check_head(model)
    model.get_base_model().get_output_embeddings().set_scale("default", 2)  # times alpha / r
    assert Head.of(model).lora[2] == pytest.approx(2 * scaling)
    check_head(model)


@pytest.mark.parametrize(
    "names", [["default"], ["other"], ["default", "other"], ["other", "default"]], ids=str
)
def test_a_module_trains_all_active_adapters_of_its_head(names):
    """Value and gradients of peft's own parameters are those of the model's logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(lora_alpha=6)
    model.add_adapter("other", peft.LoraConfig(**{**PLAIN, "r": 3, "lora_alpha": 1, "use_rslora": True}))
    model.base_model.set_adapter(names)
    layer = model.get_base_model().get_output_embeddings()
    h = torch.randn(9, SHAPE["hidden_size"], requires_grad=True)
    t = torch.randn(9, SHAPE["hidden_size"])
    active = [x[name].weight for x in (layer.lora_A, layer.lora_B) for name in names]
    with model.disable_adapter():
        of_teacher = layer(t).detach().log_softmax(-1)
    of_student = layer(h).log_softmax(-1)
    plain = (of_student.exp() * (of_student - of_teacher)).sum(-1).mean()
    # The self-teacher is the base model: its head is the layer below the adapters.
    loss = DistillationHead(layer)(h, t, layer.base_layer)
    assert_no_worse(loss, plain, plain)
    found, expected = (torch.autograd.grad(x, [h, *active]) for x in (loss, plain))
    for ours, exact in zip(found, expected, strict=True):
        assert_no_worse(ours, exact, exact)
    with model.disable_adapter():  # both sides are the base then
        bare = DistillationHead(layer)(h, t)
    assert torch.equal(bare, DistillationHead(layer.base_layer)(h, t)) and bare != loss


def test_errors_name_the_head_of_the_side():
    layer = adapted(lora_dropout=0.1).train().get_base_model().get_output_embeddings()
    h, expected = torch.randn(9, SHAPE["hidden_size"]), r"expected an adapter without dropout"
    with pytest.raises(ValueError, match=f"^lm_head: {expected}"):
        DistillationHead(layer)
    with pytest.raises(ValueError, match=f"^teacher_head: {expected}"):
        DistillationHead(layer.base_layer)(h, h, layer)


def test_another_adapter_method_is_refused_by_name():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for config in (
        peft.AdaLoraConfig(init_r=2, target_r=1, target_modules=["lm_head"], total_step=9, tinit=1, tfinal=1),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(tiny("Llama"), config)
        with pytest.raises(ValueError, match=r"^model: expected a linear layer, .*LoRA, got peft\.tuners\."):
            Head.of(model)


def test_a_head_that_peft_trains_whole():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    trained.data += 0.1
    assert Head.of(model).weight is trained
    check_head(model)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"use_dora": True}, "a plain LoRA on the head, got the adapter 'default'"),
        ({"lora_bias": True}, "an adapter without a bias"),
        ({"lora_dropout": 0.1}, "without dropout"),
    ],
)
def test_an_adapter_that_is_more_than_two_matrices_is_refused(options, match):
    model = adapted(**options).train()
    with pytest.raises(ValueError, match=f"^model: expected .*{match}"):
        Head.of(model)
    if "lora_dropout" in options:
        assert Head.of(model.eval()).lora is not None


def bert(**options):
    shape = {name: value for name, value in SHAPE.items() if "key_value" not in name}
    return transformers.BertLMHeadModel(transformers.BertConfig(**shape, **options)).eval()


def test_a_head_that_is_not_read_right_is_refused():
    cohere = tiny("Cohere")
    cohere.logit_scale = 0.5  # unlike its config
    with pytest.raises(
        ValueError,
        match="^teacher_model: expected logits that are a linear head over hidden .*Cohere.*off by",
    ):
        check_head(cohere, "teacher_model")
    # A softcap of 30 hardly bends logits of the size that random weights give.
    llama = tiny("Llama")
    llama.lm_head.weight.data *= 1e-3
    llama.lm_head.register_forward_hook(lambda _, __, logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(ValueError, match="^model: .*Llama.*scaled up"):
        check_head(llama)


def test_a_head_with_a_parameter_that_would_not_train_is_refused():
    llama = tiny("Llama")
    llama.lm_head.register_parameter("logit_scale", torch.nn.Parameter(torch.ones(SHAPE["vocab_size"])))
    with pytest.raises(ValueError, match="^model: .*weight and a bias alone, got Llama.*has logit_scale too"):
        check_head(llama)


def test_a_layer_between_trunk_and_head_belongs_to_the_hidden_states():
    check_head(bert(is_decoder=True))


def test_a_model_that_reads_later_tokens_is_refused():
    with pytest.raises(ValueError, match="^model: expected a causal language model.*is_decoder.*BertLMHead"):
        check_head(bert(is_decoder=False))


def test_sides_are_named_as_the_arguments_are():
    head, hidden = Head(torch.ones(3, 2), torch.zeros(3), 0.5, None), torch.ones(1, 2)
    got = on_heads(
        lambda *operands, **options: (operands, options),
        {"student": (hidden, head), "teacher": (hidden, head)},
        teacher_softcap=4.0,
        mask=None,
    )
    assert len(got[0]) == 4 and got[1] == {
        "student_bias": head.bias, "student_logit_scale": 0.5, "student_softcap": None,
        "teacher_bias": head.bias, "teacher_logit_scale": 0.5, "teacher_softcap": 4.0, "mask": None,
    }  # fmt: skip
    assert on_heads(lambda *operands, **options: sorted(options), {"": (hidden, head)}) == [
        "bias",
        "logit_scale",
        "softcap",
    ]
