"""Everything that decides a run: typed settings, read from presets, YAML files and the command line."""

from star_trainer.config.errors import ConfigError as ConfigError
from star_trainer.config.errors import TrainerError as TrainerError
from star_trainer.config.loading import check_section as check_section
from star_trainer.config.loading import describe_keys as describe_keys
from star_trainer.config.loading import has_keys as has_keys
from star_trainer.config.loading import load_config as load_config
from star_trainer.config.loading import preset_names as preset_names
from star_trainer.config.loading import read_section as read_section
from star_trainer.config.loading import with_implied as with_implied
from star_trainer.config.settings import REWARD_GRADIENT_METHODS as REWARD_GRADIENT_METHODS
from star_trainer.config.settings import Allocation as Allocation
from star_trainer.config.settings import Config as Config
from star_trainer.config.settings import Judge as Judge
from star_trainer.config.settings import Lora as Lora
from star_trainer.config.settings import Method as Method
from star_trainer.config.settings import Model as Model
from star_trainer.config.settings import Prompts as Prompts
from star_trainer.config.settings import RemoteReward as RemoteReward
from star_trainer.config.settings import Reward as Reward
from star_trainer.config.settings import RolloutConfig as RolloutConfig
from star_trainer.config.settings import SdeWindow as SdeWindow
from star_trainer.config.settings import Section as Section
from star_trainer.config.settings import Units as Units
