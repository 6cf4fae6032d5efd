"""The pretraining objectives, one file each, whose import registers its objective, and what they share."""

from arm_zoo.pretraining import autoregressive as autoregressive
from arm_zoo.pretraining import mae as mae
from arm_zoo.pretraining import moco as moco
from arm_zoo.pretraining._registry import DEFAULT_OBJECTIVE as DEFAULT_OBJECTIVE
from arm_zoo.pretraining._registry import OBJECTIVES as OBJECTIVES
from arm_zoo.pretraining._registry import PretrainingModel as PretrainingModel
