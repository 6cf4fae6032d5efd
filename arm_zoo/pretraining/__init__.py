"""The pretraining objectives, one file each; importing a file registers its objective."""

from arm_zoo.pretraining import autoregressive as autoregressive
from arm_zoo.pretraining import mae as mae
from arm_zoo.pretraining import moco as moco
