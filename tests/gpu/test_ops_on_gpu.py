"""The public ops' tests of tests/unit, on the device."""

import placing

# By file, a pattern of tests to leave out: test_pytorch_on_gpu.py has them, or they make their own modules or
# inputs.
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
