"""The tests of the public ops in tests/unit on the device: against float64, near teachers, weights, objectives, log-probs, backward twice, equal bits."""

import placing

# By file, the tests left to test_pytorch_on_gpu.py, or that make their modules or inputs themselves.
WITHOUT = {
    "test_op": "compile",
    "test_near_teacher": "compile",
    "test_weighted": "compile",
    "test_siblings": "compile|module|distillation_head|no_tokens",
    "test_objectives": "compile",
    "test_autograd": "compile|autocast|opcheck",
}
for _name, _but in WITHOUT.items():
    globals().update(placing.adopt(placing.unit(_name), _but))
