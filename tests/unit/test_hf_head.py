"""Trunk and head of transformers models give the model's logits, or are refused."""

import pytest
import torch

from opsd_kernels.integrations.transformers import Head, check_head, on_heads

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
