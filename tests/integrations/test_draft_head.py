"""examples/draft_head.py: the draft learns, and its loss is what the example says."""

import re
import runpy
from pathlib import Path

import torch
import torch.nn.functional as F

from opsd_kernels.testing import assert_one_rounding

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_example_runs(capsys):
    with torch.random.fork_rng():
        session = runpy.run_path(str(ROOT / "examples" / "draft_head.py"), run_name="__main__")
    rates = re.findall(r"position (\S+), (\S+), (\S+)", capsys.readouterr().out)
    first, *_, last = ([float(rate) for rate in line] for line in rates)
    assert all(after > before + 0.15 for before, after in zip(first, last, strict=True))
    # The loss and the rates on the last step's states, from dense logits in float64.
    heads, labels, ids = session["heads"], session["tokens"][:, 1:], session["ids"]
    hidden, head, states, target = (x.detach().double() for x in heads)
    options, known = session["options"], torch.isin(labels, ids)
    log_q = (hidden @ head.T + options["student_bias"].detach()).log_softmax(-1)
    log_p = (states @ target.T + options["teacher_bias"])[..., ids].log_softmax(-1)
    distance = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    assert 0 < known.sum() < known.numel()
    own = torch.searchsorted(ids, labels.contiguous()).where(known, -100)
    entropy = F.cross_entropy(log_q.transpose(1, 2), own, reduction="none")
    per_token = session["DECAY"] ** torch.arange(3) * (0.9 * distance + 0.1 * entropy)
    loss = session["loss_of"](heads, labels).detach()
    assert_one_rounding(session["distance"], distance, torch.float32)
    assert_one_rounding(loss, per_token[known].mean(), torch.float32, magnitude=1.0)
