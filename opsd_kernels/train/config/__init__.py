"""The settings of a run. The public names are `TrainConfig`, `load_config` and `ConfigError`."""

from opsd_kernels.train.config.settings import TrainConfig, load_config
from opsd_kernels.train.config.values import ConfigError

__all__ = ["ConfigError", "TrainConfig", "load_config"]
