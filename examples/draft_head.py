"""Train the draft head of speculative decoding against its target, on options that the op has.

    python examples/draft_head.py

A draft of one linear layer reads the target's hidden state of a token and predicts the target's next
distributions, each step from its own last state (as EAGLE and MTP heads do). Its vocabulary is the `V_DRAFT`
tokens that the target samples most often: `student_vocab_ids` restricts the target to them and normalises the
rest, and leaves out the tokens whose label is another one, as EAGLE-3 does. The loss is the total variation,
whose complement is the rate at which drafts are accepted by the restricted target, with a cross-entropy on
the target's own samples; later steps weigh less. Takes seconds on a CPU.
"""

import torch

from opsd_kernels import linear_divergence
from opsd_kernels.objectives import PolicyGradient, linear_policy_divergence

V_TARGET, V_DRAFT, H, STEPS, DECAY = 400, 160, 48, 3, 0.8
torch.manual_seed(0)
# Stands for the target: its next state is a function of its state and of the token that it samples.
target_head = torch.randn(V_TARGET, H) / 2
# Frequent and rare tokens, in no order
target_bias = -torch.linspace(0, 6, V_TARGET)[torch.randperm(V_TARGET)]
recur, embed = torch.randn(H, H) / H**0.5, torch.randn(V_TARGET, H) / 2

draft = torch.nn.ModuleList([torch.nn.Linear(2 * H, H), torch.nn.Linear(H, V_DRAFT)])
optimizer = torch.optim.Adam(draft.parameters(), lr=5e-3)


@torch.no_grad()
def rollout(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target's states (count, STEPS + 1, H), and the tokens (count, STEPS + 1) that it samples."""
    states, tokens = [torch.randn(count, H)], []
    for _ in range(STEPS + 1):
        logits = states[-1] @ target_head.T + target_bias
        tokens.append(logits.softmax(-1).multinomial(1)[:, 0])
        states.append(torch.tanh(states[-1] @ recur + embed[tokens[-1]]))
    return torch.stack(states[:-1], 1), torch.stack(tokens, 1)


counts = rollout(4096)[1].flatten().bincount(minlength=V_TARGET)
ids = counts.topk(V_DRAFT).indices.sort().values  # row j of the draft's head is the target's token ids[j]
options = {"student_bias": draft[1].bias, "teacher_bias": target_bias, "student_vocab_ids": ids}
print(f"{V_DRAFT} of {V_TARGET} tokens make {counts[ids].sum() / counts.sum():.0%} of the samples")


def loss_of(heads: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return 0.9 total variation + 0.1 cross-entropy, of the tokens (N, STEPS) that the draft knows.

    Weights by step, not by the place among the known tokens as a scheme of `opsd_kernels.weights`.
    """
    decay = (DECAY ** torch.arange(STEPS)).expand(labels.shape)
    return linear_policy_divergence(
        *heads,
        divergence="tvd",
        labels=labels,
        token_weights=decay,
        policy=PolicyGradient(decay),
        policy_weight=0.1,
        **options,
    )


for step in range(151):
    states, tokens = rollout(192)
    hidden, drafted = states[:, 0], []
    for at in range(STEPS):
        hidden = torch.tanh(draft[0](torch.cat([hidden, embed[tokens[:, at]]], -1)))
        drafted.append(hidden)
    # The draft's states, and the target's, that predict the tokens 1 to STEPS.
    heads = (torch.stack(drafted, 1), draft[1].weight, states[:, 1:], target_head)
    loss = loss_of(heads, tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        with torch.no_grad():
            distance = linear_divergence(*heads, divergence="tvd", reduction="none", **options)
        rates = ", ".join(f"{rate:.2f}" for rate in (1 - distance.mean(0)).tolist())
        print(f"step {step:3}  loss {loss.item():.3f}  acceptance by position {rates}")
