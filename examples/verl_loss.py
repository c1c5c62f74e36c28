"""Compute verl's forward_kl_topk loss from hidden states, for a teacher that lists its 16 likeliest tokens.

    python examples/verl_loss.py

The micro-batch is packed, with sequences of different lengths. Takes seconds on a CPU.
"""

from types import SimpleNamespace

import torch

from opsd_kernels.integrations.verl import distillation_loss

V, H, K = 2000, 64, 16
PROMPTS, RESPONSES = torch.tensor([5, 3, 8, 4]), torch.tensor([20, 31, 12, 26])
torch.manual_seed(0)


def nested(packed: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(
        packed, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    )


whole = PROMPTS + RESPONSES
# Stands for the trunk's output.
states = torch.randn(int(whole.sum()), H)
# The response of a teacher's server, one row per token.
log_probs, ids = (states @ torch.randn(H, V) / 4).log_softmax(-1).topk(K)
trunk, lm_head = torch.nn.Linear(H, H), torch.nn.Linear(H, V, bias=False)

data = {
    "prompts": nested(torch.zeros(int(PROMPTS.sum())), PROMPTS),
    "responses": nested(torch.zeros(int(RESPONSES.sum())), RESPONSES),
    "response_mask": nested(torch.ones(int(RESPONSES.sum()), dtype=torch.bool), RESPONSES),
    "teacher_ids": nested(ids, whole),
    "teacher_logprobs": nested(log_probs, whole),
    "dp_size": 1,
    "batch_num_tokens": int(RESPONSES.sum()),
    "global_batch_size": len(RESPONSES),
}
config = SimpleNamespace(loss_agg_mode="seq-mean-token-mean", loss_scale_factor=None)
settings = SimpleNamespace(
    loss_mode="forward_kl_topk", loss_max_clamp=10.0, log_prob_min_clamp=-10.0, use_policy_gradient=False
)

optimizer = torch.optim.Adam([*trunk.parameters(), *lm_head.parameters()], lr=1e-2)
for step in range(31):
    model_output = {"hidden_states": nested(trunk(states), whole), "lm_head_weight": lm_head.weight}
    loss, metrics = distillation_loss(config, SimpleNamespace(distillation_loss=settings), model_output, data)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        masses = [metrics[f"distillation/{side}_mass"].item() for side in ("student", "teacher")]
        listed = f"mass on the list: student {masses[0]:.3f}, teacher {masses[1]:.3f}"
        print(f"step {step:2}  loss {loss.item():.4f}  {listed}")
