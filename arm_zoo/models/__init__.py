"""The families of backbones, one file each; importing a file registers its models with timm."""

from arm_zoo.models import arm as arm
from arm_zoo.models import vim as vim
from arm_zoo.models import vmamba as vmamba
