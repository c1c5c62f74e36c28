"""What ranks import, once for all of them."""

import transformers
from transformers import Qwen3ForCausalLM  # noqa: F401 - imported late otherwise, in each rank

import opsd_kernels.train.loop  # noqa: F401

transformers.utils.logging.disable_progress_bar()
