"""The pretraining objectives, a file each; one that is imported here is registered."""

from arm_zoo.pretraining import autoregressive as autoregressive
from arm_zoo.pretraining import mae as mae
from arm_zoo.pretraining import moco as moco
