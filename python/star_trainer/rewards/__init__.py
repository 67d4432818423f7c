"""Rewards by name: functions from images and prompts to numbers, and their weighted sum."""

from star_trainer.rewards.combine import WeightedSum as WeightedSum
from star_trainer.rewards.combine import counted as counted
from star_trainer.rewards.combine import open_gates as open_gates
from star_trainer.rewards.combine import sum_of as sum_of
from star_trainer.rewards.combine import weighted_sum as weighted_sum
from star_trainer.rewards.errors import RewardError as RewardError
from star_trainer.rewards.named import CONVERTED as CONVERTED
from star_trainer.rewards.named import Models as Models
from star_trainer.rewards.named import RewardFunction as RewardFunction
from star_trainer.rewards.terms import GENEVAL as GENEVAL
from star_trainer.rewards.terms import DifferentiableReward as DifferentiableReward
from star_trainer.rewards.terms import HeldOutScorer as HeldOutScorer
from star_trainer.rewards.terms import NotDifferentiable as NotDifferentiable
from star_trainer.rewards.terms import check_differentiable as check_differentiable
from star_trainer.rewards.terms import check_prompts as check_prompts
from star_trainer.rewards.terms import check_reward as check_reward
from star_trainer.rewards.terms import differentiable_terms as differentiable_terms
from star_trainer.rewards.terms import held_out_scorer as held_out_scorer
from star_trainer.rewards.terms import held_out_terms as held_out_terms
from star_trainer.rewards.terms import load_reward as load_reward
from star_trainer.rewards.terms import load_terms as load_terms
