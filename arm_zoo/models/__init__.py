"""The families of backbones, a file each; one that is imported here is registered."""

from arm_zoo.models import arm as arm
from arm_zoo.models import vim as vim
from arm_zoo.models import vmamba as vmamba
