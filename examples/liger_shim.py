"""Run Liger's chunked JSD loss on the fused op: a narrow student learns a wider teacher's distribution.

    python examples/liger_shim.py

Takes seconds on a CPU.
"""

import torch

# Instead of: from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from opsd_kernels.integrations.liger import LigerFusedLinearJSDLoss

B, T, V, H_STUDENT, H_TEACHER = 8, 32, 500, 64, 96
torch.manual_seed(0)
# Stands for the trunks: the teacher's hidden states are the embeddings, the student's a projection of them.
embedding = torch.nn.Embedding(V, H_TEACHER)
teacher_head = torch.randn(V, H_TEACHER) / H_TEACHER**0.5
narrow, student_head = torch.nn.Linear(H_TEACHER, H_STUDENT), torch.nn.Linear(H_STUDENT, V, bias=False)

loss_of = LigerFusedLinearJSDLoss(
    weight_hard_loss=0.1, weight_soft_loss=0.9, beta=0.5, return_soft_hard_loss=True
)
optimizer = torch.optim.Adam([*narrow.parameters(), *student_head.parameters()], lr=1e-2)
for step in range(61):
    tokens = torch.randint(V, (B, T + 1))
    hidden = 3 * embedding(tokens[:, :-1]).detach()
    sampled = (hidden @ teacher_head.T).softmax(-1).flatten(0, 1).multinomial(1).view(B, T)
    # The last four positions are padding.
    labels = sampled.masked_fill(torch.arange(T) >= T - 4, -100)
    loss, soft, hard = loss_of(narrow(hidden), student_head.weight, hidden, teacher_head, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        parts = f"divergence {soft.item():.4f}  cross-entropy {hard.item():.3f}"
        print(f"step {step:2}  loss {loss.item():.4f}  {parts}")
